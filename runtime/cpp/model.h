// One loaded .pte: tokens in, logits of the last one out, keys and values between. Knows nothing of text.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "tables.h"

namespace gori {

class Model {
 public:
  Model(const std::string& path, uint32_t threads);
  ~Model();

  // Appends `count` tokens to the history, in chunks; float32 logits [last, vocabulary] of the `last` of them, which fit
  // one chunk and are rows() at most, valid until the next call.
  const float* run(const uint32_t* ids, size_t count, size_t last = 1);

  // Makes the history its first `length` tokens.
  void rewind(size_t length) { length_ = length; }
  size_t length() const { return length_; }

  uint32_t vocabulary() const { return vocabulary_; }
  uint32_t context() const { return context_; }
  uint32_t chunk() const { return chunk_; }
  uint32_t rows() const { return rows_; }
  uint32_t threads() const { return threads_; }

  // Keys and values of the first `length` positions, as bits, all caches one after the other.
  std::vector<uint32_t> saved(size_t length) const;
  // The inverse; Error where they are not of this program.
  void load(View<uint32_t> values, size_t length);

 private:
  void step(const uint32_t* ids, size_t count, size_t last);
  uint32_t constant(const char* name);

  struct Program;
  std::unique_ptr<Program> program_;
  std::vector<Cache> caches_;
  uint32_t vocabulary_ = 0, context_ = 0, chunk_ = 0, rows_ = 1, threads_ = 0;
  size_t length_ = 0;
  const float* logits_ = nullptr;
};

}  // namespace gori
