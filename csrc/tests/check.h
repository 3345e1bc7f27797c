// Shared by the tests of all engines: random numbers, rows of every dtype, and the comparison with numbers in double.
#pragma once
#include "../problem.h"
#include "memory.h"
#include <cmath>
#include <random>
#include <string>

namespace {

using namespace fastcl;
using memory::Place, memory::Pool;
using Reals = std::vector<double>;

char description[400];

void describe() { [[maybe_unused]] const auto written = write(STDERR_FILENO, description, std::strlen(description)); }
[[noreturn]] void fail(const char *what, int64_t at, double got, double expected, double allowed) {
  describe();
  std::fprintf(stderr, "%s[%lld]: %.9g, expected %.9g within %.3g\n", what, (long long)at, got, expected, allowed);
  std::exit(1);
}

class Random {
public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t below(int64_t bound) { return int64_t(engine_() % uint64_t(bound)); }
  bool coin() { return below(2); }
  double real() { return double(int64_t(engine_() >> 11)) * 0x1p-52 - 1; } // in [-1, 1)
private:
  std::mt19937_64 engine_;
};

// Numbers that the dtype represents exactly, both as stored and as double.

size_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }
const char *name_of(Dtype dtype) {
  static const char *const names[] = {"float64", "float32", "bfloat16", "float16"};
  return names[int(dtype)];
}
double stored(Dtype dtype, double x, void *to) {
  const float single = float(x);
  uint32_t word;
  std::memcpy(&word, &single, 4);
  switch (dtype) {
  case Dtype::float64: std::memcpy(to, &x, 8); return x;
  case Dtype::float32: std::memcpy(to, &single, 4); return single;
  case Dtype::bfloat16: {
    const uint16_t half = uint16_t(word >> 16);
    word = uint32_t(half) << 16;
    float back;
    std::memcpy(&back, &word, 4);
    std::memcpy(to, &half, 2);
    return back;
  }
  case Dtype::float16: {
    int exponent = std::fabs(x) < 0x1p-14 ? -13 : std::ilogb(x) + 1; // subnormal numbers share the smallest exponent
    const double digits = std::trunc(std::fabs(x) * std::ldexp(1, 11 - exponent));
    const uint16_t magnitude = uint16_t(digits < 1024 ? digits : (exponent + 14) * 1024 + digits - 1024);
    const uint16_t half = uint16_t((x < 0 ? 0x8000 : 0) | magnitude);
    std::memcpy(to, &half, 2);
    return std::copysign(digits * std::ldexp(1, exponent - 11), x);
  }
  }
  return 0;
}

// Random rows [size, d] with the given strides, in memory that ends with the last number.
Rows random_rows(Random &random, Pool &pool, int64_t size, int64_t d, Dtype dtype, bool by_columns, int64_t gap, Reals &values) {
  const int64_t row_stride = by_columns ? 1 : d + gap, column_stride = by_columns ? size + gap : 1;
  char *data = (char *)pool.bytes(((size - 1) * row_stride + (d - 1) * column_stride + 1) * int64_t(size_of(dtype)));
  values.resize(size * d);
  const bool some_zero = random.below(8) == 0;
  for (int64_t i = 0; i < size; i++)
    for (int64_t k = 0; k < d; k++) {
      const double x = some_zero && i % 5 == 3 ? 0 : random.real() * 1.7 / std::sqrt(double(d));
      values[i * d + k] = stored(dtype, x, data + (i * row_stride + k * column_stride) * int64_t(size_of(dtype)));
    }
  return {data, size, row_stride, column_stride, dtype};
}
template <class T> void compare(const char *what, const void *got, const Reals &expected, const Reals *sizes, double tolerance) {
  for (size_t k = 0; got && k < expected.size(); k++) {
    const double x = double(((const T *)got)[k]), truth = expected[k];
    // Exponentials in float underflow at 2^-126, relative to a base that may differ from the log-sum by 96 in base 2.
    const double allowed = tolerance * (sizes ? (*sizes)[k] : 1 + std::fabs(truth)) + (sizeof(T) == 8 ? 1e-30 : 1e-9);
    if (!(x == truth || std::fabs(x - truth) <= allowed)) fail(what, int64_t(k), x, truth, allowed);
  }
}
} // namespace
