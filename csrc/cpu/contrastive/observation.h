// The optional statistics for monitoring, from the forward's products. A single kind of tile handles all cases. It always uses
// running maxima, and computes entropies from sums relative to them, which avoids cancellation.
#pragma once
#include "cpu/sweep.h"

namespace fastcl::FASTCL_ISA {
namespace {

template <class T> constexpr T NO_MAXIMUM = sizeof(T) == 8 ? T(-__DBL_MAX__) : T(-__FLT_MAX__); // maximum of an empty set

template <class Mul> struct Observation {
  using T = typename Mul::Real;
  static constexpr int W = Simd<T>::W;
  static constexpr int64_t ROWS = BLOCK + MR;
  using Tile = typename Sweep<Mul>::Tile;

  // Numbers of a row or column, for logits t to base 2: the largest logit of the negatives and of the positives; their sums; the sums
  // of 2^(t - b) and of (b - t) 2^(t - b), with b the larger maximum; and, if there is a bias, the sums of logits without it.
  enum Part : int { MOST_NEGATIVE, MOST_POSITIVE, SUM_NEGATIVE, SUM_POSITIVE, MASS, MOMENT, PLAIN_NEGATIVE, PLAIN_POSITIVE, PARTS };

  const Sweep<Mul> &s;
  const bool asked, columns;
  const int kept;        // PARTS with a bias, else PLAIN_NEGATIVE
  T *const row_parts;    // [scales][kept][anchors.padded]; null for self-contrast, where a row's numbers are added to those of its column
  T *const column_parts; // [threads][scales][kept][contrasts.padded]
  T *const lanes;        // [threads][scales][kept][ROWS][W]: numbers of a thread's block

  Observation(const Sweep<Mul> &sweep, const Forward &call, bool columns, Arena &arena)
      : s(sweep), asked(call.anchors.observed), columns(columns), kept(call.problem.contrast_bias ? PARTS : PLAIN_NEGATIVE),
        row_parts(asked && !s.self ? arena.take<T>(s.scales * kept * s.anchors.padded) : nullptr),
        column_parts(asked && columns ? arena.take<T>(s.threads * s.scales * kept * s.contrasts.padded) : nullptr),
        lanes(asked ? arena.take<T>(s.threads * s.scales * kept * ROWS * W) : nullptr) {}

  void start(int t) const { // call before the thread's first block
    for (int k = 0; columns && k < s.scales; k++) reset(columns_of(t, k), s.contrasts.padded, {0, s.contrasts.padded});
    for (int k = 0; !s.self && k < s.scales; k++) reset(rows_of(t, k), s.anchors.padded, share(s.anchors.size, s.threads, t, MR));
  }
  void open(int t) const { // begins a block
    for (int k = 0; k < s.scales; k++) reset(lanes_of(t, k), ROWS * W, {0, ROWS * W});
  }
  void close(int t, int64_t from, int64_t to) const {
    for (int k = 0; k < s.scales; k++)
      for (int64_t i = from; i < to; i++)
        for (int l = 0; l < W; l++) merge(rows_of(t, k) + i, s.anchors.padded, lanes_of(t, k) + (i - from) * W + l, ROWS * W);
  }

  // Adds the register tile at (i0, j0) of the block [from, to), at all scales.
  FASTCL_NOINLINE void add(const Tile &products, int64_t i0, int64_t j0, int64_t from, int64_t to, int t, const Tile *cosines) const {
    I<T> negative[MR][NV], positive[MR][NV];
    V<T> plain[MR][NV], logit[MR][NV];
    for (int r = 0; r < MR; r++)
      for (int v = 0; v < NV; v++) {
        const auto masks = s.masks(i0 + r, j0 + v * W, to, true, cosines ? (*cosines)[r][v] : nullptr);
        positive[r][v] = masks.positive;
        negative[r][v] = masks.admissible & ~masks.positive;
      }
    for (int k = 0; k < s.scales; k++) {
      for (int r = 0; r < MR; r++)
        for (int v = 0; v < NV; v++) {
          const int64_t j = j0 + v * W;
          const V<T> norms = s.anchors.inverse_norms[i0 + r] * load(s.contrasts.inverse_norms + j);
          plain[r][v] = s.logits(load(products[r][v]) * norms, s.scale[k]);
          logit[r][v] = s.biased(plain[r][v], j);
        }
      for (int r = 0; r < MR; r++)
        add_lanes<NV, 1>(lanes_of(t, k) + (i0 - from + r) * W, ROWS * W, &logit[r][0], &plain[r][0], &negative[r][0], &positive[r][0]);
      for (int v = 0; columns && v < NV; v++)
        add_lanes<MR, NV>(columns_of(t, k) + j0 + v * W, s.contrasts.padded, &logit[0][v], &plain[0][v], &negative[0][v], &positive[0][v]);
    }
  }

  // Finishes a thread's share of the rows. Call after a barrier, and after the rows' counts are written.
  void finish(const Forward &out, int t) const {
    for (int k = 0; k < s.scales; k++) {
      if (s.self) finish(k, s.anchors, out.anchors, column_parts, s.threads, t);
      else finish(k, s.anchors, out.anchors, row_parts, 1, t);
      if (out.problem.columns) finish(k, s.contrasts, out.contrasts, column_parts, s.threads, t);
    }
  }

private:
  T *columns_of(int t, int k) const { return column_parts + (t * s.scales + k) * kept * s.contrasts.padded; }
  T *rows_of(int t, int k) const { return s.self ? columns_of(t, k) : row_parts + k * kept * s.anchors.padded; }

  T *lanes_of(int t, int k) const { return lanes + (t * s.scales + k) * kept * ROWS * W; }

  void reset(T *parts, int64_t stride, Range places) const {
    for (int f = 0; f < kept; f++)
      for (int64_t i = places.from; i < places.to; i++) parts[f * stride + i] = f <= MOST_POSITIVE ? NO_MAXIMUM<T> : T(0);
  }
  void merge(T *to, int64_t stride, const T *from, int64_t from_stride) const {
    for (int f : {SUM_NEGATIVE, SUM_POSITIVE}) to[f * stride] += from[f * from_stride];
    for (int f = PLAIN_NEGATIVE; f < kept; f++) to[f * stride] += from[f * from_stride];
    const T other = larger_or_nan(from[MOST_NEGATIVE * from_stride], from[MOST_POSITIVE * from_stride]);
    if (other == NO_MAXIMUM<T>) return; // an empty set, as in most lanes that are searched for positives
    const T before = larger_or_nan(to[MOST_NEGATIVE * stride], to[MOST_POSITIVE * stride]), most = larger_or_nan(before, other);
    const auto faded = [most](const T *parts, int64_t stride, T base, T &mass, T &moment) {
      mass = parts[MASS * stride] * exp2_of(base - most);
      moment = mass > 0 ? parts[MOMENT * stride] * exp2_of(base - most) + (most - base) * mass : T(0);
    };
    T mass, moment, other_mass, other_moment;
    faded(to, stride, before, mass, moment);
    faded(from, from_stride, other, other_mass, other_moment);
    to[MASS * stride] = mass + other_mass;
    to[MOMENT * stride] = moment + other_moment;
    for (int f : {MOST_NEGATIVE, MOST_POSITIVE}) to[f * stride] = larger_or_nan(to[f * stride], from[f * from_stride]);
  }

  // Adds COUNT logits to each lane.
  template <int COUNT, int STEP>
  FASTCL_INLINE void add_lanes(T *parts, int64_t stride, const V<T> *logit, const V<T> *plain, const I<T> *negative, const I<T> *positive) const {
    const V<T> least = all<T>(NO_MAXIMUM<T>);
    V<T> most_negative = load(parts + MOST_NEGATIVE * stride), most_positive = load(parts + MOST_POSITIVE * stride);
    const V<T> before = lanes_larger_or_nan<T>(most_negative, most_positive);
    EACH(k, COUNT) {
      most_negative = lanes_larger_or_nan<T>(most_negative, where<T>(negative[k * STEP], logit[k * STEP], least));
      most_positive = lanes_larger_or_nan<T>(most_positive, where<T>(positive[k * STEP], logit[k * STEP], least));
    }
    const V<T> base = lanes_larger_or_nan<T>(most_negative, most_positive), fading = exp2_clamped<T, true>(before - base);
    V<T> mass = load(parts + MASS * stride), sum_negative = load(parts + SUM_NEGATIVE * stride), sum_positive = load(parts + SUM_POSITIVE * stride);
    const V<T> risen = keep<T>(mass > all<T>(0), base - before); // without an earlier maximum it would be infinite
    V<T> moment = (load(parts + MOMENT * stride) + risen * mass) * fading;
    mass *= fading;
    EACH(k, COUNT) {
      const V<T> x = logit[k * STEP], e = keep<T>(negative[k * STEP] | positive[k * STEP], exp2_clamped<T, true>(x - base));
      mass += e;
      moment += where<T>(e > all<T>(0), (base - x) * e, e);
      sum_negative += keep<T>(negative[k * STEP], x);
      sum_positive += keep<T>(positive[k * STEP], x);
    }
    store(parts + MOST_NEGATIVE * stride, most_negative);
    store(parts + MOST_POSITIVE * stride, most_positive);
    store(parts + SUM_NEGATIVE * stride, sum_negative);
    store(parts + SUM_POSITIVE * stride, sum_positive);
    store(parts + MASS * stride, mass);
    store(parts + MOMENT * stride, moment);
    if (kept == PLAIN_NEGATIVE) return;
    V<T> plain_negative = load(parts + PLAIN_NEGATIVE * stride), plain_positive = load(parts + PLAIN_POSITIVE * stride);
    EACH(k, COUNT) {
      plain_negative += keep<T>(negative[k * STEP], plain[k * STEP]);
      plain_positive += keep<T>(positive[k * STEP], plain[k * STEP]);
    }
    store(parts + PLAIN_NEGATIVE * stride, plain_negative);
    store(parts + PLAIN_POSITIVE * stride, plain_positive);
  }

  // parts: [threads] arrays, each with all scales.
  void finish(int k, const Side<Mul> &side, const Statistics &out, const T *parts, int threads, int t) const {
    const Range mine = share(side.size, s.threads, t);
    const int64_t field = s.scales * side.size;
    for (int64_t i = mine.from; i < mine.to; i++) {
      T x[PARTS];
      reset(x, 1, {0, 1});
      for (int thread = 0; thread < threads; thread++) merge(x, 1, parts + (thread * s.scales + k) * kept * side.padded + i, side.padded);
      const int64_t row = side.order[i];
      T *const seen = (T *)out.observed + k * side.size + row;
      const auto largest = [](T t) { return t == NO_MAXIMUM<T> ? -T(__builtin_inf()) : T(natural(t)); };
      const T most = larger_or_nan(x[MOST_NEGATIVE], x[MOST_POSITIVE]);
      seen[MAX_POS * field] = largest(x[MOST_POSITIVE]);
      seen[MAX_NEG * field] = largest(x[MOST_NEGATIVE]);
      seen[ALL_POS * field] = T(LN2 * double(x[SUM_POSITIVE]));
      seen[ALL_NEG * field] = T(LN2 * double(x[SUM_NEGATIVE]));
      seen[PLAIN_POS * field] = kept == PARTS ? T(LN2 * double(x[PLAIN_POSITIVE])) : seen[ALL_POS * field];
      seen[PLAIN_NEG * field] = kept == PARTS ? T(LN2 * double(x[PLAIN_NEGATIVE])) : seen[ALL_NEG * field];
      const bool some = ((const T *)out.positives)[row] + ((const T *)out.negatives)[row] > 0;
      seen[LSE * field] = some ? T(natural(most) + double(log_of(x[MASS]))) : -T(__builtin_inf());
      seen[ENTROPY * field] = some ? T(double(log_of(x[MASS])) + LN2 * double(x[MOMENT] / x[MASS])) : T(0);
      seen[NUM_POS * field] = ((const T *)out.positives)[row];
      seen[NUM_NEG * field] = ((const T *)out.negatives)[row];
    }
  }
};

} // namespace
} // namespace fastcl::FASTCL_ISA
