// Soft assignments: each tile of logits has a tile of weights w_ij = <r_i, q_j>, a product over the columns of the assignments. A
// pair is visited once and counts for its row and its column; in self-contrast only the pairs above the diagonal are visited.
#pragma once
#include "call.h"
#include "cpu/walk.h"

namespace fastcl::FASTCL_ISA {
namespace {

// What forward and backward share: the logits and the weights of a register tile.
template <class T> struct SoftTiles {
  using Mul = Plain<T>;
  using Tile = typename Sweep<Mul>::Tile;
  static constexpr int W = Simd<T>::W;
  static constexpr int64_t NR = NV * W, ROWS = BLOCK + MR, G_ROW = Sweep<Mul>::G_ROW;
  static constexpr T LARGEST = T(Sweep<Mul>::LARGEST), NONE = -LARGEST;

  const Soft &call;
  const bool multiplied; // whether weights are computed; false if the forward kept them
  const Sweep<Mul> s, w; // sweeps of the logits and of the weights

  SoftTiles(const Soft &call, const Arranged &at, Arena &arena)
      : call(call), multiplied(!(call.backward && call.weights.of)),
        s(call.problem, at, arena, call.backward && call.contrast_gradient, call.backward && call.anchor_gradient),
        w(weights_of(call), {{at.anchors.order}, {at.contrasts.order}}, arena, false, false, nullptr, multiplied) {}

  static Problem weights_of(const Soft &call) {
    Problem p = call.problem;
    p.anchors = call.anchor_assignments;
    p.contrasts = call.contrast_assignments;
    p.dimension = call.assignment_columns;
    p.contrast_bias = nullptr;
    p.normalize_anchors = p.normalize_contrasts = false;
    return p;
  }
  void pack(int t) const {
    s.pack(t);
    if (multiplied) w.pack(t);
  }
  void pack_block(T *a, T *r, Range rows, int t) const {
    s.pack_block(a, rows.from, rows.to, t);
    if (multiplied) w.pack_block(r, rows.from, rows.to, t);
  }
  // How many rows of a block are multiplied by all its columns before the next: with long assignments a packed block would not stay in
  // the second-level cache. Kept weights change nothing, as the order of additions would change too.
  int64_t strip() const {
    const int64_t bytes = (s.chunks + w.chunks) * A_ROW * int64_t(sizeof(T));
    return larger(int64_t(MR), smaller(BLOCK / MR, (int64_t(1) << 18) / bytes / MR) * MR);
  }
  // Of the tile at row i0 of the block `rows`, whose packed rows are a and r.
  FASTCL_INLINE void products(const T *a, const T *r, Range rows, int64_t i0, int64_t j0, Tile &u, Tile &weight) const {
    const int64_t row = (i0 - rows.from) * A_ROW;
    const T *const next = s.contrasts.columns + (j0 + NR) * s.units;
    s.products(a + row, j0, u, multiplied ? w.contrasts.columns + j0 * w.units : next);
    if (!multiplied) return w.kept_products(weight, call.weights, i0, j0, rows.to);
    w.products(r + row, j0, weight, next);
    if (call.weights.of) w.keep_products(weight, call.weights, i0, j0, rows.to);
  }
  FASTCL_INLINE V<T> logits(V<T> similarity, int64_t j) const { return s.biased(s.logits(similarity, s.scale[0]), j); }
  // Replaces infinite weights by the largest number, so that their product with 0 is 0.
  static FASTCL_INLINE V<T> finite(V<T> weight) { return at_most<T>(weight, all<T>(LARGEST)); }
};

template <class T> struct SoftForward : SoftTiles<T> {
  using Base = SoftTiles<T>;
  using Base::call, Base::s, Base::w, Base::W, Base::NR, Base::ROWS, Base::NONE;
  using typename Base::Mul;
  using typename Base::Tile;
  static constexpr int64_t FLUSH = 1024; // columns that are summed in lanes of T before they are added to a double

  enum Lanes : int { EXPONENTIALS, MAXIMUM, LOGITS, WEIGHTS, INADMISSIBLE, LANES };
  struct Sums { // of a row or a column
    double total = 0, logits = 0, weights = 0, inadmissible = 0;
    T most = NONE;
  };
  struct Local {
    T *a, *r;      // a packed block of rows, and of their assignments
    T *rows;       // [LANES][ROWS][W]
    T *columns;    // [LANES][NR], of the panel
    Sums *sums;    // [ROWS]
    Sums *of_side; // [contrasts.padded]: the thread's sums of the columns and, in self-contrast, of its rows
    char apart[64];
  };
  const bool columns; // whether the columns are summed
  Local *const locals;

  SoftForward(const Soft &call, const Arranged &at, Arena &arena)
      : Base(call, at, arena), columns(s.self || call.problem.columns), locals(arena.take<Local>(s.threads)) {
    for (int t = 0; t < s.threads; t++) {
      Local local{};
      local.a = arena.take<T>(s.block_units());
      local.r = arena.take<T>(w.block_units());
      local.rows = arena.take<T>(int64_t(LANES) * ROWS * W);
      local.columns = arena.take<T>(int64_t(LANES) * NR);
      local.sums = arena.take<Sums>(ROWS);
      local.of_side = columns ? arena.take<Sums>(s.contrasts.padded) : nullptr;
      if (arena.base) locals[t] = local;
    }
  }

  void run() const {
    with_team(s.threads, [&](const Team &team) {
      team.run([&](int t) { Base::pack(t); });
      const bool wide = s.wide();
      team.run([&](int t) {
        if (wide) sweep<true>(t);
        else sweep<false>(t);
      });
      if (!columns) return;
      team.run([&](int t) {
        const Range mine = share(s.contrasts.size, s.threads, t);
        for (int64_t j = mine.from; j < mine.to; j++) {
          Sums all;
          for (int part = 0; part < s.threads; part++) merge<true>(all, locals[part].of_side[j]);
          if (s.self) finish(all, s.anchors, s.anchors.size - 1, call.anchors, j);
          else finish(all, s.contrasts, s.anchors.size, call.contrasts, j);
        }
      });
    });
  }

private:
  // WIDE: each row and column has a running maximum. Otherwise the logits are small: the exponentials need no base, and a row and a
  // column share them.
  template <bool WIDE> void sweep(int t) const {
    const Local &local = locals[t];
    const Sums none = nothing<WIDE>();
    for (int64_t j = 0; columns && j < s.contrasts.padded; j++) local.of_side[j] = none;
    const int64_t n = s.anchors.size;
    if (s.self) { // the first rows have the most columns: threads take blocks in the order 0, 1, 1, 0, ... and get about the same work
      const int64_t turns = s.threads == 1 ? 1 : 2 * s.threads, rounds = (n + turns * BLOCK - 1) / (turns * BLOCK);
      const int64_t size = round_up((n + turns * rounds - 1) / (turns * rounds), MR), blocks = (n + size - 1) / size;
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t turn = b % (2 * s.threads);
        if ((turn < s.threads ? turn : 2 * s.threads - 1 - turn) == t) block<WIDE>(t, {b * size, smaller(n, (b + 1) * size)});
      }
    } else {
      const Range mine = share(n, s.threads, t, MR);
      for (int64_t i = mine.from; i < mine.to; i += BLOCK) block<WIDE>(t, {i, smaller(mine.to, i + BLOCK)});
    }
  }
  template <bool WIDE> static Sums nothing() {
    Sums none;
    if (!WIDE) none.most = 0;
    return none;
  }

  template <bool WIDE> void block(int t, Range rows) const {
    const Local &local = locals[t];
    const int64_t count = rows.to - rows.from, size = s.contrasts.size, step = Base::strip();
    Base::pack_block(local.a, local.r, rows, t);
    for (int64_t r = 0; r < count; r++) local.sums[r] = nothing<WIDE>();
    for (int64_t from = s.self ? rows.from / NR * NR : 0; from < size; from += FLUSH) {
      clear<WIDE>(local.rows, ROWS * W, round_up(count, MR) * W);
      for (int64_t i = rows.from; i < rows.to; i += step)
        for (int64_t j = from; j < smaller(size, from + FLUSH); j += NR) panel<WIDE>(local, rows, {i, smaller(rows.to, i + step)}, j);
      for (int64_t r = 0; r < count; r++) flush<WIDE>(local, r);
    }
    for (int64_t i = rows.from; i < rows.to; i++) {
      const Sums &sums = local.sums[i - rows.from];
      if (s.self) merge<WIDE>(local.of_side[i], sums);
      else finish(sums, s.anchors, size, call.anchors, i);
    }
  }
  template <bool WIDE> static void clear(T *lanes, int64_t stride, int64_t count) {
    for (int f = 0; f < LANES; f++)
      for (int64_t k = 0; k < count; k++) lanes[f * stride + k] = WIDE && f == MAXIMUM ? NONE : T(0);
  }

  template <bool WIDE> void panel(const Local &local, Range rows, Range strip, int64_t j) const {
    if (s.self && j + NR <= strip.from) return;
    if (columns) clear<WIDE>(local.columns, NR, NR);
    for (int64_t i = strip.from; i < strip.to && !(s.self && j + NR <= i); i += MR) {
      if (s.mixed(i, j, rows.to)) sum_tile<WIDE, true>(local, i, j, rows);
      else sum_tile<WIDE, false>(local, i, j, rows);
    }
    for (int64_t l = 0; columns && l < NR; l++) {
      const auto lane = [&](int f) { return local.columns[f * NR + l]; };
      Sums part;
      part.total = double(lane(EXPONENTIALS));
      part.most = lane(MAXIMUM);
      part.logits = double(lane(LOGITS));
      part.weights = double(lane(WEIGHTS));
      part.inadmissible = double(lane(INADMISSIBLE));
      merge<WIDE>(local.of_side[j + l], part);
    }
  }

  template <bool WIDE, bool MIXED> FASTCL_NOINLINE void sum_tile(const Local &local, int64_t i0, int64_t j0, Range rows) const {
    Tile u __attribute__((aligned(64))), weight __attribute__((aligned(64)));
    Base::products(local.a, local.r, rows, i0, j0, u, weight);
    V<T> norms[NV], totals[NV], logits_sums[NV], weights_sums[NV], outsides[NV]; // of the columns
    I<T> admissible[MR][NV];
    EACH(v, NV) {
      norms[v] = load(s.contrasts.inverse_norms + j0 + v * W);
      totals[v] = logits_sums[v] = weights_sums[v] = outsides[v] = all<T>(0);
    }
    for (int from = 0; from < MR; from += ROWS_AT_ONCE) {
      V<T> powers[ROWS_AT_ONCE * NV], t[ROWS_AT_ONCE * NV];
      EACH(k, ROWS_AT_ONCE * NV) {
        const int r = from + k / NV, v = k % NV;
        powers[k] = t[k] = Base::logits(load(u[r][v]) * (s.anchors.inverse_norms[i0 + r] * norms[v]), j0 + v * W);
      }
      if (!WIDE) exp2<T, true>(powers);
      EACH(q, ROWS_AT_ONCE) {
        const int r = from + q;
        const int64_t i = i0 + r;
        const auto lanes = [&](int f) { return local.rows + (f * ROWS + i - rows.from) * W; };
        V<T> total = all<T>(0), logits_sum = all<T>(0), weights_sum = all<T>(0), outside = all<T>(0);
        EACH(v, NV) {
          V<T> x = t[q * NV + v], e = powers[q * NV + v], weigh = Base::finite(load(weight[r][v])), weighted = weigh * x;
          if (MIXED) {
            const I<T> mask = admissible[r][v] = s.masks(i, j0 + v * W, rows.to, true).admissible;
            const I<T> there = lanes_from<T>(j0 + v * W) < all_int<T>(i < rows.to ? s.contrasts.size : 0);
            if (!s.self) {
              const V<T> one = keep<T>(there & ~mask, all<T>(1));
              outside += one;
              outsides[v] += one;
            }
            weigh = keep<T>(mask, weigh);
            weighted = keep<T>(weigh != all<T>(0), weighted); // the logit may be -inf
            if (WIDE) x = where<T>(mask, x, all<T>(NONE));
            else e = keep<T>(mask, e);
          }
          logits_sum += weighted;
          weights_sum += weigh;
          logits_sums[v] += weighted;
          weights_sums[v] += weigh;
          if (WIDE) store(u[r][v], x);
          else {
            total += e;
            totals[v] += e;
          }
        }
        if (!WIDE) add_to(lanes(EXPONENTIALS), total);
        add_to(lanes(LOGITS), logits_sum);
        add_to(lanes(WEIGHTS), weights_sum);
        if (MIXED) add_to(lanes(INADMISSIBLE), outside);
      }
    }
    if (WIDE)
      for (int r = 0; r < MR; r++) {
        T *const to = local.rows + (i0 + r - rows.from) * W;
        add_wide<MIXED, NV>(to, to + MAXIMUM * ROWS * W, [&](int v) { return load(u[r][v]); }, [&](int v) { return admissible[r][v]; });
      }
    if (!columns) return;
    EACH(v, NV) {
      T *const to = local.columns + v * W;
      if (WIDE) add_wide<MIXED, MR>(to, to + MAXIMUM * NR, [&](int r) { return load(u[r][v]); }, [&](int r) { return admissible[r][v]; });
      else add_to(to, totals[v]);
      add_to(to + LOGITS * NR, logits_sums[v]);
      add_to(to + WEIGHTS * NR, weights_sums[v]);
      if (MIXED) add_to(to + INADMISSIBLE * NR, outsides[v]);
    }
  }
  // Adds 2^t of COUNT vectors to a sum and its running maximum. t is NONE where the mask is 0.
  template <bool MIXED, int COUNT, class Logit, class Mask> static FASTCL_INLINE void add_wide(T *sum, T *maximum, Logit t, Mask mask) {
    const V<T> before = load(maximum);
    V<T> most = before;
    EACH(k, COUNT) most = t(k) > most ? t(k) : most;
    V<T> total = load(sum) * exp2_clamped<T, true>(before - most);
    EACH(k, COUNT) {
      const V<T> e = exp2_clamped<T, true>(t(k) - most);
      total += MIXED ? keep<T>(mask(k), e) : e;
    }
    store(sum, total);
    store(maximum, most);
  }

  template <bool WIDE> void flush(const Local &local, int64_t r) const {
    const auto lanes = [&](int f) { return load(local.rows + (f * ROWS + r) * W); };
    Sums part;
    V<T> exponentials = lanes(EXPONENTIALS);
    if (WIDE) {
      const V<T> maxima = lanes(MAXIMUM);
      for (int l = 0; l < W; l++) part.most = larger(part.most, T(maxima[l]));
      exponentials *= exp2_clamped<T, true>(maxima - part.most);
    }
    part.total = double(sum<T>(exponentials));
    part.logits = double(sum<T>(lanes(LOGITS)));
    part.weights = double(sum<T>(lanes(WEIGHTS)));
    part.inadmissible = double(sum<T>(lanes(INADMISSIBLE)));
    merge<WIDE>(local.sums[r], part);
  }
  template <bool WIDE> static FASTCL_INLINE void merge(Sums &to, const Sums &part) { // WIDE or not, both have a maximum
    if (WIDE) {
      const T most = larger(to.most, part.most);
      to.total = rebased(to.total, to.most - most) + rebased(part.total, part.most - most);
      to.most = most;
    } else to.total += part.total;
    to.logits += part.logits;
    to.weights += part.weights;
    to.inadmissible += part.inadmissible;
  }
  static double rebased(double total, T exponent) { return exponent == 0 ? total : total * double(exp2_of(exponent)); }

  void finish(const Sums &sums, const Side<Mul> &side, int64_t others, const SoftSide &out, int64_t place) const {
    const int64_t i = side.order[place];
    const bool empty = sums.total == 0;
    ((T *)out.lse)[i] = empty ? T(-__builtin_inf()) : T(natural(sums.most) + __builtin_log(sums.total));
    ((T *)out.sum)[i] = T(LN2 * sums.logits);
    ((T *)out.weight)[i] = T(sums.weights);
    ((T *)out.size)[i] = T(double(others) - sums.inadmissible);
    ((T *)out.base)[i] = empty ? T(0) : sums.most;
    ((T *)out.total)[i] = T(sums.total);
    if (out.inverse_norms) ((T *)out.inverse_norms)[i] = s.whole_inverse_norm(side, place);
  }
};

// The bases that are subtracted from the exponents: none, because the logits are small, or those of each row; the contrasts may have
// no gradients of fields, and then need no exponentials.
enum class Bases { NONE, ANCHORS, BOTH };

template <class T> struct SoftBackward : SoftTiles<T> {
  using Base = SoftTiles<T>;
  using Base::call, Base::s, Base::w, Base::W, Base::NR, Base::ROWS, Base::G_ROW;
  using typename Base::Mul;
  using typename Base::Tile;

  struct Weights {       // weights from the gradients of a side's fields, by place; 0 in the padding
    T *lse, *base, *sum; // [padded]: 2^(t - base) * lse + w * sum
  };
  struct Local {
    T *a, *r; // a packed block of rows, and of their assignments
    T *g;     // [ROWS][G_ROW]
    T *bias;  // [G_ROW]: the tile's gradient of the bias
    double scale[W];
    bool based; // some row of the thread's share has a base
    char apart[64];
  };
  const bool rows_needed, columns_needed;
  const bool writes_rows, writes_columns; // for the walk
  static constexpr bool fixed_blocks = false;
  Weights row, column;
  double *const bias_gradient; // [contrasts.padded]
  Local *const locals;

  SoftBackward(const Soft &call, const Arranged &at, Arena &arena)
      : Base(call, at, arena), rows_needed(call.anchor_gradient), columns_needed(s.self ? rows_needed : call.contrast_gradient != nullptr),
        writes_rows(rows_needed), writes_columns(columns_needed || call.bias_gradient), row(weights(arena, s.anchors)),
        column(s.self ? row : weights(arena, s.contrasts)), bias_gradient(call.bias_gradient ? arena.take<double>(s.contrasts.padded) : nullptr),
        locals(arena.take<Local>(s.threads)) {
    for (int t = 0; t < s.threads; t++) {
      Local local{};
      local.a = arena.take<T>(s.block_units());
      local.r = Base::multiplied ? arena.take<T>(w.block_units()) : nullptr;
      local.g = arena.take<T>(ROWS * G_ROW);
      local.bias = call.bias_gradient ? arena.take<T>(G_ROW) : nullptr;
      if (arena.base) locals[t] = local;
    }
  }

  void run() const {
    const T factor = *(const T *)call.problem.logit_scale;
    with_team(s.threads, [&](const Team &team) {
      team.run([&](int t) {
        Base::pack(t);
        weigh(s.anchors, call.anchors, row, t);
        if (!s.self) weigh(s.contrasts, call.contrasts, column, t);
        if (rows_needed) erase(s.anchors, call.anchor_gradient, t);
        if (columns_needed && !s.self) erase(s.contrasts, call.contrast_gradient, t);
        const Range mine = share(s.contrasts.padded, s.threads, t);
        for (int64_t j = mine.from; bias_gradient && j < mine.to; j++) bias_gradient[j] = 0;
      });
      bool based = s.wide();
      for (int t = 0; t < s.threads; t++) based |= locals[t].based;
      const Walk<SoftBackward> walk{*this};
      if (!based) walk.template run<Bases::NONE>(team);
      else if (s.self || call.contrasts.total) walk.template run<Bases::BOTH>(team);
      else walk.template run<Bases::ANCHORS>(team);
      team.run([&](int t) {
        if (rows_needed) project(s.anchors, call.anchor_gradient, factor, t);
        if (columns_needed && !s.self) project(s.contrasts, call.contrast_gradient, factor, t);
        const Range mine = share(s.contrasts.size, s.threads, t);
        for (int64_t j = mine.from; bias_gradient && j < mine.to; j++) ((T *)call.bias_gradient)[s.contrasts.order[j]] = T(bias_gradient[j]);
      });
    });
    if (!call.scale_gradient) return;
    double total = 0;
    for (int t = 0; t < s.threads; t++)
      for (int64_t l = 0; l < W; l++) total += locals[t].scale[l];
    *(double *)call.scale_gradient = total;
  }

  template <Bases BASES> void block(int t, Range rows) const { Base::pack_block(locals[t].a, locals[t].r, rows, t); }
  // One tile: its gradient, then the products. A square on the diagonal of self-contrast is used only once.
  template <Bases BASES> void tile(int t, Range rows, Range cols) const {
    Local &local = locals[t];
    const bool diagonal = s.self && rows.from == cols.from;
    for (int64_t k = 0; bias_gradient && k < G_ROW; k++) local.bias[k] = 0;
    const int64_t step = Base::strip();
    for (int64_t from = rows.from; from < rows.to; from += step)
      for (int64_t j = cols.from; j < cols.to; j += NR)
        for (int64_t i = from; i < smaller(rows.to, from + step) && !(diagonal && j + NR <= i); i += MR) {
          if (s.mixed(i, j, rows.to)) gradient_tile<BASES, true>(local, i, j, rows, j - cols.from);
          else gradient_tile<BASES, false>(local, i, j, rows, j - cols.from);
        }
    for (int64_t j = cols.from; bias_gradient && j < cols.to; j++) bias_gradient[j] += double(local.bias[j - cols.from]);
    if (diagonal) mirror<Mul>(local.g, rows.to - rows.from);
    if (rows_needed) s.template product<G_ROW, 1>(local.g, s.contrasts, cols, s.anchors, rows, call.anchor_gradient);
    if (columns_needed && !diagonal)
      s.template product<1, G_ROW>(local.g, s.anchors, rows, s.contrasts, cols, s.self ? call.anchor_gradient : call.contrast_gradient);
  }

private:
  static Weights weights(Arena &arena, const Side<Mul> &side) {
    return {arena.take<T>(side.padded), arena.take<T>(side.padded), arena.take<T>(side.padded)};
  }
  void erase(const Side<Mul> &side, void *gradient, int t) const {
    const Range mine = share(side.size, s.threads, t);
    memset((T *)gradient + mine.from * s.d, 0, (mine.to - mine.from) * s.d * sizeof(T));
  }
  void project(const Side<Mul> &side, void *gradient, T factor, int t) const {
    const Range mine = share(side.size, s.threads, t);
    for (int64_t i = mine.from; i < mine.to; i++) s.project(side, i, (T *)gradient, factor, t);
  }

  // The weights of a side; zeros if it has no gradients of fields.
  void weigh(const Side<Mul> &side, const SoftSide &saved, const Weights &to, int t) const {
    const Range mine = share(side.padded, s.threads, t);
    for (int64_t place = mine.from; place < mine.to; place++) {
      to.lse[place] = to.base[place] = to.sum[place] = 0;
      if (place >= side.size || !saved.total) continue;
      const int64_t i = side.order[place];
      const T total = ((const T *)saved.total)[i];
      if (total != 0) to.lse[place] = T(double(((const T *)saved.lse_gradient)[i]) / double(total));
      to.base[place] = ((const T *)saved.base)[i];
      to.sum[place] = ((const T *)saved.sum_gradient)[i];
      locals[t].based |= to.base[place] != 0;
    }
  }

  // The gradient with respect to a register tile's products: the sum of the softmax part and of the weights' part.
  template <Bases BASES, bool MIXED> FASTCL_NOINLINE void gradient_tile(Local &local, int64_t i0, int64_t j0, Range rows, int64_t c0) const {
    Tile u __attribute__((aligned(64))), weight __attribute__((aligned(64)));
    Base::products(local.a, local.r, rows, i0, j0, u, weight);
    V<T> norms[NV], other_lse[NV], other_base[NV], other_sum[NV], over_rows[NV], scale = all<T>(0);
    EACH(v, NV) {
      norms[v] = load(s.contrasts.inverse_norms + j0 + v * W);
      other_lse[v] = load(column.lse + j0 + v * W);
      other_base[v] = load(column.base + j0 + v * W);
      other_sum[v] = load(column.sum + j0 + v * W);
      over_rows[v] = all<T>(0);
    }
    for (int from = 0; from < MR; from += ROWS_AT_ONCE) {
      V<T> similarities[ROWS_AT_ONCE * NV], t[ROWS_AT_ONCE * NV];
      EACH(k, ROWS_AT_ONCE * NV) {
        const int r = from + k / NV, v = k % NV;
        similarities[k] = load(u[r][v]) * (s.anchors.inverse_norms[i0 + r] * norms[v]);
        t[k] = Base::logits(similarities[k], j0 + v * W);
      }
      if (BASES == Bases::NONE) exp2<T, true>(t);
      EACH(q, ROWS_AT_ONCE) {
        const int r = from + q;
        const int64_t i = i0 + r;
        V<T> g[NV];
        EACH(v, NV) {
          const V<T> similarity = similarities[q * NV + v], x = t[q * NV + v], weigh = Base::finite(load(weight[r][v]));
          // Which products are fused is written down: left to the compiler, code around them would change their rounding.
          if (BASES == Bases::NONE) g[v] = x * (all<T>(row.lse[i]) + other_lse[v]);
          else g[v] = exp2_clamped<T, true>(x - row.base[i]) * row.lse[i];
          if (BASES == Bases::BOTH) g[v] = fused<T>(exp2_clamped<T, true>(x - other_base[v]), other_lse[v], g[v]);
          g[v] = fused<T>(weigh, all<T>(row.sum[i]) + other_sum[v], g[v]);
          if (MIXED) g[v] = keep<T>(s.masks(i, j0 + v * W, rows.to, false).admissible, g[v]);
          if (MIXED) scale += keep<T>(s.counted(i, j0 + v * W), g[v] * similarity);
          else scale += g[v] * similarity;
          over_rows[v] += g[v];
          g[v] *= s.anchors.inverse_norms[i] * norms[v];
        }
        s.store_row(local.g + (i - rows.from) * G_ROW + c0, g);
      }
    }
    if (MIXED && bias_gradient) EACH(v, NV) add_to(local.bias + c0 + v * W, over_rows[v]);
    for (int l = 0; l < W; l++) local.scale[l] += double(scale[l]); // in double, because terms of both signs cancel in the sum over all pairs
  }
};

int64_t soft(const Soft &call, const Arranged &at, void *workspace) {
  Arena arena{(char *)workspace};
  const auto run = [&](const auto &pass) {
    if (workspace) pass.run();
    return arena.used;
  };
  if (call.problem.wide_reals) return call.backward ? run(SoftBackward<double>(call, at, arena)) : run(SoftForward<double>(call, at, arena));
  return call.backward ? run(SoftBackward<float>(call, at, arena)) : run(SoftForward<float>(call, at, arena));
}

} // namespace
} // namespace fastcl::FASTCL_ISA
