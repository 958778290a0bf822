// gori-call: one utterance from the command line, or one a line from standard input, answered as JSON.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "gori.h"

namespace {

constexpr char kUsage[] =
    "usage: gori-call [options] ARTIFACT [UTTERANCE]\n"
    "\n"
    "Answers UTTERANCE with the function calls that the artifact makes of it; without one, each line of standard input.\n"
    "\n"
    "  --gleo              Gleo's action JSON: packageName, action, actionParameters\n"
    "  --text              what the model says, unconstrained\n"
    "  --threads N         default 1\n"
    "  --most N            tokens of an answer at most; default 256\n"
    "  --temperature T     sample; default 0: the likeliest token each time\n"
    "  --top-k K  --top-p P  --seed N\n"
    "  --timing            a line of JSON on standard error for each answer\n"
    "  --tokens            the utterances' tokens in place of answers\n"
    "  --save-prefix FILE  write the prompt's prefix for the artifact's prefix.bin and end\n"
    "  --no-prefix         do not read prefix.bin\n"
    "  --lookup WHEN       read ahead what was said while a value is copied: auto (while it pays), always, never\n"
    "  --version\n"
    "\n"
    "Example: gori-call demo/export/executorch \"운전석 열선 2단계\"\n"
    "Exit: 0 answered, 1 an error in one sentence, 2 usage.\n";

struct Arguments {
  gori_open_options open{sizeof(gori_open_options), 0, 1, GORI_LOOKUP_MEASURED};
  gori_call_options call{sizeof(gori_call_options), GORI_FORM_CALLS, 0, 0.0f, 0, 1.0f, 0};
  bool timing = false, tokens = false;
  const char* save = nullptr;
  std::vector<const char*> places;
};

[[noreturn]] void usage(const std::string& why) {
  std::fprintf(stderr, "%s\n%s", why.c_str(), kUsage);
  std::exit(2);
}

double number(const char* name, const char* text) {
  char* end = nullptr;
  const double value = text ? std::strtod(text, &end) : 0;
  if (!text || end == text || *end) usage(std::string(name) + " needs a number");
  return value;
}

Arguments parsed(int count, char** values) {
  Arguments a;
  for (int i = 1; i < count; ++i) {
    const std::string name = values[i];
    const char* next = i + 1 < count ? values[i + 1] : nullptr;
    const auto taken = [&] { return number(name.c_str(), (++i, next)); };
    if (name == "--help" || name == "-h") {
      std::fputs(kUsage, stdout);
      std::exit(0);
    } else if (name == "--version") {
      std::printf("gori-call %s\n", gori_version());
      std::exit(0);
    } else if (name == "--gleo") {
      a.call.form = GORI_FORM_GLEO;
    } else if (name == "--text") {
      a.call.form = GORI_FORM_TEXT;
    } else if (name == "--timing") {
      a.timing = true;
    } else if (name == "--tokens") {
      a.tokens = true;
    } else if (name == "--no-prefix") {
      a.open.use_prefix = 0;
    } else if (name == "--lookup") {
      const std::string when = next ? next : "";
      if (when != "auto" && when != "always" && when != "never") usage("--lookup is auto, always or never");
      a.open.lookup = when == "auto" ? GORI_LOOKUP_MEASURED : when == "always" ? GORI_LOOKUP_ALWAYS : GORI_LOOKUP_NEVER;
      ++i;
    } else if (name == "--threads") {
      a.open.threads = static_cast<int32_t>(taken());
    } else if (name == "--most") {
      a.call.most = static_cast<int32_t>(taken());
    } else if (name == "--temperature") {
      a.call.temperature = static_cast<float>(taken());
    } else if (name == "--top-k") {
      a.call.top_k = static_cast<int32_t>(taken());
    } else if (name == "--top-p") {
      a.call.top_p = static_cast<float>(taken());
    } else if (name == "--seed") {
      a.call.seed = static_cast<uint64_t>(taken());
    } else if (name == "--save-prefix") {
      if (!next) usage("--save-prefix needs a file");
      a.save = next, ++i;
    } else if (name.size() > 1 && name[0] == '-' && name != "--") {
      usage("unknown option " + name);
    } else if (name != "--") {
      a.places.push_back(values[i]);
    }
  }
  if (a.places.empty()) usage("an artifact is needed");
  if (a.places.size() > 2) usage("one utterance, in quotes");
  return a;
}

int failed() {
  std::fprintf(stderr, "Error: %s\n", gori_error());
  return 1;
}

gori_status print_tokens(gori_session* handle, const std::string& text) {
  std::vector<uint32_t> ids(text.size() * 4 + 16);
  size_t count = 0;
  const gori_status status = gori_tokens(handle, text.data(), text.size(), ids.data(), ids.size(), &count);
  if (status != GORI_OK) return status;
  for (size_t i = 0; i < count; ++i) std::printf(i ? " %u" : "%u", ids[i]);
  std::putchar('\n');
  return status;
}

gori_status print_answer(gori_session* handle, const Arguments& a, const std::string& utterance, std::vector<char>& buffer) {
  gori_result r{};
  r.size = sizeof r;
  r.text = buffer.data(), r.capacity = buffer.size();
  gori_status status = gori_call(handle, utterance.c_str(), &a.call, &r);
  if (status == GORI_ERROR_CAPACITY) {
    buffer.resize(r.length + 1);
    r.text = buffer.data(), r.capacity = buffer.size();
    status = gori_call(handle, utterance.c_str(), &a.call, &r);
  }
  if (status != GORI_OK) return status;
  std::printf("%s\n", r.text);
  if (a.timing)
    std::fprintf(
        stderr,
        "{\"prompt_tokens\": %u, \"prefix_tokens\": %u, \"answer_tokens\": %u, \"forced_tokens\": %u, "
        "\"guessed_tokens\": %u, \"confirmed_tokens\": %u, "
        "\"first_token_ms\": %.3f, \"total_ms\": %.3f}\n",
        r.prompt_tokens, r.prefix_tokens, r.answer_tokens, r.forced_tokens, r.guessed_tokens, r.confirmed_tokens,
        r.first_token_ms, r.total_ms);
  return status;
}

}  // namespace

int main(int count, char** values) {
  const Arguments a = parsed(count, values);
  gori_session* handle = nullptr;
  if (gori_open(a.places[0], &a.open, &handle) != GORI_OK) return failed();
  int status = 0;
  if (a.save) {
    status = gori_save_prefix(handle, a.save) == GORI_OK ? 0 : failed();
  } else {
    std::vector<char> buffer(1 << 16);
    const auto one = [&](const std::string& text) {
      return a.tokens ? print_tokens(handle, text) : print_answer(handle, a, text, buffer);
    };
    if (a.places.size() == 2) {
      status = one(a.places[1]) == GORI_OK ? 0 : failed();
    } else {
      // an utterance that cannot be answered is a line, too: what reads the lines keeps count
      for (std::string line; std::getline(std::cin, line); std::fflush(stdout))
        if (one(line) != GORI_OK) status = failed(), std::puts("null");
    }
  }
  gori_close(handle);
  return status;
}
