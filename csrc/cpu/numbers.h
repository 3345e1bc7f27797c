// Rows of any dtype as numbers.
#pragma once
#include "problem.h"
#include "threads.h"
#include <cstring>

namespace fastcl::FASTCL_ISA {
namespace {

template <class T> FASTCL_INLINE T widened(uint16_t bits, bool bfloat) {
#if defined(__aarch64__) // float16 is a type of the processor
  if (!bfloat) {
    __fp16 half;
    memcpy(&half, &bits, 2);
    return T(half);
  }
#endif
  uint32_t word;
  if (bfloat) word = uint32_t(bits) << 16;
  else {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    if (magnitude >= 0x7c00) word = sign | 0x7f800000 | (magnitude << 13);
    else { // multiplying by 2^112 corrects the exponent, also of subnormal numbers
      float value;
      const uint32_t shifted = magnitude << 13;
      memcpy(&value, &shifted, 4);
      value *= 0x1p112f;
      memcpy(&word, &value, 4);
      word |= sign;
    }
  }
  float value;
  memcpy(&value, &word, 4);
  return T(value);
}
template <class T, class From, class Convert> FASTCL_INLINE void convert_row(const Rows &rows, int64_t row, int64_t d, T *out, Convert convert) {
  const From *in = (const From *)rows.data + row * rows.row_stride;
  if (rows.column_stride == 1)
    for (int64_t k = 0; k < d; k++) out[k] = convert(in[k]);
  else
    for (int64_t k = 0; k < d; k++) out[k] = convert(in[k * rows.column_stride]);
}
template <class T> FASTCL_NOINLINE void read_row(const Rows &rows, int64_t row, int64_t d, T *out) {
  switch (rows.dtype) {
  case Dtype::float64: return convert_row<T, double>(rows, row, d, out, [](double x) { return T(x); });
  case Dtype::float32: return convert_row<T, float>(rows, row, d, out, [](float x) { return T(x); });
  case Dtype::bfloat16: return convert_row<T, uint16_t>(rows, row, d, out, [](uint16_t x) { return widened<T>(x, true); });
  case Dtype::float16: return convert_row<T, uint16_t>(rows, row, d, out, [](uint16_t x) { return widened<T>(x, false); });
  }
}
template <class Sum, class T> FASTCL_INLINE Sum dot(const T *x, const T *y, int64_t d) {
  Sum s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t k = 0; k < d; k++) s += Sum(x[k]) * Sum(y[k]);
  return s;
}

} // namespace
} // namespace fastcl::FASTCL_ISA
