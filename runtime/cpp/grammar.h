// What may be said next while a model answers with calls: the walk of runtime/constrain.py over the tables of gori/grammar.py.
//
// Every answer that ends parses and fits its schemas, and every answer ends within its budget of tokens.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "tables.h"
#include "tokenizer.h"

namespace gori {

// The grammar of one artifact; constant after it was read, so many answers may share it.
class Grammar {
 public:
  Grammar(const Tables& tables, const Tokenizer& tokenizer);

  struct Function {
    uint32_t token, first, count;
  };
  struct Argument {
    uint32_t token, start, flags;
  };
  enum Flags : uint32_t { kRequired = 1, kRepeats = 2, kCopied = 4, kText = 8 };
  static constexpr uint32_t kNowhere = 0xFFFF;
  static constexpr int kMostCalls = 8;

  uint32_t step(uint32_t state, uint32_t token) const;
  std::string_view name_of_function(size_t i) const { return text(names_, names_at_, i); }
  std::string_view name_of_argument(size_t i) const { return text(names_, names_at_, functions.size + i); }
  std::string_view package(size_t i) const { return text(packages_, packages_at_, i); }
  bool is_end(uint32_t token) const;

  const Tokenizer& tokenizer;
  View<Function> functions;
  View<Argument> arguments;
  View<uint32_t> ends, edges_at, edge_token, masks;
  View<uint16_t> edge_next, finish, mask_of, byte_next;
  View<uint8_t> accept, byte_class;
  uint32_t none, vocabulary, wide, longest_wide = 0;
  size_t classes = 0, mask_words;
  std::unordered_map<uint32_t, uint32_t> function_of;

 private:
  static std::string_view text(View<uint8_t> bytes, View<uint32_t> at, size_t i) {
    return {reinterpret_cast<const char*>(bytes.data) + at[i], at[i + 1] - at[i]};
  }
  View<uint8_t> names_, packages_;
  View<uint32_t> names_at_, packages_at_;
};

// Where copied values may come from.
struct Utterance {
  void read(std::string_view said, const Grammar& grammar, uint32_t text_start);
  bool starts(size_t place) const { return place == text.size() || (static_cast<uint8_t>(text[place]) & 0xC0) != 0x80; }

  std::string text;
  std::vector<uint32_t> reach;       // from each place: bytes until a character that is no white space is whole
  std::vector<uint32_t> beginnings;  // where a value can begin
  uint32_t shortest = 0;             // tokens of the shortest copied value
};

class Constraint {
 public:
  explicit Constraint(const Grammar& grammar);

  // Starts an answer of at most `budget` tokens, the end mark among them.
  void begin(std::string_view utterance, uint32_t budget);

  // Finds what may follow: `listed()` and, where it is not null, `mask()` (a bit for each token).
  void allow();
  const std::vector<uint32_t>& listed() const { return listed_; }
  const uint32_t* mask() const { return mask_; }

  // After allow(): the only token that may follow, or Tokenizer::kNone.
  uint32_t forced() const;

  // Appends an allowed token.
  void advance(uint32_t token);
  bool done() const { return done_; }

 private:
  static constexpr uint32_t kNever = 1u << 30;

  void structural();
  // `need`: tokens that an ending after this one takes
  void offer(uint32_t token, uint32_t need) {
    if (need < left_) listed_.push_back(token);
  }
  void calls();
  uint32_t missing(uint32_t function, uint64_t used) const;
  uint32_t rest() const { return missing(function_, used_) + 1; }
  uint32_t need(uint32_t argument) const;
  bool copies() const { return argument_ != kNever && (g_.arguments[argument_].flags & Grammar::kCopied); }
  void copied();
  uint32_t after_copy(uint32_t token);
  void places_after(uint32_t token, std::vector<uint32_t>& out) const;

  const Grammar& g_;
  Utterance utterance_;
  std::vector<uint32_t> listed_, scratch_, places_, next_places_;
  std::string piece_;
  const uint32_t* mask_ = nullptr;
  uint32_t left_ = 0, function_ = kNever, argument_ = kNever, state_ = kNever;
  uint64_t used_ = 0;
  int calls_ = 0;
  bool done_ = false, said_none_ = false, has_copies_ = false;
  uint32_t text_start_ = 0;
};

}  // namespace gori
