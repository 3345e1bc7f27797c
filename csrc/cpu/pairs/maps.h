// The maps of pairs and their derivatives, as vectors.
#pragma once
#include "cpu/pairs/call.h"
#include "cpu/sweep.h"

namespace fastcl::FASTCL_ISA {
namespace {

template <class T> FASTCL_INLINE V<T> root(V<T> x) {
#if FASTCL_BYTES == 64
  if constexpr (sizeof(T) == 8) return (V<T>)_mm512_sqrt_pd((__m512d)x);
  else return (V<T>)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 8) return (V<T>)_mm256_sqrt_pd((__m256d)x);
  else return (V<T>)_mm256_sqrt_ps((__m256)x);
#elif defined(__aarch64__)
  if constexpr (sizeof(T) == 8) return (V<T>)vsqrtq_f64((float64x2_t)x);
  else return (V<T>)vsqrtq_f32((float32x4_t)x);
#else
  EACH(l, Simd<T>::W) x[l] = sizeof(T) == 8 ? T(__builtin_sqrt(x[l])) : T(__builtin_sqrtf(float(x[l])));
  return x;
#endif
}

// 2 atanh(z) / z in powers of z^2, for z^2 <= 1/9.
template <class T> struct Atanh;
template <> struct Atanh<float> { // relative error 4e-9
  static constexpr float OF_SQUARE[] = {0.28174656629f, 0.27961418033f, 0.40024852753f, 0.66666316986f, 2.f};
};
template <> struct Atanh<double> {
  static constexpr double OF_SQUARE[] = {2. / 35, 2. / 33, 2. / 31, 2. / 29, 2. / 27, 2. / 25, 2. / 23, 2. / 21, 2. / 19,
                                         2. / 17, 2. / 15, 2. / 13, 2. / 11, 2. / 9,  2. / 7,  2. / 5,  2. / 3,  2.};
};

template <class T> struct Mapped {
  V<T> value, slope; // slope: the derivative by the logit or the distance
};

// log(1 + 2^t) and its derivative by t * log(2), for any t.
template <class T, bool CAREFUL> FASTCL_INLINE Mapped<T> softplus(V<T> t) {
  constexpr auto &c = Atanh<T>::OF_SQUARE;
  const V<T> one = all<T>(1), u = exp2_clamped<T, CAREFUL>(t > 0 ? -t : t), r = one / ((one + u) * (all<T>(2) + u));
  const V<T> z = u * (one + u) * r, w = z * z; // log(1 + u) = 2 atanh(u / (2 + u))
  V<T> p = all<T>(c[0]);
  EACH(k, int(sizeof(c) / sizeof(T)) - 1) p = p * w + c[k + 1];
  const V<T> of_one = (all<T>(2) + u) * r; // 1 / (1 + u)
  return {at_least<T>(t, all<T>(0)) * T(LN2) + p * z, where<T>(t > 0, of_one, of_one * u)};
}

// max(0, above) and 1 where it is not 0; or half its square and itself. NaN stays NaN.
template <class T, bool SQUARED> FASTCL_INLINE Mapped<T> excess(V<T> above) {
  const V<T> value = at_least<T>(above, all<T>(0));
  if constexpr (SQUARED) return {value * value * T(0.5), value};
  else return {value, where<T>(value == value, keep<T>(value > 0, all<T>(1)), value)};
}

// The map at logits to base 2, or at distances.
template <class T, PairMap MAP, bool POSITIVE, bool CAREFUL> FASTCL_INLINE Mapped<T> mapped(V<T> t, T margin) {
  constexpr bool FALLS = (MAP == PairMap::softplus || MAP == PairMap::hinge) == POSITIVE;
  Mapped<T> result;
  if constexpr (MAP == PairMap::softplus) result = softplus<T, CAREFUL>(FALLS ? -t : t);
  else {
    const V<T> x = MAP == PairMap::hinge ? t * T(LN2) : t;
    result = excess<T, MAP == PairMap::squared>(FALLS ? margin - x : x - margin);
  }
  if (FALLS) result.slope = -result.slope;
  return result;
}

constexpr bool of_distance(PairMap map) { return map == PairMap::distance || map == PairMap::squared; }

} // namespace
} // namespace fastcl::FASTCL_ISA
