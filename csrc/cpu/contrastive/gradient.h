// The backward epilogue: the gradient of a tile of logits, and its products with the rows of both sides.
#pragma once
#include "cpu/guide.h"
#include "cpu/walk.h"

namespace fastcl::FASTCL_ISA {
namespace {

// Each side's contribution to the gradient of logit s_ij: weight * 2^(t_ij - base), with weight and base of the negatives or of the
// positives, plus a constant for a positive. All numbers are 0 in the padding.
template <class T> struct Weights {
  T *negative, *positive, *constant; // [padded]
  T *negative_base, *positive_base;  // [padded], used if the log-sums spread too widely for one base
};

// The base that is subtracted from the exponents: none, because the logits are small; one number for all rows; or each row's own.
enum Base { CENTRAL, SHARED, OWN };

template <class Mul> struct GradientPass {
  using T = typename Mul::Real;
  using Unit = typename Mul::Unit;
  static constexpr int W = Simd<T>::W;
  static constexpr int64_t NR = NV * W;
  static constexpr bool DOT = Mul::PAIR == 2;
  static constexpr int64_t G_ROW = Sweep<Mul>::G_ROW, T_ROW = BLOCK + 16; // row strides of the tile's gradient and of its transpose
  // Limits on the log-sums (to base 2) for one shared base. Logit minus base rounds at the size of log-sum minus base. If the spread
  // is at most four times the smallest log-sum, that is at most twice the rounding error of the logit itself.
  static constexpr double SHARED_SPREAD = 120, SHARED_ROUNDING = 16, SHARED_LARGEST = 1e6;

  struct Spread {
    double least, most;
  };
  struct Local {
    Unit *a;             // a packed block
    Unit *g;             // [BLOCK + MR][G_ROW]
    Unit *transposed;    // [BLOCK / 2 + MR][T_ROW] pairs along the rows; without pairs, g itself is read across
    double *scale;       // [scales][W]: lanes of the tile's terms of the logit scales' gradients
    double *scale_total; // [scales]
    Spread *spread;      // [scales]: smallest and largest log-sum
    char apart[64];      // keeps threads on separate cache lines
  };
  const Problem &p;
  const Backward &out;
  const Sweep<Mul> s;
  const GuideTiles<T> guide;
  const bool rows_needed, columns_needed;
  const bool continued; // the forward has already summed the register tiles that hold no positives
  const bool writes_rows = rows_needed, writes_columns = columns_needed || out.bias_gradient;
  const bool fixed_blocks = continued;  // then these are the forward's tiles, for any number of threads
  Weights<T> *const row, *const column; // [scales]
  T *const bases;                       // [scales]: base of all exponents of a scale, unless each row has its own
  T *const bias_gradient;               // [contrasts.padded]
  Local *const locals;

  GradientPass(const Backward &call, const Arranged &at, Arena &arena)
      : p(call.problem), out(call), s(p, at, arena, call.contrast_gradient != nullptr, call.anchor_gradient != nullptr, nullptr, !call.products.of),
        guide(p, at, arena), rows_needed(call.anchor_gradient), columns_needed(s.self ? rows_needed : call.contrast_gradient != nullptr),
        continued(call.weighted.sums && arena.base && *(const T *)call.weighted.valid == 1), row(weights(arena, s.anchors.padded)),
        column(s.self ? row : weights(arena, s.contrasts.padded)), bases(arena.take<T>(s.scales)),
        bias_gradient(call.bias_gradient ? arena.take<T>(s.contrasts.padded) : nullptr), locals(arena.take<Local>(s.threads)) {
    for (int t = 0; t < s.threads; t++) {
      Local local{};
      local.a = arena.take<Unit>(s.block_units());
      local.g = arena.take<Unit>((BLOCK + MR) * G_ROW);
      local.transposed = DOT ? arena.take<Unit>((BLOCK / 2 + MR) * T_ROW) : nullptr;
      local.scale = arena.take<double>(s.scales * W);
      local.scale_total = arena.take<double>(s.scales);
      local.spread = arena.take<Spread>(s.scales);
      if (arena.base) locals[t] = local;
    }
  }

  void run() const {
    if (continued && !s.anchors.cluster) return with_team(s.threads, [&](const Team &team) { finish_weighted(team); });
    with_team(s.threads, [&](const Team &team) {
      team.run([&](int t) {
        const Local &local = locals[t];
        for (int k = 0; k < s.scales; k++) {
          local.spread[k] = {1e300, -1e300};
          widen(k, s.anchors, out.anchors, t);
          if (p.columns) widen(k, s.contrasts, out.contrasts, t);
          local.scale_total[k] = 0;
        }
        for (int64_t l = 0; l < s.scales * W; l++) local.scale[l] = 0;
        s.pack(t);
        guide.pack(t);
      });
      const bool wide = s.wide();
      Base kind = CENTRAL; // sufficient for all scales
      for (int k = 0; k < s.scales; k++) {
        const Base own = base_of(k, wide).kind;
        if (own > kind) kind = own;
      }
      team.run([&](int t) {
        for (int k = 0; k < s.scales; k++) {
          const T base = base_of(k, wide).base;
          if (t == 0) bases[k] = base;
          weigh(k, s.anchors, out.anchors, row[k], kind == OWN, base, t);
          if (s.self) continue;
          if (p.columns) weigh(k, s.contrasts, out.contrasts, column[k], kind == OWN, base, t);
          else clear(s.contrasts, column[k], t);
        }
        if (continued) take_weighted(t);
        else if (rows_needed) erase(s.anchors, out.anchor_gradient, t);
        if (columns_needed && !s.self) erase(s.contrasts, out.contrast_gradient, t);
        if (bias_gradient) {
          const Range mine = share(s.contrasts.padded, s.threads, t);
          for (int64_t j = mine.from; j < mine.to; j++) bias_gradient[j] = 0;
        }
      });
      const Walk<GradientPass> walk{*this};
      if (kind == OWN) walk.template run<OWN>(team);
      else if (kind == CENTRAL) walk.template run<CENTRAL>(team);
      else walk.template run<SHARED>(team);
      team.run([&](int t) {
        if (rows_needed) project(s.anchors, out.anchor_gradient, t);
        if (columns_needed && !s.self) project(s.contrasts, out.contrast_gradient, t);
        if (bias_gradient) {
          const Range mine = share(s.contrasts.size, s.threads, t);
          for (int64_t j = mine.from; j < mine.to; j++) ((T *)out.bias_gradient)[s.contrasts.order[j]] = T(out.factor) * bias_gradient[j];
        }
      });
    });
    if (!out.scale_gradient) return;
    for (int k = 0; k < s.scales; k++) {
      double total = 0;
      for (int t = 0; t < s.threads; t++) total += locals[t].scale_total[k];
      ((double *)out.scale_gradient)[k] = out.factor * total;
    }
  }

private:
  Weights<T> *weights(Arena &arena, int64_t padded) const {
    Weights<T> *const result = arena.take<Weights<T>>(s.scales);
    for (int k = 0; k < s.scales; k++) {
      const Weights<T> w{arena.take<T>(padded), arena.take<T>(padded), arena.take<T>(padded), arena.take<T>(padded), arena.take<T>(padded)};
      if (arena.base) result[k] = w;
    }
    return result;
  }

  // The base of one scale, from all log-sums. wide: result of Sweep::wide.
  struct Shared {
    Base kind;
    T base; // unused if each row has its own base
  };
  Shared base_of(int k, bool wide) const {
    double least = 1e300, most = -1e300;
    for (int t = 0; t < s.threads; t++) {
      least = smaller(least, locals[t].spread[k].least);
      most = larger(most, locals[t].spread[k].most);
    }
    const double nearest = least > 0 ? least : most < 0 ? -most : 0;
    const bool central = !wide && least >= -SHARED_LIMIT - 32 && most <= SHARED_LIMIT + 32;
    const bool rounds = !central && most - least > larger(SHARED_ROUNDING, 4 * nearest);
    const bool own = rounds || most - least > SHARED_SPREAD || most > SHARED_LARGEST || least < -SHARED_LARGEST;
    // an integer, so that subtracting it from a logit is exact
    return {own ? OWN : central ? CENTRAL : SHARED, central || least > most ? T(0) : T(__builtin_rint((least + most) / 2))};
  }

  // The anchors' gradient from the forward's sums, times a factor per row for base 0.
  void take_weighted(int t) const {
    const Range mine = share(s.anchors.size, s.threads, t);
    for (int64_t i = mine.from; i < mine.to; i++) {
      const int64_t row = s.anchors.order[i];
      const T *sums = (const T *)out.weighted.sums + row * s.d;
      T *const g = (T *)out.anchor_gradient + row * s.d;
      const bool empty = ((const T *)out.anchors.negatives)[row] == 0; // even if an extra positive has raised the base
      const T weight = empty ? T(0) : T(rebased(out.anchors, LSE_ALL, row, 0) + rebased(out.anchors, LSE_NEG, row, 0)) * s.anchors.inverse_norms[i];
      for (int64_t k = 0; k < s.d; k++) g[k] = weight * sums[k];
    }
  }
  void finish_weighted(const Team &team) const {
    team.run([&](int t) {
      const Range mine = share(s.anchors.size, s.threads, t);
      T unused = 0;
      for (int64_t i = mine.from; i < mine.to; i++) s.measured(s.anchors, i, s.row_buffer(t), unused);
      take_weighted(t);
      project(s.anchors, out.anchor_gradient, t);
    });
  }

  // Weights.

  void widen(int k, const Side<Mul> &side, const Statistics &of_all, int t) const {
    const Statistics saved = of_all.of_scale(k, side.size, sizeof(T) == 8);
    const Range mine = share(side.size, s.threads, t);
    for (int f = 0; f < SUM_POS; f++) {
      if (!saved.fields[f]) continue;
      const T *sums = (const T *)saved.sums[f], *shifts = (const T *)saved.shifts[f];
      for (int64_t i = mine.from; i < mine.to; i++) {
        if (sums[i] == 0) continue;
        const double log_sum = LOG2E * (double(shifts[i]) + double(log_of(sums[i])));
        if (log_sum != log_sum) continue; // the row's gradients are NaN with any base
        Spread &spread = locals[t].spread[k];
        spread = {smaller(spread.least, log_sum), larger(spread.most, log_sum)};
      }
    }
  }

  // gradient / sum, converted from the sum's shift to the base 2^base.
  static double rebased(const Statistics &saved, int f, int64_t i, double base) {
    if (!saved.fields[f]) return 0;
    const double sum = ((const T *)saved.sums[f])[i], shift = ((const T *)saved.shifts[f])[i];
    if (sum == 0) return 0;
    const double exponent = natural(T(base)) - shift, weight = double(((const T *)saved.fields[f])[i]) / sum;
    return exponent == 0 ? weight : weight * __builtin_exp(exponent);
  }
  void weigh(int k, const Side<Mul> &side, const Statistics &of_all, const Weights<T> &to, bool wide, T shared_base, int t) const {
    const Statistics saved = of_all.of_scale(k, side.size, sizeof(T) == 8);
    const Range mine = share(side.padded, s.threads, t);
    const auto gradient = [&](int f, int64_t i) { return saved.fields[f] ? double(((const T *)saved.fields[f])[i]) : 0.; };
    for (int64_t place = mine.from; place < mine.to; place++) {
      if (place >= side.size) {
        to.negative[place] = to.positive[place] = to.constant[place] = to.negative_base[place] = to.positive_base[place] = 0;
        continue;
      }
      const int64_t i = side.order[place];
      const double negative = wide ? ((const T *)saved.negative_base)[i] : shared_base;
      const double positive = wide ? ((const T *)saved.positive_base)[i] : shared_base;
      to.negative_base[place] = T(negative);
      to.positive_base[place] = T(positive);
      to.negative[place] = T(rebased(saved, LSE_ALL, i, negative) + rebased(saved, LSE_NEG, i, negative));
      if (out.single_positives && ((const T *)saved.positives)[i] == 1) {
        // A single positive's share of the sum is 1 - the negatives' share: so nothing cancels when it is almost all.
        const double share = 1 / (1 + 1 / double(((const T *)saved.negative_ratio)[i])); // of an infinite ratio 1
        to.positive[place] = 0;
        to.constant[place] = T(gradient(LSE_ALL, i) + gradient(SUM_POS, i) + gradient(LSE_POS, i) - gradient(LSE_ALL, i) * share);
      } else {
        to.positive[place] = T(rebased(saved, LSE_ALL, i, positive) + rebased(saved, LSE_POS, i, positive));
        to.constant[place] = T(gradient(SUM_POS, i));
      }
    }
  }
  void clear(const Side<Mul> &side, const Weights<T> &to, int t) const {
    const Range mine = share(side.padded, s.threads, t);
    for (int64_t i = mine.from; i < mine.to; i++) to.negative[i] = to.positive[i] = to.constant[i] = to.negative_base[i] = to.positive_base[i] = 0;
  }
  void erase(const Side<Mul> &side, void *gradient, int t) const {
    const Range mine = share(side.size, s.threads, t);
    memset((T *)gradient + mine.from * s.d, 0, (mine.to - mine.from) * s.d * sizeof(T));
  }

public:
  template <Base BASE> void block(int t, Range rows) const {
    if (!out.products.of) s.pack_block(locals[t].a, rows.from, rows.to, t);
    guide.pack_block(rows, t);
  }
  // One tile: its gradient, then the products. A square on the diagonal of self-contrast is used only once.
  template <Base BASE> void tile(int t, Range rows, Range cols) const {
    if (continued && !s.clustered(rows.from, rows.to, cols.from, cols.to)) return;
    if (s.rules.apart(rows.from, rows.to, cols.from, cols.to)) return;
    const Local &local = locals[t];
    const bool diagonal = s.self && rows.from == cols.from, mirrored = diagonal && !DOT;
    for (int64_t j = cols.from; j < cols.to; j += NR) {
      const char *next = out.products.of ? nullptr : (const char *)(s.contrasts.columns + (j + NR) * s.units);
      for (int64_t i = rows.from; i < rows.to && !(mirrored && j + NR <= i); i += MR) {
        const Unit *a = local.a + (i - rows.from) * A_ROW;
        const char *ahead = next ? next + (i - rows.from) / MR * 8 * s.units : nullptr;
        const int64_t i1 = smaller(i + MR, rows.to), j1 = smaller(j + NR, cols.to);
        if ((continued && !s.clustered(i, i1, j, j1)) || (!DOT && s.rules.apart(i, i1, j, j1))) {
          s.store_zeros(local.g + (i - rows.from) * G_ROW + (j - cols.from) / Mul::PAIR, MR);
          continue;
        }
        const bool mixed = s.mixed(i, j, rows.to);
        (mixed ? logit_gradients<BASE, true> : logit_gradients<BASE, false>)(*this, t, a, i, j, i - rows.from, j - cols.from, rows.to, ahead);
      }
    }
    if constexpr (!DOT)
      if (mirrored) mirror<Mul>(local.g, rows.to - rows.from);
    for (int k = 0; k < s.scales; k++) {
      double total = 0;
      for (int64_t l = k * W; l < (k + 1) * W; l++) {
        total += local.scale[l];
        local.scale[l] = 0;
      }
      local.scale_total[k] += total;
    }
    if (rows_needed) s.template product<G_ROW, 1>(local.g, s.contrasts, cols, s.anchors, rows, out.anchor_gradient);
    if (columns_needed && !diagonal) {
      void *gradient = s.self ? out.anchor_gradient : out.contrast_gradient;
      if constexpr (DOT) s.template product<1, T_ROW>(local.transposed, s.anchors, rows, s.contrasts, cols, gradient);
      else s.template product<1, G_ROW>(local.g, s.anchors, rows, s.contrasts, cols, gradient);
    }
  }

private:
  // The gradient with respect to a register tile's products, summed over the scales.
  template <Base BASE, bool MIXED> static FASTCL_NOINLINE void logit_gradients(const GradientPass &pass, int thread, const Unit *a, int64_t i0,
                                                                               int64_t j0, int64_t r0, int64_t c0, int64_t to, const void *next) {
    const Sweep<Mul> &s = pass.s;
    const Local &local = pass.locals[thread];
    [[maybe_unused]] const auto *const cosines = MIXED ? pass.guide.cosines(thread, i0 - r0, i0, j0) : nullptr;
    typename Sweep<Mul>::Tile u __attribute__((aligned(64))), sum __attribute__((aligned(64)));
    if (pass.out.products.of) s.kept_products(u, pass.out.products, i0, j0, to);
    else s.products(a, j0, u, next);
    const T *const row_norms = s.anchors.inverse_norms + i0;
    V<T> norms[NV];
    EACH(v, NV) norms[v] = load(s.contrasts.inverse_norms + j0 + v * W);
    for (int k = 0; k < s.scales; k++) {
      const Weights<T> &row_weights = pass.row[k], &column_weights = pass.column[k];
      const auto by = s.scale[k];
      const T base = pass.bases[k], factor = s.scales == 1 ? T(1) : ((const T *)pass.p.logit_scale)[k];
      const bool last = k + 1 == s.scales;
      const auto own = [&](const T *weights, int r) { return weights[i0 + r]; };
      const auto other = [&](const T *weights, int v) { return load(weights + j0 + v * W); };
      const auto power = [&](V<T> t, auto own_base, auto other_base, auto own_weight, auto other_weight) {
        if constexpr (BASE == CENTRAL) return exp2<T, MIXED>(t) * (own_weight + other_weight);
        else if constexpr (BASE == SHARED) return exp2_clamped<T, MIXED>(t - base) * (own_weight + other_weight);
        else return exp2_clamped<T, MIXED>(t - own_base) * own_weight + exp2_clamped<T, MIXED>(t - other_base) * other_weight;
      };
      V<T> column_negative[NV], scale = all<T>(0);
      EACH(v, NV) column_negative[v] = other(column_weights.negative, v);
      constexpr bool TOGETHER = !MIXED && BASE != OWN; // exponentials of several rows are computed together
      const auto row = [&](int r, [[maybe_unused]] const V<T> *powers) {
        V<T> g[NV];
        EACH(v, NV) {
          const V<T> norm = row_norms[r] * norms[v], similarity = load(u[r][v]) * norm;
          [[maybe_unused]] V<T> t;
          if constexpr (TOGETHER) g[v] = powers[v] * (own(row_weights.negative, r) + column_negative[v]);
          else {
            t = s.logits(similarity, by);
            if constexpr (MIXED) t = s.biased(t, j0 + v * W);
            g[v] =
                power(t, own(row_weights.negative_base, r), other(column_weights.negative_base, v), own(row_weights.negative, r), column_negative[v]);
          }
          if constexpr (MIXED) {
            const int64_t i = i0 + r, j = j0 + v * W;
            const auto masks = s.masks(i, j, to, false, cosines ? (*cosines)[r][v] : nullptr);
            g[v] = keep<T>(masks.admissible, g[v]);
            if (s.marked(i, j, masks.positive)) {
              const V<T> positive = power(t, own(row_weights.positive_base, r), other(column_weights.positive_base, v), own(row_weights.positive, r),
                                          other(column_weights.positive, v)) +
                                    (own(row_weights.constant, r) + other(column_weights.constant, v));
              g[v] = where<T>(masks.positive, positive, g[v]);
            }
            if (pass.bias_gradient) add_to(pass.bias_gradient + j0 + v * W, g[v]);
          }
          if constexpr (MIXED) scale += keep<T>(s.counted(i0 + r, j0 + v * W), g[v] * similarity);
          else scale += g[v] * similarity;
          g[v] *= factor;
          if (k > 0) g[v] += load(sum[r][v]);
          if (last) g[v] *= norm;
          if (DOT || !last) store(sum[r][v], g[v]);
        }
        if (last) s.store_row(local.g + (r0 + r) * G_ROW + c0 / Mul::PAIR, g);
      };
      if constexpr (TOGETHER)
        for (int r = 0; r < MR; r += ROWS_AT_ONCE) {
          V<T> powers[ROWS_AT_ONCE * NV];
          EACH(q, ROWS_AT_ONCE) EACH(v, NV) {
            const V<T> t = s.logits(load(u[r + q][v]) * (row_norms[r + q] * norms[v]), by);
            powers[q * NV + v] = BASE == SHARED ? t - base : t;
          }
          if constexpr (BASE == SHARED) exp2_clamped<T, false>(powers);
          else exp2<T, false>(powers);
          EACH(q, ROWS_AT_ONCE) row(r + q, powers + q * NV);
        }
      else
        for (int r = 0; r < MR; r++) row(r, nullptr);
      if (MIXED || !(DOT && s.self && j0 < i0)) add_wide(local.scale + k * W, scale); // tiles that are not mirrored were counted above the diagonal
    }
#if FASTCL_DOT
    if constexpr (DOT) store_transposed<T_ROW>(local.transposed, sum, r0, c0);
#endif
  }
  // In double, once per register tile, because positive and negative terms cancel in the sum over all pairs.
  static FASTCL_INLINE void add_wide(double *sums, V<T> x) {
    typedef double Wide __attribute__((vector_size(W * sizeof(double)), aligned(FASTCL_BYTES), may_alias));
    *(Wide *)sums += __builtin_convertvector(x, Wide);
  }

  // Called once, after all additions.
  void project(const Side<Mul> &side, void *gradient, int t) const {
    const Range mine = share(side.size, s.threads, t);
    const T logit_scale = s.scales == 1 ? *(const T *)p.logit_scale : T(1); // with several scales the tiles' gradients include them
    for (int64_t i = mine.from; i < mine.to; i++) s.project(side, i, (T *)gradient, T(out.factor) * logit_scale, t);
  }
};

} // namespace
} // namespace fastcl::FASTCL_ISA
