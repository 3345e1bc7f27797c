// Tests how csrc/cuda/contrastive/sweep.h splits float32 numbers into two tf32 numbers. Compiled with emulator.h in front.
#include "cuda/contrastive/sweep.h"
#include "emulator.cpp"
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

using namespace fastcl::cuda;

namespace {

constexpr uint32_t TF32 = 0xFFFFE000; // the bits that tensor cores read

void require(bool condition, const char *what, uint32_t bits) {
  if (condition) return;
  std::fprintf(stderr, "cuda_split_test: %s: %08x\n", what, bits);
  std::exit(1);
}

void check(uint32_t bits) {
  const float x = __uint_as_float(bits);
  uint32_t large, small;
  split(bits, large, small);
  const double of_large = __uint_as_float(large), of_small = __uint_as_float(small);
  if (std::isnan(x)) return require(std::isnan(of_large) && std::isnan(__uint_as_float(large & TF32)), "a NaN that is lost", bits);
  require((large & ~TF32) == 0, "a large part of more bits than tf32 has", bits);
  require(of_large + of_small == double(x), "parts that do not add up", bits);
  const double unit = std::ldexp(1.0, std::ilogb(x) - 10); // of tf32 at x
  require(std::fabs(of_small) <= unit / 2, "a large part that is not the nearest", bits);
  const double read = __uint_as_float(small & TF32); // a rest of at most 12 bits, of which tf32 has 11
  require(std::fabs(of_small - read) <= std::fabs(of_small) / 1024, "a rest that loses more than its last bit", bits);
}

} // namespace

int main() {
  std::mt19937 random(7);
  std::uniform_int_distribution<uint32_t> mantissa(0, 0x7FFFFF), exponent(40, 240); // 2^-87 to 2^113
  for (int k = 0; k < 1000000; k++) check((random() & 0x80000000u) | exponent(random) << 23 | mantissa(random));
  for (uint32_t bits : {0x3F800000u, 0x3F801000u, 0x3F803000u, 0x3FFFFFFFu, 0x3FFFF000u}) check(bits); // 1, two ties, and below 2
  for (uint32_t nan : {0x7FFFFFFFu, 0x7FC00000u, 0xFFC00000u, 0xFFFFFFFFu}) check(nan);                // 0x7FFFFFFF is a device's NaN
  uint32_t large, small;
  split(0, large, small);
  require(large == 0 && small == 0, "a zero that is not split into zeros", 0);
  std::puts("ok");
}
