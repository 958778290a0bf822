#include "watch.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>

namespace vehicle {

using std::chrono::milliseconds;

void notify(const std::string& state) {
  const char* path = std::getenv("NOTIFY_SOCKET");
  sockaddr_un address{};
  if (!path || (path[0] != '/' && path[0] != '@') || std::strlen(path) >= sizeof address.sun_path) return;
  address.sun_family = AF_UNIX;
  std::strcpy(address.sun_path, path);
  if (path[0] == '@') address.sun_path[0] = 0;
  const int socket = ::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (socket < 0) return;
  const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + std::strlen(path));
  // lost where systemd does not listen: the watchdog then does what it is for
  (void)::sendto(socket, state.data(), state.size(), MSG_NOSIGNAL, reinterpret_cast<const sockaddr*>(&address), size);
  ::close(socket);
}

milliseconds ping_interval() {
  const char *usec = std::getenv("WATCHDOG_USEC"), *pid = std::getenv("WATCHDOG_PID");
  if (!usec || (pid && std::atol(pid) != ::getpid())) return milliseconds(0);
  const long half_ms = std::atol(usec) / 2000;
  return milliseconds(std::max(half_ms, 1L));
}

Watch::Watch(gori_session* handle, milliseconds limit, milliseconds ping)
    : handle_(handle), limit_(limit), ping_(ping), thread_([this] { watch(); }) {}

Watch::~Watch() {
  {
    std::lock_guard<std::mutex> lock(guard_);
    stop_ = true;
  }
  change_.notify_one();
  thread_.join();
}

void Watch::begin() {
  std::lock_guard<std::mutex> lock(guard_);
  running_ = true, began_ = Clock::now();
  change_.notify_one();
}

void Watch::end() {
  std::lock_guard<std::mutex> lock(guard_);
  running_ = false;
}

void Watch::watch() {
  // a cancel that comes before the answer has begun is forgotten by it, so it is repeated until the answer ends
  const auto again = milliseconds(10);
  auto next_ping = Clock::now();
  std::unique_lock<std::mutex> lock(guard_);
  while (!stop_) {
    const auto now = Clock::now();
    const bool late = running_ && now >= began_ + limit_;
    if (late) gori_cancel(handle_);
    // one more limit to obey; what hangs for longer hangs in the engine
    const bool alive = !running_ || now < began_ + 2 * limit_;
    if (ping_.count() && alive && now >= next_ping) notify("WATCHDOG=1"), next_ping = now + ping_;
    auto wake = now + std::chrono::hours(1);
    if (running_) wake = late ? now + again : began_ + limit_;
    if (ping_.count() && alive) wake = std::min(wake, next_ping);
    change_.wait_until(lock, wake);
  }
}

}  // namespace vehicle
