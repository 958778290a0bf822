#include "grammar.h"

#include <algorithm>

#include "gori.h"

namespace gori {

Grammar::Grammar(const Tables& t, const Tokenizer& tokenizer)
    : tokenizer(tokenizer),
      edges_at(t.get<uint32_t>("edges_at")),
      edge_token(t.get<uint32_t>("edge_token")),
      masks(t.get<uint32_t>("masks")),
      edge_next(t.get<uint16_t>("edge_next")),
      finish(t.get<uint16_t>("finish")),
      mask_of(t.get<uint16_t>("mask_of")),
      byte_next(t.get<uint16_t>("byte_next")),
      accept(t.get<uint8_t>("accept")),
      byte_class(t.get<uint8_t>("byte_class")),
      names_(t.get<uint8_t>("names")),
      packages_(t.get<uint8_t>("packages")),
      names_at_(t.get<uint32_t>("names_at")),
      packages_at_(t.get<uint32_t>("packages_at")) {
  const auto f = t.get<uint32_t>("functions"), a = t.get<uint32_t>("arguments"), marks = t.get<uint32_t>("marks");
  functions = {reinterpret_cast<const Function*>(f.data), f.size / 3};
  arguments = {reinterpret_cast<const Argument*>(a.data), a.size / 3};
  none = marks[0], vocabulary = marks[1];
  ends = {marks.data + 2, marks.size - 2};
  wide = static_cast<uint32_t>(mask_of.size);
  mask_words = (vocabulary + 31) / 32;
  classes = wide ? byte_next.size / wide : 0;
  for (uint32_t i = 0; i < functions.size; ++i) {
    function_of.emplace(functions[i].token, i);
  }
  for (uint32_t s = 0; s < wide; ++s)
    if (finish[s] != kNowhere) longest_wide = std::max<uint32_t>(longest_wide, finish[s]);
}

bool Grammar::is_end(uint32_t token) const { return std::find(ends.begin(), ends.end(), token) != ends.end(); }

uint32_t Grammar::step(uint32_t state, uint32_t token) const {
  if (state >= wide) {
    const uint32_t i = state - wide;
    for (uint32_t e = edges_at[i]; e < edges_at[i + 1]; ++e)
      if (edge_token[e] == token) return edge_next[e];
    return kNowhere;
  }
  const auto piece = tokenizer.piece(token);
  if (piece.empty()) return kNowhere;
  for (char byte : piece) {
    state = byte_next[state * classes + byte_class[static_cast<uint8_t>(byte)]];
    if (state == kNowhere) return kNowhere;
  }
  return state;
}

void Utterance::read(std::string_view said, const Grammar& g, uint32_t text_start) {
  constexpr uint32_t never = 1u << 30;
  text.assign(said);
  reach.assign(text.size() + 1, never);
  beginnings.clear();
  const uint32_t after_space = g.byte_next[text_start * g.classes + g.byte_class[' ']];
  for (size_t place = text.size(), end = place; place-- > 0;) {
    if (!starts(place)) continue;
    uint32_t state = after_space;
    for (size_t i = place; state != Grammar::kNowhere && i < end; ++i)
      state = g.byte_next[state * g.classes + g.byte_class[static_cast<uint8_t>(text[i])]];
    const bool whole = state != Grammar::kNowhere && g.accept[state];
    // white space ends no value, so from inside it the character behind it is read, too
    for (size_t i = place; i < end; ++i)
      reach[i] = std::min(never, static_cast<uint32_t>(end - i) + (whole ? 0 : reach[end]));
    if (whole) beginnings.push_back(static_cast<uint32_t>(place));
    end = place;
  }
  std::reverse(beginnings.begin(), beginnings.end());
  shortest = never;
  for (uint32_t p : beginnings) shortest = std::min(shortest, reach[p]);
  shortest += 1;
}

Constraint::Constraint(const Grammar& grammar)
    : g_(grammar), scratch_(grammar.mask_words), piece_(grammar.tokenizer.longest() + 1, ' ') {
  listed_.reserve(grammar.functions.size + grammar.arguments.size + grammar.vocabulary);
  for (const auto& a : grammar.arguments)
    if (a.flags & Grammar::kCopied) has_copies_ = true, text_start_ = a.start;
}

void Constraint::begin(std::string_view utterance, uint32_t budget) {
  if (budget < 2)
    throw Error(GORI_ERROR_TOO_LONG, "no room is left for an answer: shorten the utterance or export with a larger context");
  left_ = budget;
  function_ = argument_ = state_ = kNever;
  used_ = 0, calls_ = 0;
  done_ = said_none_ = false;
  if (has_copies_) {
    utterance_.read(utterance, g_, text_start_);
    places_.reserve(utterance_.text.size() + 1);
    next_places_.reserve(utterance_.text.size() + 1);
  }
}

void Constraint::allow() {
  listed_.clear();
  mask_ = nullptr;
  if (said_none_) {
    for (uint32_t t : g_.ends) listed_.push_back(t);
    return;
  }
  structural();
  if (state_ == kNever) return;
  if (copies()) {
    copied();
    return;
  }
  const uint32_t after = rest();
  if (state_ >= g_.wide) {
    const uint32_t i = state_ - g_.wide;
    for (uint32_t e = g_.edges_at[i]; e < g_.edges_at[i + 1]; ++e)
      offer(g_.edge_token[e], g_.finish[g_.edge_next[e]] + after);
    return;
  }
  mask_ = g_.masks.data + g_.mask_of[state_] * g_.mask_words;
  if (g_.longest_wide + after < left_) return;
  for (size_t w = 0; w < g_.mask_words; ++w) {
    uint32_t kept = mask_[w];
    for (uint32_t bits = mask_[w]; bits; bits &= bits - 1) {
      const auto bit = static_cast<uint32_t>(__builtin_ctz(bits));
      const uint32_t next = g_.step(state_, static_cast<uint32_t>(w * 32 + bit));
      if (next == Grammar::kNowhere || g_.finish[next] + after >= left_) kept &= ~(1u << bit);
    }
    scratch_[w] = kept;
  }
  mask_ = scratch_.data();
}

// Special tokens that may follow, where an ending after each still fits.
void Constraint::structural() {
  if (function_ == kNever) {
    offer(g_.none, 1);
    calls();
    return;
  }
  if (state_ != kNever && !g_.accept[state_]) return;
  const auto& f = g_.functions[function_];
  const uint32_t lacking = rest();
  bool complete = true;
  for (uint32_t i = f.first; i < f.first + f.count; ++i) {
    const auto& a = g_.arguments[i];
    const bool seen = used_ >> (i - f.first) & 1;
    const bool owed = !seen && (a.flags & Grammar::kRequired);
    complete = complete && !owed;
    if (!seen || ((a.flags & Grammar::kRepeats) && i == argument_))
      offer(a.token, owed ? lacking - 1 : lacking + need(i));
  }
  if (!complete) return;
  for (uint32_t t : g_.ends) offer(t, 0);
  if (calls_ < Grammar::kMostCalls) calls();
}

void Constraint::calls() {
  for (uint32_t i = 0; i < g_.functions.size; ++i) offer(g_.functions[i].token, missing(i, 0) + 1);
}

// Tokens of the required arguments that are not used yet.
uint32_t Constraint::missing(uint32_t function, uint64_t used) const {
  const auto& f = g_.functions[function];
  uint32_t sum = 0;
  for (uint32_t i = f.first; i < f.first + f.count; ++i)
    if ((g_.arguments[i].flags & Grammar::kRequired) && !(used >> (i - f.first) & 1))
      sum = std::min(kNever, sum + 1 + need(i));  // four values that nothing was said for would count past 32 bits
  return sum;
}

// Tokens of an argument's shortest value.
uint32_t Constraint::need(uint32_t argument) const {
  const auto& a = g_.arguments[argument];
  return a.flags & Grammar::kCopied ? utterance_.shortest : g_.finish[a.start];
}

void Constraint::copied() {
  const bool fresh = state_ == g_.arguments[argument_].start;
  const std::string_view text = utterance_.text;
  const uint32_t after = rest();
  const size_t lead = fresh ? 1 : 0, most = g_.tokenizer.longest();
  piece_[0] = ' ';
  const size_t from = listed_.size();
  for (uint32_t place : fresh ? utterance_.beginnings : places_) {
    for (size_t n = fresh ? 0 : 1; n <= most && place + n <= text.size(); ++n) {
      std::copy_n(text.data() + place, n, piece_.data() + lead);
      const uint32_t token = g_.tokenizer.token({piece_.data(), n + lead});
      if (token == Tokenizer::kNone || std::find(listed_.begin() + from, listed_.end(), token) != listed_.end()) continue;
      if (after_copy(token) + after < left_) listed_.push_back(token);
    }
  }
  std::sort(listed_.begin() + from, listed_.end());
}

// Tokens that a copied value needs after this one; kNever where it leads nowhere.
uint32_t Constraint::after_copy(uint32_t token) {
  const uint32_t state = g_.step(state_, token);
  if (state == Grammar::kNowhere) return kNever;
  if (g_.accept[state]) return 0;
  places_after(token, next_places_);
  uint32_t least = kNever;
  for (uint32_t p : next_places_) least = std::min(least, utterance_.reach[p]);
  return least;
}

void Constraint::places_after(uint32_t token, std::vector<uint32_t>& out) const {
  std::string_view piece = g_.tokenizer.piece(token);
  const std::string_view text = utterance_.text;
  const bool fresh = state_ == g_.arguments[argument_].start;
  if (fresh) piece.remove_prefix(1);
  out.clear();
  for (uint32_t p : fresh ? utterance_.beginnings : places_)
    if (text.compare(p, piece.size(), piece) == 0) out.push_back(p + static_cast<uint32_t>(piece.size()));
}

uint32_t Constraint::forced() const {
  if (!mask_) return listed_.size() == 1 ? listed_[0] : Tokenizer::kNone;
  uint32_t only = Tokenizer::kNone;
  size_t count = listed_.size();
  if (count) only = listed_[0];
  for (size_t w = 0; w < g_.mask_words && count < 2; ++w) {
    if (!mask_[w]) continue;
    count += static_cast<size_t>(__builtin_popcount(mask_[w]));
    only = static_cast<uint32_t>(w * 32 + static_cast<size_t>(__builtin_ctz(mask_[w])));
  }
  return count == 1 ? only : Tokenizer::kNone;
}

void Constraint::advance(uint32_t token) {
  --left_;
  if (g_.is_end(token)) {
    done_ = true;
    return;
  }
  if (token == g_.none) {
    said_none_ = true;
    return;
  }
  if (const auto found = g_.function_of.find(token); found != g_.function_of.end()) {
    function_ = found->second;
    argument_ = state_ = kNever;
    used_ = 0;
    ++calls_;
    return;
  }
  const auto& f = g_.functions[function_];
  for (uint32_t i = f.first; i < f.first + f.count; ++i) {
    if (g_.arguments[i].token != token) continue;
    argument_ = i;
    state_ = g_.arguments[i].start;
    used_ |= uint64_t{1} << (i - f.first);
    return;
  }
  if (copies()) {
    places_after(token, next_places_);
    places_.swap(next_places_);
  }
  state_ = g_.step(state_, token);
  if (state_ == Grammar::kNowhere)
    throw Error(GORI_ERROR_FILE, "runner.bin is damaged: its masks and its bytes disagree: export it again");
}

}  // namespace gori
