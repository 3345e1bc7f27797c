// Shared by forward and backward: packed rows, the products and logits of a register tile, masks.
#pragma once
#include "numbers.h"
#include "rules.h"
#include <cstring>

namespace fastcl::FASTCL_ISA {
namespace {

constexpr int64_t BLOCK = 192;        // largest number of rows of a tile: its gradient stays in the second-level cache
constexpr int64_t CHUNK = 128;        // units multiplied into one partial sum: bounds the rounding error of long rows
constexpr int64_t A_ROW = CHUNK + 16; // stride of a chunk's rows: rows that are read together are in different cache sets
constexpr int ROWS_AT_ONCE = 2;       // rows of a register tile whose exponentials are computed together
static_assert(MR % ROWS_AT_ONCE == 0, "a register tile is whole groups of these rows");
constexpr double LOG2E = 1.4426950408889634074, LN2 = 0.69314718055994530942;
constexpr double NORM_FLOOR = 1e-12;
constexpr double SHARED_LIMIT = 64; // for logits |t| below this, to base 2, the numbers 2^t, their sums and reciprocals fit a float

template <class T> FASTCL_INLINE T larger_or_nan(T most, T x) { return x > most || x != x ? x : most; }
template <class T> FASTCL_INLINE V<T> lanes_larger_or_nan(V<T> most, V<T> x) { return (x > most) | (x != x) ? x : most; }
// Converts a logarithm to base 2 to natural units. Beyond 2^23 the result is rounded to T, so that equal shifts and bases, which are
// stored in T, stay equal: the rounding error of one of them would act as an exponent.
template <class T> FASTCL_INLINE double natural(T base2) {
  const double exact = LN2 * double(base2);
  return __builtin_fabs(exact) > 8388608. ? double(T(exact)) : exact;
}
template <class T> FASTCL_INLINE T exp2_of(T x) {
  if constexpr (sizeof(T) == 8) return __builtin_exp2(x);
  else return __builtin_exp2f(x);
}
template <class T> FASTCL_INLINE T log_of(T x) {
  if constexpr (sizeof(T) == 8) return __builtin_log(x);
  else return __builtin_logf(x);
}

// One side of the matrix of logits, by place in the arranged order.
template <class Mul> struct Side {
  using T = typename Mul::Real;
  using Unit = typename Mul::Unit;
  static constexpr int64_t NR = NV * Simd<T>::W;
  Rows rows;
  int64_t size, padded;                          // padded: a multiple of NR, with room for a register tile's overhang
  const int32_t *order, *cluster, *id, *matched; // null: not present; cluster and id of the padding never match
  bool leaves_out;                               // some contrasts are left out: their bias is -inf
  const int32_t *present;                        // [padded]: 0 for contrasts left out; null: there are none
  bool normalize;
  T *inverse_norms; // of packed rows; 1 for rows that are not normalised; 0 in the padding
  T *powers;        // powers of two by which normalised rows were multiplied when packed; 1 for nearly all rows. Null: not normalised
  Unit *columns;    // [padded / NR][units of D][NR]: for products whose columns are the places; null: not needed
  Unit *depth;      // [D / NR, up][units of padded][NR]: for products that sum over the places; null: not needed
  int64_t depth_units() const { return (padded + Mul::PAIR - 1) / Mul::PAIR; }
};

template <class Mul> struct Sweep {
  using T = typename Mul::Real;
  using Unit = typename Mul::Unit;
  static constexpr int W = Simd<T>::W;
  static constexpr int64_t NR = NV * W;
  static constexpr int64_t A_CHUNK = (BLOCK + MR) * A_ROW; // one chunk of a block's rows, overhang included

  static constexpr double LARGEST = sizeof(T) == 8 ? __DBL_MAX__ : double(__FLT_MAX__);
  // Rows with larger norms are scaled when packed. Otherwise products and gradients of two such rows would leave T's range.
  static constexpr double FAR = sizeof(T) == 8 ? 0x1p500 : 0x1p40;

  int64_t d, units, chunks; // of a row
  int threads, scales;
  bool self;
  struct Scale {
    T whole, rest; // log2(e) * logit_scale in two parts, so that logits to base 2 are rounded only once
  };
  Scale *scale;                 // [scales]
  Side<Mul> anchors, contrasts; // the same for self-contrast
  PairRules<T> rules;
  bool restricted; // ids, rules or a bias of -inf make some pairs inadmissible
  T *bias;         // [contrasts.padded], to base 2, 0 for contrasts that are left out; null: none
  T *largest;      // [2][threads]: largest norm, as it enters the logits, of each thread's anchors and contrasts
  T *scratch;      // [threads][W][scratch_row]: buffers for converted rows

  // If the arena only counts, pointers are null and the bias is the only array that is read.
  // anchor_bias: bias of anchors that are contrasts of the original problem; it only tells which of them are left out.
  // multiplied: whether similarities are computed; false if their products were kept.
  Sweep(const Problem &p, const Arranged &at, Arena &arena, bool sum_over_anchors, bool sum_over_contrasts, const void *anchor_bias = nullptr,
        bool multiplied = true)
      : d(p.dimension), units((d + Mul::PAIR - 1) / Mul::PAIR), chunks((units + CHUNK - 1) / CHUNK), threads(p.threads), scales(p.scales),
        self(p.self_contrast()), anchors(side(p.anchors, at.anchors, p.normalize_anchors, -3, anchor_bias, arena, self && multiplied,
                                              sum_over_anchors || (self && sum_over_contrasts))),
        contrasts(self ? anchors
                       : side(p.contrasts, at.contrasts, p.normalize_contrasts, -4, p.contrast_bias, arena, multiplied, sum_over_contrasts)),
        rules(p, at, anchors.padded, contrasts.padded, arena), restricted(anchors.id || anchors.present || contrasts.present || rules.any) {
    bias = p.contrast_bias ? arena.template take<T>(contrasts.padded) : nullptr;
    largest = arena.template take<T>(2 * threads);
    scratch = arena.template take<T>(threads * W * scratch_row());
    scale = arena.template take<Scale>(scales);
    if (!arena.base) return;
    for (int k = 0; k < scales; k++) {
      const double exact = LOG2E * double(((const T *)p.logit_scale)[k]);
      const T whole = T(exact);
      scale[k] = {whole, __builtin_isfinite(whole) ? T(exact - double(whole)) : T(0)};
    }
    for (int64_t j = 0; bias && j < contrasts.padded; j++)
      bias[j] = j < contrasts.size && !left_out(contrasts, j) ? T(LOG2E * double(((const T *)p.contrast_bias)[contrasts.order[j]])) : T(0);
  }
  int64_t scratch_row() const { return round_up(d, 16); }
  T *row_buffer(int t, int64_t l = 0) const { return scratch + (t * W + l) * scratch_row(); }

  // Computes norms and packs rows into panels: the share of one planned thread. A barrier must follow.
  void pack(int t) const {
    largest[t] = pack_side(anchors, t);
    largest[threads + t] = self ? largest[t] : pack_side(contrasts, t);
  }

  // Whether some |logit|, to base 2, may exceed SHARED_LIMIT. Call after `pack`.
  bool wide() const {
    double most_bias = 0;
    for (int64_t j = 0; bias && j < contrasts.size; j++) most_bias = larger_or_nan(most_bias, __builtin_fabs(double(bias[j])));
    double most_scale = 0;
    for (int k = 0; k < scales; k++) most_scale = larger_or_nan(most_scale, __builtin_fabs(double(scale[k].whole)));
    return !(most_scale * largest_norm(0) * largest_norm(1) + most_bias <= SHARED_LIMIT);
  }
  double largest_norm(int side) const { // of anchors (0) or contrasts (1), as it enters the logits; NaN if any norm is
    double most = 0;
    for (int t = 0; t < threads; t++) most = larger_or_nan(most, double(largest[side * threads + t]));
    return most;
  }

  // Packs the rows of a block, row-major within chunks: a[chunk][row][A_ROW]. Rows from `to` on are zero.
  void pack_block(Unit *a, int64_t from, int64_t to, int t) const {
    const int64_t rows = round_up(to - from, MR);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t i = from + r;
      const Unit *x = i < to ? read(anchors, i, row_buffer(t)) : nullptr;
      for (int64_t c = 0; c < chunks; c++) {
        Unit *out = a + c * A_CHUNK + r * A_ROW;
        const int64_t n = smaller(CHUNK, units - c * CHUNK);
        if (x) memcpy(out, x + c * CHUNK, n * sizeof(Unit));
        else memset(out, 0, n * sizeof(Unit));
      }
    }
  }
  int64_t block_units() const { return chunks * A_CHUNK; }

  // Products <x_i, y_j> of the register tile at (i0, j0), stored in memory because an epilogue needs the registers.
  // `a` is the tile's first row in a packed block. Products commute, and so do norms that are multiplied first, so the
  // similarities a_i c_j <x_i, x_j> and their mirror images agree bitwise.
  using Tile = T[MR][NV][W];
  FASTCL_INLINE void products(const Unit *a, int64_t j0, Tile &u, const void *next) const {
    const Unit *b = contrasts.columns + j0 * units;
    V<T> part[MR][NV];
    EACH(r, MR) EACH(v, NV) part[r][v] = all<T>(0);
    multiply<Mul, A_ROW, 1>(a, b, smaller(CHUNK, units), part, next);
    EACH(r, MR) EACH(v, NV) store(u[r][v], part[r][v]);
    settle(u);
    for (int64_t c = 1; c < chunks; c++) {
      EACH(r, MR) EACH(v, NV) part[r][v] = all<T>(0);
      multiply<Mul, A_ROW, 1>(a + c * A_CHUNK, b + c * CHUNK * NR, smaller(CHUNK, units - c * CHUNK), part, next);
      EACH(r, MR) EACH(v, NV) add_to(u[r][v], part[r][v]);
      settle(u);
    }
  }
  // Stores a register tile's products of the rows before `to`, and loads them again; the other rows become zero. In self-contrast
  // those of pairs i <= j are stored.
  FASTCL_NOINLINE void keep_products(const Tile &u, const KeptProducts &kept, int64_t i0, int64_t j0, int64_t to) const {
    T *const at = (T *)kept.of + i0 * kept.stride + j0;
    const int64_t count = smaller(to - i0, int64_t(MR));
    for (int64_t r = 0; r < count; r++) EACH(v, NV) store(at + r * kept.stride + v * W, load(u[r][v]));
  }
  FASTCL_NOINLINE void kept_products(Tile &u, const KeptProducts &kept, int64_t i0, int64_t j0, int64_t to) const {
    const T *const at = (const T *)kept.of + i0 * kept.stride + j0;
    for (int64_t r = 0; r < MR; r++) EACH(v, NV) store(u[r][v], i0 + r < to ? load(at + r * kept.stride + v * W) : all<T>(0));
    if (!self || i0 + MR <= j0 + 1) return;
    for (int64_t r = 0; r < MR && i0 + r < to; r++) // the pairs below the diagonal, from their mirror images
      for (int64_t l = 0; l < smaller(i0 + r - j0, NR); l++) ((T *)u[r])[l] = ((const T *)kept.of)[(j0 + l) * kept.stride + i0 + r];
  }
  static FASTCL_INLINE V<T> logits(V<T> similarity, Scale by) {
    return fused<T>(similarity, all<T>(by.whole), similarity * by.rest); // forward and backward round in the same way
  }
  FASTCL_INLINE V<T> biased(V<T> logits, int64_t j) const { return bias ? logits + load(bias + j) : logits; }

  // Whether anchors [i0, i1) may have positives among contrasts [j0, j1).
  FASTCL_INLINE bool clustered(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    return anchors.cluster && anchors.cluster[i0] <= contrasts.cluster[j1 - 1] && contrasts.cluster[j0] <= anchors.cluster[i1 - 1];
  }
  // Whether the register tile needs masks: it may hold positives, inadmissible pairs or an edge, or there is a bias.
  FASTCL_INLINE bool mixed(int64_t i0, int64_t j0, int64_t to) const {
    const int64_t i1 = i0 + MR, j1 = j0 + NR;
    if (i1 > to || j1 > contrasts.size || bias || anchors.present) return true;
    if (self && i0 < j1 && j0 < i1) return true;
    if (clustered(i0, i1, j0, j1)) return true;
    if (rules.mixed(i0, i1, j0, j1)) return true;
    return anchors.matched && anchors.matched[i1] > anchors.matched[i0] && contrasts.matched[j1] > contrasts.matched[j0];
  }
  struct Masks {
    I<T> admissible, positive;
  };
  // The pairs that a sum over all pairs includes; for self-contrast only those above the diagonal.
  FASTCL_INLINE I<T> counted(int64_t i, int64_t j) const { return self ? lanes_from<T>(j) > all_int<T>(i) : all_int<T>(-1); }
  // Masks of row i and the columns from j on. For self-contrast they exclude j = i, and with `upper` also j < i.
  // cosines: [W], of the guide; null: none.
  FASTCL_INLINE Masks masks(int64_t i, int64_t j, int64_t to, bool upper, const T *cosines = nullptr) const {
    const I<T> column = lanes_from<T>(j), row = all_int<T>(i);
    I<T> admissible = column < all_int<T>(i < to ? contrasts.size : 0);
    if (self) admissible &= upper ? column > row : column != row;
    if (restricted) admissible &= meeting(i, j);
    I<T> positive = all_int<T>(0);
    if (anchors.cluster) positive = admissible & (load_ids<T>(contrasts.cluster + j) == all_int<T>(anchors.cluster[i]));
    if (rules.anchors.tags) positive |= admissible & rules.shared(i, j, i < to);
    if (cosines) admissible &= positive | rules.within(i, load(cosines));
    return {admissible, positive};
  }
  // Pairs that are admissible by their ids, bias and rules but the guide. Rarely restricted, so `masks` tests one flag for all.
  FASTCL_NOINLINE I<T> meeting(int64_t i, int64_t j) const {
    if (left_out(anchors, i)) return all_int<T>(0);
    I<T> result = all_int<T>(-1);
    if (anchors.id) result &= load_ids<T>(contrasts.id + j) != all_int<T>(anchors.id[i]);
    if (anchors.id && rules.anchors.sample) result |= rules.same_sample(i, j);
    if (rules.anchors.group) result &= rules.same_group(i, j);
    if (rules.anchors.row) result &= rules.other_row(i, j);
    if (contrasts.present) result &= load_ids<T>(contrasts.present + j) != all_int<T>(0);
    return result;
  }

  static FASTCL_INLINE bool left_out(const Side<Mul> &side, int64_t i) { return side.present && !side.present[i]; }
  // Whether pairs of existing places may be inadmissible; the diagonal of self-contrast does not count.
  FASTCL_INLINE bool excludes() const { return anchors.id || contrasts.present || rules.any; }
  // Whether row i may have positives or inadmissible pairs among the W columns from j on.
  FASTCL_INLINE bool marked(int64_t i, int64_t j, I<T> positive) const {
    if (excludes()) return true;
    if (rules.anchors.tags) return any<T>(positive);
    const int64_t end = smaller(j + W, contrasts.size);
    return j < end && clustered(i, i + 1, j, end);
  }

  // Stores a row of a register tile in a tile with row stride G_ROW; a product then sums over its columns.
  static constexpr int64_t G_ROW = BLOCK / Mul::PAIR + 16;
  static FASTCL_INLINE void store_row(Unit *g, const V<T> (&x)[NV]) {
    if constexpr (Mul::PAIR == 1) EACH(v, NV) store(g + v * W, x[v]);
#if FASTCL_DOT
    else _mm512_store_si512(g, (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]));
#endif
  }

  static FASTCL_INLINE void store_zeros(Unit *g, int rows) { // for a register tile
    const V<T> zeros[NV] = {};
    for (int r = 0; r < rows; r++) store_row(g + r * G_ROW, zeros);
  }

  // out[row] += sum over the places in `over` of g * their rows, for the rows at the places in `to`.
  template <long ROW, long STEP>
  FASTCL_NOINLINE void product(const Unit *g, const Side<Mul> &summed, Range over, const Side<Mul> &side, Range to, void *out) const {
    const int64_t panels = (d + NR - 1) / NR, stride = summed.depth_units() * NR;
    const long depth = (over.to - over.from + Mul::PAIR - 1) / Mul::PAIR;
    const Unit *z = summed.depth + over.from / Mul::PAIR * NR;
    for (int64_t p = 0; p < panels; p++, z += stride)
      for (int64_t i = to.from; i < to.to; i += MR) {
        const int64_t count = smaller(to.to - i, int64_t(MR)), width = smaller(d - p * NR, NR);
        T *y[MR];
        EACH(r, MR) {
          y[r] = (T *)out + (r < count ? side.order[i + r] : side.order[i]) * d + p * NR;
          EACH(v, NV) __builtin_prefetch(y[r] + v * W, 1, 3); // needed only after the product
        }
        V<T> x[MR][NV];
        EACH(r, MR) EACH(v, NV) x[r][v] = all<T>(0);
        const char *ahead = (const char *)(z + stride) + (i - to.from) / MR * 8 * depth;
        multiply<Mul, ROW, STEP>(g + (i - to.from) * ROW, z, depth, x, ahead);
        if (count == MR && width == NR) EACH(r, MR) EACH(v, NV) storeu(y[r] + v * W, loadu(y[r] + v * W) + x[r][v]);
        else EACH(r, MR) {
            if (r >= count) continue;
            T part[NR] __attribute__((aligned(64)));
            EACH(v, NV) store(part + v * W, x[r][v]);
            for (int64_t k = 0; k < width; k++) y[r][k] += part[k];
          }
      }
  }

  // Computes row i's inverse norm and power, and returns the row. `most` becomes the largest norm as it enters the logits, or NaN.
  const Unit *measured(const Side<Mul> &s, int64_t i, T *buffer, T &most) const {
    const bool direct = lies_so(s);
    const T *x = direct ? (const T *)s.rows.data + s.order[i] * s.rows.row_stride : buffer;
    if (!direct) read_row(s.rows, s.order[i], d, buffer);
    // in double, because an error of the norm affects all logits of the row
    double norm = __builtin_sqrt(dot<double>(x, x, d));
    T a = 1, power = 1;
    if (s.normalize) {
      if (!(norm > 0 && norm <= FAR)) norm = far_norm(x, buffer, norm, power);
      a = norm == 0 || norm > FAR ? T(0) : T(1 / larger(norm, NORM_FLOOR));
      s.powers[i] = power;
    } else if (!(norm <= LARGEST) && is_infinite(x)) a = T(__builtin_nan("")); // its logits of -inf would drop out of sums
    most = larger_or_nan(most, T(norm) * a);
    s.inverse_norms[i] = a;
    return read(s, i, buffer);
  }
  // The norm of a row beyond FAR, multiplied by a power of two that brings it near 1; or of a row whose squares underflow.
  FASTCL_NOINLINE double far_norm(const T *x, T *buffer, double norm, T &power) const {
    double most = 0;
    for (int64_t k = 0; k < d; k++) most = larger(most, __builtin_fabs(double(x[k])));
    if (norm != norm || !(most <= __DBL_MAX__)) return norm;
    if (norm <= FAR) return most;                              // its exact value does not matter: it is below the floor
    power = T(__builtin_ldexp(1, -__builtin_ilogb(most) + 1)); // not a subnormal number
    for (int64_t k = 0; k < d; k++) buffer[k] = x[k] * power;
    return __builtin_sqrt(dot<double>(buffer, buffer, d));
  }
  FASTCL_NOINLINE bool is_infinite(const T *x) const {
    for (int64_t k = 0; k < d; k++)
      if (__builtin_isinf(x[k])) return true;
    return false;
  }
  T whole_inverse_norm(const Side<Mul> &s, int64_t i) const { // of the row before packing
    return s.normalize && !left_out(s, i) ? s.inverse_norms[i] * s.powers[i] : s.inverse_norms[i];
  }

  // Maps the gradient of a_i x_i to that of x_i, g - x <x, g> / <x, x>, times a factor.
  void project(const Side<Mul> &side, int64_t i, T *gradient, T factor, int t) const {
    const int64_t row = side.order[i];
    T *const g = gradient + row * d, *const x = row_buffer(t);
    const T a = side.inverse_norms[i];
    if (side.normalize && a != 0 && a < T(1 / NORM_FLOOR)) { // no projection below the floor, where x / floor is linear
      const T power = side.powers[i];
      read_row(side.rows, row, d, x);
      for (int64_t k = 0; power != 1 && k < d; k++) x[k] *= power;
      factor *= power;
      const T square = dot<T>(x, x, d), along = dot<T>(x, g, d) / square;
      for (int64_t k = 0; k < d; k++) g[k] -= along * x[k];
      const T rest = dot<T>(x, g, d) / square; // the two cancel where g is parallel to x, and leave a rounding error of g
      for (int64_t k = 0; k < d; k++) g[k] = factor * (g[k] - rest * x[k]);
    } else
      for (int64_t k = 0; k < d; k++) g[k] *= factor;
  }

private:
  Side<Mul> side(const Rows &rows, const Places &at, bool normalize, int32_t none, const void *bias, Arena &arena, bool columns, bool depth) const {
    Side<Mul> s{};
    s.rows = rows;
    s.size = rows.size;
    s.padded = round_up(round_up(rows.size, NR) + MR, NR);
    s.normalize = normalize;
    s.order = at.order;
    s.matched = at.matched;
    s.inverse_norms = arena.take<T>(s.padded);
    s.powers = normalize ? arena.take<T>(s.padded) : nullptr;
    s.cluster = ids(at.cluster, s, none, arena);
    s.id = ids(at.id, s, none, arena);
    s.leaves_out = false;
    for (int64_t i = 0; bias && i < s.size; i++) s.leaves_out |= is_left_out(bias, i);
    s.present = s.leaves_out ? present(bias, s, arena) : nullptr;
    s.columns = columns ? arena.take<Unit>(s.padded * units + 1024) : nullptr; // prefetches read beyond the end
    s.depth = depth ? arena.take<Unit>(round_up(d, NR) * s.depth_units() + 1024) : nullptr;
    return s;
  }
  static const int32_t *ids(const int32_t *from, const Side<Mul> &s, int32_t none, Arena &arena) {
    if (!from) return nullptr;
    int32_t *to = arena.take<int32_t>(s.padded);
    if (!arena.base) return to;
    memcpy(to, from, s.size * sizeof(int32_t));
    for (int64_t i = s.size; i < s.padded; i++) to[i] = none;
    return to;
  }

  static bool is_left_out(const void *bias, int64_t row) { return ((const T *)bias)[row] == -T(__builtin_inf()); }
  static const int32_t *present(const void *bias, const Side<Mul> &s, Arena &arena) {
    int32_t *to = arena.take<int32_t>(s.padded);
    for (int64_t i = 0; arena.base && i < s.padded; i++) to[i] = i >= s.size || !is_left_out(bias, s.order[i]);
    return to;
  }

  // A row in units: in place if its layout allows it, else in the buffer.
  const Unit *read(const Side<Mul> &s, int64_t i, Unit *buffer) const {
    if (left_out(s, i)) return zeros(buffer); // independent of the row's values
    const Rows &rows = s.rows;
    const int64_t row = s.order[i];
    if constexpr (Mul::PAIR == 2) {
      const uint16_t *in = (const uint16_t *)rows.data + row * rows.row_stride;
      uint16_t *out = (uint16_t *)buffer;
      if (rows.column_stride == 1) memcpy(out, in, d * 2);
      else
        for (int64_t k = 0; k < d; k++) out[k] = in[k * rows.column_stride];
      if (d & 1) out[d] = 0;
      if (const T power = power_of(s, i); power != 1)
        for (int64_t k = 0; k < d; k++) { // exact, unless the result is subnormal and negligible
          const T scaled = widened<T>(out[k], true) * power;
          uint32_t word;
          memcpy(&word, &scaled, 4);
          out[k] = uint16_t(word >> 16);
        }
      if (vanishes(s, i)) // finite numbers become 0, others NaN
        for (int64_t k = 0; k < d; k++) out[k] = (out[k] & 0x7f80) == 0x7f80 ? 0x7fc0 : 0;
      return buffer;
    } else {
      const T power = power_of(s, i);
      if (lies_so(s) && !vanishes(s, i) && power == 1) return (const T *)rows.data + row * rows.row_stride;
      read_row(rows, row, d, buffer);
      for (int64_t k = 0; power != 1 && k < d; k++) buffer[k] *= power;
      if (vanishes(s, i)) // finite numbers become 0, others NaN
        for (int64_t k = 0; k < d; k++) buffer[k] *= T(0);
      return buffer;
    }
  }
  static bool lies_so(const Side<Mul> &s) { // contiguous rows of T
    return s.rows.column_stride == 1 && s.rows.dtype == (sizeof(T) == 8 ? Dtype::float64 : Dtype::float32);
  }
  static bool vanishes(const Side<Mul> &s, int64_t i) { return s.normalize && s.inverse_norms[i] == 0; }

  static T power_of(const Side<Mul> &s, int64_t i) { return s.normalize ? s.powers[i] : T(1); }

  // Packs W rows at a time. Returns the largest norm, or NaN.
  T pack_side(const Side<Mul> &s, int t) const {
    const Range mine = share(s.padded, threads, t, NR);
    T most = 0;
    for (int64_t i = mine.from; i < mine.to; i += W) {
      const Unit *rows[W];
      for (int64_t l = 0; l < W; l++) {
        const bool there = i + l < s.size && !left_out(s, i + l);
        rows[l] = there ? measured(s, i + l, row_buffer(t, l), most) : nothing(s, i + l, row_buffer(t, l));
      }
      if (s.columns) pack_columns(s, i, rows);
      for (int64_t l = 0; s.depth && l < W; l++) pack_depth(s, i + l, rows[l]);
    }
    return most;
  }
  const Unit *nothing(const Side<Mul> &s, int64_t i, T *buffer) const {
    s.inverse_norms[i] = 0;
    return zeros((Unit *)buffer);
  }
  const Unit *zeros(Unit *buffer) const {
    memset((void *)buffer, 0, scratch_row() * sizeof(T));
    return buffer;
  }
  void pack_columns(const Side<Mul> &s, int64_t i, const Unit *const (&rows)[W]) const { // transposed in registers
    Unit *out = s.columns + i / NR * NR * units + i % NR;
    int64_t k = 0;
    for (; k + W <= units; k += W, out += W * NR) {
      V<T> tile[W];
      EACH(l, W) tile[l] = loadu(rows[l] + k);
      transpose<T>(tile);
      EACH(l, W) store(out + l * NR, tile[l]);
    }
    for (; k < units; k++, out += NR)
      for (int64_t l = 0; l < W; l++) out[l] = rows[l][k];
  }
  void pack_depth(const Side<Mul> &s, int64_t i, const Unit *x) const {
    const int64_t panels = (d + NR - 1) / NR, stride = s.depth_units() * NR;
    for (int64_t p = 0; p < panels; p++) {
      const int64_t n = smaller(NR, d - p * NR);
      if constexpr (Mul::PAIR == 2) {
        uint16_t *out = (uint16_t *)(s.depth + p * stride + i / 2 * NR) + i % 2;
        for (int64_t l = 0; l < NR; l++) out[2 * l] = l < n ? ((const uint16_t *)x)[p * NR + l] : uint16_t(0);
      } else {
        T *out = s.depth + p * stride + i * NR;
        for (int64_t l = 0; l < NR; l++) out[l] = l < n ? x[p * NR + l] : T(0);
      }
    }
  }
};

} // namespace
} // namespace fastcl::FASTCL_ISA
