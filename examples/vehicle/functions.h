// What this car can do: for each function the arguments that it takes, when it may be done, the messages that do it.
//
// The limits stand here once more, in the car's own code: a model, a tools file or a message from another program never
// widens them. Nothing in this file sends anything.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "bus.h"

namespace vehicle {

enum class Kind { text, one_of, whole, number, flag, clock };

struct Parameter {
  const char* name;
  Kind kind;
  bool required = false;
  double least = 0, most = 0;
  std::vector<std::string_view> values = {};
};

// May it be done now? `why` is what the driver is told where the answer is not `yes`.
struct Verdict {
  enum { yes, ask, no } is = yes;
  std::string why = {};
};

struct Plan {
  std::vector<Frame> frames = {};
  Object data = {};  // what the function reports
};

struct Function {
  const char* name;
  std::vector<Parameter> parameters;
  bool needs_one;  // one of its optional arguments has to be said
  Verdict (*rule)(const Object& arguments, const Bus& bus);
  const char* message;
  Plan (*handler)(const Function& function, const Object& arguments, const Bus& bus);
};

const std::vector<Function>& functions();
const Function* function(std::string_view name);

// What is wrong with a call's arguments, empty where nothing is; `missing` where something was left out.
std::string fault(const Function& function, const Object& arguments, bool& missing);

// The table as OpenAI function definitions, so that it can be compared with the tools that a model was trained on.
std::string definitions();

}  // namespace vehicle
