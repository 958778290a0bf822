#include "json.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>

namespace vehicle {
namespace {

constexpr int kDeepest = 16;

void put_utf8(std::string& out, uint32_t point) {
  const auto byte = [&](uint32_t bits) { out += static_cast<char>(bits); };
  if (point < 0x80) return byte(point);
  if (point < 0x800) {
    byte(0xC0 | point >> 6);
  } else if (point < 0x10000) {
    byte(0xE0 | point >> 12), byte(0x80 | (point >> 6 & 0x3F));
  } else {
    byte(0xF0 | point >> 18), byte(0x80 | (point >> 12 & 0x3F)), byte(0x80 | (point >> 6 & 0x3F));
  }
  byte(0x80 | (point & 0x3F));
}

class Reader {
 public:
  explicit Reader(std::string_view text) : rest_(text) {}

  bool whole(Value& out) {
    if (!value(out, 0)) return false;
    space();
    return rest_.empty();
  }

 private:
  void space() {
    rest_.remove_prefix(std::min(rest_.find_first_not_of(" \t\r\n"), rest_.size()));
  }

  bool word(std::string_view wanted) {
    if (rest_.substr(0, wanted.size()) != wanted) return false;
    rest_.remove_prefix(wanted.size());
    return true;
  }

  bool token(char wanted) {
    space();
    return word(std::string_view(&wanted, 1));
  }

  bool value(Value& out, int depth) {
    space();
    if (rest_.empty() || depth > kDeepest) return false;
    switch (rest_[0]) {
      case '{': return object(out, depth);
      case '[': return array(out, depth);
      case '"': return string(out.is.emplace<std::string>());
      case 't': return out.is = true, word("true");
      case 'f': return out.is = false, word("false");
      case 'n': return out.is = nullptr, word("null");
      default: return number(out);
    }
  }

  bool object(Value& out, int depth) {
    Object members;
    word("{");
    if (!token('}')) {
      do {
        Member member;
        space();
        if (!string(member.name) || find(members, member.name) || !token(':')) return false;
        if (!value(member.value, depth + 1)) return false;
        members.push_back(std::move(member));
      } while (token(','));
      if (!token('}')) return false;
    }
    out.is = std::move(members);
    return true;
  }

  bool array(Value& out, int depth) {
    Array items;
    word("[");
    if (!token(']')) {
      do {
        if (!value(items.emplace_back(), depth + 1)) return false;
      } while (token(','));
      if (!token(']')) return false;
    }
    out.is = std::move(items);
    return true;
  }

  bool number(Value& out) {
    double found = 0;
    const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), found);
    // from_chars reads "inf" and "nan", too
    if (error != std::errc() || !std::isfinite(found)) return false;
    rest_.remove_prefix(static_cast<size_t>(end - rest_.data()));
    out.is = found;
    return true;
  }

  bool string(std::string& out) {
    if (!word("\"")) return false;
    while (!rest_.empty() && rest_[0] != '"') {
      const char c = rest_[0];
      rest_.remove_prefix(1);
      if (static_cast<unsigned char>(c) < 0x20) return false;
      if (c != '\\')
        out += c;
      else if (!escape(out))
        return false;
    }
    return word("\"");
  }

  bool escape(std::string& out) {
    constexpr std::string_view kNames = "\"\\/bfnrt", kMean = "\"\\/\b\f\n\r\t";
    if (rest_.empty()) return false;
    const char name = rest_[0];
    rest_.remove_prefix(1);
    if (const size_t at = kNames.find(name); at != std::string_view::npos) return out += kMean[at], true;
    uint32_t high = 0, low = 0;
    if (name != 'u' || !unit(high) || (high >= 0xDC00 && high < 0xE000)) return false;
    if (high < 0xD800 || high >= 0xE000) return put_utf8(out, high), true;
    if (!word("\\u") || !unit(low) || low < 0xDC00 || low >= 0xE000) return false;
    return put_utf8(out, 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00)), true;
  }

  bool unit(uint32_t& out) {
    if (rest_.size() < 4) return false;
    const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + 4, out, 16);
    if (error != std::errc() || end != rest_.data() + 4) return false;
    rest_.remove_prefix(4);
    return true;
  }

  std::string_view rest_;
};

void write(std::string& out, const std::string& text) {
  out += '"';
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\', out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
      out += escaped;
    } else {
      out += c;
    }
  }
  out += '"';
}

void write(std::string& out, double number) {
  char digits[32];
  const bool whole = number == std::floor(number) && std::fabs(number) < 1e15;
  char* const limit = digits + sizeof digits;
  const auto end =
      whole ? std::to_chars(digits, limit, static_cast<int64_t>(number)) : std::to_chars(digits, limit, number);
  out.append(digits, end.ptr);
}

void write(std::string& out, const Value& value) {
  if (const auto* flag = value.flag()) {
    out += *flag ? "true" : "false";
  } else if (const auto* number = value.number()) {
    write(out, *number);
  } else if (const auto* text = value.text()) {
    write(out, *text);
  } else if (const auto* items = value.array()) {
    out += '[';
    for (size_t i = 0; i < items->size(); ++i) out += i ? ", " : "", write(out, (*items)[i]);
    out += ']';
  } else if (const auto* members = value.object()) {
    out += '{';
    for (size_t i = 0; i < members->size(); ++i) {
      out += i ? ", " : "", write(out, (*members)[i].name), out += ": ";
      write(out, (*members)[i].value);
    }
    out += '}';
  } else {
    out += "null";
  }
}

}  // namespace

const Value* find(const Object& object, std::string_view name) {
  for (const auto& member : object)
    if (member.name == name) return &member.value;
  return nullptr;
}

std::optional<Value> parse(std::string_view text) {
  Value out;
  if (!Reader(text).whole(out)) return std::nullopt;
  return out;
}

std::string dump(const Value& value) {
  std::string out;
  write(out, value);
  return out;
}

}  // namespace vehicle
