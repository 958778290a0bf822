// Counts what is allocated while answers are made: every malloc of the process goes through here (glibc).
//
//   gori-allocations ARTIFACT < utterances
//
// Three numbers: allocations of the warm calls before their first token; after it; and by XNNPACK at any time of them, which
// plans its memory anew where a step has another number of tokens than the one before. The first line is the warm-up. In the form of calls nothing is heard of the first token, so an answer is asked for
// twice, whole and cut to the fewest tokens: what the longer one allocates more was allocated while tokens were made.

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "gori.h"

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
}

namespace {
thread_local bool counting = false;
thread_local long counted = 0, planned = 0;

// The library of a code address is looked up once for each place.
bool is_xnnpack(const void* caller) {
  struct Known {
    const void* from;
    bool is;
  };
  static thread_local Known known[64] = {};
  Known& k = known[reinterpret_cast<uintptr_t>(caller) / 4 % 64];
  if (k.from != caller) {
    Dl_info info{};
    k = {caller, dladdr(caller, &info) && info.dli_fname && std::strstr(info.dli_fname, "backend_xnnpack")};
  }
  return k.is;
}

void count(const void* caller) {
  if (!counting) return;
  counting = false;
  ++(is_xnnpack(caller) ? planned : counted);
  counting = true;
}
}  // namespace

#define COUNT() count(__builtin_return_address(0))

extern "C" {
void* malloc(size_t n) { return COUNT(), __libc_malloc(n); }
void* calloc(size_t n, size_t size) { return COUNT(), __libc_calloc(n, size); }
void* realloc(void* at, size_t n) { return COUNT(), __libc_realloc(at, n); }
void* memalign(size_t alignment, size_t n) { return COUNT(), __libc_memalign(alignment, n); }
void* aligned_alloc(size_t alignment, size_t n) { return COUNT(), __libc_memalign(alignment, n); }
int posix_memalign(void** out, size_t alignment, size_t n) {
  COUNT();
  *out = __libc_memalign(alignment, n);
  return *out ? 0 : 12;
}
}

namespace {

[[noreturn]] void failed() {
  std::fprintf(stderr, "%s\n", gori_error());
  std::exit(1);
}

struct Counter {
  long before = 0, after = 0, planned = 0;
  bool heard = false;
};

// An answer with the form and at most so many tokens; allocations before its first text and after it.
Counter measured(gori_session* handle, const std::string& said, gori_form form, int most, std::vector<char>& buffer) {
  gori_call_options options{sizeof(gori_call_options), form, most, 0.0f, 0, 1.0f, 0};
  gori_result result{};
  result.size = sizeof result, result.text = buffer.data(), result.capacity = buffer.size();
  Counter c;
  const auto heard = [](void* user, const char*, size_t) {
    auto& c = *static_cast<Counter*>(user);
    if (!c.heard) c.before = counted, c.heard = true;
    return 0;
  };
  counted = planned = 0, counting = true;
  const gori_status status = gori_stream(handle, said.c_str(), &options, heard, &c, &result);
  counting = false;
  if (status != GORI_OK) failed();
  if (!c.heard) c.before = counted;
  c.after = counted - c.before, c.planned = planned;
  return c;
}

}  // namespace

int main(int argc, char** argv) {
  gori_session* handle = nullptr;
  if (argc != 2 || gori_open(argv[1], nullptr, &handle) != GORI_OK) failed();
  std::vector<char> buffer(1 << 16);
  long before = 0, after = 0, by_xnnpack = 0;
  bool warm = false;
  for (std::string said; std::getline(std::cin, said); warm = true) {
    const Counter text = measured(handle, said, GORI_FORM_TEXT, 64, buffer);
    const Counter whole = measured(handle, said, GORI_FORM_CALLS, 64, buffer);
    const Counter cut = measured(handle, said, GORI_FORM_CALLS, 2, buffer);
    if (!warm) continue;
    before += text.before + cut.before;
    after += text.after + (whole.before + whole.after) - (cut.before + cut.after);
    by_xnnpack += whole.planned;
  }
  gori_close(handle);
  std::printf("%ld %ld %ld\n", before, after, by_xnnpack);
}
