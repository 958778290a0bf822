// gori-vehicle: the in-car assistant as a service. Opens the artifact, answers once to be warm, says that it is ready,
// serves.

#include <sys/signalfd.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "assistant.h"
#include "server.h"

namespace {

constexpr char kUsage[] =
    "usage: gori-vehicle --artifact DIR [options]\n"
    "\n"
    "Each line of input is an utterance; for each, one line of JSON: a list of callbacks.\n"
    "\n"
    "  --artifact DIR     what `gori export --target executorch` wrote, and `gori verify` accepted\n"
    "  --socket PATH      serve a Unix socket; default: standard input\n"
    "  --socket inherited   the one that systemd passes\n"
    "  --bus FILE         append messages for the bus to FILE; default -, standard error\n"
    "  --signals FILE     a JSON object of signals (speed_kmh, battery, …); default: none is known, and a car whose\n"
    "                     speed is not known counts as driving fast\n"
    "  --deadline-ms N    cancel an answer after so long; default 2000\n"
    "  --threads N        default 1\n"
    "  --functions        print what the car can do as function definitions, and end\n"
    "\n"
    "Exit: 0 ended, 1 an error in one sentence, 2 usage.\n";

struct Arguments {
  std::string artifact, socket, bus = "-", signals;
  long deadline_ms = 2000, threads = 1;
};

[[noreturn]] void usage(const std::string& why) {
  std::fprintf(stderr, "%s\n%s", why.c_str(), kUsage);
  std::exit(2);
}

long whole(const std::string& name, const char* text, long most) {
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  if (end == text || *end || value < 1 || value > most)
    usage(name + " is 1 to " + std::to_string(most) + ", not " + text);
  return value;
}

Arguments parsed(int count, char** values) {
  Arguments a;
  for (int i = 1; i < count; ++i) {
    const std::string name = values[i];
    if (name == "--help") std::exit(std::fputs(kUsage, stdout) < 0);
    if (name == "--functions") std::exit(std::puts(vehicle::definitions().c_str()) < 0);
    if (i + 1 == count) usage(name + " is not known, or needs a value");
    const char* value = values[++i];
    if (name == "--artifact") a.artifact = value;
    else if (name == "--socket") a.socket = value;
    else if (name == "--bus") a.bus = value;
    else if (name == "--signals") a.signals = value;
    else if (name == "--deadline-ms") a.deadline_ms = whole(name, value, 600000);
    else if (name == "--threads") a.threads = whole(name, value, 64);
    else usage("unknown option " + name);
  }
  if (a.artifact.empty()) usage("--artifact is needed");
  return a;
}

// Blocked before any thread is made, so that a stop arrives nowhere else.
int stop_signals() {
  sigset_t set;
  sigemptyset(&set), sigaddset(&set, SIGTERM), sigaddset(&set, SIGINT);
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  return ::signalfd(-1, &set, SFD_CLOEXEC);
}

using Handle = std::unique_ptr<gori_session, decltype(&gori_close)>;

Handle open(const Arguments& a) {
  const gori_open_options options{sizeof(gori_open_options), static_cast<int32_t>(a.threads), 1, GORI_LOOKUP_MEASURED};
  gori_session* handle = nullptr;
  if (gori_open(a.artifact.c_str(), &options, &handle) != GORI_OK) throw std::runtime_error(gori_error());
  return {handle, gori_close};
}

// The first answer allocates, and tells whether this artifact answers at all.
void warm_up(gori_session* handle, vehicle::Watch& watch) {
  std::string text(1 << 14, 0);
  gori_result result{};
  result.size = sizeof result;
  result.text = text.data(), result.capacity = text.size();
  watch.begin();
  const auto status = gori_call(handle, "안녕", nullptr, &result);
  watch.end();
  if (status != GORI_OK) throw std::runtime_error("the first answer failed: " + std::string(gori_error()));
}

void serve(const Arguments& a, int stop) {
  const Handle handle = open(a);
  vehicle::LogBus bus(a.bus, a.signals);
  vehicle::Watch watch(handle.get(), std::chrono::milliseconds(a.deadline_ms), vehicle::ping_interval());
  warm_up(handle.get(), watch);
  vehicle::Assistant assistant(handle.get(), bus, watch);
  vehicle::Server server(assistant);
  if (a.socket.empty())
    server.add_standard_input();
  else if (a.socket == "inherited")
    server.listen_on_inherited();
  else
    server.listen_on(a.socket);
  vehicle::notify(std::string("READY=1\nSTATUS=gori ") + gori_version() + " answers");
  server.run(stop);
  vehicle::notify("STOPPING=1");
}

}  // namespace

int main(int count, char** values) {
  const Arguments a = parsed(count, values);
  const int stop = stop_signals();
  try {
    serve(a, stop);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "Error: %s\n", e.what());
    return 1;
  }
  return 0;
}
