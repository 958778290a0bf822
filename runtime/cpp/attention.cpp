#include "attention.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace gori {
namespace {

// eight lanes of float: GCC and Clang turn them into what the target has (AVX2, NEON, or plain code)
typedef float Lanes __attribute__((vector_size(32), aligned(4)));
typedef float Half __attribute__((vector_size(16), aligned(4)));
constexpr size_t kLanes = 8;
constexpr size_t kLine = 16, kAhead = 8;  // floats of a cache line, keys that are fetched ahead

// Queries that read the same keys and are worked on together, so that a key is loaded once for all of them.
constexpr size_t kMostRows = 4;
struct Rows {
  const float* q[kMostRows];
  float* y[kMostRows];
  size_t count[kMostRows];  // keys that each may see; never fewer than of the row before
  float* scores[kMostRows];
};

Lanes& lanes(float* at) { return *reinterpret_cast<Lanes*>(at); }
const Lanes& lanes(const float* at) { return *reinterpret_cast<const Lanes*>(at); }

float total(const Lanes& sum) {
  Half low, high;
  std::memcpy(&low, &sum, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&sum) + sizeof low, sizeof high);
  low += high;
  return (low[0] + low[2]) + (low[1] + low[3]);
}

// e^x for x <= 0, relative error below 2e-7: 2^n times a polynomial of the rest (Cephes' expf). A loop over it becomes
// vector code, which a call of the library does not.
inline float exp_negative(float x) {
  x = std::max(x, -87.0f);
  const auto n = static_cast<int32_t>(x * 1.44269504f - 0.5f);
  const float r = x - static_cast<float>(n) * 0.693359375f - static_cast<float>(n) * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = p * r + c;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// Turns `count` scores into weights that sum to one.
void softmax(float* score, size_t count) {
  float largest = score[0], sum = 0;
  for (size_t j = 1; j < count; ++j) largest = std::max(largest, score[j]);
  for (size_t j = 0; j < count; ++j) sum += score[j] = exp_negative(score[j] - largest);
  const float by = 1 / sum;
  for (size_t j = 0; j < count; ++j) score[j] *= by;
}

// R rows over keys and values that lie `stride` floats apart.
template <size_t R>
void attend(const Rows& rows, const float* keys, const float* values, size_t stride, size_t d, float scale) {
  const size_t count = rows.count[R - 1], whole = d / kLanes * kLanes;
  for (size_t j = 0; j < count; ++j) {
    const float* key = keys + j * stride;
    for (size_t i = 0; i < d; i += kLine) {
      __builtin_prefetch(key + kAhead * stride + i);
      __builtin_prefetch(values + j * stride + i);
    }
    Lanes sum[R] = {};
    for (size_t i = 0; i < whole; i += kLanes)
      for (size_t r = 0; r < R; ++r) sum[r] += lanes(rows.q[r] + i) * lanes(key + i);
    for (size_t r = 0; r < R; ++r) {
      float score = total(sum[r]);
      for (size_t i = whole; i < d; ++i) score += rows.q[r][i] * key[i];
      rows.scores[r][j] = score * scale;
    }
  }
  for (size_t r = 0; r < R; ++r) {
    softmax(rows.scores[r], rows.count[r]);
    std::fill(rows.scores[r] + rows.count[r], rows.scores[r] + count, 0.0f);
  }
  size_t i = 0;
  for (; i + 2 * kLanes <= d; i += 2 * kLanes) {
    Lanes sum[R][2] = {};
    for (size_t j = 0; j < count; ++j) {
      const float* value = values + j * stride + i;
      for (size_t r = 0; r < R; ++r)
        for (size_t part = 0; part < 2; ++part) sum[r][part] += lanes(value + part * kLanes) * rows.scores[r][j];
    }
    for (size_t r = 0; r < R; ++r)
      for (size_t part = 0; part < 2; ++part) lanes(rows.y[r] + i + part * kLanes) = sum[r][part];
  }
  for (; i < d; ++i)
    for (size_t r = 0; r < R; ++r) {
      float sum = 0;
      for (size_t j = 0; j < count; ++j) sum += values[j * stride + i] * rows.scores[r][j];
      rows.y[r][i] = sum;
    }
}

constexpr decltype(&attend<1>) kAttend[kMostRows] = {attend<1>, attend<2>, attend<3>, attend<4>};

}  // namespace

size_t scores_for(size_t positions) { return kMostRows * positions; }

void attention(
    const Heads& heads, size_t start, const float* q, const float* keys, const float* values, float scale, float* scores,
    float* y) {
  const size_t group = heads.queries / heads.keys, rows = heads.tokens * group, d = heads.size;
  for (size_t k = 0; k < heads.keys; ++k)
    for (size_t first = 0; first < rows; first += kMostRows) {
      const size_t together = std::min(kMostRows, rows - first);
      Rows some;
      for (size_t r = 0; r < together; ++r) {
        const size_t s = (first + r) / group, at = (s * heads.queries + k * group + (first + r) % group) * d;
        some.q[r] = q + at;
        some.y[r] = y + at;
        some.count[r] = start + s + 1;
        some.scores[r] = scores + r * (start + heads.tokens);
      }
      kAttend[together - 1](some, keys + k * d, values + k * d, heads.keys * d, d, scale);
    }
}

}  // namespace gori
