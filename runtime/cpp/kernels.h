// Where a program keeps its keys and values, seen by the kernel that writes them.
#pragma once

#include <cstddef>
#include <vector>

namespace gori {

// One cache of a layer: `positions` rows of `width` floats, one after the other.
struct Cache {
  float* data;
  size_t width;
  size_t positions;
};

// While it lives, each cache that this thread's programs write is appended to `found`, in running order.
class WatchCaches {
 public:
  explicit WatchCaches(std::vector<Cache>& found);
  ~WatchCaches();
  WatchCaches(const WatchCaches&) = delete;
  WatchCaches& operator=(const WatchCaches&) = delete;
};

}  // namespace gori
