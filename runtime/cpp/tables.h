// Named arrays in one file, mapped and read in place (gori/tables.py writes it). Knows nothing of what they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace gori {

// What went wrong, in one sentence, with the status that the C API gives for it (gori.h).
struct Error : std::runtime_error {
  Error(int status, const std::string& what) : std::runtime_error(what), status(status) {}
  int status;
};

// A run of constant elements that somebody else owns.
template <typename T>
struct View {
  const T* data = nullptr;
  size_t size = 0;
  const T& operator[](size_t i) const { return data[i]; }
  const T* begin() const { return data; }
  const T* end() const { return data + size; }
};

class Tables {
 public:
  // Maps the file; Error where it is none of gori's, or is cut off.
  explicit Tables(const std::string& path);
  ~Tables();
  Tables(const Tables&) = delete;
  Tables& operator=(const Tables&) = delete;

  bool has(std::string_view name) const { return find(name, 0, false).first != nullptr; }

  // An array by name; Error where it is not there or holds elements of another size.
  template <typename T>
  View<T> get(std::string_view name) const {
    auto [at, count] = find(name, sizeof(T), true);
    return {reinterpret_cast<const T*>(at), count};
  }

 private:
  std::pair<const uint8_t*, size_t> find(std::string_view name, size_t width, bool required) const;

  std::string path_;
  const uint8_t* base_ = nullptr;
  size_t bytes_ = 0;
  size_t entries_ = 0;
};

// Writes arrays of u32 and f32 in the same form, through a temporary file that is renamed.
void write_tables(
    const std::string& path,
    const std::vector<std::pair<std::string, View<uint32_t>>>& arrays);

}  // namespace gori
