#include "lookup.h"

#include <algorithm>

namespace gori {
namespace {

constexpr double kKeptAlone = 0.9;  // what a step's weight becomes at the next: the last ten count, those of this moment
constexpr double kKept = 0.98;      // of guesses the last fifty
constexpr double kEnough = 8;       // steps of a kind before their mean is believed
constexpr uint32_t kTryAgain = 32;  // of so many chances one is taken where guesses do not pay: that may change

}  // namespace

bool Lookup::pays() {
  if (when_ != GORI_LOOKUP_MEASURED) return when_ == GORI_LOOKUP_ALWAYS;
  if (guessed_ < kEnough) return true;
  if (alone_ < kEnough / 2) return false;
  if (++chances_ % kTryAgain == 0) return true;
  // a step with guesses gives one token and those that came
  return cost_ < 1 + gained_ / guessed_;
}

void Lookup::guess(
    const std::vector<uint32_t>& prompt, size_t end, const std::vector<uint32_t>& said, size_t room,
    std::vector<uint32_t>& out) {
  out.clear();
  const size_t most = std::min(most_, room);
  if (!most || tokenizer_.piece(said.back()).empty()) return;
  size_t best = end;
  for (size_t i = 0; i + 1 < end; ++i) {
    if (prompt[i] != said.back()) continue;
    if (best == end) best = i;
    if (i && said.size() > 1 && prompt[i - 1] == said[said.size() - 2]) {  // two tokens agree
      best = i;
      break;
    }
  }
  if (best == end || !pays()) return;
  for (size_t i = best + 1; i < end && out.size() < most; ++i) out.push_back(prompt[i]);
}

// What a step with guesses costs is told in steps without, those just before: a machine that is slow for a while is slow at
// both. One slow moment is not what a step costs.
void Lookup::took(double ms, bool guessed) {
  if (guessed) {
    guessed_ = guessed_ * kKept + 1;
    gained_ *= kKept;
    if (alone_ > 0) cost_ += (std::min(ms / alone_ms_, 8.0) - cost_) / guessed_;
  } else {
    alone_ = alone_ * kKeptAlone + 1;
    alone_ms_ += (alone_ > 2 ? std::min(ms, 4 * alone_ms_) - alone_ms_ : ms - alone_ms_) / alone_;
  }
}

}  // namespace gori
