// From what was said to what the bus does: an utterance in, Gleo callbacks out. It knows the model only through gori.h
// and the car only through Bus.
#pragma once

#include <chrono>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "bus.h"
#include "functions.h"
#include "gori.h"
#include "watch.h"

namespace vehicle {

// What one client was asked to confirm. It is forgotten with the next utterance that is not a yes, and after 15 s.
struct Pending {
  const Function* function = nullptr;
  Object arguments;
  std::chrono::steady_clock::time_point until;
};

class Assistant {
 public:
  Assistant(gori_session* handle, Bus& bus, Watch& watch)
      : handle_(handle), bus_(bus), watch_(watch), answer_(1 << 14) {}

  // One line of JSON: an array of callbacks {functionName, status, message, mode, data}, one for each call, in their
  // order; one with an empty functionName where no function fits or none could be called.
  std::string answer(const std::string& utterance, std::optional<Pending>& pending);

 private:
  struct Call {
    const Function* function = nullptr;
    Object arguments = {};
  };

  std::string ask(const std::string& utterance, std::string& error);
  static Value check(const Value& item, Call& out);
  Array act(const Value& calls, std::optional<Pending>& pending);
  Value perform(const Call& call, bool confirmed, std::optional<Pending>& pending);
  Value send(const Call& call);

  gori_session* handle_;
  Bus& bus_;
  Watch& watch_;
  std::vector<char> answer_;
};

}  // namespace vehicle
