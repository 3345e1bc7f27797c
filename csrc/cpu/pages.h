// Pages of a new result.
#pragma once
#include "threads.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastcl::FASTCL_ISA {
namespace {

// The rows of a result that one thread writes, in their order. A large result is new memory, whose pages the system maps at the first
// write, with an interrupt for each. One call maps the pages of the next rows together: on a virtual machine an interrupt takes
// as long as the arithmetic of a page. The pages are cleared, and so are in the cache when the rows are written.
class FreshPages {
public:
  void begin(void *from, int64_t bytes) {
    next_ = (uintptr_t)from / PAGE * PAGE;
    end_ = bytes < LEAST ? next_ : (uintptr_t)from + bytes;
  }
  FASTCL_INLINE void map(const void *up_to) { // before the first write below `up_to`
    if ((uintptr_t)up_to > next_ && next_ < end_) map_next((uintptr_t)up_to);
  }

private:
  static constexpr int64_t PAGE = 4096, STEP = 1 << 18, LEAST = 1 << 20; // a smaller result is likely to be memory that was used before
  uintptr_t next_ = 0, end_ = 0;

  FASTCL_NOINLINE void map_next(uintptr_t up_to) {
    while (next_ < up_to && next_ < end_) {
#if defined(__linux__)
      constexpr int POPULATE_WRITE = 23; // Linux 5.14; an older one refuses, and the pages are mapped at the first write
      madvise((void *)next_, smaller(end_ - next_, uintptr_t(STEP)), POPULATE_WRITE);
#endif
      next_ += STEP;
    }
  }
};

} // namespace
} // namespace fastcl::FASTCL_ISA
