#include "answer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>

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

// Bytes of whole characters at the beginning of `text`, which ends in the middle of one at worst.
size_t whole_characters(std::string_view text) {
  for (size_t back = 1; back <= 4 && back <= text.size(); ++back) {
    const auto byte = static_cast<uint8_t>(text[text.size() - back]);
    if ((byte & 0xC0) == 0x80) continue;
    const size_t needed = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC0 ? 2 : 1;
    return needed > back ? text.size() - back : text.size();
  }
  return text.size();
}

}  // namespace

Answerer::Answerer(const std::string& directory, const gori_open_options& options)
    : tables_(directory + "/runner.bin"),
      tokenizer_(tables_),
      model_(directory + "/model.pte", static_cast<uint32_t>(options.threads)),
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
  text_.reserve(4096);
  said_.reserve(4096);
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
  model_.load(saved.get<uint32_t>("caches"), ids.size);
  prefix_ = ids.size;
}

void Answerer::save_prefix(const std::string& path) {
  const auto caches = model_.saved(prefix_);
  write_tables(path, {{"ids", before_}, {"caches", {caches.data(), caches.size()}}});
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
  out.answer_tokens = out.forced_tokens = 0;
  out.first_token_ms = 0;
  model_.rewind(prefix_);
  pending_ = prompt_;
  tokens_.clear();
  text_.clear();
  random_.seed(options.seed);
  const auto most = static_cast<uint32_t>(options.most > 0 ? options.most : 256);
  // the end mark is chosen and not read, so it may stand one past the context
  const auto budget = std::min<uint32_t>(most, static_cast<uint32_t>(model_.context() - read + 1));
  if (form == GORI_FORM_TEXT) {
    free(budget, options, on_text, out);
  } else {
    said_ = tokenizer_.normalized(utterance);
    constraint_->begin(said_, budget);
    constrained(budget, options, out);
    write_calls(form);
    if (on_text && !on_text(text_)) throw Error(GORI_CANCELLED, "the answer was cancelled");
  }
  out.total_ms = now_ms() - began_ms_;
}

// Reads what is pending; logits of the last of it.
const float* Answerer::ask(gori_result& out) {
  if (cancelled) throw Error(GORI_CANCELLED, "the answer was cancelled");
  const float* logits = model_.run(pending_.data(), pending_.size());
  pending_.clear();
  if (out.first_token_ms == 0) out.first_token_ms = now_ms() - began_ms_;
  return logits;
}

void Answerer::constrained(uint32_t budget, const gori_call_options& options, gori_result& out) {
  for (uint32_t i = 0; i < budget && !constraint_->done(); ++i) {
    constraint_->allow();
    uint32_t token = constraint_->forced();
    if (token == Tokenizer::kNone)
      token = choose(ask(out), options);
    else
      ++out.forced_tokens;
    constraint_->advance(token);
    tokens_.push_back(token);
    pending_.push_back(token);
  }
  out.answer_tokens = static_cast<uint32_t>(tokens_.size());
}

void Answerer::free(uint32_t budget, const gori_call_options& options, const OnText& on_text, gori_result& out) {
  size_t given = 0;
  for (uint32_t i = 0; i < budget && model_.length() + pending_.size() <= model_.context(); ++i) {
    const uint32_t token = choose(ask(out), options);
    tokens_.push_back(token);
    if (std::find(ends_.begin(), ends_.end(), token) != ends_.end()) break;
    if (token < tokenizer_.size()) text_ += tokenizer_.piece(token);
    const size_t whole = whole_characters(text_);
    if (on_text && whole > given && !on_text(std::string_view(text_).substr(given, whole - given)))
      throw Error(GORI_CANCELLED, "the answer was cancelled");
    given = whole;
    pending_.push_back(token);
  }
  out.answer_tokens = static_cast<uint32_t>(tokens_.size());
  text_.resize(given);
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
    if (sampled) ranked_.emplace_back(logits[id], id);
    if (token == Tokenizer::kNone || logits[id] > best || (logits[id] == best && id < token)) best = logits[id], token = id;
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
