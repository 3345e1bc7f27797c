// The epilogue of pair sums: the map of every pair, its sums, and, with weights, the gradient of their total in the same sweep.
#pragma once
#include "cpu/pairs/maps.h"
#include "cpu/walk.h"

namespace fastcl::FASTCL_ISA {
namespace {

// What a tile adds up for each row, and in self-contrast for each column. The first three are enough where all pairs are negatives.
enum Quantity : int { SUM_NEGATIVE, ACTIVE_NEGATIVE, SLOPE, SUM_POSITIVE, ACTIVE_POSITIVE, COUNT_POSITIVE, EXCLUDED, QUANTITIES };

template <class Mul> struct PairPass {
  using T = typename Mul::Real;
  using Unit = typename Mul::Unit;
  static constexpr int W = Simd<T>::W;
  static constexpr int64_t NR = NV * W;
  static constexpr bool DOT = Mul::PAIR == 2;
  static constexpr int64_t G_ROW = Sweep<Mul>::G_ROW, T_ROW = BLOCK + 16; // row strides of the tile's gradient and of its transpose
  // Squared distances below this share of the squared norms are found again, from differences: the product would lose their digits.
  static constexpr double NEAR = 1. / 64;

  struct Local {
    Unit *a;          // a packed block
    Unit *g;          // [BLOCK + MR][G_ROW]
    Unit *transposed; // [BLOCK / 2 + MR][T_ROW] pairs along the rows; without pairs, g itself is read across
    T *rows;          // [QUANTITIES][BLOCK + MR][W]: lanes of the tile's sums
    T *columns;       // [QUANTITIES][BLOCK + NR]
    double *lanes;    // [2][W]: lanes of the tile's terms of the scale's and the offset's gradients
    T *row;           // a row as it is stored
    double *x, *y;    // the rows of a near pair as they enter the product
    double scale, offset;
    bool marked;    // the tile has sums besides the first three
    char apart[64]; // keeps threads on separate cache lines
  };
  const Pairs &call;
  const Problem &p;
  const Sweep<Mul> s;
  const bool distance, differentiated, rows_needed, columns_needed;
  const bool slopes; // of columns of two sets: sums of the logits' gradient are needed
  const bool writes_rows = true, writes_columns = s.self || columns_needed || slopes, fixed_blocks = false;
  const double scale_factor;       // of the gradients of rows
  T *const weights[2];             // [anchors.padded], by place
  T *const offset;                 // [anchors.padded], to base 2
  T *const squares, *const others; // [padded]: squared norms of anchors and contrasts as they enter the product
  double *const totals;            // [QUANTITIES][anchors.padded]
  double *const column_slopes;     // [contrasts.padded]
  Local *const locals;

  PairPass(const Pairs &c, const Arranged &at, Arena &arena)
      : call(c), p(c.problem), s(p, at, arena, c.contrast_gradient != nullptr, c.anchor_gradient != nullptr), distance(of_distance(c.map)),
        differentiated(c.weights), rows_needed(c.anchor_gradient), columns_needed(s.self ? rows_needed : c.contrast_gradient != nullptr),
        slopes(!s.self && (c.bias_gradient || (of_distance(c.map) && c.contrast_gradient))),
        scale_factor(arena.base ? double(*(const T *)p.logit_scale) : 1), weights{arena.take<T>(s.anchors.padded), arena.take<T>(s.anchors.padded)},
        offset(arena.take<T>(s.anchors.padded)), squares(distance ? arena.take<T>(s.anchors.padded) : nullptr),
        others(!distance ? nullptr
               : s.self  ? squares
                         : arena.take<T>(s.contrasts.padded)),
        totals(arena.take<double>(QUANTITIES * s.anchors.padded)), column_slopes(slopes ? arena.take<double>(s.contrasts.padded) : nullptr),
        locals(arena.take<Local>(s.threads)) {
    for (int t = 0; t < s.threads; t++) {
      Local local{};
      local.a = arena.take<Unit>(s.block_units());
      local.g = arena.take<Unit>((BLOCK + MR) * G_ROW);
      local.transposed = DOT ? arena.take<Unit>((BLOCK / 2 + MR) * T_ROW) : nullptr;
      local.rows = arena.take<T>(QUANTITIES * (BLOCK + MR) * W);
      local.columns = arena.take<T>(QUANTITIES * (BLOCK + NR));
      local.lanes = arena.take<double>(2 * W);
      local.row = distance ? arena.take<T>(s.d) : nullptr;
      local.x = distance ? arena.take<double>(s.d) : nullptr;
      local.y = distance ? arena.take<double>(s.d) : nullptr;
      if (arena.base) locals[t] = local;
    }
  }

  void run() const {
    with_team(s.threads, [&](const Team &team) {
      team.run([&](int t) {
        s.pack(t);
        prepare(t);
      });
      const Walk<PairPass> walk{*this};
      switch (call.map) {
      case PairMap::softplus: walk.template run<PairMap::softplus>(team); break;
      case PairMap::hinge: walk.template run<PairMap::hinge>(team); break;
      case PairMap::distance: walk.template run<PairMap::distance>(team); break;
      case PairMap::squared: walk.template run<PairMap::squared>(team); break;
      }
      team.run([&](int t) { finish(t); });
    });
    double scale = 0, of_offset = 0;
    for (int t = 0; t < s.threads; t++) {
      scale += locals[t].scale;
      of_offset += locals[t].offset;
    }
    if (call.scale_gradient) *(double *)call.scale_gradient = scale;
    if (call.offset_gradient && !call.offset_of_rows) *(double *)call.offset_gradient = of_offset;
  }

  template <PairMap MAP> void block(int t, Range rows) const { s.pack_block(locals[t].a, rows.from, rows.to, t); }

  // One tile: its sums and gradient, then the products. A square on the diagonal of self-contrast is used only once.
  template <PairMap MAP> void tile(int t, Range rows, Range cols) const {
    if (call.only_positives && !s.clustered(rows.from, rows.to, cols.from, cols.to)) return;
    Local &local = locals[t];
    const bool diagonal = s.self && rows.from == cols.from, mirrored = diagonal && !DOT;
    clear(local, rows, cols);
    for (int64_t j = cols.from; j < cols.to; j += NR) {
      const Unit *next = s.contrasts.columns + (j + NR) * s.units;
      for (int64_t i = rows.from; i < rows.to && !(mirrored && j + NR <= i); i += MR) {
        const int64_t r0 = i - rows.from, c0 = j - cols.from;
        if (call.only_positives && !s.clustered(i, smaller(i + MR, rows.to), j, smaller(j + NR, cols.to))) {
          s.store_zeros(local.g + r0 * G_ROW + c0 / Mul::PAIR, MR);
          if constexpr (DOT) store_nothing(local, r0, c0);
          continue;
        }
        const char *ahead = (const char *)next + r0 / MR * 8 * s.units;
        const bool mixed = s.mixed(i, j, rows.to);
        (mixed ? pairs<MAP, true> : pairs<MAP, false>)(*this, t, local.a + r0 * A_ROW, i, j, r0, c0, rows.to, ahead);
      }
    }
    add(local, rows, cols);
    if (!differentiated) return;
    if constexpr (!DOT)
      if (mirrored) mirror<Mul>(local.g, rows.to - rows.from);
    if (rows_needed) s.template product<G_ROW, 1>(local.g, s.contrasts, cols, s.anchors, rows, call.anchor_gradient);
    if (columns_needed && !diagonal) {
      void *gradient = s.self ? call.anchor_gradient : call.contrast_gradient;
      if constexpr (DOT) s.template product<1, T_ROW>(local.transposed, s.anchors, rows, s.contrasts, cols, gradient);
      else s.template product<1, G_ROW>(local.g, s.anchors, rows, s.contrasts, cols, gradient);
    }
  }

private:
  void prepare(int t) const {
    locals[t].scale = locals[t].offset = 0;
    for (int l = 0; l < 2 * W; l++) locals[t].lanes[l] = 0;
    const Range mine = share(s.anchors.padded, s.threads, t);
    for (int64_t i = mine.from; i < mine.to; i++) {
      const bool there = i < s.anchors.size;
      const int64_t row = there ? s.anchors.order[i] : 0;
      for (int k = 0; k < 2; k++) weights[k][i] = there && differentiated ? ((const T *)call.weights)[k * s.anchors.size + row] : T(0);
      offset[i] = there && call.offset ? T(LOG2E * double(((const T *)call.offset)[call.offset_of_rows ? row : 0])) : T(0);
      for (int q = 0; q < QUANTITIES; q++) totals[q * s.anchors.padded + i] = 0;
    }
    if (rows_needed) erase(s.anchors, call.anchor_gradient, t);
    if (call.contrast_gradient) erase(s.contrasts, call.contrast_gradient, t);
    if (distance) measure(s.anchors, squares, t);
    if (distance && !s.self) measure(s.contrasts, others, t);
    const Range columns = share(s.contrasts.padded, s.threads, t);
    for (int64_t j = columns.from; slopes && j < columns.to; j++) column_slopes[j] = 0;
  }
  void erase(const Side<Mul> &side, void *gradient, int t) const {
    const Range mine = share(side.size, s.threads, t);
    memset((T *)gradient + mine.from * s.d, 0, (mine.to - mine.from) * s.d * sizeof(T));
  }
  // The squared norms of rows as they enter the product. The rows of this share were packed by the same thread.
  void measure(const Side<Mul> &side, T *to, int t) const {
    const Range mine = share(side.padded, s.threads, t, NR);
    for (int64_t i = mine.from; i < mine.to; i++) {
      to[i] = 0;
      if (i >= side.size || s.left_out(side, i)) continue;
      read_row(side.rows, side.order[i], s.d, s.row_buffer(t));
      const T *x = s.row_buffer(t), a = side.inverse_norms[i], power = side.normalize ? side.powers[i] : T(1);
      double square = 0;
      for (int64_t k = 0; k < s.d; k++) square += double(x[k] * power) * double(x[k] * power);
      to[i] = T(double(a) * double(a) * square); // NaN for rows with infinite numbers
    }
  }

  // The sums of a tile.

  static constexpr int64_t ROWS = (BLOCK + MR) * W, COLUMNS = BLOCK + NR;
  void clear(Local &local, Range rows, Range cols) const {
    const int64_t height = round_up(rows.to - rows.from, MR) * W, width = round_up(cols.to - cols.from, NR);
    for (int q = 0; q < QUANTITIES; q++) {
      memset(local.rows + q * ROWS, 0, height * sizeof(T));
      if (writes_columns) memset(local.columns + q * COLUMNS, 0, width * sizeof(T));
    }
    local.marked = false;
  }
  void add(Local &local, Range rows, Range cols) const {
    for (int q = 0; q < (local.marked ? int(QUANTITIES) : int(SUM_POSITIVE)); q++) {
      double *const total = totals + q * s.anchors.padded;
      for (int64_t i = rows.from; i < rows.to; i++) {
        const T *lanes = local.rows + q * ROWS + (i - rows.from) * W;
        double sum = 0;
        for (int l = 0; l < W; l++) sum += double(lanes[l]);
        total[i] += sum;
      }
      double *const across = s.self ? total : q == SLOPE ? column_slopes : nullptr;
      for (int64_t j = cols.from; across && j < cols.to; j++) across[j] += double(local.columns[q * COLUMNS + j - cols.from]);
    }
    for (int l = 0; l < W; l++) {
      local.scale += local.lanes[l];
      local.offset += local.lanes[W + l];
    }
    for (int l = 0; l < 2 * W; l++) local.lanes[l] = 0;
  }
  static FASTCL_INLINE void add_wide(double *sums, V<T> x) {
    typedef double Wide __attribute__((vector_size(W * sizeof(double)), aligned(FASTCL_BYTES), may_alias));
    *(Wide *)sums += __builtin_convertvector(x, Wide);
  }
  static FASTCL_INLINE void store_nothing(const Local &local, int64_t r0, int64_t c0) {
#if FASTCL_DOT
    typename Sweep<Mul>::Tile zeros __attribute__((aligned(64))) = {};
    if constexpr (DOT) store_transposed<T_ROW>(local.transposed, zeros, r0, c0);
#endif
  }

  // A register tile.
  template <PairMap MAP, bool MIXED> static FASTCL_NOINLINE void pairs(const PairPass &pass, int t, const Unit *a, int64_t i0, int64_t j0, int64_t r0,
                                                                       int64_t c0, int64_t to, const void *next) {
    constexpr bool DISTANCE = of_distance(MAP), COUNTS_ACTIVE = MAP != PairMap::softplus; // softplus is never 0
    const Sweep<Mul> &s = pass.s;
    Local &local = pass.locals[t];
    typename Sweep<Mul>::Tile u __attribute__((aligned(64))), gradient __attribute__((aligned(64)));
    s.products(a, j0, u, next);
    // Below the diagonal, where a tile is not mirrored, its sums were taken above the diagonal.
    const bool counted = MIXED || !(DOT && s.self && j0 < i0), across = pass.writes_columns;
    const auto by = s.scale[0];
    const T margin = T(pass.call.margins[1]);
    const auto row_sum = [&](Quantity q, int r) { return local.rows + q * ROWS + (r0 + r) * W; };
    const auto column_sum = [&](Quantity q, int v) { return local.columns + q * COLUMNS + c0 + v * W; };
    V<T> norms[NV], column_weight[NV], scale = all<T>(0), offset = all<T>(0);
    EACH(v, NV) {
      norms[v] = load(s.contrasts.inverse_norms + j0 + v * W);
      column_weight[v] = s.self ? loadu(pass.weights[1] + j0 + v * W) : all<T>(0);
    }
    if constexpr (MIXED) local.marked = true;
    const auto row = [&](int r) {
      const int64_t i = i0 + r;
      V<T> g[NV], values = all<T>(0), active = all<T>(0), slopes = all<T>(0);
      EACH(v, NV) {
        const int64_t j = j0 + v * W;
        const V<T> norm = s.anchors.inverse_norms[i] * norms[v], similarity = load(u[r][v]) * norm;
        [[maybe_unused]] typename Sweep<Mul>::Masks masks{};
        [[maybe_unused]] I<T> sums = all_int<T>(-1);
        if constexpr (MIXED) {
          masks = s.masks(i, j, to, false);
          sums = s.counted(i, j);
        }
        V<T> x;
        [[maybe_unused]] I<T> near = all_int<T>(0);
        if constexpr (DISTANCE) {
          const V<T> largest = pass.squares[i] + load(pass.others + j), square = at_least<T>(largest - T(2) * similarity, all<T>(0));
          near = square < largest * T(NEAR);
          if constexpr (MIXED) near &= masks.admissible;
          x = root<T>(square);
          if (any<T>(near)) pass.measure_near(local, near, i, j, x);
        } else {
          x = s.logits(similarity, by) + pass.offset[i];
          if constexpr (MIXED) x = s.biased(x, j);
        }
        Mapped<T> one = mapped<T, MAP, false, MIXED>(x, margin);
        V<T> weight = pass.weights[1][i] + column_weight[v];
        if constexpr (MIXED) {
          const I<T> existing = masks.admissible & sums, all_pairs = sums & pass.existing(i, j, to);
          I<T> negative = masks.admissible & ~masks.positive;
          if (pass.call.only_positives) negative = all_int<T>(0);
          one.value = keep<T>(negative, one.value);
          one.slope = keep<T>(negative, one.slope) * weight;
          if (any<T>(masks.positive)) {
            Mapped<T> other = mapped<T, MAP, true, MIXED>(x, T(pass.call.margins[0]));
            other.value = keep<T>(masks.positive & sums, other.value);
            V<T> w = all<T>(pass.weights[0][i]);
            if (s.self) w += loadu(pass.weights[0] + j);
            one.slope += keep<T>(masks.positive, other.slope) * w;
            const auto both = [&](Quantity q, V<T> value) {
              add_to(row_sum(q, r), value);
              if (s.self) add_to(column_sum(q, v), value);
            };
            both(SUM_POSITIVE, other.value);
            both(ACTIVE_POSITIVE, keep<T>(masks.positive & sums & (other.value != T(0)), all<T>(1)));
            both(COUNT_POSITIVE, keep<T>(masks.positive & sums, all<T>(1)));
          }
          if (s.restricted) add_to(row_sum(EXCLUDED, r), keep<T>(all_pairs & ~existing, all<T>(1)));
          one.value = keep<T>(sums, one.value);
        } else one.slope = one.slope * weight;
        values += one.value;
        const V<T> ones = COUNTS_ACTIVE ? keep<T>(one.value != T(0), all<T>(1)) : V<T>{};
        if constexpr (COUNTS_ACTIVE) active += ones;
        if (s.self && counted) {
          add_to(column_sum(SUM_NEGATIVE, v), one.value);
          if constexpr (COUNTS_ACTIVE) add_to(column_sum(ACTIVE_NEGATIVE, v), ones);
        }
        if (!pass.differentiated) continue;
        if constexpr (DISTANCE) {
          one.slope = where<T>(x == T(0), all<T>(0), -one.slope / x); // the derivative by the inner product
          if (any<T>(near)) pass.add_near(local, MIXED ? near & sums : counted ? near : all_int<T>(0), near, i, j, one.slope);
        }
        const V<T> summed = MIXED ? keep<T>(sums, one.slope) : one.slope;
        slopes += summed;
        scale += summed * similarity;
        if (across && counted) add_to(column_sum(SLOPE, v), summed);
        g[v] = one.slope * norm;
        if (DOT) store(gradient[r][v], g[v]);
      }
      if (counted) {
        add_to(row_sum(SUM_NEGATIVE, r), values);
        if constexpr (COUNTS_ACTIVE) add_to(row_sum(ACTIVE_NEGATIVE, r), active);
      }
      if (!pass.differentiated) return;
      if (counted) add_to(row_sum(SLOPE, r), slopes);
      offset += slopes;
      s.store_row(local.g + (r0 + r) * G_ROW + c0 / Mul::PAIR, g);
    };
    if constexpr (MIXED)
      for (int r = 0; r < MR; r++) row(r);
    else FASTCL_UNROLL(2) for (int r = 0; r < MR; r++) row(r);
    if (!pass.differentiated) return;
    if (counted) {
      add_wide(local.lanes, scale);
      add_wide(local.lanes + W, offset);
    }
#if FASTCL_DOT
    if constexpr (DOT) store_transposed<T_ROW>(local.transposed, gradient, r0, c0);
#endif
  }
  // The pairs of row i that are there, admissible or not.
  FASTCL_INLINE I<T> existing(int64_t i, int64_t j, int64_t to) const {
    const I<T> column = lanes_from<T>(j);
    I<T> there = column < all_int<T>(i < to ? s.contrasts.size : 0);
    if (s.self) there &= column != all_int<T>(i);
    return there;
  }

  // Near pairs, from the differences of their rows in double. Rows are multiplied by their factors before they are subtracted, in loops
  // of their own: a fused multiply-subtract would leave a difference between equal rows.

  void read_near(const Local &local, int64_t i, int64_t j) const {
    enter(s.anchors, i, local.row, local.x);
    enter(s.contrasts, j, local.row, local.y);
  }
  // Writes a row as it enters the product.
  FASTCL_NOINLINE void enter(const Side<Mul> &side, int64_t i, T *row, double *to) const {
    read_row(side.rows, side.order[i], s.d, row);
    double factor = side.inverse_norms[i];
    if (side.normalize && factor != 0) {
      const double power = side.powers[i];
      double square = 0;
      for (int64_t k = 0; k < s.d; k++) square += (double(row[k]) * power) * (double(row[k]) * power);
      factor = power / larger(__builtin_sqrt(square), NORM_FLOOR);
    }
    for (int64_t k = 0; k < s.d; k++) to[k] = factor * double(row[k]);
  }
  FASTCL_NOINLINE void measure_near(const Local &local, I<T> near, int64_t i, int64_t j, V<T> &distances) const {
    for (int l = 0; l < W; l++) {
      if (!near[l]) continue;
      read_near(local, i, j + l);
      double square = 0;
#pragma omp simd reduction(+ : square)
      for (int64_t k = 0; k < s.d; k++) {
        const double apart = local.x[k] - local.y[k];
        square += apart * apart;
      }
      distances[l] = T(__builtin_sqrt(square));
    }
  }
  // Adds the gradients of the pairs in `sums`, and clears the lanes `near` of slope, the derivative by the inner product.
  FASTCL_NOINLINE void add_near(const Local &local, I<T> sums, I<T> near, int64_t i, int64_t j, V<T> &slope) const {
    for (int l = 0; l < W; l++) {
      if (!near[l]) continue;
      const double by = slope[l];
      slope[l] = 0;
      if (!sums[l] || by == 0) continue;
      read_near(local, i, j + l);
      T *const dx = rows_needed ? (T *)call.anchor_gradient + s.anchors.order[i] * s.d : nullptr;
      T *const dy = !columns_needed ? nullptr
                    : s.self        ? (T *)call.anchor_gradient + s.anchors.order[j + l] * s.d
                                    : (T *)call.contrast_gradient + s.contrasts.order[j + l] * s.d;
      const double of_x = by * s.anchors.inverse_norms[i], of_y = by * s.contrasts.inverse_norms[j + l];
      for (int64_t k = 0; k < s.d; k++) {
        const double apart = local.x[k] - local.y[k];
        if (dx) dx[k] -= T(of_x * apart);
        if (dy) dy[k] += T(of_y * apart);
      }
    }
  }

  // The outputs, once all tiles are added.
  void finish(int t) const {
    const int64_t n = s.anchors.size, padded = s.anchors.padded;
    const Range mine = share(n, s.threads, t);
    T *const values = (T *)call.values, *const active = (T *)call.active, *const counts = (T *)call.counts;
    for (int64_t i = mine.from; i < mine.to; i++) {
      const int64_t row = s.anchors.order[i];
      const auto total = [&](Quantity q) { return totals[q * padded + i]; };
      const double negatives = double(s.self ? n - 1 : s.contrasts.size) - total(EXCLUDED) - total(COUNT_POSITIVE);
      values[row] = T(total(SUM_POSITIVE));
      values[n + row] = T(total(SUM_NEGATIVE));
      counts[row] = T(total(COUNT_POSITIVE));
      counts[n + row] = call.only_positives ? T(0) : T(negatives);
      active[row] = T(total(ACTIVE_POSITIVE));
      active[n + row] = call.map == PairMap::softplus ? counts[n + row] : T(total(ACTIVE_NEGATIVE));
      if (call.offset_gradient && call.offset_of_rows) ((double *)call.offset_gradient)[row] = total(SLOPE);
    }
    if (rows_needed) project(s.anchors, call.anchor_gradient, totals + SLOPE * padded, t);
    if (call.contrast_gradient) project(s.contrasts, call.contrast_gradient, column_slopes, t);
    const Range columns = share(s.contrasts.size, s.threads, t);
    for (int64_t j = columns.from; call.bias_gradient && j < columns.to; j++)
      ((T *)call.bias_gradient)[s.contrasts.order[j]] = s.left_out(s.contrasts, j) ? T(0) : T(column_slopes[j]);
  }
  void project(const Side<Mul> &side, void *gradient, const double *slopes_of, int t) const {
    const Range mine = share(side.size, s.threads, t);
    for (int64_t i = mine.from; i < mine.to; i++) {
      if (distance && !side.normalize) { // of |x|^2 / 2; of unit rows it would be projected off
        T *const g = (T *)gradient + side.order[i] * s.d, *const x = s.row_buffer(t);
        if (s.left_out(side, i)) continue;
        read_row(side.rows, side.order[i], s.d, x);
        for (int64_t k = 0; k < s.d; k++) g[k] -= T(slopes_of[i] * double(x[k]));
      }
      s.project(side, i, (T *)gradient, distance ? T(1) : T(scale_factor), t);
    }
  }
};

} // namespace
} // namespace fastcl::FASTCL_ISA
