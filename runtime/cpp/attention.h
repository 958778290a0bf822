// Causal attention of new tokens over keys and values in a cache, float32, on one thread. Knows nothing of ExecuTorch.
#pragma once

#include <cstddef>

namespace gori {

struct Heads {
  size_t tokens;  // new ones, S
  size_t queries;  // heads, H
  size_t keys;  // heads, K, a divisor of H: query head h reads key head h / (H / K)
  size_t size;  // of a head, d
};

// Floats that `attention` needs to work in for a cache of `positions`.
size_t scores_for(size_t positions);

// y [S, H, d] = softmax(q k^T * scale) v (1706.03762, equation 1) of q [S, H, d], keys and values [positions, K, d];
// new token s stands at position start + s and sees those up to its own.
void attention(
    const Heads& heads, size_t start, const float* q, const float* keys, const float* values, float scale, float* scores,
    float* y);

}  // namespace gori
