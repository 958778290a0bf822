// Many threads on one handle and on several, answers cancelled from outside, for the sanitizers and for a soak.
//
//   gori-stress ARTIFACT ROUNDS THREADS < utterances
//
// Every answer that was not cancelled must be the one that a single thread gave. Prints answers, cancellations, and resident
// memory in KiB after a tenth of the rounds and at the end; exit 1 with a sentence where anything is not as it must be.

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

#include "gori.h"

namespace {

std::atomic<long> answered{0}, cancelled{0}, wrong{0};

gori_session* opened(const char* artifact) {
  gori_session* handle = nullptr;
  if (gori_open(artifact, nullptr, &handle) == GORI_OK) return handle;
  std::fprintf(stderr, "%s\n", gori_error());
  std::exit(1);
}

gori_status asked(gori_session* handle, const std::string& said, gori_form form, std::string& out) {
  char buffer[1 << 14];
  gori_call_options options{sizeof(gori_call_options), form, 48, 0.0f, 0, 1.0f, 0};
  gori_result result{};
  result.size = sizeof result, result.text = buffer, result.capacity = sizeof buffer;
  const gori_status status = gori_call(handle, said.c_str(), &options, &result);
  out.assign(buffer, status == GORI_OK ? result.length : 0);
  return status;
}

struct Expected {
  std::string said;
  std::string answers[3];
  gori_status status[3];
};

void work(gori_session* handle, const std::vector<Expected>& all, size_t first, long rounds) {
  std::string answer;
  for (long i = 0; i < rounds; ++i) {
    const Expected& e = all[(first + static_cast<size_t>(i)) % all.size()];
    const int form = static_cast<int>(i % 3);
    const gori_status status = asked(handle, e.said, static_cast<gori_form>(form), answer);
    if (status == GORI_CANCELLED) {
      ++cancelled;
    } else {
      ++answered;
      if (status != e.status[form] || answer != e.answers[form]) ++wrong;
    }
    uint32_t ids[64];
    size_t count = 0;
    gori_tokens(handle, e.said.data(), e.said.size(), ids, 64, &count);
    gori_facts facts{};
    facts.size = sizeof facts;
    if (gori_describe(handle, &facts) != GORI_OK) ++wrong;
  }
}

long resident_kib() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.rfind("VmRSS:", 0) == 0) return std::strtol(line.c_str() + 6, nullptr, 10);
  return 0;
}

// `threads` on each handle, and one that cancels now and then.
void round_of(const std::vector<gori_session*>& handles, const std::vector<Expected>& all, int threads, long rounds) {
  std::vector<std::thread> crew;
  std::atomic<bool> over{false};
  std::thread canceller([&] {
    for (size_t i = 0; !over; ++i) {
      std::this_thread::sleep_for(std::chrono::microseconds(700 + i % 7 * 300));
      gori_cancel(handles[i % handles.size()]);
    }
  });
  for (size_t h = 0; h < handles.size(); ++h)
    for (int t = 0; t < threads; ++t) crew.emplace_back(work, handles[h], std::cref(all), h + static_cast<size_t>(t), rounds);
  for (auto& member : crew) member.join();
  over = true;
  canceller.join();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const long rounds = std::atol(argv[2]);
  const int threads = std::atoi(argv[3]);
  gori_session* one = opened(argv[1]);
  std::vector<Expected> all;
  for (std::string said; std::getline(std::cin, said);) {
    Expected e{said, {}, {}};
    for (int form = 0; form < 3; ++form) e.status[form] = asked(one, said, static_cast<gori_form>(form), e.answers[form]);
    all.push_back(e);
  }
  round_of({one}, all, threads, rounds / 10 + 1);
  const long early = resident_kib();
  gori_session* two = opened(argv[1]);
  round_of({one, two}, all, threads, rounds);
  gori_close(two);
  round_of({one}, all, threads, rounds);
  gori_close(one);
  std::printf("%ld %ld %ld %ld\n", answered.load(), cancelled.load(), early, resident_kib());
  if (wrong) std::fprintf(stderr, "%ld answers were not those of a single thread\n", wrong.load());
  return wrong ? 1 : 0;
}
