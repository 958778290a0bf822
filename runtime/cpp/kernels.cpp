// llama::update_cache and llama::custom_sdpa for ExecuTorch, without libtorch: the wheel has them only in a library that
// needs it. Batch of one, float32, caches [1, C, K, d] as gori's exporter writes them.

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "attention.h"
#include "kernels.h"

namespace gori {
namespace {

using executorch::aten::optional;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::KernelRuntimeContext;

thread_local std::vector<Cache>* watcher = nullptr;
thread_local std::vector<float> scores;

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
  const Heads heads{static_cast<size_t>(S), static_cast<size_t>(H), static_cast<size_t>(K), static_cast<size_t>(d)};
  const size_t needed = scores_for(static_cast<size_t>(C));
  if (scores.size() < needed) scores.resize(needed);
  const float by = scale.has_value() ? static_cast<float>(*scale) : 1.0f / std::sqrt(static_cast<float>(d));
  attention(
      heads, static_cast<size_t>(start), q.const_data_ptr<float>(), keys.const_data_ptr<float>(),
      values.const_data_ptr<float>(), by, scores.data(), out.mutable_data_ptr<float>());
  return out;
}

}  // namespace

WatchCaches::WatchCaches(std::vector<Cache>& found) { watcher = &found; }
WatchCaches::~WatchCaches() { watcher = nullptr; }

}  // namespace gori

EXECUTORCH_LIBRARY(llama, "update_cache.out", gori::update_cache_out);
EXECUTORCH_LIBRARY(llama, "custom_sdpa.out", gori::custom_sdpa_out);
