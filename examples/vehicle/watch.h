// Time limits, inwards and outwards: an answer that takes too long is cancelled, and systemd hears that the service
// lives only as long as answers end. A hang that cancelling does not end stops the pings, and systemd restarts it.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>

#include "gori.h"

namespace vehicle {

// The notification protocol of systemd (sd_notify(3)): a datagram to $NOTIFY_SOCKET. Nothing happens without one.
void notify(const std::string& state);

// Half of $WATCHDOG_USEC where systemd watches this process, as sd_watchdog_enabled(3) advises; else zero.
std::chrono::milliseconds ping_interval();

class Watch {
 public:
  // Cancels what runs longer than `limit` on `handle`; pings each `ping`, never where it is zero.
  Watch(gori_session* handle, std::chrono::milliseconds limit, std::chrono::milliseconds ping);
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  // An answer lies between the two. After `end` nothing cancels the next one.
  void begin();
  void end();

 private:
  using Clock = std::chrono::steady_clock;
  void watch();

  gori_session* handle_;
  const std::chrono::milliseconds limit_, ping_;
  std::mutex guard_;
  std::condition_variable change_;
  bool running_ = false, stop_ = false;
  Clock::time_point began_{};
  std::thread thread_;
};

}  // namespace vehicle
