#include "bus.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace vehicle {

LogBus::LogBus(const std::string& log, std::string signals)
    : log_(log == "-" ? stderr : std::fopen(log.c_str(), "ae")), signals_(std::move(signals)) {
  if (!log_) throw std::runtime_error("cannot write the bus log " + log + ": " + std::strerror(errno));
}

LogBus::~LogBus() {
  if (log_ != stderr) std::fclose(log_);
}

bool LogBus::send(const Frame& frame) {
  const std::string line = dump(Object{{"message", frame.message}, {"fields", frame.fields}});
  return std::fprintf(log_, "%s\n", line.c_str()) > 0 && std::fflush(log_) == 0;
}

std::optional<double> LogBus::read(std::string_view signal) const {
  std::ostringstream text;
  text << std::ifstream(signals_).rdbuf();
  const auto body = parse(text.str());
  const Value* found = body && body->object() ? find(*body->object(), signal) : nullptr;
  return found && found->number() ? std::optional(*found->number()) : std::nullopt;
}

}  // namespace vehicle
