// The forward epilogue: sums over the logits of each anchor and, if wanted, of each contrast.
#pragma once
#include "cpu/guide.h"
#include "observation.h"

namespace fastcl::FASTCL_ISA {
namespace {

// Sums of a row or column. NEGATIVE and POSITIVE are sums of 2^(t - maximum), with the logit t to base 2. The maxima are running
// maxima if the logits are wide, else 0.
enum Sum : int { NEGATIVE, NEGATIVE_MAXIMUM, POSITIVE, POSITIVE_MAXIMUM, LOGITS, POSITIVES, INADMISSIBLE, SUMS };
constexpr int64_t LEAN_SUMS = POSITIVE; // enough without clusters and without inadmissible pairs

template <class T> FASTCL_INLINE bool is_maximum(int f) { return f == NEGATIVE_MAXIMUM || f == POSITIVE_MAXIMUM; }

template <class T> void reset(T *sums, int64_t fields, int64_t stride, int64_t from, int64_t to, bool wide) {
  for (int64_t f = 0; f < fields; f++)
    for (int64_t i = from; i < to; i++) sums[f * stride + i] = wide && is_maximum<T>(f) ? NO_MAXIMUM<T> : T(0);
}

// to += from, for each field; `stride` separates fields.
template <class T> FASTCL_INLINE void merge(T *to, int64_t stride, const T *from, int64_t from_stride, int64_t fields, bool wide) {
  for (int f = 0; f < fields; f++)
    if (wide && f + 1 < fields && is_maximum<T>(f + 1)) {
      T &m = to[(f + 1) * stride];
      const T other = from[(f + 1) * from_stride], most = larger(m, other);
      to[f * stride] = to[f * stride] * exp2_of(m - most) + from[f * from_stride] * exp2_of(other - most);
      m = most;
    } else if (!is_maximum<T>(f)) to[f * stride] += from[f * from_stride];
}

template <class Mul> struct StatisticsPass {
  using T = typename Mul::Real;
  using Unit = typename Mul::Unit;
  static constexpr int W = Simd<T>::W;
  static constexpr int64_t NR = NV * W, ROWS = BLOCK + MR;

  struct Local { // of a thread
    Unit *a;     // a packed block
    T *rows;     // [scales][SUMS][ROWS][W]: lanes of the block's sums
    T *columns;  // [scales][SUMS][NR]: a panel's sums over the block
    Unit *e;     // [BLOCK + MR][G_ROW]: exponentials of a tile times the contrasts' inverse norms
  };
  const Problem &p;
  const Forward &out;
  const Sweep<Mul> s;
  const int64_t fields;
  const bool weighting; // also sum exponentials times contrasts, unless the logits are wide
  const bool columns;   // also compute each contrast's sums
  T *const row_sums;    // [scales][SUMS][anchors.padded]; null for self-contrast, where a row's sums are added to those of its column
  T *const column_sums; // [threads][scales][SUMS][contrasts.padded]
  Local *const locals;
  const GuideTiles<T> guide;
  const Observation<Mul> seen; // the optional statistics for monitoring

  StatisticsPass(const Forward &call, const Arranged &at, Arena &arena)
      : p(call.problem), out(call), s(p, at, arena, false, call.weighted.sums),
        fields(p.anchor_clusters || p.rules.anchor_tags || p.anchor_ids || s.rules.any || s.contrasts.leaves_out ? int64_t(SUMS) : LEAN_SUMS),
        weighting(call.weighted.sums), columns(s.self || p.columns), row_sums(s.self ? nullptr : arena.take<T>(s.scales * fields * s.anchors.padded)),
        column_sums(columns ? arena.take<T>(s.threads * s.scales * fields * s.contrasts.padded) : nullptr), locals(arena.take<Local>(s.threads)),
        guide(p, at, arena), seen(s, call, columns, arena) {
    for (int t = 0; t < s.threads; t++) {
      Local local{arena.take<Unit>(s.block_units()), arena.take<T>(s.scales * fields * ROWS * W), arena.take<T>(s.scales * fields * NR), nullptr};
      if (weighting) local.e = arena.take<Unit>(ROWS * Sweep<Mul>::G_ROW);
      if (arena.base) locals[t] = local;
    }
  }

  void run() const {
    with_team(s.threads, [&](const Team &team) {
      team.run([&](int t) {
        s.pack(t);
        guide.pack(t);
      });
      const bool wide = s.wide();
      if (out.weighted.sums && team.index == 0) *(T *)out.weighted.valid = T(weighting && !wide && s.largest_norm(1) < 1e15);
      team.run([&](int t) {
        if (wide) sweep<true>(t);
        else sweep<false>(t);
      });
      team.run([&](int t) {
        for (int k = 0; k < s.scales; k++) {
          if (s.self) finish(k, s.anchors, out.anchors, column_sums, s.threads, s.rules.anchors, s.rules.anchors, t, wide);
          else finish(k, s.anchors, out.anchors, row_sums, 1, s.rules.anchors, s.rules.contrasts, t, wide);
          if (p.columns) finish(k, s.contrasts, out.contrasts, column_sums, s.threads, s.rules.contrasts, s.rules.anchors, t, wide);
        }
        if (seen.asked) seen.finish(out, t);
      });
    });
  }

private:
  T *columns_of(int t, int k) const { return column_sums + (t * s.scales + k) * fields * s.contrasts.padded; }
  T *totals_of(int t, int k) const { return s.self ? columns_of(t, k) : row_sums + k * fields * s.anchors.padded; }
  T *rows_of(const Local &local, int k) const { return local.rows + k * fields * ROWS * W; }

  template <bool WIDE> void sweep(int t) const {
    for (int k = 0; columns && k < s.scales; k++) reset(columns_of(t, k), fields, s.contrasts.padded, 0, s.contrasts.padded, WIDE);
    if (seen.asked) seen.start(t);
    const int64_t n = s.anchors.size;
    if (s.self) { // the first rows have the most columns: threads take blocks in the order 0, 1, 1, 0, ... and get about the same work
      const int64_t turns = s.threads == 1 ? 1 : 2 * s.threads, rounds = (n + turns * BLOCK - 1) / (turns * BLOCK);
      const int64_t size = round_up((n + turns * rounds - 1) / (turns * rounds), MR), blocks = (n + size - 1) / size;
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t turn = b % (2 * s.threads);
        if ((turn < s.threads ? turn : 2 * s.threads - 1 - turn) == t) block<WIDE>(t, b * size, smaller(n, (b + 1) * size));
      }
    } else {
      const Range mine = share(n, s.threads, t, MR);
      for (int64_t i = mine.from; i < mine.to; i += BLOCK) block<WIDE>(t, i, smaller(mine.to, i + BLOCK));
    }
  }

  template <bool WIDE> void block(int t, int64_t from, int64_t to) const {
    const Local &local = locals[t];
    s.pack_block(local.a, from, to, t);
    guide.pack_block({from, to}, t);
    if (seen.asked) seen.open(t);
    for (int k = 0; k < s.scales; k++) reset(rows_of(local, k), fields, ROWS * W, 0, round_up(to - from, MR) * W, WIDE);
    const bool weighted = !WIDE && weighting;
    if (weighted)
      for (int64_t i = from; i < to; i++) memset((T *)out.weighted.sums + s.anchors.order[i] * s.d, 0, s.d * sizeof(T));
    const Range met = s.rules.together(from, to); // weighted sums have no rules
    const int64_t first = larger(s.self ? from : 0, met.from) / NR * NR, step = weighted ? BLOCK : s.contrasts.padded;
    for (int64_t j = first; j < met.to; j += step) {
      const Range cols{j, smaller(j + step, met.to)};
      panels<WIDE>(t, from, to, cols, weighted);
      if (weighted) s.template product<Sweep<Mul>::G_ROW, 1>(local.e, s.contrasts, cols, s.anchors, {from, to}, out.weighted.sums);
    }
    if (seen.asked) seen.close(t, from, to);
    for (int k = 0; k < s.scales; k++) {
      T *totals = totals_of(t, k);
      const int64_t stride = s.anchors.padded;
      for (int64_t i = from; i < to; i++) {
        if (!s.self) reset(totals + i, fields, stride, 0, 1, WIDE);
        const T *lanes = rows_of(local, k) + (i - from) * W;
        if constexpr (WIDE)
          for (int64_t l = 0; l < W; l++) merge(totals + i, stride, lanes + l, ROWS * W, fields, WIDE);
        else
          for (int64_t f = 0; f < fields; f++)
            if (!is_maximum<T>(int(f))) totals[f * stride + i] += sum<T>(load(lanes + f * ROWS * W));
      }
    }
  }

  template <bool WIDE> void panels(int t, int64_t from, int64_t to, Range cols, bool weighted) const {
    const Local &local = locals[t];
    for (int64_t j = cols.from; j < cols.to; j += NR) {
      const Unit *next = s.contrasts.columns + (j + NR) * s.units;
      for (int k = 0; columns && k < s.scales; k++) reset(local.columns + k * fields * NR, fields, NR, 0, NR, WIDE);
      bool positives = false; // whether the tiles may have held positives or inadmissible pairs
      for (int64_t i = from; i < to && !(s.self && j + NR <= i); i += MR) {
        const Unit *a = local.a + (i - from) * A_ROW;
        T *rows = local.rows + (i - from) * W;
        Unit *e = weighted ? local.e + (i - from) * Sweep<Mul>::G_ROW + (j - cols.from) / Mul::PAIR : nullptr;
        const char *ahead = (const char *)next + (i - from) / MR * 8 * s.units;
        if (e && s.clustered(i, smaller(i + MR, to), j, smaller(j + NR, cols.to))) { // left to the backward, which has the positives' whole gradient
          s.store_zeros(e, MR);
          e = nullptr;
        }
        if (s.rules.apart(i, smaller(i + MR, to), j, smaller(j + NR, s.contrasts.size))) continue;
        if (s.mixed(i, j, to)) {
          tile<WIDE, true>(a, i, j, to, rows, local.columns, e, ahead, t, from);
          positives = fields > LEAN_SUMS;
        } else tile<WIDE, false>(a, i, j, to, rows, local.columns, e, ahead, t, from);
      }
      for (int k = 0; columns && k < s.scales; k++) merge_panel<WIDE>(columns_of(t, k) + j, local.columns + k * fields * NR, positives);
    }
  }

  // `merge` for a panel's columns, one vector at a time.
  template <bool WIDE> void merge_panel(T *to, const T *from, bool positives) const {
    const int64_t stride = s.contrasts.padded;
    for (int f = 0; f < (positives ? int(SUMS) : int(NEGATIVE_MAXIMUM)); f++) {
      if (is_maximum<T>(f)) continue;
      T *const sum = to + f * stride;
      const T *const part = from + f * NR;
      EACH(v, NV) {
        if (WIDE && is_maximum<T>(f + 1)) {
          T *const maximum = sum + stride + v * W;
          const V<T> mine = load(maximum), other = load(part + NR + v * W), most = larger_of(mine, other);
          store(sum + v * W, load(sum + v * W) * exp2_clamped<T, true>(mine - most) + load(part + v * W) * exp2_clamped<T, true>(other - most));
          store(maximum, most);
        } else add_to(sum + v * W, load(part + v * W));
      }
    }
  }

  // Adds 2^t of COUNT vectors to a sum and its running maximum.
  template <bool MIXED, int COUNT, class Logit, class Mask> static FASTCL_INLINE void add_wide(T *sum, T *maximum, Logit t, Mask mask) {
    const V<T> before = load(maximum);
    V<T> most = before;
    EACH(k, COUNT) {
      V<T> x = t(k);
      if (MIXED) x = where<T>(mask(k), x, all<T>(NO_MAXIMUM<T>));
      most = larger_of(most, x);
    }
    V<T> total = load(sum) * exp2_clamped<T, MIXED>(before - most);
    EACH(k, COUNT) {
      const V<T> e = exp2_clamped<T, MIXED>(t(k) - most);
      total += MIXED ? keep<T>(mask(k), e) : e;
    }
    store(sum, total);
    store(maximum, most);
  }
  static FASTCL_INLINE V<T> larger_of(V<T> a, V<T> b) { return b > a ? b : a; }

  using Tile = typename Sweep<Mul>::Tile;
  using Scale = typename Sweep<Mul>::Scale;
  struct Sums {
    V<T> of[SUMS];
  };

  // One register tile: the products are computed once for all scales.
  template <bool WIDE, bool MIXED> FASTCL_NOINLINE void tile(const Unit *a, int64_t i0, int64_t j0, int64_t to, T *rows, T *cols, Unit *e,
                                                             const void *next, int t, int64_t from) const {
    Tile products __attribute__((aligned(64)));
    s.products(a, j0, products, next);
    if (out.products.of) s.keep_products(products, out.products, i0, j0, to);
    const Tile *const cosines = MIXED ? guide.cosines(t, from, i0, j0) : nullptr;
    for (int k = 0; k < s.scales; k++)
      add_tile<WIDE, MIXED>(products, s.scale[k], i0, j0, to, rows + k * fields * ROWS * W, cols + k * fields * NR, e, cosines);
    if (__builtin_expect(seen.asked, false)) seen.add(products, i0, j0, from, to, t, cosines);
  }
  // Adds a tile at one scale. Not wide: row and column share one exponential. Wide: each has its own running maxima.
  template <bool WIDE, bool MIXED> FASTCL_INLINE void add_tile(const Tile &products, Scale scale, int64_t i0, int64_t j0, int64_t to, T *rows,
                                                               T *cols, Unit *e, const Tile *cosines) const {
    constexpr int64_t R = ROWS * W, G_ROW = Sweep<Mul>::G_ROW;
    V<T> norms[NV];
    EACH(v, NV) norms[v] = load(s.contrasts.inverse_norms + j0 + v * W);
    const T *const row_norms = s.anchors.inverse_norms + i0;
    if constexpr (!MIXED && !WIDE) {
      V<T> sums[NV];
      EACH(v, NV) sums[v] = all<T>(0);
      for (int from = 0; from < MR; from += ROWS_AT_ONCE) {
        V<T> powers[ROWS_AT_ONCE * NV];
        EACH(q, ROWS_AT_ONCE) EACH(v, NV)
        powers[q * NV + v] = s.logits(load(products[from + q][v]) * (row_norms[from + q] * norms[v]), scale);
        exp2<T, false>(powers);
        EACH(q, ROWS_AT_ONCE) {
          const int r = from + q;
          V<T> x[NV];
          EACH(v, NV) {
            x[v] = powers[q * NV + v];
            sums[v] += x[v];
          }
          add_to(rows + r * W, x[0] + x[1]);
          if (!e) continue;
          EACH(v, NV) x[v] *= norms[v];
          s.store_row(e + r * G_ROW, x);
        }
      }
      if (columns) EACH(v, NV) add_to(cols + v * W, sums[v]);
      return;
    }
    const auto logits = [&](int r, int v) { return s.biased(s.logits(load(products[r][v]) * (row_norms[r] * norms[v]), scale), j0 + v * W); };
    if constexpr (!WIDE) {
      const auto zero = [](Sums &sums) { EACH(f, SUMS) sums.of[f] = all<T>(0); };
      Sums column_sums[NV];
      EACH(v, NV) zero(column_sums[v]);
      bool met = false;
      for (int r = 0; r < MR; r++) {
        V<T> x[NV];
        Sums row_sums;
        zero(row_sums);
        bool marked = false;
        EACH(v, NV) {
          const V<T> t = logits(r, v), power = exp2<T, true>(t);
          const auto masks = s.masks(i0 + r, j0 + v * W, to, true, cosines ? (*cosines)[r][v] : nullptr);
          x[v] = keep<T>(masks.admissible & ~masks.positive, power);
          column_sums[v].of[NEGATIVE] += x[v];
          if (fields == LEAN_SUMS || !s.marked(i0 + r, j0 + v * W, masks.positive)) continue;
          marked = true;
          const V<T> one = all<T>(1);
          const auto both = [&](int f, V<T> term) {
            row_sums.of[f] += term;
            column_sums[v].of[f] += term;
          };
          both(POSITIVE, keep<T>(masks.positive, power));
          both(LOGITS, keep<T>(masks.positive, t));
          both(POSITIVES, keep<T>(masks.positive, one));
          if (s.excludes()) both(INADMISSIBLE, keep<T>(excluded(i0 + r, j0 + v * W, to, masks.admissible), one));
        }
        add_to(rows + r * W, x[0] + x[1]);
        if (marked) EACH(f, SUMS) if (f >= LEAN_SUMS && !is_maximum<T>(f)) add_to(rows + f * R + r * W, row_sums.of[f]);
        met |= marked;
        if (!e) continue;
        EACH(v, NV) x[v] *= norms[v];
        s.store_row(e + r * G_ROW, x);
      }
      if (columns) EACH(v, NV) {
          add_to(cols + v * W, column_sums[v].of[NEGATIVE]);
          if (met) EACH(f, SUMS) if (f >= LEAN_SUMS && !is_maximum<T>(f)) add_to(cols + f * NR + v * W, column_sums[v].of[f]);
        }
      return;
    }
    Tile t __attribute__((aligned(64)));
    for (int r = 0; r < MR; r++) EACH(v, NV) store(t[r][v], logits(r, v));
    if constexpr (!MIXED) {
      const auto none = [](int) { return I<T>{}; };
      for (int r = 0; r < MR; r++) add_wide<false, NV>(rows + r * W, rows + NEGATIVE_MAXIMUM * R + r * W, [&](int v) { return load(t[r][v]); }, none);
      if (columns) EACH(v, NV)
      add_wide<false, MR>(cols + v * W, cols + NEGATIVE_MAXIMUM * NR + v * W, [&](int r) { return load(t[r][v]); }, none);
      return;
    }
    I<T> negative[MR][NV], positive[MR][NV];
    for (int r = 0; r < MR; r++)
      for (int v = 0; v < NV; v++) {
        const auto masks = s.masks(i0 + r, j0 + v * W, to, true, cosines ? (*cosines)[r][v] : nullptr);
        positive[r][v] = masks.positive;
        negative[r][v] = masks.admissible & ~masks.positive;
        if (fields == LEAN_SUMS) continue;
        const V<T> one = all<T>(1), outside = keep<T>(excluded(i0 + r, j0 + v * W, to, masks.admissible), one);
        const V<T> logit = keep<T>(masks.positive, load(t[r][v])), count = keep<T>(masks.positive, one);
        add_to(rows + LOGITS * R + r * W, logit);
        add_to(rows + POSITIVES * R + r * W, count);
        add_to(rows + INADMISSIBLE * R + r * W, outside);
        if (!columns) continue;
        add_to(cols + LOGITS * NR + v * W, logit);
        add_to(cols + POSITIVES * NR + v * W, count);
        add_to(cols + INADMISSIBLE * NR + v * W, outside);
      }
    const auto both = [&](int f, const I<T>(&mask)[MR][NV]) {
      for (int r = 0; r < MR; r++)
        add_wide<true, NV>(rows + f * R + r * W, rows + (f + 1) * R + r * W, [&](int v) { return load(t[r][v]); }, [&](int v) { return mask[r][v]; });
      if (columns)
        for (int v = 0; v < NV; v++)
          add_wide<true, MR>(
              cols + f * NR + v * W, cols + (f + 1) * NR + v * W, [&](int r) { return load(t[r][v]); }, [&](int r) { return mask[r][v]; });
    };
    both(NEGATIVE, negative);
    if (fields > LEAN_SUMS) both(POSITIVE, positive);
  }
  // Inadmissible pairs of existing places of one group; the diagonal of self-contrast does not count.
  FASTCL_INLINE I<T> excluded(int64_t i, int64_t j, int64_t to, I<T> admissible) const {
    if (!s.restricted) return all_int<T>(0);
    const I<T> column = lanes_from<T>(j);
    I<T> there = column < all_int<T>(i < to ? s.contrasts.size : 0);
    if (s.self) there &= column > all_int<T>(i);
    if (s.rules.anchors.group) there &= s.rules.same_group(i, j);
    return there & ~admissible;
  }

  // sums: [parts] arrays, each with all scales.
  void finish(int k, const Side<Mul> &side, const Statistics &of_all, const T *sums, int parts, const RulesOfSide &own, const RulesOfSide &others,
              int t, bool wide) const {
    const Range mine = share(side.size, s.threads, t);
    const Statistics out = of_all.of_scale(k, side.size, sizeof(T) == 8);
    for (int64_t i = mine.from; i < mine.to; i++) {
      T x[SUMS] = {};
      if (wide) x[NEGATIVE_MAXIMUM] = x[POSITIVE_MAXIMUM] = NO_MAXIMUM<T>;
      for (int part = 0; part < parts; part++) merge(x, 1, sums + (part * s.scales + k) * fields * side.padded + i, side.padded, fields, wide);
      const int64_t row = side.order[i];
      const T most = larger(x[NEGATIVE_MAXIMUM], x[POSITIVE_MAXIMUM]);
      const T negative = wide ? x[NEGATIVE] * exp2_of(x[NEGATIVE_MAXIMUM] - most) : x[NEGATIVE];
      const T positive = wide ? x[POSITIVE] * exp2_of(x[POSITIVE_MAXIMUM] - most) : x[POSITIVE];
      put(out, LSE_ALL, row, negative + positive, most);
      put(out, LSE_POS, row, x[POSITIVE], x[POSITIVE_MAXIMUM]);
      put(out, LSE_NEG, row, x[NEGATIVE], x[NEGATIVE_MAXIMUM]);
      if (out.fields[SUM_POS]) ((T *)out.fields[SUM_POS])[row] = T(LN2 * double(x[LOGITS]));
      ((T *)out.positives)[row] = x[POSITIVES];
      ((T *)out.negatives)[row] = T((own.group ? s.rules.members(own, i, others) : others.size) - s.self) - x[POSITIVES] - x[INADMISSIBLE];
      ((T *)out.negative_ratio)[row] = negative / positive;
      ((T *)out.negative_base)[row] = x[NEGATIVE_MAXIMUM];
      ((T *)out.positive_base)[row] = x[POSITIVE_MAXIMUM];
      if (out.inverse_norms) ((T *)out.inverse_norms)[row] = s.whole_inverse_norm(side, i);
    }
  }
  static void put(const Statistics &out, Field field, int64_t row, T sum, T maximum) {
    if (!out.fields[field]) return;
    const double exact = sum == 0 ? 0. : natural(maximum);
    const T shift = T(exact); // rounded; the sum absorbs the difference
    ((T *)out.fields[field])[row] = exact == 0 ? log_of(sum) : T(exact + double(log_of(sum)));
    ((T *)out.shifts[field])[row] = shift;
    ((T *)out.sums[field])[row] = exact == double(shift) ? sum : T(double(sum) * __builtin_exp(exact - double(shift)));
  }
};

} // namespace
} // namespace fastcl::FASTCL_ISA
