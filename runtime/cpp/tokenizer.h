// A byte-level BPE tokenizer that gives the tokens of Hugging Face's tokenizers library, from tables that gori exported.
//
// A text is brought to NFC (where the tokenizer asks for it), cut into pre-tokens by a pattern over kinds of characters, and
// each pre-token's bytes are merged by rank. Special tokens are never read in a text: what a user says stays text.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "tables.h"

namespace gori {

// One character of a UTF-8 text at `at`, which moves on. Of bytes that are no character the longest part that begins one
// becomes one U+FFFD, as Python's decoder and the Unicode Standard (table 3-11) have it.
uint32_t next_character(std::string_view text, size_t& at);
void append_utf8(uint32_t character, std::string& out);

class Tokenizer {
 public:
  explicit Tokenizer(const Tables& tables);

  // Appends the tokens of a text. Bytes that are not UTF-8 are read as U+FFFD.
  void encode(std::string_view text, std::vector<uint32_t>& ids) const;

  // The text as the tokenizer sees it: valid UTF-8, in NFC where it normalizes.
  std::string normalized(std::string_view text) const;

  // The bytes of text that a token stands for; none of a special token.
  std::string_view piece(uint32_t id) const {
    return {reinterpret_cast<const char*>(pieces_.data) + at_[id], at_[id + 1] - at_[id]};
  }

  // The token of exactly these bytes, or kNone.
  uint32_t token(std::string_view bytes) const;

  size_t size() const { return at_.size - 1; }
  size_t longest() const { return longest_; }

  static constexpr uint32_t kNone = 0xFFFFFFFF;

 private:
  struct Element {
    uint64_t kinds;
    uint32_t least, most, kind;
  };

  std::vector<uint32_t> code_points(std::string_view text) const;
  void to_nfc(std::vector<uint32_t>& points) const;
  void decompose(uint32_t point, std::vector<uint32_t>& out) const;
  uint32_t composed(uint32_t a, uint32_t b) const;
  uint8_t combining(uint32_t point) const;
  size_t match_sequence(const std::vector<uint8_t>& kinds, size_t at, const Element* e, const Element* end) const;
  void merge(std::string_view piece, std::vector<uint32_t>& ids) const;
  bool rank(uint32_t left, uint32_t right, uint32_t& rank, uint32_t& to) const;

  std::vector<std::vector<Element>> alternatives_;
  View<uint16_t> block_of_;
  View<uint8_t> kind_of_;
  View<uint32_t> byte_token_, merge_rank_, merge_to_, at_;
  View<uint64_t> merge_pair_;
  View<uint8_t> pieces_;
  bool nfc_ = false, whole_words_ = false;
  View<uint32_t> apart_, apart_at_, apart_to_, marks_of_, pair_to_;
  View<uint8_t> mark_class_;
  View<uint64_t> pair_;
  std::unordered_map<std::string_view, uint32_t> by_bytes_;
  size_t longest_ = 0;
};

}  // namespace gori
