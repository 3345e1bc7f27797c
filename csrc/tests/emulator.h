// Runs CUDA kernels on the host, one device thread at a time. g++ compiles the kernels' own code with this header in front. A thread
// is a coroutine that yields at barriers and at exchanges between lanes of a warp. Blocks run one after another; the blocks of a
// cooperative launch run together.
//
// The emulator is stricter than a device. A barrier that not all threads of the block reach, an exchange without all lanes, or a block
// with an incomplete warp is an error that ends the process and prints the kernel's name. Warps run one after another from barrier to
// barrier, in an order that FASTCL_EMULATOR_ORDER selects (forward, backward or a number that seeds a shuffle): if a barrier is missing,
// results depend on the order. A block's shared memory starts as NaN, and a protected page follows it.
#pragma once
#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64's own words"
#endif
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define FASTCL_EMULATOR 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaStream_t = void *;
using cudaError_t = int;

namespace emulator {

constexpr int PROCESSORS = 4;
constexpr int64_t SHARED = 99 << 10; // as on the devices with the least

struct Index {
  unsigned x, y, z;
};
struct Thread; // a device thread
const Index &thread_index();
const Index &block_index();
const Index &block_size();
const Index &grid_size();
char *shared_memory();
void block_barrier();
void part_barrier(int name, int threads); // for the warps of a block that call it with this name
void grid_barrier();
// All lanes of the warp pass `size` bytes, at most 128, and get those of all lanes at distance `size`. The result is valid until the
// exchange after the next.
const char *exchange(const void *given, int64_t size);

void run(const char *name, int64_t blocks, int64_t blocks_y, int threads, int64_t shared, bool cooperative, const std::function<void()> &kernel);
[[noreturn]] void fail(const char *what);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
uint16_t float_to_bfloat16(float x);

template <class T> T from_lane(T value, int lane) {
  T result;
  std::memcpy(&result, exchange(&value, sizeof value) + lane * int64_t(sizeof value), sizeof value);
  return result;
}
inline void whole_warp(unsigned mask) {
  if (mask != 0xffffffffu) fail("a warp's exchange without all lanes");
}
inline int lane() { return int(thread_index().x % 32); }

} // namespace emulator

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_size())
#define gridDim (::emulator::grid_size())

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulator::whole_warp(mask);
  emulator::exchange("", 1);
}
inline void __threadfence() {}
template <class T> T __shfl_sync(unsigned mask, T value, int from) {
  emulator::whole_warp(mask);
  return emulator::from_lane(value, from & 31);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int with) {
  emulator::whole_warp(mask);
  return emulator::from_lane(value, emulator::lane() ^ with);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, int by) {
  emulator::whole_warp(mask);
  return emulator::from_lane(value, emulator::lane() + by < 32 ? emulator::lane() + by : emulator::lane());
}
template <class T> T __shfl_up_sync(unsigned mask, T value, int by) {
  emulator::whole_warp(mask);
  return emulator::from_lane(value, emulator::lane() >= by ? emulator::lane() - by : emulator::lane());
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  emulator::whole_warp(mask);
  const char said = predicate != 0, *all = emulator::exchange(&said, 1);
  unsigned result = 0;
  for (int l = 0; l < 32; l++) result |= unsigned(all[l]) << l;
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
