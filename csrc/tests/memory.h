// Memory that detects reads and writes beyond either end, filled with bytes that form NaN.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

namespace memory {

// HEAP relies on an address sanitizer, which does not check assembly and masked instructions. Protected pages next to a buffer's end,
// or its beginning, detect these too.
enum class Place { HEAP, BEFORE_A_PAGE, AFTER_A_PAGE };

class Pool {
public:
  explicit Pool(Place place) : place_(place) {}
  Pool(const Pool &) = delete;
  ~Pool() {
    for (const auto &[address, size] : mapped_) munmap(address, size);
    for (void *address : allocated_) std::free(address);
  }
  void *bytes(int64_t size) {
    void *result;
    if (place_ == Place::HEAP) {
      result = std::malloc(size);
      allocated_.push_back(result);
    } else {
      const int64_t page = sysconf(_SC_PAGESIZE), inner = (size + page - 1) / page * page, outer = inner + 2 * page;
      char *start = (char *)mmap(nullptr, outer, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (start == MAP_FAILED || (inner && mprotect(start + page, inner, PROT_READ | PROT_WRITE))) {
        std::perror("mmap");
        std::exit(2);
      }
      mapped_.emplace_back(start, outer);
      result = start + page + (place_ == Place::BEFORE_A_PAGE ? inner - size : 0);
    }
    std::memset(result, 0xff, size);
    return result;
  }
  // Aligned as the engines require of their workspace.
  void *workspace(int64_t size) {
    if (place_ != Place::HEAP) return bytes((size + 63) / 64 * 64);
    void *result = std::aligned_alloc(64, (size + 63) / 64 * 64);
    allocated_.push_back(result);
    std::memset(result, 0xff, size);
    return result;
  }
  template <class T> T *array(int64_t count) { return (T *)bytes(count * int64_t(sizeof(T))); }
  template <class T> const T *copy(const std::vector<T> &values) {
    if (values.empty()) return nullptr;
    T *result = array<T>(values.size());
    std::memcpy(result, values.data(), values.size() * sizeof(T));
    return result;
  }

private:
  Place place_;
  std::vector<std::pair<void *, size_t>> mapped_;
  std::vector<void *> allocated_;
};

} // namespace memory
