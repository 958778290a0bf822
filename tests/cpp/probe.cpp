// The runner's tokenizer and grammar behind plain functions, for tests in Python: what the C interface does not show. Needs a
// runner.bin and no model, and is compiled without ExecuTorch.

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "attention.h"
#include "grammar.h"
#include "sound.h"
#include "tables.h"
#include "tokenizer.h"

namespace {

struct Probe {
  explicit Probe(const char* path) : tables(path), tokenizer((gori::check_text(tables), tables)) {
    if (!tables.has("functions")) return;
    gori::check_grammar(tables);
    grammar = std::make_unique<gori::Grammar>(tables, tokenizer);
    constraint = std::make_unique<gori::Constraint>(*grammar);
  }
  gori::Tables tables;
  gori::Tokenizer tokenizer;
  std::unique_ptr<gori::Grammar> grammar;
  std::unique_ptr<gori::Constraint> constraint;
};

std::string failure;

// What a body returns, or `otherwise` where it throws.
template <typename T, typename Body>
T guarded(T otherwise, Body&& body) {
  try {
    failure.clear();
    return body();
  } catch (const std::exception& e) {
    failure = e.what();
    return otherwise;
  }
}

template <typename T>
size_t copied(const T& from, typename T::value_type* to, size_t capacity) {
  std::copy_n(from.begin(), std::min(from.size(), capacity), to);
  return from.size();
}

}  // namespace

extern "C" {

Probe* probe_open(const char* path) {
  return guarded<Probe*>(nullptr, [&] { return new Probe(path); });
}

void probe_close(Probe* p) { delete p; }

const char* probe_error() { return failure.c_str(); }

size_t probe_tokens(Probe* p, const char* text, size_t bytes, uint32_t* ids, size_t capacity) {
  std::vector<uint32_t> found;
  p->tokenizer.encode({text, bytes}, found);
  return copied(found, ids, capacity);
}

size_t probe_normalized(Probe* p, const char* text, size_t bytes, char* out, size_t capacity) {
  return copied(p->tokenizer.normalized({text, bytes}), out, capacity);
}

int probe_begin(Probe* p, const char* said, size_t bytes, uint32_t budget) {
  return guarded(-1, [&] { return p->constraint->begin({said, bytes}, budget), 0; });
}

// What may follow: tokens one by one, then those of the mask; -1 in `forced` where more than one may.
size_t probe_allowed(Probe* p, uint32_t* ids, size_t capacity, int64_t* forced) {
  p->constraint->allow();
  std::vector<uint32_t> found = p->constraint->listed();
  if (const uint32_t* mask = p->constraint->mask())
    for (uint32_t t = 0; t < p->grammar->mask_words * 32; ++t)
      if (mask[t / 32] >> t % 32 & 1) found.push_back(t);
  const uint32_t only = p->constraint->forced();
  *forced = only == gori::Tokenizer::kNone ? -1 : int64_t{only};
  return copied(found, ids, capacity);
}

int probe_advance(Probe* p, uint32_t token) {
  return guarded(-1, [&] { return p->constraint->advance(token), p->constraint->done() ? 1 : 0; });
}

void probe_attention(
    const size_t* shape, size_t start, const float* q, const float* keys, const float* values, float scale, float* y) {
  std::vector<float> scores(gori::scores_for(start + shape[0]));
  gori::attention({shape[0], shape[1], shape[2], shape[3]}, start, q, keys, values, scale, scores.data(), y);
}

}  // extern "C"
