#include "tables.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "gori.h"

namespace gori {
namespace {

constexpr char kMagic[] = "GORITAB1";
constexpr size_t kName = 24, kAlignment = 16;

struct Head {
  char magic[8];
  uint32_t entries;
  uint32_t zero;
};

struct Entry {
  char name[kName];
  uint32_t width;
  uint32_t zero;
  uint64_t offset;
  uint64_t count;
};

size_t aligned(size_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

Tables::Tables(const std::string& path) : path_(path) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat info {};
  if (file < 0 || ::fstat(file, &info) != 0) {
    if (file >= 0) ::close(file);
    throw Error(GORI_ERROR_FILE, "cannot read " + path + ": " + std::strerror(errno));
  }
  bytes_ = static_cast<size_t>(info.st_size);
  void* at = bytes_ >= sizeof(Head) ? ::mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
  ::close(file);
  if (at == MAP_FAILED) throw Error(GORI_ERROR_FILE, "cannot map " + path + ": it is empty or there is no memory");
  base_ = static_cast<const uint8_t*>(at);
  const auto* head = reinterpret_cast<const Head*>(base_);
  entries_ = head->entries;
  bool sound = std::memcmp(head->magic, kMagic, 8) == 0 && entries_ <= (bytes_ - sizeof(Head)) / sizeof(Entry);
  for (size_t i = 0; sound && i < entries_; ++i) {
    const auto& e = reinterpret_cast<const Entry*>(base_ + sizeof(Head))[i];
    const bool known = e.width == 1 || e.width == 2 || e.width == 4 || e.width == 8;
    sound = known && e.offset % kAlignment == 0 && e.offset <= bytes_ && e.count <= (bytes_ - e.offset) / e.width;
  }
  if (!sound) {
    ::munmap(at, bytes_);
    throw Error(GORI_ERROR_FILE, path + " is not a file of gori's tables, or is cut off: export the artifact again");
  }
}

Tables::~Tables() { ::munmap(const_cast<uint8_t*>(base_), bytes_); }

std::pair<const uint8_t*, size_t> Tables::find(std::string_view name, size_t width, bool required) const {
  for (size_t i = 0; i < entries_; ++i) {
    const auto& e = reinterpret_cast<const Entry*>(base_ + sizeof(Head))[i];
    if (name != std::string_view(e.name, strnlen(e.name, kName))) continue;
    if (width && e.width != width) break;
    return {base_ + e.offset, e.count};
  }
  if (required)
    throw Error(GORI_ERROR_FILE, path_ + " has no " + std::string(name) + ": export the artifact with this version of gori");
  return {nullptr, 0};
}

void write_tables(
    const std::string& path,
    const std::vector<std::pair<std::string, View<uint32_t>>>& arrays) {
  const std::string part = path + ".part";
  std::FILE* file = std::fopen(part.c_str(), "wb");
  if (!file) throw Error(GORI_ERROR_FILE, "cannot write " + part + ": " + std::strerror(errno));
  std::vector<uint8_t> head(aligned(sizeof(Head) + sizeof(Entry) * arrays.size()));
  auto* first = reinterpret_cast<Head*>(head.data());
  std::memcpy(first->magic, kMagic, 8);
  first->entries = static_cast<uint32_t>(arrays.size());
  uint64_t offset = head.size();
  auto* entry = reinterpret_cast<Entry*>(head.data() + sizeof(Head));
  for (const auto& [name, view] : arrays) {
    std::memcpy(entry->name, name.data(), name.size() < kName ? name.size() : kName - 1);
    entry->width = 4;
    entry->offset = offset;
    entry->count = view.size;
    offset += aligned(view.size * 4);
    ++entry;
  }
  bool good = std::fwrite(head.data(), 1, head.size(), file) == head.size();
  const uint8_t zeros[kAlignment] = {};
  for (const auto& [name, view] : arrays) {
    const size_t bytes = view.size * 4;
    good = good && std::fwrite(view.data, 1, bytes, file) == bytes;
    good = good && std::fwrite(zeros, 1, aligned(bytes) - bytes, file) == aligned(bytes) - bytes;
  }
  good = std::fflush(file) == 0 && ::fsync(fileno(file)) == 0 && good;
  good = std::fclose(file) == 0 && good;
  if (!good || std::rename(part.c_str(), path.c_str()) != 0) {
    std::remove(part.c_str());
    throw Error(GORI_ERROR_FILE, "cannot write " + path + ": " + std::strerror(errno));
  }
}

}  // namespace gori
