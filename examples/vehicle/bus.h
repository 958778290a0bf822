// The vehicle's bus as this program sees it: messages out, signals in. LogBus stands where a gateway to CAN, SOME/IP or
// Android's vehicle HAL would: it writes each message as a line of JSON and reads signals from a file.
#pragma once

#include <cstdio>
#include <optional>
#include <string>
#include <string_view>

#include "json.h"

namespace vehicle {

struct Frame {
  std::string message;  // "window.move"
  Object fields;
};

class Bus {
 public:
  virtual ~Bus() = default;
  // False where the bus did not take it.
  virtual bool send(const Frame& frame) = 0;
  // A signal's present value; nothing where it is not known, which is never read as "standing" or "safe".
  virtual std::optional<double> read(std::string_view signal) const = 0;
};

class LogBus : public Bus {
 public:
  // Appends to the file `log`, to standard error where it is "-". `signals` is a JSON object of numbers, read anew each
  // time; without a file no signal is known. Throws std::runtime_error where `log` cannot be opened.
  LogBus(const std::string& log, std::string signals);
  ~LogBus() override;
  LogBus(const LogBus&) = delete;
  LogBus& operator=(const LogBus&) = delete;

  bool send(const Frame& frame) override;
  std::optional<double> read(std::string_view signal) const override;

 private:
  std::FILE* log_;
  std::string signals_;
};

}  // namespace vehicle
