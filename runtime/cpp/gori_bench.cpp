// gori-bench: how fast an artifact's program is in this runner, without text: one JSON object, every time taken.
//
// What `python -m gori.runtime.bench_round` prints of an engine in Python, so that `gori bench` can set them side by side.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gori.h"
#include "model.h"

namespace {

using Clock = std::chrono::steady_clock;

constexpr char kUsage[] =
    "usage: gori-bench [--threads N] [--prompt N]... [--decode N] ARTIFACT\n"
    "\n"
    "Times whole prompts of N tokens, and single tokens after a prompt of 32: milliseconds, as one JSON object.\n"
    "ARTIFACT is a directory with model.pte, or a .pte. Default: one thread, 64 tokens decoded, no prompt.\n"
    "\n"
    "Example: gori-bench --prompt 128 demo/export/executorch\n"
    "Exit: 0 timed, 1 an error in one sentence, 2 usage.\n";

// each thing is timed again until it took so long in all, at least and at most so often; once before is not counted
constexpr size_t kFewest = 2, kMost = 25, kFirstTokenPrompt = 32;
constexpr double kLongEnoughMs = 250;

struct Arguments {
  uint32_t threads = 1;
  size_t decode = 64;
  std::vector<size_t> prompts;
  std::string artifact;
};

[[noreturn]] void usage(const std::string& why) {
  std::fprintf(stderr, "%s\n%s", why.c_str(), kUsage);
  std::exit(2);
}

Arguments parsed(int count, char** values) {
  Arguments a;
  for (int i = 1; i < count; ++i) {
    const std::string name = values[i];
    if (name == "--help" || name == "-h") {
      std::fputs(kUsage, stdout);
      std::exit(0);
    }
    if (name[0] != '-') {
      if (!a.artifact.empty()) usage("one artifact, please");
      a.artifact = name;
      continue;
    }
    if (name != "--threads" && name != "--prompt" && name != "--decode") usage("unknown option " + name);
    char* end = nullptr;
    const char* text = ++i < count ? values[i] : "";
    const long value = std::strtol(text, &end, 10);
    if (end == text || *end || value < 1) usage(name + " needs a whole number from 1 on");
    if (name == "--threads") a.threads = static_cast<uint32_t>(value);
    if (name == "--prompt") a.prompts.push_back(static_cast<size_t>(value));
    if (name == "--decode") a.decode = static_cast<size_t>(value);
  }
  if (a.artifact.empty()) usage("an artifact is needed");
  return a;
}

double took(const std::function<void()>& run) {
  const auto began = Clock::now();
  run();
  return std::chrono::duration<double, std::milli>(Clock::now() - began).count();
}

void repeated(const std::function<void()>& measure, const std::function<void()>& forget) {
  measure();
  forget();
  double total = 0;
  for (size_t n = 0; n < kFewest || (n < kMost && total < kLongEnoughMs); ++n) total += took(measure);
}

void print_list(const std::vector<double>& values) {
  std::putchar('[');
  for (size_t i = 0; i < values.size(); ++i) std::printf("%s%.5f", i ? ", " : "", values[i]);
  std::putchar(']');
}

// a line of /proc/self/status in MiB; 0 where the system has none
double memory(const char* name) {
  double kib = 0;
  if (std::FILE* f = std::fopen("/proc/self/status", "r")) {
    char line[256];
    while (std::fgets(line, sizeof line, f))
      if (!std::strncmp(line, name, std::strlen(name))) kib = std::atof(line + std::strlen(name));
    std::fclose(f);
  }
  return kib / 1024;
}

size_t likeliest(const float* logits, size_t count) {
  return static_cast<size_t>(std::max_element(logits, logits + count) - logits);
}

void bench(const Arguments& a) {
  namespace fs = std::filesystem;
  const std::string file = fs::is_directory(a.artifact) ? a.artifact + "/model.pte" : a.artifact;
  if (!fs::is_regular_file(file)) throw gori::Error(GORI_ERROR_FILE, file + " does not exist: name an artifact of `gori export`");
  const double before = memory("VmRSS:");
  std::unique_ptr<gori::Model> model;
  const double load = took([&] { model = std::make_unique<gori::Model>(file, a.threads); });
  gori::Model& m = *model;
  std::mt19937 random(0);
  std::vector<uint32_t> ids(m.context());
  for (auto& id : ids) id = static_cast<uint32_t>(random() % m.vocabulary());
  const size_t first = std::min<size_t>(kFirstTokenPrompt, m.context() / 2);
  const size_t decode = std::min<size_t>(a.decode, m.context() - first);

  std::string skipped, comma;
  std::vector<std::pair<size_t, std::vector<double>>> prefills;
  for (size_t count : a.prompts) {
    if (count > m.context()) {
      skipped += (skipped.empty() ? "" : ", ") + std::to_string(count);
      continue;
    }
    std::vector<double> times;
    repeated([&] { m.rewind(0), times.push_back(took([&] { m.run(ids.data(), count); })); }, [&] { times.clear(); });
    prefills.emplace_back(count, times);
  }
  std::vector<double> to_first, tokens;
  size_t chosen = 0;  // printed, so that the choice is not left out
  const auto answer = [&] {
    m.rewind(0);
    to_first.push_back(took([&] { chosen = likeliest(m.run(ids.data(), first), m.vocabulary()); }));
    for (size_t i = 0; i < decode; ++i) tokens.push_back(took([&] { m.run(&ids[first + i], 1); }));
  };
  repeated(answer, [&] { to_first.clear(), tokens.clear(); });

  std::printf(
      "{\"engine\": \"gori-bench\", \"engine_version\": \"%s\", \"threads\": %u, \"file_bytes\": %ju, \"context\": %u, "
      "\"stand_in\": false, \"load_ms\": %.3f, \"rss_mib\": %.2f, \"peak_rss_mib\": %.2f, \"prompt_skipped\": [%s], "
      "\"first_token_prompt\": %zu, \"decode_tokens\": %zu, \"first_token\": %zu, \"prefill_ms\": {",
      GORI_VERSION, m.threads(), static_cast<uintmax_t>(fs::file_size(file)), m.context(), load,
      std::max(0.0, memory("VmHWM:") - before), memory("VmHWM:"), skipped.c_str(), first, decode, chosen);
  for (const auto& [count, times] : prefills) {
    std::printf("%s\"%zu\": ", comma.c_str(), count);
    print_list(times);
    comma = ", ";
  }
  std::fputs("}, \"first_token_ms\": ", stdout);
  print_list(to_first);
  std::fputs(", \"decode_ms\": ", stdout);
  print_list(tokens);
  std::puts("}");
}

}  // namespace

int main(int count, char** values) {
  const Arguments a = parsed(count, values);
  try {
    bench(a);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "Error: %s\n", e.what());
    return 1;
  }
  return 0;
}
