// The loop that makes an answer: prompt, then token by token, constrained to calls or free. Text in, text out.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "gori.h"
#include "grammar.h"
#include "lookup.h"
#include "model.h"
#include "tokenizer.h"

namespace gori {

// Pieces of text as they become whole; false stops.
using OnText = std::function<bool(std::string_view)>;

class Answerer {
 public:
  Answerer(const std::string& directory, const gori_open_options& options);

  // Answers; the text lies in `text()` until the next answer. Error with GORI_CANCELLED where it was stopped.
  void answer(std::string_view utterance, const gori_call_options& options, const OnText& on_text, gori_result& out);
  const std::string& text() const { return text_; }

  void save_prefix(const std::string& path);
  void describe(gori_facts& out) const;

  Tokenizer& tokenizer() { return tokenizer_; }
  std::atomic<bool> cancelled{false};

 private:
  void constrained(uint32_t budget, const gori_call_options& options, gori_result& out);
  void free(uint32_t budget, const gori_call_options& options, const OnText& on_text, gori_result& out);
  uint32_t choose(const float* logits, const gori_call_options& options);
  const float* ask(gori_result& out);
  void said(uint32_t token, gori_result& out);
  void settle();
  void write_calls(gori_form form);
  void load_prefix(const std::string& path);

  Tables tables_;
  Tokenizer tokenizer_;
  std::string program_;
  Model model_;
  std::unique_ptr<Grammar> grammar_;
  std::unique_ptr<Constraint> constraint_;
  Lookup lookup_;
  std::vector<uint32_t> guesses_;  // read behind what is certain
  size_t confirmed_ = 0;           // of them
  const float* logits_ = nullptr;  // of the last certain token; null where that is still pending
  View<uint32_t> before_, after_;
  std::string lead_, text_, said_, bytes_;
  std::vector<uint32_t> ends_, pending_, tokens_, prompt_;
  std::vector<std::pair<float, uint32_t>> ranked_;
  std::mt19937_64 random_;
  size_t prefix_ = 0;
  double began_ms_ = 0;
};

}  // namespace gori
