// Guesses of what follows while a value is copied: the words behind the same words in the utterance (prompt lookup, Saxena
// 2023; checked as in 2211.17192: an answer never depends on a guess). They are made while they pay, which is measured.
#pragma once

#include <cstdint>
#include <vector>

#include "gori.h"
#include "tokenizer.h"

namespace gori {

class Lookup {
 public:
  // `most` guesses at once; none where it is 0.
  Lookup(const Tokenizer& tokenizer, size_t most, gori_lookup when) : tokenizer_(tokenizer), most_(most), when_(when) {}

  // Fills `out` with what may follow `said`, of which the last is the latest: tokens of the first `end` of the prompt, `room` of
  // them at most. Empty where nothing matches, or where it does not pay.
  void guess(
      const std::vector<uint32_t>& prompt, size_t end, const std::vector<uint32_t>& said, size_t room,
      std::vector<uint32_t>& out);

  // How long reading one certain token took, alone or with guesses behind it.
  void took(double ms, bool guessed);
  // A guess came.
  void confirmed() { gained_ += 1; }

 private:
  bool pays();

  const Tokenizer& tokenizer_;
  size_t most_;
  gori_lookup when_;
  double alone_ms_ = 0;                          // running mean of a step without guesses
  double cost_ = 0;                              // of a step with guesses, in steps without
  double alone_ = 0, guessed_ = 0, gained_ = 0;  // steps of each kind, and guesses that came, the older the less they count
  uint32_t chances_ = 0;
};

}  // namespace gori
