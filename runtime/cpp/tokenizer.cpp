#include "tokenizer.h"

#include <algorithm>
#include <queue>

namespace gori {
namespace {

constexpr uint32_t kReplacement = 0xFFFD;
// Hangul by arithmetic: The Unicode Standard 15.0, section 3.12
constexpr uint32_t kS = 0xAC00, kL = 0x1100, kV = 0x1161, kT = 0x11A7, kLs = 19, kVs = 21, kTs = 28;
constexpr uint32_t kSs = kLs * kVs * kTs;

}  // namespace

void append_utf8(uint32_t c, std::string& out) {
  if (c < 0x80) {
    out += static_cast<char>(c);
  } else if (c < 0x800) {
    out += static_cast<char>(0xC0 | c >> 6);
    out += static_cast<char>(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    out += static_cast<char>(0xE0 | c >> 12);
    out += static_cast<char>(0x80 | (c >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (c & 0x3F));
  } else {
    out += static_cast<char>(0xF0 | c >> 18);
    out += static_cast<char>(0x80 | (c >> 12 & 0x3F));
    out += static_cast<char>(0x80 | (c >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (c & 0x3F));
  }
}

uint32_t next_character(std::string_view text, size_t& at) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(at++);
  if (lead < 0x80) return lead;
  size_t more = lead >= 0xF0 && lead <= 0xF4 ? 3 : lead >= 0xE0 && lead < 0xF0 ? 2 : lead >= 0xC2 && lead < 0xE0 ? 1 : 0;
  if (!more) return kReplacement;
  uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  uint32_t c = lead & (0x3F >> more);
  for (; more; --more) {
    if (at == text.size() || byte(at) < low || byte(at) > high) return kReplacement;
    c = c << 6 | (byte(at++) & 0x3F);
    low = 0x80, high = 0xBF;
  }
  return c;
}

Tokenizer::Tokenizer(const Tables& t)
    : block_of_(t.get<uint16_t>("block_of")),
      kind_of_(t.get<uint8_t>("kind_of")),
      byte_token_(t.get<uint32_t>("byte_token")),
      merge_rank_(t.get<uint32_t>("merge_rank")),
      merge_to_(t.get<uint32_t>("merge_to")),
      at_(t.get<uint32_t>("pieces_at")),
      merge_pair_(t.get<uint64_t>("merge_pair")),
      pieces_(t.get<uint8_t>("pieces")),
      nfc_(t.has("apart")),
      whole_words_(t.get<uint8_t>("whole_words")[0] != 0) {
  const auto rows = t.get<uint32_t>("pattern");
  size_t at = 1;
  for (uint32_t i = 0; i < rows[0]; ++i) {
    std::vector<Element> elements(rows[at++]);
    for (auto& e : elements) {
      e = {rows[at] | static_cast<uint64_t>(rows[at + 1]) << 32, rows[at + 2], rows[at + 3], rows[at + 4]};
      at += 5;
    }
    alternatives_.push_back(std::move(elements));
  }
  if (nfc_) {
    apart_ = t.get<uint32_t>("apart"), apart_at_ = t.get<uint32_t>("apart_at"), apart_to_ = t.get<uint32_t>("apart_to");
    marks_of_ = t.get<uint32_t>("marks_of"), mark_class_ = t.get<uint8_t>("mark_class");
    pair_ = t.get<uint64_t>("pair"), pair_to_ = t.get<uint32_t>("pair_to");
  }
  by_bytes_.reserve(size());
  for (uint32_t id = 0; id < size(); ++id) {
    longest_ = std::max(longest_, piece(id).size());
    if (!piece(id).empty()) by_bytes_.emplace(piece(id), id);
  }
}

uint32_t Tokenizer::token(std::string_view bytes) const {
  const auto found = by_bytes_.find(bytes);
  return found == by_bytes_.end() ? kNone : found->second;
}

std::vector<uint32_t> Tokenizer::code_points(std::string_view text) const {
  std::vector<uint32_t> points;
  points.reserve(text.size());
  for (size_t at = 0; at < text.size();) points.push_back(next_character(text, at));
  if (nfc_) to_nfc(points);
  return points;
}

std::string Tokenizer::normalized(std::string_view text) const {
  std::string out;
  out.reserve(text.size());
  for (uint32_t c : code_points(text)) append_utf8(c, out);
  return out;
}

uint8_t Tokenizer::combining(uint32_t point) const {
  const auto* found = std::lower_bound(marks_of_.begin(), marks_of_.end(), point);
  return found != marks_of_.end() && *found == point ? mark_class_[found - marks_of_.begin()] : 0;
}

void Tokenizer::decompose(uint32_t point, std::vector<uint32_t>& out) const {
  if (point >= kS && point < kS + kSs) {
    const uint32_t s = point - kS;
    out.push_back(kL + s / (kVs * kTs));
    out.push_back(kV + s % (kVs * kTs) / kTs);
    if (s % kTs) out.push_back(kT + s % kTs);
    return;
  }
  const auto* found = std::lower_bound(apart_.begin(), apart_.end(), point);
  if (found == apart_.end() || *found != point) {
    out.push_back(point);
    return;
  }
  const size_t i = found - apart_.begin();
  out.insert(out.end(), apart_to_.data + apart_at_[i], apart_to_.data + apart_at_[i + 1]);
}

uint32_t Tokenizer::composed(uint32_t a, uint32_t b) const {
  if (a >= kL && a < kL + kLs && b >= kV && b < kV + kVs) return kS + ((a - kL) * kVs + (b - kV)) * kTs;
  if (a >= kS && a < kS + kSs && (a - kS) % kTs == 0 && b > kT && b < kT + kTs) return a + (b - kT);
  const uint64_t key = static_cast<uint64_t>(a) << 32 | b;
  const auto* found = std::lower_bound(pair_.begin(), pair_.end(), key);
  return found != pair_.end() && *found == key ? pair_to_[found - pair_.begin()] : kNone;
}

// Unicode Standard Annex 15: decompose, put marks in order, compose.
void Tokenizer::to_nfc(std::vector<uint32_t>& points) const {
  // below U+0300 nothing combines, and what decomposes there is composed again
  if (std::all_of(points.begin(), points.end(), [](uint32_t c) { return c < 0x300 || (c >= kS && c < kS + kSs); }))
    return;
  std::vector<uint32_t> apart;
  apart.reserve(points.size() * 2);
  for (uint32_t c : points) decompose(c, apart);
  for (size_t i = 0; i < apart.size();) {
    if (!combining(apart[i])) {
      ++i;
      continue;
    }
    size_t end = i;
    while (end < apart.size() && combining(apart[end])) ++end;
    std::stable_sort(apart.begin() + i, apart.begin() + end, [this](uint32_t a, uint32_t b) {
      return combining(a) < combining(b);
    });
    i = end;
  }
  points.clear();
  size_t starter = kNone;
  uint8_t before = 0;
  for (uint32_t c : apart) {
    const uint8_t mark = combining(c);
    const bool adjacent = starter != kNone && starter + 1 == points.size();
    const bool blocked = starter == kNone || (!adjacent && (before >= mark || before == 0));
    const uint32_t whole = blocked ? kNone : composed(points[starter], c);
    if (whole != kNone) {
      points[starter] = whole;
      continue;
    }
    if (mark == 0) starter = points.size();
    before = mark;
    points.push_back(c);
  }
}

size_t Tokenizer::match_sequence(
    const std::vector<uint8_t>& kinds, size_t at, const Element* e, const Element* end) const {
  if (e == end) return at;
  const auto holds = [&](size_t i) { return i < kinds.size() && (e->kinds >> kinds[i] & 1); };
  if (e->kind) return holds(at) == (e->kind == 2) ? match_sequence(kinds, at, e + 1, end) : kNone;
  size_t count = 0;
  while (count < e->most && holds(at + count)) ++count;
  // greedy: the longest first, then back
  for (size_t n = count + 1; n-- > e->least;) {
    const size_t after = match_sequence(kinds, at + n, e + 1, end);
    if (after != kNone) return after;
  }
  return kNone;
}

void Tokenizer::encode(std::string_view text, std::vector<uint32_t>& ids) const {
  const auto points = code_points(text);
  std::vector<uint8_t> kinds(points.size());
  for (size_t i = 0; i < points.size(); ++i)
    kinds[i] = kind_of_[static_cast<size_t>(block_of_[points[i] / 256]) * 256 + points[i] % 256];
  std::string piece;
  size_t begin = 0;  // of what no alternative has taken yet
  const auto cut = [&](size_t from, size_t to) {
    piece.clear();
    for (size_t i = from; i < to; ++i) append_utf8(points[i], piece);
    if (!piece.empty()) merge(piece, ids);
  };
  for (size_t at = 0; at < points.size();) {
    size_t end = kNone;
    for (const auto& a : alternatives_) {
      end = match_sequence(kinds, at, a.data(), a.data() + a.size());
      if (end != kNone && end > at) break;
      end = kNone;
    }
    if (end == kNone) {
      ++at;
      continue;
    }
    cut(begin, at);
    cut(at, end);
    begin = at = end;
  }
  cut(begin, points.size());
}

bool Tokenizer::rank(uint32_t left, uint32_t right, uint32_t& rank, uint32_t& to) const {
  const uint64_t key = static_cast<uint64_t>(left) << 32 | right;
  const auto* found = std::lower_bound(merge_pair_.begin(), merge_pair_.end(), key);
  if (found == merge_pair_.end() || *found != key) return false;
  rank = merge_rank_[found - merge_pair_.begin()];
  to = merge_to_[found - merge_pair_.begin()];
  return true;
}

// Always the merge of the lowest rank, of equal ones the leftmost; through a heap, so that a word of ten thousand letters
// is no trouble.
void Tokenizer::merge(std::string_view piece, std::vector<uint32_t>& ids) const {
  if (whole_words_) {
    if (const uint32_t whole = token(piece); whole != kNone) {
      ids.push_back(whole);
      return;
    }
  }
  struct Symbol {
    uint32_t id;
    int32_t before, after;
  };
  struct Candidate {
    uint32_t rank;
    int32_t place;
    uint32_t left, right, to;
    bool operator<(const Candidate& o) const { return rank != o.rank ? rank > o.rank : place > o.place; }
  };
  const auto n = static_cast<int32_t>(piece.size());
  std::vector<Symbol> symbols(piece.size());
  for (int32_t i = 0; i < n; ++i)
    symbols[i] = {byte_token_[static_cast<uint8_t>(piece[i])], i - 1, i + 1 < n ? i + 1 : -1};
  std::priority_queue<Candidate> heap;
  const auto offer = [&](int32_t i) {
    if (i < 0 || symbols[i].after < 0) return;
    Candidate c{0, i, symbols[i].id, symbols[symbols[i].after].id, 0};
    if (rank(c.left, c.right, c.rank, c.to)) heap.push(c);
  };
  for (int32_t i = 0; i + 1 < n; ++i) offer(i);
  while (!heap.empty()) {
    const Candidate c = heap.top();
    heap.pop();
    Symbol& left = symbols[c.place];
    // one of the two was merged away since
    if (left.id != c.left || left.after < 0 || symbols[left.after].id != c.right) continue;
    Symbol& right = symbols[left.after];
    left.id = c.to;
    right.id = kNone;
    left.after = right.after;
    if (left.after >= 0) symbols[left.after].before = c.place;
    offer(left.before);
    offer(c.place);
  }
  for (int32_t i = 0; i >= 0 && n; i = symbols[i].after) ids.push_back(symbols[i].id);
}

}  // namespace gori
