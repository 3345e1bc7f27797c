// Workspace, threads, and the division of work among them.
#pragma once
#include "simd.h"

// The functions that GCC calls for `omp parallel` and `omp barrier`. They are called directly because every OpenMP runtime that
// torch may load has them, while another compiler would call functions that only its own runtime has.
#if defined(__APPLE__)
#define FASTCL_IF_LOADED __attribute__((weak_import)) // null if torch has loaded no runtime with this function
#else
#define FASTCL_IF_LOADED
#endif
extern "C" {
FASTCL_IF_LOADED void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags);
FASTCL_IF_LOADED void GOMP_barrier();
FASTCL_IF_LOADED int omp_get_thread_num();
FASTCL_IF_LOADED int omp_get_num_threads();
}

namespace fastcl::FASTCL_ISA {
namespace {

// Python passes the workspace as one buffer. Without a buffer the arena only counts bytes.
struct Arena {
  char *base;
  int64_t used = 0;
  template <class T> T *take(int64_t count) {
    T *p = base ? (T *)(base + used) : nullptr;
    used += round_up(count * int64_t(sizeof(T)), 64);
    return p;
  }
};

struct Team {
  int threads, index, members;                // planned threads; index of this member among the members that really run
  template <class F> void run(F work) const { // ends with a barrier
    for (int t = index; t < threads; t += members) work(t);
    if (members > 1) GOMP_barrier();
  }
};
template <class F> void with_team(int threads, F body) {
  bool alone = threads == 1; // without OpenMP: a forked child must not use its parent's threads
#if defined(__APPLE__)
  alone |= !GOMP_parallel || !GOMP_barrier || !omp_get_thread_num || !omp_get_num_threads;
#endif
  if (alone) return body(Team{threads, 0, 1}); // one member does the work of all planned threads
  struct Call {
    F &body;
    int threads;
  } call{body, threads};
  const auto member = [](void *data) {
    const Call &call = *(Call *)data;
    call.body(Team{call.threads, omp_get_thread_num(), omp_get_num_threads()});
  };
  GOMP_parallel(member, &call, threads, 0);
}
struct Range {
  int64_t from, to;
};
FASTCL_INLINE Range share(int64_t size, int parts, int part, int64_t unit = 1) { // boundaries are multiples of `unit`
  const int64_t units = (size + unit - 1) / unit;
  return {smaller(size, units * part / parts * unit), smaller(size, units * (part + 1) / parts * unit)};
}

} // namespace
} // namespace fastcl::FASTCL_ISA
