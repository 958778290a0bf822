#include "sound.h"

#include <algorithm>
#include <string>

#include "gori.h"

namespace gori {
namespace {

constexpr uint32_t kCharacters = 0x110000, kNowhere = 0xFFFF, kCopied = 4;
// a matcher goes one call deeper for each element
constexpr uint32_t kMostElements = 64;

void require(bool sound, const char* array) {
  if (!sound)
    throw Error(GORI_ERROR_FILE, std::string("runner.bin is damaged: ") + array + " leads out of its tables: export it again");
}

template <typename T>
void require_below(View<T> values, uint64_t limit, const char* array) {
  require(std::all_of(values.begin(), values.end(), [limit](T v) { return v < limit; }), array);
}

// Where texts begin in an array of `bytes` elements: `count` of them and the end.
void require_offsets(View<uint32_t> at, size_t count, size_t bytes, const char* array) {
  require(at.size == count + 1 && at[0] == 0 && at[count] <= bytes && std::is_sorted(at.begin(), at.end()), array);
}

void check_pattern(View<uint32_t> rows) {
  require(rows.size > 0, "pattern");
  size_t at = 1;
  for (uint32_t i = 0; i < rows[0]; ++i) {
    require(at < rows.size && rows[at] > 0 && rows[at] <= kMostElements, "pattern");
    const size_t next = at + 1 + size_t{rows[at]} * 5;
    require(next <= rows.size, "pattern");
    for (size_t e = at + 1; e < next; e += 5) require(rows[e + 2] <= rows[e + 3] && rows[e + 4] <= 2, "pattern");
    at = next;
  }
}

void check_unicode(const Tables& t) {
  const auto apart_to = t.get<uint32_t>("apart_to"), pair_to = t.get<uint32_t>("pair_to");
  require_offsets(t.get<uint32_t>("apart_at"), t.get<uint32_t>("apart").size, apart_to.size, "apart_at");
  require_below(apart_to, kCharacters, "apart_to");
  require_below(pair_to, kCharacters, "pair_to");
  require(t.get<uint64_t>("pair").size == pair_to.size, "pair");
  require(t.get<uint32_t>("marks_of").size == t.get<uint8_t>("mark_class").size, "marks_of");
}

size_t vocabulary_of(const Tables& t) {
  const auto at = t.get<uint32_t>("pieces_at");
  require(at.size > 1, "pieces_at");
  return at.size - 1;
}

void check_edges(const Tables& t, size_t states, size_t wide, size_t vocabulary) {
  const auto token = t.get<uint32_t>("edge_token");
  const auto next = t.get<uint16_t>("edge_next");
  require(token.size == next.size, "edge_next");
  require_offsets(t.get<uint32_t>("edges_at"), states - wide, token.size, "edges_at");
  require_below(token, vocabulary, "edge_token");
  require_below(next, states, "edge_next");
}

// The states whose tokens are a mask and a table of bytes.
void check_wide(const Tables& t, size_t wide, size_t vocabulary) {
  const auto masks = t.get<uint32_t>("masks");
  const auto next = t.get<uint16_t>("byte_next");
  const auto of_byte = t.get<uint8_t>("byte_class");
  const size_t words = (vocabulary + 31) / 32, classes = wide ? next.size / wide : 0;
  require(masks.size % words == 0, "masks");
  require_below(t.get<uint16_t>("mask_of"), masks.size / words, "mask_of");
  for (size_t last = words - 1; vocabulary % 32 && last < masks.size; last += words)
    require(masks[last] >> (vocabulary % 32) == 0, "masks");
  require(of_byte.size == 256 && next.size == classes * wide, "byte_next");
  if (wide) require_below(of_byte, classes, "byte_class");
  for (uint16_t state : next) require(state < wide || state == kNowhere, "byte_next");
}

}  // namespace

void check_text(const Tables& t) {
  const auto block = t.get<uint16_t>("block_of");
  const auto kind = t.get<uint8_t>("kind_of");
  const size_t vocabulary = vocabulary_of(t);
  require(block.size == kCharacters / 256 && kind.size % 256 == 0, "block_of");
  require_below(block, kind.size / 256, "block_of");
  require_below(kind, 64, "kind_of");
  require_offsets(t.get<uint32_t>("pieces_at"), vocabulary, t.get<uint8_t>("pieces").size, "pieces_at");
  const auto first = t.get<uint32_t>("byte_token"), to = t.get<uint32_t>("merge_to");
  require(first.size == 256, "byte_token");
  require_below(first, vocabulary, "byte_token");
  require_below(to, vocabulary, "merge_to");
  require(t.get<uint64_t>("merge_pair").size == to.size && t.get<uint32_t>("merge_rank").size == to.size, "merge_pair");
  require(t.get<uint8_t>("whole_words").size == 1, "whole_words");
  check_pattern(t.get<uint32_t>("pattern"));
  if (t.has("apart")) check_unicode(t);
  require_below(t.get<uint32_t>("prompt_before"), vocabulary, "prompt_before");
  require_below(t.get<uint32_t>("prompt_after"), vocabulary, "prompt_after");
  require(t.get<uint32_t>("prompt_after").size > 0, "prompt_after");
  const auto marks = t.get<uint32_t>("marks");
  require(marks.size > 2 && marks[1] == vocabulary, "marks");
  require_below(View<uint32_t>{marks.data + 2, marks.size - 2}, vocabulary, "marks");
}

void check_grammar(const Tables& t) {
  const size_t vocabulary = vocabulary_of(t);
  const auto f = t.get<uint32_t>("functions"), a = t.get<uint32_t>("arguments");
  const size_t states = t.get<uint8_t>("accept").size, wide = t.get<uint16_t>("mask_of").size;
  require(states < kNowhere && wide <= states && t.get<uint16_t>("finish").size == states, "finish");
  require(f.size > 0 && f.size % 3 == 0, "functions");
  require(a.size % 3 == 0, "arguments");
  for (size_t i = 0; i < f.size; i += 3)
    require(f[i] < vocabulary && f[i + 2] <= 64 && uint64_t{f[i + 1]} + f[i + 2] <= a.size / 3, "functions");
  // a copied value is any text, and that is a wide automaton
  for (size_t i = 0; i < a.size; i += 3)
    require(a[i] < vocabulary && a[i + 1] < (a[i + 2] & kCopied ? wide : states), "arguments");
  require(t.get<uint32_t>("marks")[0] < vocabulary, "marks");
  check_edges(t, states, wide, vocabulary);
  check_wide(t, wide, vocabulary);
  const size_t functions = f.size / 3, names = functions + a.size / 3;
  require_offsets(t.get<uint32_t>("names_at"), names, t.get<uint8_t>("names").size, "names_at");
  require_offsets(t.get<uint32_t>("packages_at"), functions, t.get<uint8_t>("packages").size, "packages_at");
}

}  // namespace gori
