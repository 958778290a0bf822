#include "answer.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "sound.h"

namespace gori {
namespace {

double now_ms() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void append_json(std::string_view s, std::string& out) {
  out += '"';
  for (char c : s) {
    const auto byte = static_cast<uint8_t>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (byte < 0x20 || byte == 0x7F) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", byte);
      out += escaped;
    } else {
      out += c;
    }
  }
  out += '"';
}

// Moves the characters at the beginning of `bytes` to `text`, what is none as U+FFFD; an end that may still become one stays
// unless this is the `last` of them.
void move_characters(std::string& bytes, std::string& text, bool last) {
  size_t at = 0;
  while (at < bytes.size()) {
    size_t next = at;
    const uint32_t character = next_character(bytes, next);
    const auto lead = static_cast<uint8_t>(bytes[at]);
    const size_t whole = lead >= 0xF5 ? 1 : lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : lead >= 0xC2 ? 2 : 1;
    if (!last && next == bytes.size() && next - at < whole) break;
    append_utf8(character, text);
    at = next;
  }
  bytes.erase(0, at);
}

// Of the program: its size and what stands at 32 places of it. Another model's weights differ at all of them, and reading
// them does not fetch a large file from the disk.
std::vector<uint32_t> fingerprint(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "rb");
  if (!file) throw Error(GORI_ERROR_FILE, "cannot read " + path + ": " + std::strerror(errno));
  std::fseek(file, 0, SEEK_END);
  const long size = std::ftell(file);
  uint64_t hash = 0xCBF29CE484222325;  // FNV-1a
  unsigned char block[256];
  for (long i = 0; i < 32; ++i) {
    std::fseek(file, size / 32 * i, SEEK_SET);
    const size_t count = std::fread(block, 1, sizeof block, file);
    for (size_t b = 0; b < count; ++b) hash = (hash ^ block[b]) * 0x100000001B3;
  }
  std::fclose(file);
  const auto bytes = static_cast<uint64_t>(size);
  return {static_cast<uint32_t>(bytes), static_cast<uint32_t>(bytes >> 32), static_cast<uint32_t>(hash), static_cast<uint32_t>(hash >> 32)};
}

// The tables of a directory, after every index in them was checked.
const Tables& sound(const Tables& tables) {
  check_text(tables);
  if (tables.has("functions")) check_grammar(tables);
  return tables;
}

}  // namespace

Answerer::Answerer(const std::string& directory, const gori_open_options& options)
    : tables_(directory + "/runner.bin"),
      tokenizer_(sound(tables_)),
      program_(directory + "/model.pte"),
      model_(program_, static_cast<uint32_t>(options.threads)),
      lookup_(tokenizer_, model_.rows() - 1, static_cast<gori_lookup>(options.lookup)),
      before_(tables_.get<uint32_t>("prompt_before")),
      after_(tables_.get<uint32_t>("prompt_after")) {
  const auto lead = tables_.get<uint8_t>("prompt_lead");
  lead_.assign(reinterpret_cast<const char*>(lead.data), lead.size);
  if (model_.vocabulary() < tokenizer_.size())
    throw Error(GORI_ERROR_FILE, "runner.bin has " + std::to_string(tokenizer_.size()) + " tokens and model.pte " +
                                     std::to_string(model_.vocabulary()) + ": they are of two models, export it again");
  if (tables_.has("functions")) {
    grammar_ = std::make_unique<Grammar>(tables_, tokenizer_);
    constraint_ = std::make_unique<Constraint>(*grammar_);
  }
  const auto marks = tables_.get<uint32_t>("marks");
  ends_.assign(marks.data + 2, marks.end());
  for (auto* v : {&pending_, &tokens_, &prompt_}) v->reserve(model_.context() + 1);
  const size_t longest = static_cast<size_t>(model_.context()) * std::max<size_t>(tokenizer_.longest(), 3);
  // JSON writes a control character in six bytes, and names besides; pages that are never written cost nothing
  text_.reserve(6 * longest + (size_t{1} << 14)), said_.reserve(longest), bytes_.reserve(tokenizer_.longest() + 4);
  ranked_.reserve(model_.vocabulary());
  if (options.use_prefix) load_prefix(directory + "/prefix.bin");
  if (prefix_ < before_.size) {
    model_.rewind(0);
    model_.run(before_.data, before_.size);
    prefix_ = before_.size;
  }
}

void Answerer::load_prefix(const std::string& path) {
  if (std::FILE* file = std::fopen(path.c_str(), "rb"))
    std::fclose(file);
  else
    return;
  const Tables saved(path);
  const auto ids = saved.get<uint32_t>("ids");
  if (ids.size != before_.size || !std::equal(ids.begin(), ids.end(), before_.begin()))
    throw Error(GORI_ERROR_FILE, path + " was saved for another prompt: save it again");
  const auto program = saved.get<uint32_t>("program");
  const auto known = fingerprint(program_);
  if (program.size != known.size() || !std::equal(program.begin(), program.end(), known.begin()))
    throw Error(GORI_ERROR_FILE, path + " was saved from another model.pte: save it again");
  model_.load(saved.get<uint32_t>("caches"), ids.size);
  prefix_ = ids.size;
}

void Answerer::save_prefix(const std::string& path) {
  const auto caches = model_.saved(prefix_);
  const auto program = fingerprint(program_);
  write_tables(
      path, {{"ids", before_}, {"program", {program.data(), program.size()}}, {"caches", {caches.data(), caches.size()}}});
}

void Answerer::describe(gori_facts& out) const {
  out.vocabulary = model_.vocabulary(), out.context = model_.context(), out.chunk = model_.chunk();
  out.threads = model_.threads();
  out.functions = grammar_ ? static_cast<uint32_t>(grammar_->functions.size) : 0;
  out.prefix_tokens = static_cast<uint32_t>(prefix_);
}

void Answerer::answer(
    std::string_view utterance, const gori_call_options& options, const OnText& on_text, gori_result& out) {
  began_ms_ = now_ms();
  cancelled = false;
  const auto form = static_cast<gori_form>(options.form);
  if (form != GORI_FORM_TEXT && !grammar_)
    throw Error(GORI_ERROR_NO_CALL, "this model was not trained on calls, runner.bin has no grammar: ask for text");
  prompt_.clear();
  said_.assign(lead_).append(utterance);
  tokenizer_.encode(said_, prompt_);
  prompt_.insert(prompt_.end(), after_.begin(), after_.end());
  const size_t read = prefix_ + prompt_.size();
  if (read + 2 > model_.context())
    throw Error(GORI_ERROR_TOO_LONG, "the prompt has " + std::to_string(read) + " tokens, the context holds " +
                                         std::to_string(model_.context()) +
                                         ": shorten the utterance or export with a larger context");
  out.prompt_tokens = static_cast<uint32_t>(read);
  out.prefix_tokens = static_cast<uint32_t>(prefix_);
  out.answer_tokens = out.forced_tokens = out.guessed_tokens = out.confirmed_tokens = 0;
  out.first_token_ms = 0;
  model_.rewind(prefix_);
  guesses_.clear();
  confirmed_ = 0, logits_ = nullptr;
  pending_.assign(prompt_.begin(), prompt_.end());
  tokens_.clear();
  text_.clear();
  random_.seed(options.seed);
  const auto most = static_cast<uint32_t>(options.most > 0 ? options.most : 256);
  // the end mark is chosen and not read, so it may stand one past the context
  const auto budget = std::min<uint32_t>(most, static_cast<uint32_t>(model_.context() - read + 1));
  if (form == GORI_FORM_TEXT) {
    free(budget, options, on_text, out);
  } else {
    constraint_->begin(tokenizer_.normalized(utterance), budget);
    constrained(budget, options, out);
    write_calls(form);
    if (on_text && !on_text(text_)) throw Error(GORI_CANCELLED, "the answer was cancelled");
  }
  out.total_ms = now_ms() - began_ms_;
}

// Reads what is pending, and guesses of what follows behind it; logits of the last that is certain.
const float* Answerer::ask(gori_result& out) {
  if (cancelled) throw Error(GORI_CANCELLED, "the answer was cancelled");
  settle();
  const bool one = pending_.size() == 1 && !tokens_.empty();
  const size_t room = model_.context() - model_.length() - pending_.size();
  if (one) lookup_.guess(prompt_, prompt_.size() - after_.size, tokens_, room, guesses_);
  pending_.insert(pending_.end(), guesses_.begin(), guesses_.end());
  const double began = now_ms();
  logits_ = model_.run(pending_.data(), pending_.size(), guesses_.size() + 1);
  if (one) lookup_.took(now_ms() - began, !guesses_.empty());
  out.guessed_tokens += static_cast<uint32_t>(guesses_.size());
  pending_.clear();
  if (out.first_token_ms == 0) out.first_token_ms = now_ms() - began_ms_;
  return logits_;
}

// Takes guesses that did not come, or were not asked about, out of the history.
void Answerer::settle() {
  model_.rewind(model_.length() - (guesses_.size() - confirmed_));
  guesses_.clear();
  confirmed_ = 0, logits_ = nullptr;
}

// A token of the answer: it was read ahead, or is to be read.
void Answerer::said(uint32_t token, gori_result& out) {
  tokens_.push_back(token);
  if (confirmed_ < guesses_.size() && guesses_[confirmed_] == token) {
    ++confirmed_, ++out.confirmed_tokens;
    lookup_.confirmed();
    logits_ += model_.vocabulary();
    return;
  }
  settle();
  pending_.push_back(token);
}

void Answerer::constrained(uint32_t budget, const gori_call_options& options, gori_result& out) {
  for (uint32_t i = 0; i < budget && !constraint_->done(); ++i) {
    constraint_->allow();
    uint32_t token = constraint_->forced();
    if (token == Tokenizer::kNone)
      token = choose(logits_ ? logits_ : ask(out), options);
    else
      ++out.forced_tokens;
    constraint_->advance(token);
    said(token, out);
  }
  settle();
  out.answer_tokens = static_cast<uint32_t>(tokens_.size());
}

void Answerer::free(uint32_t budget, const gori_call_options& options, const OnText& on_text, gori_result& out) {
  bytes_.clear();
  const auto give = [&](bool last) {
    const size_t given = text_.size();
    move_characters(bytes_, text_, last);
    if (on_text && text_.size() > given && !on_text(std::string_view(text_).substr(given)))
      throw Error(GORI_CANCELLED, "the answer was cancelled");
  };
  const auto room = [&] { return model_.length() + pending_.size() - (guesses_.size() - confirmed_) <= model_.context(); };
  for (uint32_t i = 0; i < budget && room(); ++i) {
    const uint32_t token = choose(logits_ ? logits_ : ask(out), options);
    said(token, out);
    if (std::find(ends_.begin(), ends_.end(), token) != ends_.end()) break;
    if (token < tokenizer_.size()) bytes_ += tokenizer_.piece(token);
    give(false);
  }
  give(true);
  out.answer_tokens = static_cast<uint32_t>(tokens_.size());
}

// Of the tokens that are allowed (all of them in free text): the likeliest, the lowest id of equal ones; or a sample from the
// softmax at a temperature, cut to the top k and to the smallest set of probability top_p (1904.09751).
uint32_t Answerer::choose(const float* logits, const gori_call_options& options) {
  const bool free = options.form == GORI_FORM_TEXT;
  const bool sampled = options.temperature > 0;
  float best = -std::numeric_limits<float>::infinity();
  uint32_t token = Tokenizer::kNone;
  ranked_.clear();
  const auto consider = [&](uint32_t id) {
    // what is no number has no place in an order
    const float logit = std::isnan(logits[id]) ? -std::numeric_limits<float>::infinity() : logits[id];
    if (sampled) ranked_.emplace_back(logit, id);
    if (token == Tokenizer::kNone || logit > best || (logit == best && id < token)) best = logit, token = id;
  };
  if (free) {
    for (uint32_t id = 0; id < model_.vocabulary(); ++id) consider(id);
  } else {
    for (uint32_t id : constraint_->listed()) consider(id);
    if (const uint32_t* mask = constraint_->mask())
      for (size_t w = 0; w < grammar_->mask_words; ++w)
        for (uint32_t bits = mask[w]; bits; bits &= bits - 1)
          consider(static_cast<uint32_t>(w * 32) + static_cast<uint32_t>(__builtin_ctz(bits)));
  }
  if (token == Tokenizer::kNone)
    throw Error(GORI_ERROR_FILE, "runner.bin is damaged: its grammar allows nothing here: export it again");
  if (!sampled) return token;
  std::sort(ranked_.begin(), ranked_.end(), [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  });
  size_t count = ranked_.size();
  if (options.top_k > 0) count = std::min(count, static_cast<size_t>(options.top_k));
  const auto weight = [&](size_t i) {
    return std::exp((static_cast<double>(ranked_[i].first) - static_cast<double>(best)) / static_cast<double>(options.temperature));
  };
  double total = 0;
  for (size_t i = 0; i < count; ++i) total += weight(i);
  const double top_p = options.top_p > 0 && options.top_p < 1 ? static_cast<double>(options.top_p) : 1.0;
  double kept = 0;
  size_t keep = 0;
  while (keep < count && (keep == 0 || kept < top_p * total)) kept += weight(keep++);
  double draw = std::uniform_real_distribution<double>(0, kept)(random_);
  for (size_t i = 0; i < keep; ++i)
    if ((draw -= weight(i)) <= 0) return ranked_[i].second;
  return ranked_[keep - 1].second;
}

// The tokens of an answer as JSON. What the grammar allowed needs no check.
void Answerer::write_calls(gori_form form) {
  const auto& g = *grammar_;
  const bool gleo = form == GORI_FORM_GLEO;
  text_ = "[";
  size_t function = 0;
  bool open = false, first = true;
  const auto close = [&] { text_ += open ? "}}" : ""; };
  for (size_t i = 0; i < tokens_.size();) {
    const uint32_t token = tokens_[i];
    if (const auto found = g.function_of.find(token); found != g.function_of.end()) {
      close();
      text_ += open ? ", {" : "{";
      function = found->second;
      if (gleo && !g.package(function).empty()) {
        text_ += "\"packageName\": ";
        append_json(g.package(function), text_);
        text_ += ", ";
      }
      text_ += gleo ? "\"action\": " : "\"name\": ";
      append_json(g.name_of_function(function), text_);
      text_ += gleo ? ", \"actionParameters\": {" : ", \"arguments\": {";
      open = first = true;
      ++i;
      continue;
    }
    const auto& f = g.functions[function];
    uint32_t argument = f.first;
    while (argument < f.first + f.count && g.arguments[argument].token != token) ++argument;
    if (!open || argument == f.first + f.count) break;  // an end mark
    text_ += first ? "" : ", ";
    first = false;
    append_json(g.name_of_argument(argument), text_);
    text_ += ": ";
    const auto& a = g.arguments[argument];
    const bool list = a.flags & Grammar::kRepeats;
    text_ += list ? "[" : "";
    for (bool more = false; i < tokens_.size() && tokens_[i] == token; more = true) {
      said_.clear();
      for (++i; i < tokens_.size() && !tokenizer_.piece(tokens_[i]).empty(); ++i) said_ += tokenizer_.piece(tokens_[i]);
      text_ += more ? ", " : "";
      const auto value = std::string_view(said_).substr(1);
      if (a.flags & Grammar::kText)
        append_json(value, text_);
      else
        text_ += value;
    }
    text_ += list ? "]" : "";
  }
  close();
  text_ += "]";
}

}  // namespace gori
