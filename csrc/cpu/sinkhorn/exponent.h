// Exponentials of numbers that are not above 0, and numbers rounded to half precision.
#pragma once
#include "cpu/numbers.h"

namespace fastcl::FASTCL_ISA {
namespace {

// e^(x / epsilon) for x <= 0, or slightly larger, with an error of one or two units in the last place; 0 instead of subnormal numbers,
// except just below the smallest normal one. NaN stays.
template <class T> struct Exponent {
  static constexpr int BIAS = sizeof(T) == 8 ? 1023 : 127;
  static constexpr T ROUND = Exponential<T>::ROUND + BIAS; // the low bits of the sum are an exponent with its bias
  T to_base_2, least;                                      // whose power is 2^-BIAS, which the exponent's bits turn into 0

  explicit Exponent(T to_base_2) : to_base_2(to_base_2), least(larger(T(-BIAS) / to_base_2, sizeof(T) == 8 ? T(-__DBL_MAX__) : T(-__FLT_MAX__))) {}
  template <int COUNT> FASTCL_INLINE void of(V<T> *x) const { // of several vectors at once
    using U = typename Simd<T>::U;
    const V<T> factor = all<T>(to_base_2);
    V<T> shifted[COUNT], f[COUNT], p[COUNT];
    EACH(v, COUNT) x[v] = at_least<T>(x[v], all<T>(least));
    EACH(v, COUNT) shifted[v] = fused<T>(x[v], factor, all<T>(ROUND));
    EACH(v, COUNT) f[v] = fused<T>(x[v], factor, ROUND - shifted[v]);
    polynomial<T, true>(f, p);
    EACH(v, COUNT) x[v] = p[v] * (V<T>)((U)shifted[v] << Exponential<T>::MANTISSA);
  }
};

// 2^t in the same way.
template <class T> FASTCL_INLINE V<T> exp2_down(V<T> t) {
  Exponent<T>(1).template of<1>(&t);
  return t;
}

template <class T> FASTCL_INLINE uint16_t narrowed_bfloat(T x) {
  const float value = float(x);
  uint32_t word;
  memcpy(&word, &value, 4);
  const uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  return uint16_t((word & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
template <class T> FASTCL_INLINE uint16_t narrowed_half(T x) {
  const float value = float(x);
  uint32_t word;
  memcpy(&word, &value, 4);
  const uint32_t sign = (word >> 16) & 0x8000, magnitude = word & 0x7fffffff;
  // subnormal: adding 1/2 aligns the last place with that of float16, and rounds
  float aligned;
  memcpy(&aligned, &magnitude, 4);
  aligned += 0.5f;
  uint32_t subnormal;
  memcpy(&subnormal, &aligned, 4);
  subnormal -= 0x3f000000;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  const uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00; // NaN, or infinity for numbers beyond the largest
  return uint16_t(sign | (magnitude >= 0x477ff000 ? large : finite));
}

} // namespace
} // namespace fastcl::FASTCL_ISA
