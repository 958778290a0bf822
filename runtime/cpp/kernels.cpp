// llama::update_cache and llama::custom_sdpa for ExecuTorch, without libtorch: the wheel has them only in a library that
// needs it. Batch of one, float32, caches [1, C, K, d] as gori's exporter writes them.
//
// Attention of S new tokens over everything before them (1706.03762, equation 1), causal: query head h reads key head
// h / (H / K). Two passes over the keys for each query and head: scores and their largest, then the weighted values.

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"

namespace gori {
namespace {

using executorch::aten::optional;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::KernelRuntimeContext;

thread_local std::vector<Cache>* watcher = nullptr;
thread_local std::vector<float> scores;

// eight lanes of float: GCC and Clang turn them into what the target has (AVX2, NEON, or plain code)
typedef float Lanes __attribute__((vector_size(32), aligned(4)));
constexpr size_t kLanes = 8;

float dot(const float* a, const float* b, size_t d) {
  Lanes sum0 = {}, sum1 = {};
  size_t i = 0;
  for (; i + 2 * kLanes <= d; i += 2 * kLanes) {
    sum0 += *reinterpret_cast<const Lanes*>(a + i) * *reinterpret_cast<const Lanes*>(b + i);
    sum1 += *reinterpret_cast<const Lanes*>(a + i + kLanes) * *reinterpret_cast<const Lanes*>(b + i + kLanes);
  }
  sum0 += sum1;
  float sum = 0;
  for (size_t lane = 0; lane < kLanes; ++lane) sum += sum0[lane];
  for (; i < d; ++i) sum += a[i] * b[i];
  return sum;
}

void add_scaled(float* y, const float* x, float weight, size_t d) {
  size_t i = 0;
  for (; i + kLanes <= d; i += kLanes)
    *reinterpret_cast<Lanes*>(y + i) += *reinterpret_cast<const Lanes*>(x + i) * weight;
  for (; i < d; ++i) y[i] += x[i] * weight;
}

// One query of one head over `count` keys that lie `stride` floats apart.
void attend(const float* q, const float* keys, const float* values, size_t count, size_t stride, size_t d, float scale, float* y) {
  float largest = -std::numeric_limits<float>::infinity();
  for (size_t j = 0; j < count; ++j) {
    scores[j] = dot(q, keys + j * stride, d) * scale;
    largest = std::max(largest, scores[j]);
  }
  float sum = 0;
  for (size_t j = 0; j < count; ++j) sum += scores[j] = std::exp(scores[j] - largest);
  std::memset(y, 0, d * sizeof(float));
  for (size_t j = 0; j < count; ++j) add_scaled(y, values + j * stride, scores[j] / sum, d);
}

Tensor& update_cache_out(KernelRuntimeContext& context, const Tensor& value, Tensor& cache, int64_t start, Tensor& out) {
  ET_KERNEL_CHECK(context, value.dim() == 4 && cache.dim() == 4, InvalidArgument, out);
  const int64_t S = value.size(1), C = cache.size(1), K = cache.size(2), d = cache.size(3);
  ET_KERNEL_CHECK_MSG(
      context,
      value.size(0) == 1 && cache.size(0) == 1 && value.size(2) == K &&
          value.size(3) == d && value.scalar_type() == ScalarType::Float && cache.scalar_type() == ScalarType::Float &&
          start >= 0 && start + S <= C,
      InvalidArgument, out, "update_cache: %zd tokens at %zd do not fit a cache of %zd", ssize_t(S), ssize_t(start), ssize_t(C));
  auto* to = cache.mutable_data_ptr<float>();
  std::memcpy(to + start * K * d, value.const_data_ptr<float>(), static_cast<size_t>(S * K * d) * sizeof(float));
  if (watcher) watcher->push_back({to, static_cast<size_t>(K * d), static_cast<size_t>(C)});
  return out;
}

Tensor& custom_sdpa_out(
    KernelRuntimeContext& context, const Tensor& q, const Tensor& keys, const Tensor& values, int64_t start,
    const optional<Tensor>& mask, double dropout, bool causal, optional<double> scale, Tensor& out) {
  ET_KERNEL_CHECK(context, q.dim() == 4 && keys.dim() == 4 && values.sizes() == keys.sizes(), InvalidArgument, out);
  const int64_t S = q.size(1), H = q.size(2), d = q.size(3), C = keys.size(1), K = keys.size(2);
  ET_KERNEL_CHECK_MSG(
      context,
      q.size(0) == 1 && keys.size(0) == 1 && !mask.has_value() && dropout == 0.0 && causal && K > 0 && H % K == 0 &&
          keys.size(3) == d && start >= 0 && start + S <= C && q.scalar_type() == ScalarType::Float &&
          keys.scalar_type() == ScalarType::Float && values.scalar_type() == ScalarType::Float &&
          out.scalar_type() == ScalarType::Float,
      InvalidArgument, out, "custom_sdpa: only causal attention of one sequence in float32 is known here");
  ET_KERNEL_CHECK(context, executorch::runtime::resize_tensor(out, q.sizes()) == executorch::runtime::Error::Ok, InvalidArgument, out);
  if (scores.size() < static_cast<size_t>(C)) scores.resize(static_cast<size_t>(C));
  const float by = scale.has_value() ? static_cast<float>(*scale) : 1.0f / std::sqrt(static_cast<float>(d));
  const auto* qs = q.const_data_ptr<float>();
  const auto* ks = keys.const_data_ptr<float>();
  const auto* vs = values.const_data_ptr<float>();
  auto* y = out.mutable_data_ptr<float>();
  for (int64_t h = 0; h < H; ++h) {
    const int64_t kv = h / (H / K) * d;
    for (int64_t s = 0; s < S; ++s)
      attend(qs + (s * H + h) * d, ks + kv, vs + kv, static_cast<size_t>(start + s + 1), static_cast<size_t>(K * d),
             static_cast<size_t>(d), by, y + (s * H + h) * d);
  }
  return out;
}

}  // namespace

WatchCaches::WatchCaches(std::vector<Cache>& found) { watcher = &found; }
WatchCaches::~WatchCaches() { watcher = nullptr; }

}  // namespace gori

EXECUTORCH_LIBRARY(llama, "update_cache.out", gori::update_cache_out);
EXECUTORCH_LIBRARY(llama, "custom_sdpa.out", gori::custom_sdpa_out);
