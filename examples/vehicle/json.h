// JSON as libgori writes it and as the bus and the callbacks need it. It knows nothing about calls.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace vehicle {

struct Value;
struct Member;
using Array = std::vector<Value>;
using Object = std::vector<Member>;  // in the order of writing

struct Value {
  std::variant<std::nullptr_t, bool, double, std::string, Array, Object> is;

  Value() : is(nullptr) {}
  Value(bool flag) : is(flag) {}
  Value(double number) : is(number) {}
  Value(int number) : is(static_cast<double>(number)) {}
  Value(const char* text) : is(std::string(text)) {}
  Value(std::string text) : is(std::move(text)) {}
  Value(Array items);
  Value(Object members);

  const bool* flag() const { return std::get_if<bool>(&is); }
  const double* number() const { return std::get_if<double>(&is); }
  const std::string* text() const { return std::get_if<std::string>(&is); }
  const Array* array() const { return std::get_if<Array>(&is); }
  const Object* object() const { return std::get_if<Object>(&is); }
};

struct Member {
  std::string name;
  Value value;
};

inline Value::Value(Array items) : is(std::move(items)) {}
inline Value::Value(Object members) : is(std::move(members)) {}

// The value of a member, null where there is none of this name.
const Value* find(const Object& object, std::string_view name);

// The value of a whole text; nothing where it is not JSON, says a member twice or is nested deeper than 16.
std::optional<Value> parse(std::string_view text);

// One line. Numbers that are whole are written without a point.
std::string dump(const Value& value);

}  // namespace vehicle
