// Vectors, exponentials and products for one instruction set. The including translation unit defines
//   FASTCL_ISA      the namespace
//   FASTCL_BYTES    bytes of a vector register
//   FASTCL_ROWS     rows of the register tile, which is two vectors wide
//   FASTCL_DOT      1 if rows of bfloat16 are multiplied without conversion
// Everything is in an unnamed namespace, and nothing is from std: the linker would merge a template or inline function with external
// linkage across translation units, and an older machine could then run instructions that it does not support.
#include "problem.h"
#include <utility> // index_sequence: a type, no code
#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FASTCL_INLINE inline __attribute__((always_inline))
#define FASTCL_NOINLINE __attribute__((noinline))
#define FASTCL_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define FASTCL_UNROLL(times) FASTCL_PRAGMA(clang loop unroll_count(times))
#else
#define FASTCL_UNROLL(times) FASTCL_PRAGMA(GCC unroll times)
#endif
#define EACH(k, count) FASTCL_UNROLL(64) for (int k = 0; k < (count); k++)

namespace fastcl::FASTCL_ISA {
namespace {

constexpr int MR = FASTCL_ROWS, NV = 2; // a register tile: MR rows, NV vectors

template <class T> struct IntOf;
template <> struct IntOf<float> {
  using type = int32_t;
  using wrapping = uint32_t;
};
template <> struct IntOf<double> {
  using type = int64_t;
  using wrapping = uint64_t;
};

template <class T> struct Simd {
  using Int = typename IntOf<T>::type;
  static constexpr int W = FASTCL_BYTES / sizeof(T);
  typedef T V __attribute__((vector_size(FASTCL_BYTES)));
  typedef Int I __attribute__((vector_size(FASTCL_BYTES)));
  typedef typename IntOf<T>::wrapping U __attribute__((vector_size(FASTCL_BYTES))); // unsigned, so that overflow wraps
  typedef T Unaligned __attribute__((vector_size(FASTCL_BYTES), aligned(sizeof(T)), may_alias));
  typedef T Aligned __attribute__((vector_size(FASTCL_BYTES), may_alias));
  typedef int32_t Ids __attribute__((vector_size(W * sizeof(int32_t)), aligned(4), may_alias));
};
template <class T> using V = typename Simd<T>::V;
template <class T> using I = typename Simd<T>::I;

template <class T> FASTCL_INLINE T larger(T a, T b) { return a > b ? a : b; }
template <class T> FASTCL_INLINE T smaller(T a, T b) { return a < b ? a : b; }
FASTCL_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

template <class T> FASTCL_INLINE V<T> load(const T *p) { return *(const typename Simd<T>::Aligned *)p; }
template <class T> FASTCL_INLINE V<T> loadu(const T *p) { return *(const typename Simd<T>::Unaligned *)p; }
template <class T> FASTCL_INLINE void store(T *p, V<T> v) { *(typename Simd<T>::Aligned *)p = v; }
template <class T> FASTCL_INLINE void storeu(T *p, V<T> v) { *(typename Simd<T>::Unaligned *)p = v; }
template <class T> FASTCL_INLINE void add_to(T *p, V<T> v) { store(p, load(p) + v); }
template <class Vector, class X, size_t... L> FASTCL_INLINE Vector broadcast(X x, std::index_sequence<L...>) { return Vector{((void)L, x)...}; }
template <class T> FASTCL_INLINE V<T> all(T x) { return broadcast<V<T>>(x, std::make_index_sequence<Simd<T>::W>()); } // every lane x
template <class T> FASTCL_INLINE I<T> all_int(int64_t x) { return broadcast<I<T>>(typename Simd<T>::Int(x), std::make_index_sequence<Simd<T>::W>()); }
template <class T> FASTCL_INLINE I<T> lanes_from(int64_t first) {
  I<T> v;
  EACH(l, Simd<T>::W) v[l] = typename Simd<T>::Int(l);
  return v + all_int<T>(first);
}
template <class T> FASTCL_INLINE I<T> load_ids(const int32_t *p) { return __builtin_convertvector(*(const typename Simd<T>::Ids *)p, I<T>); }
template <class T> FASTCL_INLINE V<T> where(I<T> mask, V<T> yes, V<T> no) { return mask ? yes : no; }
template <class T> FASTCL_INLINE V<T> keep(I<T> mask, V<T> v) { return (V<T>)((I<T>)v & mask); }     // 0 elsewhere
template <class T> FASTCL_INLINE V<T> at_least(V<T> v, V<T> floor) { return v < floor ? floor : v; } // NaN stays NaN
template <class T> FASTCL_INLINE V<T> at_most(V<T> v, V<T> ceiling) { return v > ceiling ? ceiling : v; }
// a * b + c, fused if there is such an instruction. In a * b + c * d the compiler could fuse either product, and a different one in
// different places.
template <class T> FASTCL_INLINE V<T> fused(V<T> a, V<T> b, V<T> c) {
#if FASTCL_BYTES == 64
  if constexpr (sizeof(T) == 8) return (V<T>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  else return (V<T>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  if constexpr (sizeof(T) == 8) return (V<T>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  else return (V<T>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  if constexpr (sizeof(T) == 8) return (V<T>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
  else return (V<T>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
template <class T> FASTCL_INLINE bool any(I<T> mask) { // whether a lane is not 0
  typedef int64_t Words __attribute__((vector_size(FASTCL_BYTES)));
  const Words words = (Words)mask;
  int64_t found = 0;
  EACH(l, int(FASTCL_BYTES / 8)) found |= words[l];
  return found != 0;
}
template <class T> FASTCL_INLINE T sum(V<T> v) { // by halves
  T part[Simd<T>::W] __attribute__((aligned(FASTCL_BYTES)));
  store(part, v);
  for (int half = Simd<T>::W / 2; half; half /= 2)
    for (int l = 0; l < half; l++) part[l] += part[l + half];
  return part[0];
}

// Transposes a W x W matrix whose rows are W vectors.
template <class T, int HALF, class Lanes> struct Butterfly;
template <class T, int HALF, size_t... L> struct Butterfly<T, HALF, std::index_sequence<L...>> {
  static constexpr size_t W = sizeof...(L);
  static FASTCL_INLINE V<T> low(V<T> a, V<T> b) { return __builtin_shufflevector(a, b, (L & HALF ? W + L - HALF : L)...); }
  static FASTCL_INLINE V<T> high(V<T> a, V<T> b) { return __builtin_shufflevector(a, b, (L & HALF ? W + L : L + HALF)...); }
};
template <class T, int HALF = 1> FASTCL_INLINE void transpose(V<T> (&rows)[Simd<T>::W]) {
  constexpr int W = Simd<T>::W;
  if constexpr (HALF < W) {
    using B = Butterfly<T, HALF, std::make_index_sequence<W>>;
    EACH(r, W) if (!(r & HALF)) {
      const V<T> a = rows[r], b = rows[r + HALF];
      rows[r] = B::low(a, b);
      rows[r + HALF] = B::high(a, b);
    }
    transpose<T, 2 * HALF>(rows);
  }
}

// 2^t. Adding 1.5 * 2^mantissa rounds t to an integer, which is then in the low bits of the sum.
template <class T> struct Exponential;
template <> struct Exponential<float> {
  static constexpr float LEAST = -126, MOST = 126, ROUND = 12582912.f; // range of valid arguments
  static constexpr int MANTISSA = 23;
  // Relative error 2e-7 at most, 2e-8 on average; minimax on [-1/2, 1/2].
  static constexpr float FAST[] = {1.3264727272e-3f, 9.6715127391e-3f, 5.5507337440e-2f, 2.4022242084e-1f, 6.9314697760e-1f, 1.f};
  // For tiles with positives, in both passes: relative error 1e-7, one rounding more than exact. Minimax too, 2e-9 without rounding.
  static constexpr float CAREFUL[] = {1.5353362e-4f, 1.3398875e-3f, 9.6184369e-3f, 5.5503324e-2f, 2.4022648e-1f, 6.9314720e-1f, 1.f};
};
template <> struct Exponential<double> {
  static constexpr double LEAST = -1022, MOST = 1022, ROUND = 6755399441055744.;
  static constexpr int MANTISSA = 52;
  static constexpr double CAREFUL[] = {// ln(2)^k / k!
                                       1.3691488853904128e-12, 2.5678435993488206e-11,
                                       4.4455382718708116e-10, 7.054911620801123e-09,
                                       1.01780860092397e-07,   1.321548679014431e-06,
                                       1.5252733804059841e-05, 1.540353039338161e-04,
                                       1.3333558146428443e-03, 9.618129107628477e-03,
                                       5.550410866482158e-02,  2.402265069591007e-01,
                                       6.931471805599453e-01,  1.};
  static constexpr const double (&FAST)[14] = CAREFUL;
};
template <class T, bool CAREFUL> constexpr auto &coefficients() {
  if constexpr (CAREFUL) return Exponential<T>::CAREFUL;
  else return Exponential<T>::FAST;
}
// Several vectors at once, step by step: one vector's steps depend on each other, and a processor looks ahead over too few
// instructions to find those of the next vector behind them.
template <class T, bool CAREFUL, int COUNT> FASTCL_INLINE void polynomial(const V<T> (&f)[COUNT], V<T> (&p)[COUNT]) {
  constexpr auto &c = coefficients<T, CAREFUL>();
  EACH(v, COUNT) p[v] = all<T>(c[0]);
  EACH(k, int(sizeof(c) / sizeof(T)) - 1) EACH(v, COUNT) p[v] = p[v] * f[v] + c[k + 1];
}
template <class T, bool CAREFUL, int COUNT> FASTCL_INLINE void exp2(V<T> (&t)[COUNT]) {
  using E = Exponential<T>;
  using U = typename Simd<T>::U; // the caller clamps arguments beyond the range of exponents
  V<T> shifted[COUNT], f[COUNT], p[COUNT];
  EACH(v, COUNT) shifted[v] = t[v] + E::ROUND;
  EACH(v, COUNT) f[v] = t[v] - (shifted[v] - E::ROUND);
  polynomial<T, CAREFUL>(f, p);
  EACH(v, COUNT) t[v] = (V<T>)((U)p[v] + ((U)shifted[v] << E::MANTISSA));
}
template <class T, bool CAREFUL> FASTCL_INLINE V<T> exp2(V<T> t) {
  V<T> one[1] = {t};
  exp2<T, CAREFUL>(one);
  return one[0];
}
template <class T, bool CAREFUL, int COUNT> FASTCL_INLINE void exp2_clamped(V<T> (&t)[COUNT]) {
  using E = Exponential<T>;
  V<T> power[COUNT];
  EACH(v, COUNT) power[v] = at_most<T>(at_least<T>(t[v], all<T>(E::LEAST)), all<T>(E::MOST));
  exp2<T, CAREFUL>(power);
  EACH(v, COUNT) t[v] = where<T>(t[v] == t[v], power[v], t[v]); // the bits of NaN are not a valid exponent
}
template <class T, bool CAREFUL> FASTCL_INLINE V<T> exp2_clamped(V<T> t) {
  V<T> one[1] = {t};
  exp2_clamped<T, CAREFUL>(one);
  return one[0];
}

// Keeps x in memory. Otherwise the compiler would move it between registers and the stack.
template <class X> FASTCL_INLINE void settle(X &x) { __asm__("" : "+m"(x)); }

// How rows are multiplied. Unit: the part of a row that one lane multiplies, a number or a pair of bfloat16.
template <class T> struct Plain {
  using Real = T;
  using Unit = T;
  static constexpr int PAIR = 1; // numbers in a unit
  static FASTCL_INLINE V<T> multiply(V<T> acc, T a, V<T> b) { return acc + a * b; }
};
#if FASTCL_DOT
struct Dot {
  using Real = float;
  using Unit = float;
  static constexpr int PAIR = 2;
  static FASTCL_INLINE V<float> multiply(V<float> acc, float a, V<float> b) {
    return (V<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
  }
};
#endif

// acc[r][lane] += sum over k of a[r * ROW + k * STEP] * b[k * NR + lane], in units. `next` is prefetched.
template <class Mul, long ROW, long STEP> FASTCL_INLINE void multiply(const typename Mul::Unit *a, const typename Mul::Unit *b, long depth,
                                                                      V<typename Mul::Real> (&acc)[MR][NV], const void *next) {
  using T = typename Mul::Real;
  constexpr int W = Simd<T>::W;
  const char *ahead = (const char *)next;
#if defined(__aarch64__)
  // An instruction of NEON multiplies by one lane of a register. So factors that are adjacent in memory are loaded together, and are not
  // spread over a register each.
  for (; depth >= 2; depth -= 2, a += 2 * STEP, b += 2 * NV * W, ahead += 16) {
    V<T> bv[2][NV];
    EACH(k, 2) EACH(v, NV) bv[k][v] = load(b + (k * NV + v) * W);
    __builtin_prefetch(b + 16 * NV * W, 0, 3);
    __builtin_prefetch(ahead, 0, 2);
    if constexpr (STEP == 1) {
      typedef T Pair __attribute__((vector_size(2 * sizeof(T)), aligned(sizeof(T)), may_alias));
      EACH(r, MR) {
        Pair x = *(const Pair *)(a + r * ROW);
        __asm__("" : "+w"(x)); // GCC would load the numbers one by one
        EACH(k, 2) EACH(v, NV) acc[r][v] = Mul::multiply(acc[r][v], x[k], bv[k][v]);
      }
    } else {
      static_assert(ROW == 1 && MR % W == 0, "whole vectors of rows");
      EACH(k, 2) EACH(q, MR / W) {
        const V<T> x = loadu(a + k * STEP + q * W);
        EACH(l, W) EACH(v, NV) acc[q * W + l][v] = Mul::multiply(acc[q * W + l][v], x[l], bv[k][v]);
      }
    }
  }
#endif
  FASTCL_UNROLL(2) for (long k = 0; k < depth; k++) {
    V<T> bv[NV];
    EACH(v, NV) {
      bv[v] = load(b + v * W);
      __builtin_prefetch(b + v * W + 8 * NV * W, 0, 3);
    }
    EACH(r, MR) {
      const T x = a[r * ROW];
      EACH(v, NV) acc[r][v] = Mul::multiply(acc[r][v], x, bv[v]);
    }
    if ((k & 3) == 0) __builtin_prefetch(ahead + 8 * k, 0, 2);
    a += STEP;
    b += NV * W;
  }
}

} // namespace
} // namespace fastcl::FASTCL_ISA
