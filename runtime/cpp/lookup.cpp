#include "lookup.h"

#include <algorithm>

namespace gori {
namespace {

constexpr double kKept = 0.98;      // what a step's weight becomes at the next: the last fifty count
constexpr double kEnough = 8;       // steps of a kind before its mean is believed
constexpr uint32_t kTryAgain = 32;  // of so many chances one is taken where guesses do not pay: that may change

}  // namespace

bool Lookup::pays() {
  if (when_ != GORI_LOOKUP_MEASURED) return when_ == GORI_LOOKUP_ALWAYS;
  if (guessed_ < kEnough) return true;
  if (alone_ < kEnough) return false;
  if (++chances_ % kTryAgain == 0) return true;
  // a step with guesses gives one token and those that came
  return guessed_ms_ < alone_ms_ * (1 + gained_ / guessed_);
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

void Lookup::took(double ms, bool guessed) {
  double& mean = guessed ? guessed_ms_ : alone_ms_;
  double& count = guessed ? guessed_ : alone_;
  count = count * kKept + 1;
  if (guessed) gained_ *= kKept;
  // one slow moment of the machine is not what a step costs
  mean += (count > kEnough ? std::min(ms, 4 * mean) - mean : ms - mean) / count;
}

}  // namespace gori
