// Soft assignments: each tile of logits has a tile of weights w_ij = <r_i, q_j>, a product over the columns of the assignments. A
// thread owns rows and visits all columns, forward and backward. A second pass with the sides exchanged handles the other side, and
// self-contrast visits the whole square. So threads share nothing, and a row's sums do not depend on the number of threads. This
// takes more multiplications than the passes for clusters, which are far more common.
#pragma once
#include "call.h"
#include "cpu/sweep.h"

namespace fastcl::FASTCL_ISA {
namespace {

template <class T> struct SoftPass {
  using Mul = Plain<T>;
  using Tile = typename Sweep<Mul>::Tile;
  static constexpr int W = Simd<T>::W;
  static constexpr int64_t NR = NV * W, ROWS = BLOCK + MR, G_ROW = Sweep<Mul>::G_ROW;
  static constexpr int64_t FLUSH = 1024; // columns that are summed in lanes of T before they are added to a double
  static constexpr T LARGEST = T(Sweep<Mul>::LARGEST), NONE = -LARGEST;

  enum Lanes : int { EXPONENTIALS, MAXIMUM, LOGITS, WEIGHTS, INADMISSIBLE, LANES };
  struct Sums { // of a row
    double total, logits, weights, inadmissible;
    T most;
  };
  struct Weights {       // weights from the gradients of a side's fields, by place; 0 in the padding
    T *lse, *base, *sum; // [padded]: 2^(t - base) * lse + w * sum
  };
  struct Local {
    T *a, *r;   // a packed block of rows, and of their assignments
    T *lanes;   // [LANES][ROWS][W]; in the backward, [ROWS][W] of the bias' gradient
    Sums *sums; // [ROWS]; in the backward, the bias' gradient in `total`
    T *g;       // [ROWS][G_ROW]
    double scale[W];
    char apart[64];
  };

  const Soft &call;
  const Problem p;
  const Sweep<Mul> s, w; // sweeps of the logits and of the weights
  const bool bias_of_rows;
  T *const row_bias; // [anchors.padded], to base 2; null: none
  Weights row, column;
  Local *const locals;

  // exchanged: the rows are the contrasts, and the bias belongs to the rows.
  SoftPass(const Soft &call, const Arranged &at, Arena &arena, bool exchanged)
      : call(call), p(logits_of(call, exchanged)),
        s(p, at, arena, false, call.backward && call.anchor_gradient, exchanged ? call.problem.contrast_bias : nullptr),
        w(weights_of(call), {{at.anchors.order}, {at.contrasts.order}}, arena, false, false), bias_of_rows(exchanged && call.problem.contrast_bias),
        row_bias(bias_of_rows ? arena.take<T>(s.anchors.padded) : nullptr), locals(arena.take<Local>(s.threads)) {
    if (call.backward) {
      row = weights(arena, s.anchors);
      column = s.self ? row : weights(arena, s.contrasts);
    }
    for (int t = 0; t < s.threads; t++) {
      Local local{};
      local.a = arena.take<T>(s.block_units());
      local.r = arena.take<T>(w.block_units());
      local.lanes = arena.take<T>((call.backward ? 1 : int64_t(LANES)) * ROWS * W);
      local.sums = arena.take<Sums>(ROWS);
      if (call.backward) local.g = arena.take<T>(ROWS * G_ROW);
      if (arena.base) locals[t] = local;
    }
    for (int64_t i = 0; arena.base && row_bias && i < s.anchors.padded; i++)
      row_bias[i] =
          i < s.anchors.size && !s.left_out(s.anchors, i) ? T(LOG2E * double(((const T *)call.problem.contrast_bias)[s.anchors.order[i]])) : T(0);
  }

  void run() const {
    with_team(s.threads, [&](const Team &team) {
      team.run([&](int t) {
        s.pack(t);
        w.pack(t);
      });
      if (call.backward)
        team.run([&](int t) {
          weigh(s.anchors, call.anchors, row, t);
          if (!s.self) weigh(s.contrasts, call.contrasts, column, t);
        });
      team.run([&](int t) {
        const Range mine = share(s.anchors.size, s.threads, t, MR);
        for (int64_t i = mine.from; i < mine.to; i += BLOCK) {
          const Range rows{i, smaller(mine.to, i + BLOCK)};
          s.pack_block(locals[t].a, rows.from, rows.to, t);
          w.pack_block(locals[t].r, rows.from, rows.to, t);
          if (call.backward) backward(locals[t], rows, t);
          else forward(locals[t], rows);
        }
      });
    });
    if (!call.scale_gradient) return;
    double total = 0;
    for (int t = 0; t < s.threads; t++)
      for (int64_t l = 0; l < W; l++) total += locals[t].scale[l];
    *(double *)call.scale_gradient = s.self ? total / 2 : total; // the square contains every pair twice
  }

private:
  static Problem logits_of(const Soft &call, bool exchanged) {
    Problem p = call.problem;
    if (exchanged) p.contrast_bias = nullptr;
    return p;
  }
  static Problem weights_of(const Soft &call) {
    Problem p = call.problem;
    p.anchors = call.anchor_assignments;
    p.contrasts = call.contrast_assignments;
    p.dimension = call.assignment_columns;
    p.contrast_bias = nullptr;
    p.normalize_anchors = p.normalize_contrasts = false;
    return p;
  }
  static Weights weights(Arena &arena, const Side<Mul> &side) {
    return {arena.take<T>(side.padded), arena.take<T>(side.padded), arena.take<T>(side.padded)};
  }
  FASTCL_INLINE V<T> logits(V<T> similarity, int64_t i, int64_t j) const {
    const V<T> t = s.biased(s.logits(similarity, s.scale[0]), j);
    return row_bias ? t + row_bias[i] : t;
  }
  // Replaces infinite weights by the largest number, so that their product with 0 is 0.
  static FASTCL_INLINE V<T> finite(V<T> weight) { return at_most<T>(weight, all<T>(LARGEST)); }

  // Visits the register tiles of some columns: for each panel of columns, all rows of the block.
  template <class Tiles> FASTCL_INLINE void walk(Range rows, Range cols, Tiles tile) const {
    for (int64_t j = cols.from; j < cols.to; j += NR)
      for (int64_t i = rows.from; i < rows.to; i += MR) tile(i, j, s.mixed(i, j, rows.to));
  }
  FASTCL_INLINE void products(const Local &local, int64_t row, int64_t j0, Tile &u, Tile &weight) const {
    s.products(local.a + row * A_ROW, j0, u, w.contrasts.columns + j0 * w.units);
    w.products(local.r + row * A_ROW, j0, weight, s.contrasts.columns + (j0 + NR) * s.units);
  }

  void forward(const Local &local, Range rows) const {
    const int64_t count = rows.to - rows.from;
    for (int64_t r = 0; r < count; r++) local.sums[r] = {0, 0, 0, 0, NONE};
    for (int64_t from = 0; from < s.contrasts.size; from += FLUSH) {
      for (int f = 0; f < LANES; f++)
        for (int64_t k = 0; k < round_up(count, MR) * W; k++) local.lanes[f * ROWS * W + k] = f == MAXIMUM ? NONE : T(0);
      walk(rows, {from, smaller(s.contrasts.size, from + FLUSH)}, [&](int64_t i, int64_t j, bool mixed) {
        if (mixed) sum_tile<true>(local, i, j, rows);
        else sum_tile<false>(local, i, j, rows);
      });
      for (int64_t r = 0; r < count; r++) flush(local, r);
    }
    for (int64_t i = rows.from; i < rows.to; i++) finish(local.sums[i - rows.from], i);
  }

  template <bool MIXED> FASTCL_NOINLINE void sum_tile(const Local &local, int64_t i0, int64_t j0, Range rows) const {
    Tile u __attribute__((aligned(64))), weight __attribute__((aligned(64)));
    products(local, i0 - rows.from, j0, u, weight);
    V<T> norms[NV];
    EACH(v, NV) norms[v] = load(s.contrasts.inverse_norms + j0 + v * W);
    for (int r = 0; r < MR; r++) {
      const int64_t i = i0 + r;
      const auto lanes = [&](int f) { return local.lanes + (f * ROWS + i - rows.from) * W; };
      V<T> t[NV], q[NV], logits_sum = all<T>(0), weights_sum = all<T>(0), outside = all<T>(0), before = load(lanes(MAXIMUM)), most = before;
      I<T> admissible[NV];
      EACH(v, NV) {
        t[v] = logits(load(u[r][v]) * (s.anchors.inverse_norms[i] * norms[v]), i, j0 + v * W);
        q[v] = finite(load(weight[r][v]));
        V<T> weighted = q[v] * t[v];
        if (MIXED) {
          admissible[v] = s.masks(i, j0 + v * W, rows.to, false).admissible;
          const I<T> there = lanes_from<T>(j0 + v * W) < all_int<T>(i < rows.to ? s.contrasts.size : 0);
          if (!s.self) outside += keep<T>(there & ~admissible[v], all<T>(1));
          q[v] = keep<T>(admissible[v], q[v]);
          weighted = keep<T>(q[v] != all<T>(0), weighted); // the logit may be -inf
          t[v] = where<T>(admissible[v], t[v], all<T>(NONE));
        }
        logits_sum += weighted;
        weights_sum += q[v];
        most = t[v] > most ? t[v] : most;
      }
      V<T> total = load(lanes(EXPONENTIALS)) * exp2_clamped<T, true>(before - most);
      EACH(v, NV) {
        const V<T> e = exp2_clamped<T, true>(t[v] - most);
        total += MIXED ? keep<T>(admissible[v], e) : e;
      }
      store(lanes(EXPONENTIALS), total);
      store(lanes(MAXIMUM), most);
      add_to(lanes(LOGITS), logits_sum);
      add_to(lanes(WEIGHTS), weights_sum);
      if (MIXED) add_to(lanes(INADMISSIBLE), outside);
    }
  }

  void flush(const Local &local, int64_t r) const {
    const auto lanes = [&](int f) { return load(local.lanes + (f * ROWS + r) * W); };
    Sums &to = local.sums[r];
    const V<T> maxima = lanes(MAXIMUM);
    T most = to.most;
    for (int l = 0; l < W; l++) most = larger(most, T(maxima[l]));
    to.total = to.total * double(exp2_of(to.most - most)) + double(sum<T>(lanes(EXPONENTIALS) * exp2_clamped<T, true>(maxima - most)));
    to.most = most;
    to.logits += double(sum<T>(lanes(LOGITS)));
    to.weights += double(sum<T>(lanes(WEIGHTS)));
    to.inadmissible += double(sum<T>(lanes(INADMISSIBLE)));
  }

  void finish(const Sums &sums, int64_t place) const {
    const int64_t i = s.anchors.order[place];
    const SoftSide &out = call.anchors;
    const bool empty = sums.total == 0;
    ((T *)out.lse)[i] = empty ? T(-__builtin_inf()) : T(natural(sums.most) + __builtin_log(sums.total));
    ((T *)out.sum)[i] = T(LN2 * sums.logits);
    ((T *)out.weight)[i] = T(sums.weights);
    ((T *)out.size)[i] = T(double(s.contrasts.size - s.self) - sums.inadmissible);
    ((T *)out.base)[i] = empty ? T(0) : sums.most;
    ((T *)out.total)[i] = T(sums.total);
    if (out.inverse_norms) ((T *)out.inverse_norms)[i] = s.whole_inverse_norm(s.anchors, place);
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
    }
  }

  void backward(Local &local, Range rows, int t) const {
    T *const gradient = (T *)call.anchor_gradient;
    const int64_t count = rows.to - rows.from;
    for (int64_t i = rows.from; gradient && i < rows.to; i++) memset(gradient + s.anchors.order[i] * s.d, 0, s.d * sizeof(T));
    for (int64_t r = 0; r < count; r++) local.sums[r].total = 0;
    const bool both = s.self || call.contrasts.total;
    for (int64_t from = 0; from < s.contrasts.size; from += BLOCK) {
      const Range cols{from, smaller(s.contrasts.size, from + BLOCK)};
      for (int64_t k = 0; k < round_up(count, MR) * W; k++) local.lanes[k] = 0;
      walk(rows, cols, [&](int64_t i, int64_t j, bool mixed) {
        if (both && mixed) gradient_tile<true, true>(local, i, j, rows, j - from);
        else if (both) gradient_tile<true, false>(local, i, j, rows, j - from);
        else if (mixed) gradient_tile<false, true>(local, i, j, rows, j - from);
        else gradient_tile<false, false>(local, i, j, rows, j - from);
      });
      for (int64_t r = 0; bias_of_rows && r < count; r++) local.sums[r].total += double(sum<T>(load(local.lanes + r * W)));
      if (gradient) s.template product<G_ROW, 1>(local.g, s.contrasts, cols, s.anchors, rows, gradient);
    }
    for (int64_t i = rows.from; i < rows.to; i++) {
      if (gradient) s.project(s.anchors, i, gradient, *(const T *)p.logit_scale, t);
      if (bias_of_rows && call.bias_gradient) ((T *)call.bias_gradient)[s.anchors.order[i]] = T(local.sums[i - rows.from].total);
    }
  }

  // The gradient with respect to a register tile's products: the sum of the softmax part and of the weights' part.
  template <bool BOTH, bool MIXED> FASTCL_NOINLINE void gradient_tile(Local &local, int64_t i0, int64_t j0, Range rows, int64_t c0) const {
    Tile u __attribute__((aligned(64))), weight __attribute__((aligned(64)));
    products(local, i0 - rows.from, j0, u, weight);
    V<T> norms[NV], other_lse[NV], other_base[NV], other_sum[NV], scale = all<T>(0);
    EACH(v, NV) {
      norms[v] = load(s.contrasts.inverse_norms + j0 + v * W);
      other_lse[v] = load(column.lse + j0 + v * W);
      other_base[v] = load(column.base + j0 + v * W);
      other_sum[v] = load(column.sum + j0 + v * W);
    }
    for (int r = 0; r < MR; r++) {
      const int64_t i = i0 + r;
      V<T> g[NV], over_columns = all<T>(0);
      EACH(v, NV) {
        const V<T> norm = s.anchors.inverse_norms[i] * norms[v], similarity = load(u[r][v]) * norm;
        const V<T> t = logits(similarity, i, j0 + v * W), q = finite(load(weight[r][v]));
        // Which products are fused is written down: left to the compiler, code around them would change their rounding.
        const V<T> e = exp2_clamped<T, true>(t - row.base[i]);
        if (BOTH) {
          g[v] = fused<T>(exp2_clamped<T, true>(t - other_base[v]), other_lse[v], e * row.lse[i]);
          g[v] = fused<T>(q, all<T>(row.sum[i]) + other_sum[v], g[v]);
        } else g[v] = fused<T>(e, all<T>(row.lse[i]), q * row.sum[i]);
        if (MIXED) g[v] = keep<T>(s.masks(i, j0 + v * W, rows.to, false).admissible, g[v]);
        scale += g[v] * similarity;
        over_columns += g[v];
        g[v] *= norm;
      }
      if (bias_of_rows) add_to(local.lanes + (i - rows.from) * W, over_columns);
      s.store_row(local.g + (i - rows.from) * G_ROW + c0, g);
    }
    for (int l = 0; l < W; l++) local.scale[l] += double(scale[l]); // in double, because terms of both signs cancel in the sum over all pairs
  }
};

// The same call with the sides exchanged: the contrasts become the anchors.
Soft exchanged(const Soft &call) {
  Soft other = call;
  other.problem.anchors = call.problem.contrasts;
  other.problem.contrasts = call.problem.anchors;
  other.problem.normalize_anchors = call.problem.normalize_contrasts;
  other.problem.normalize_contrasts = call.problem.normalize_anchors;
  other.anchor_assignments = call.contrast_assignments;
  other.contrast_assignments = call.anchor_assignments;
  other.anchors = call.contrasts;
  other.contrasts = call.anchors;
  other.anchor_gradient = call.contrast_gradient;
  other.contrast_gradient = call.anchor_gradient;
  other.scale_gradient = nullptr;
  return other;
}

template <class T> int64_t soft_with(const Soft &call, const Arranged &at, void *workspace) {
  int64_t most = 0;
  const auto pass = [&](const Soft &mine, const Arranged &places, bool exchanged) {
    Arena arena{(char *)workspace};
    const SoftPass<T> pass(mine, places, arena, exchanged);
    if (workspace) pass.run();
    most = larger(most, arena.used);
  };
  if (!call.backward || call.anchor_gradient || call.scale_gradient) pass(call, at, false);
  if (call.backward ? call.contrast_gradient || call.bias_gradient : call.problem.columns) pass(exchanged(call), {at.contrasts, at.anchors}, true);
  return most;
}

int64_t soft(const Soft &call, const Arranged &at, void *workspace) {
  return call.problem.wide_reals ? soft_with<double>(call, at, workspace) : soft_with<float>(call, at, workspace);
}

} // namespace
} // namespace fastcl::FASTCL_ISA
