// Shared by all kernels: reading rows of every dtype as float, warp-wide sums, barriers. The code also compiles for the host, where
// csrc/tests/emulator.h defines CUDA's functions.
#pragma once
#include "problem.h"
#include "runtime.h"
#ifndef FASTCL_EMULATOR
#include <cooperative_groups.h>
#endif
#include <cmath>

namespace fastcl::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float LOG2E = 1.4426950408889634f;

// Storage of half-precision numbers.
struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

__device__ inline float bits_to_float(uint32_t bits) {
#ifdef FASTCL_EMULATOR
  float x;
  memcpy(&x, &bits, 4);
  return x;
#else
  return __uint_as_float(bits);
#endif
}
__device__ inline uint32_t float_to_bits(float x) {
#ifdef FASTCL_EMULATOR
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
#else
  return __float_as_uint(x);
#endif
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Bfloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
__device__ inline float to_float(Half x) {
#ifdef FASTCL_EMULATOR
  return emulator::half_to_float(x.bits);
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}

// Rounds to the nearest, ties to even.
__device__ inline void from_float(float x, float &to) { to = x; }
__device__ inline void from_float(float x, Bfloat16 &to) {
#ifdef FASTCL_EMULATOR
  to.bits = emulator::float_to_bfloat16(x);
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#endif
}
__device__ inline void from_float(float x, Half &to) {
#ifdef FASTCL_EMULATOR
  to.bits = emulator::float_to_half(x);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#endif
}

// 2^x within 2 ulp; results below 2^-126 are 0.
__device__ inline float exp2_fast(float x) {
#ifdef FASTCL_EMULATOR
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0 : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// The block's dynamic shared memory, of `Launch::shared` bytes.
__device__ inline char *shared_memory() {
#ifdef FASTCL_EMULATOR
  return emulator::shared_memory();
#else
  extern __shared__ __align__(128) char fastcl_shared_memory[];
  return fastcl_shared_memory;
#endif
}

// Waits for all threads of all blocks; only in cooperative launches. Memory written before it is visible after it.
__device__ inline void grid_barrier() {
#ifdef FASTCL_EMULATOR
  emulator::grid_barrier();
#else
  cooperative_groups::this_grid().sync();
#endif
}

// Waits until `threads` threads of the block (whole warps) have called it with this name, 1 to 15.
__device__ inline void part_barrier(int name, int threads) {
#ifdef FASTCL_EMULATOR
  emulator::part_barrier(name, threads);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
#endif
}

__device__ inline int lane() { return int(threadIdx.x) % WARP; }

// Gives the same bits in every lane: at each step two lanes add the same two numbers.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
  return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
  return x;
}

__host__ __device__ inline int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

} // namespace fastcl::cuda
