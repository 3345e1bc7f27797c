// The emulator's tensor cores and asynchronous copies, which csrc/cuda/products.h uses. Fragments are in the lanes' registers as in
// the documentation of mma.sync and ldmatrix. The emulator is strict in two ways: a product's sum is truncated to float32, as on
// devices, and a copy poisons its destination until the thread has waited for it.
#pragma once
#include "emulator.h"
#include <vector>

#define __grid_constant__

struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float __uint_as_float(unsigned x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float __int_as_float(int x) { return __uint_as_float(unsigned(x)); }
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }

namespace emulator {

// The address of a byte in shared memory.
inline uint32_t shared_address(const void *place) { return uint32_t(static_cast<const char *>(place) - shared_memory()); }
inline char *shared_place(uint32_t address, uint32_t size) { // accesses beyond the end fail
  if (address % size) fail("a misaligned address of shared memory");
  return shared_memory() + address;
}

// A thread's copies by group, oldest first; the last group is still open.
struct Copy {
  char *to;
  char bytes[16];
};
inline std::vector<std::vector<Copy>> &copies() {
  static std::vector<std::vector<Copy>> of_threads[1024];
  auto &own = of_threads[thread_index().x];
  if (own.empty()) own.emplace_back();
  return own;
}
inline void copy_async(uint32_t to, const void *from, bool there) {
  Copy copy{shared_place(to, 16), {}};
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("a misaligned source of a copy");
  if (there) std::memcpy(copy.bytes, from, 16);
  std::memset(copy.to, 0xFF, 16);
  copies().back().push_back(copy);
}
inline void copy_commit() { copies().emplace_back(); }
inline void copy_wait(int pending) {
  auto &groups = copies();
  while (int(groups.size()) - 1 > pending) {
    for (const Copy &copy : groups.front()) std::memcpy(copy.to, copy.bytes, 16);
    groups.erase(groups.begin());
  }
}

// ldmatrix: four matrices of 8 rows of 16 bytes; lanes 8 k to 8 k + 7 hold the addresses of the rows of matrix k.
inline void load_matrices(uint32_t (&out)[4], uint32_t address, bool transposed) {
  const auto *addresses = reinterpret_cast<const uint32_t *>(exchange(&address, 4));
  const int g = lane() / 4, t = lane() % 4;
  for (int k = 0; k < 4; k++) {
    if (!transposed) {
      std::memcpy(&out[k], shared_place(addresses[8 * k + g], 16) + 4 * t, 4);
    } else {
      uint16_t low, high;
      std::memcpy(&low, shared_place(addresses[8 * k + 2 * t], 16) + 2 * g, 2);
      std::memcpy(&high, shared_place(addresses[8 * k + 2 * t + 1], 16) + 2 * g, 2);
      out[k] = low | uint32_t(high) << 16;
    }
  }
}

inline float truncated(double x) {
  const float nearest = float(x);
  return std::isfinite(nearest) && std::fabs(double(nearest)) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

// mma.m16n8: C [16, 8] += A [16, DEPTH] B [DEPTH, 8]. Lane 4 g + t holds the places (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// of C. A register holds PACKED numbers along the depth. For A: rows g and g + 8 of the first half of the depth, then of the second;
// for B: column g of either half.
template <int DEPTH, int PACKED, class Decode> void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Decode decode) {
  const uint32_t given[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto *words = reinterpret_cast<const uint32_t *>(exchange(given, sizeof given));
  const int g = lane() / 4, t = lane() % 4;
  for (int place = 0; place < 4; place++) {
    const int row = place / 2, column = 2 * t + place % 2;
    double sum = c[place];
    for (int k = 0; k < DEPTH; k++) {
      const int half = k / (4 * PACKED), owner = k % (4 * PACKED) / PACKED, part = k % PACKED;
      sum += decode(words[(4 * g + owner) * 6 + row + 2 * half], part) * decode(words[(4 * column + owner) * 6 + 4 + half], part);
    }
    c[place] = truncated(sum);
  }
}
inline void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<16, 2>(c, a, b, [](uint32_t word, int part) { return double(__uint_as_float(word >> 16 * part << 16)); });
}
inline void multiply_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<16, 2>(c, a, b, [](uint32_t word, int part) { return double(half_to_float(uint16_t(word >> 16 * part))); });
}
inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<8, 1>(c, a, b, [](uint32_t word, int) { return double(__uint_as_float(word & 0xFFFFE000)); }); // a device ignores the lower bits
}

} // namespace emulator
