// Sinkhorn's passes. Each reads the scores once, a few rows at a time, and takes one exponential per score. After a row update, passes over
// the plan that it left take none: a later plan is the same matrix with other factors for its rows and columns.
//
// A thread owns a range of rows. Sums over rows are formed for a few rows, then for a block, a thread, and all threads, always in
// this order: the same number of threads gives the same bits.
#pragma once
#include "call.h"
#include "cpu/pages.h"
#include "cpu/sweep.h"
#include "exponent.h"

namespace fastcl::FASTCL_ISA {
namespace {

template <class T> struct PlanPasses; // in plan.h

template <class T> struct SinkhornRun {
  static constexpr int64_t W = Simd<T>::W;
  static constexpr int64_t GROUP = 4;                // rows that are added to the column sums together
  static constexpr int64_t LINES = 8;                // rows whose column maxima are updated before their exponentials
  static constexpr int AT_ONCE = 6;                  // vectors of exponentials of a row that are computed together
  static constexpr int64_t AHEAD = 1024 / sizeof(T); // numbers from a row's element to the one that is prefetched
  static constexpr int64_t BLOCK_ROWS = 64;          // rows summed before the sum is added to the thread's: bounds the rounding error
  static constexpr T ENOUGH = T(0x1p-24);            // smallest row sum for which terms flushed below 2^-126 are negligible
  static constexpr T SLACK = 20;                     // see column_sums
  static constexpr T NOTHING = sizeof(T) == 8 ? T(-__DBL_MAX__) : T(-__FLT_MAX__);

  struct Split { // a potential in two parts, each padded
    T *high, *low;
  };
  struct Row { // whole vectors are read in place, the last few numbers are in `tail`
    const T *whole, *tail;
  };
  struct Out { // where a row is written, in the same way
    T *whole, *tail;
    FASTCL_INLINE void put(int64_t j, bool last, V<T> x) const {
      if (last) store(tail, x);
      else storeu(whole + j, x);
    }
  };
  struct Local {              // of a thread
    T *scores, *gradient, *e; // [LINES or GROUP][line]
    T *tails;                 // [3][LINES][W]
    T *block, *total;         // [padded]
    T *shift;                 // [padded]
    FreshPages pages;         // of the matrix
  };

  const Sinkhorn &c;
  const int64_t n, k, whole, padded; // whole: number of columns in full vectors
  const int64_t line;                // distance of the workspace's rows: rows of 4096 bytes would compete for the same cache lines
  T scale, to_base_2;
  Exponent<T> exponent;
  Split potential;     // of columns
  T *weights, *shifts; // [padded]
  T *factors;          // [factor_count][line]
  Split *term_potentials;
  T **term_shifts, **term_weights;
  Local *locals;

  SinkhornRun(const Sinkhorn &call, Arena &arena)
      : c(call), n(call.scores.size), k(call.columns), whole(k / W * W), padded(round_up(k, W)), line(padded + 16), scale(0), to_base_2(0),
        exponent(1) {
    potential = by_columns() ? split_space(arena) : Split{nullptr, nullptr};
    weights = c.weights ? arena.template take<T>(line) : nullptr;
    shifts = c.pass == SinkhornPass::column_products ? arena.template take<T>(line) : nullptr;
    factors = c.column_factors ? arena.template take<T>(c.factor_count * line) : nullptr;
    const int64_t terms = c.term_count;
    term_potentials = arena.template take<Split>(terms);
    term_shifts = arena.template take<T *>(terms);
    term_weights = arena.template take<T *>(terms);
    for (int64_t t = 0; t < terms; t++) {
      const bool row_term = c.terms[t].p;
      const Split split = row_term ? split_space(arena) : Split{nullptr, nullptr};
      T *const shift = row_term ? nullptr : arena.template take<T>(line);
      T *const weight = arena.template take<T>(line);
      if (!arena.base) continue;
      term_potentials[t] = split, term_shifts[t] = shift, term_weights[t] = weight;
    }
    locals = arena.template take<Local>(c.threads);
    for (int t = 0; t < c.threads; t++) {
      Local local{};
      if (c.scores.data && !lies_so(c.scores)) local.scores = arena.template take<T>(LINES * line);
      if (c.gradient.data && !lies_so(c.gradient)) local.gradient = arena.template take<T>(GROUP * line);
      local.tails = arena.template take<T>(3 * LINES * W);
      if (c.pass != SinkhornPass::column_sums && !c.plan) local.e = arena.template take<T>(GROUP * line);
      if (c.by_column || c.pass == SinkhornPass::column_sums) {
        local.block = arena.template take<T>(line);
        local.total = arena.template take<T>(line);
      }
      if (c.pass == SinkhornPass::column_sums) local.shift = arena.template take<T>(line);
      if (arena.base) locals[t] = local;
    }
    if (!arena.base) return;
    scale = *(const T *)c.inverse_epsilon;
    to_base_2 = T(LOG2E * double(scale));
    exponent = Exponent<T>(to_base_2);
    if (potential.high) split_columns(c.potential, potential);
    if (weights) pad((const T *)c.weights, weights, T(0));
    if (shifts) pad_shifts((const T *)c.column_shift, shifts);
    for (int64_t m = 0; factors && m < c.factor_count; m++) pad((const T *)c.column_factors + m * k, factors + m * line, T(0));
    for (int64_t t = 0; t < terms; t++) {
      pad((const T *)c.terms[t].w, term_weights[t], T(0));
      if (term_shifts[t]) pad_shifts((const T *)c.terms[t].shift, term_shifts[t]);
      else split_columns(c.terms[t].potential, term_potentials[t]);
    }
  }

  void run() const {
    with_team(c.threads, [&](const Team &team) {
      team.run([&](int t) {
        const Range mine = share(n, c.threads, t, LINES);
        if (c.matrix && c.matrix != c.plan) locals[t].pages.begin((char *)c.matrix + mine.from * row_bytes(), (mine.to - mine.from) * row_bytes());
        switch (c.pass) {
        case SinkhornPass::column_sums: return column_sums(t, mine);
        case SinkhornPass::row_pass: return by_groups(t, mine, [&](int64_t i, int64_t rows) { row_pass(t, i, rows); });
        case SinkhornPass::products: return by_groups(t, mine, [&](int64_t i, int64_t rows) { products(t, i, rows); });
        case SinkhornPass::column_products:
          for (int64_t i = mine.from; i < mine.to; i++) column_products(t, i);
          return;
        case SinkhornPass::assignment_gradient: return by_groups(t, mine, [&](int64_t i, int64_t rows) { assignment_gradient(t, i, rows); });
        case SinkhornPass::score_gradient:
          for (int64_t i = mine.from; i < mine.to; i++) score_gradient(t, i);
          return;
        default: return PlanPasses<T>{*this}.run(t, mine);
        }
      });
      if (c.pass == SinkhornPass::column_sums) team.run([&](int t) { merge_column_sums(share(padded, c.threads, t, W)); });
      else if (c.by_column) team.run([&](int t) { merge_totals(share(padded, c.threads, t, W)); });
    });
  }

private:
  friend struct PlanPasses<T>;

  bool by_columns() const { return c.pass != SinkhornPass::column_sums && c.pass != SinkhornPass::column_products && !c.plan; }
  int64_t row_bytes() const { return k * (c.scores.dtype == Dtype::float64 ? 8 : c.scores.dtype == Dtype::float32 ? 4 : 2); }
  static bool lies_so(const Rows &rows) { return rows.column_stride == 1 && rows.dtype == (sizeof(T) == 8 ? Dtype::float64 : Dtype::float32); }
  Split split_space(Arena &arena) const {
    T *const high = arena.template take<T>(line);
    return {high, arena.template take<T>(line)};
  }
  static void split_one(double x, T &high, T &low) {
    high = T(x);
    low = __builtin_isfinite(high) ? T(x - double(high)) : T(0);
  }
  void split_columns(const double *from, const Split &to) const {
    for (int64_t j = 0; j < k; j++) split_one(from[j], to.high[j], to.low[j]);
    for (int64_t j = k; j < padded; j++) to.high[j] = -T(__builtin_inf()), to.low[j] = 0; // padding has no weight
  }
  void pad(const T *from, T *to, T rest) const {
    memcpy(to, from, k * sizeof(T));
    for (int64_t j = k; j < padded; j++) to[j] = rest;
  }
  void pad_shifts(const T *from, T *to) const {
    for (int64_t j = 0; j < padded; j++) to[j] = j >= k ? -NOTHING : from[j] < NOTHING ? T(0) : from[j];
  }

  Row row(const Rows &rows, int64_t i, T *buffer, T *tail) const {
    if (lies_so(rows)) {
      const T *const at = (const T *)rows.data + i * rows.row_stride;
      for (int64_t j = whole; j < padded; j++) tail[j - whole] = j < k ? at[j] : T(0);
      return {at, tail};
    }
    read_row(rows, i, k, buffer);
    for (int64_t j = k; j < padded; j++) buffer[j] = 0;
    return {buffer, buffer + whole};
  }
  Row scores(int t, int64_t i, int64_t which) const {
    const Local &l = locals[t];
    return row(c.scores, i, l.scores + which * line, l.tails + which * W);
  }
  Row gradient(int t, int64_t i, int64_t which) const {
    const Local &l = locals[t];
    return row(c.gradient, i, l.gradient + which * line, l.tails + (LINES + which) * W);
  }
  template <class F> FASTCL_INLINE void each(F f) const { // calls f with the first column of each vector, and whether it is the last, partial one
    const int64_t whole = this->whole, padded = this->padded;
    for (int64_t j = 0; j < whole; j += W) f(j, false);
    if (whole < padded) f(whole, true);
  }
  static FASTCL_INLINE V<T> at(const Row &row, int64_t j, bool last) {
    __builtin_prefetch(row.whole + j + AHEAD, 0, 3); // a processor's own prefetches stop at the end of a page
    return last ? load(row.tail) : loadu(row.whole + j);
  }

  template <class F> void by_groups(int t, Range mine, F work) const {
    const Local &l = locals[t];
    if (l.total) memset(l.total, 0, padded * sizeof(T));
    for (int64_t block = mine.from; block < mine.to; block += BLOCK_ROWS) {
      const int64_t end = smaller(mine.to, block + BLOCK_ROWS);
      if (l.block) memset(l.block, 0, padded * sizeof(T));
      for (int64_t i = block; i < end; i += GROUP) work(i, smaller(end - i, GROUP));
      if (l.total)
        for (int64_t j = 0; j < padded; j += W) add_to(l.total + j, load(l.block + j));
    }
  }
  // block_j += sum_r factor_r e_rj
  FASTCL_INLINE void add_columns(const Local &l, const T *factors, int64_t rows) const {
    for (int64_t j = 0; j < padded; j += W) {
      V<T> sum = load(l.block + j);
      if (rows == GROUP) EACH(r, GROUP) sum += factors[r] * load(l.e + r * line + j);
      else
        for (int64_t r = 0; r < rows; r++) sum += factors[r] * load(l.e + r * line + j);
      store(l.block + j, sum);
    }
  }
  void merge_totals(Range mine) const {
    for (int64_t j = mine.from; j < mine.to; j++) {
      T sum = 0;
      for (int t = 0; t < c.threads; t++) sum += locals[t].total[j];
      if (j < k) ((T *)c.by_column)[j] = sum;
    }
  }

  // A column's shift is its largest number up to some row. It is raised only when a number exceeds it by a factor of 2^SLACK.
  void column_sums(int t, Range mine) const {
    const Local &l = locals[t];
    const Exponent<T> exponent = this->exponent;
    const V<T> slack = all<T>(SLACK / to_base_2);
    T *const shifts = l.shift, *const totals = l.total;
    for (int64_t j = 0; j < padded; j++) shifts[j] = NOTHING, totals[j] = 0;
    for (int64_t i = mine.from; i < mine.to; i += GROUP) {
      const int64_t rows = smaller(mine.to - i, GROUP);
      Row lines[GROUP];
      T high[GROUP], low[GROUP];
      for (int64_t r = 0; r < GROUP; r++) { // missing lines repeat the first, with weight 0
        lines[r] = r < rows ? scores(t, i + r, r) : lines[0];
        split_one(r < rows ? c.potential[i + r] : -__builtin_inf(), high[r], low[r]);
      }
      each([&](int64_t j, bool last) {
        V<T> x[GROUP], most, shift = load(shifts + j), total = load(totals + j);
        EACH(r, GROUP) {
          x[r] = (at(lines[r], j, last) + high[r]) + low[r];
          most = r == 0 ? x[0] : x[r] > most ? x[r] : most;
        }
        if (__builtin_expect(any<T>(most - shift > slack), false)) {
          most = most > shift ? most : shift;
          V<T> kept = shift - most;
          exponent.template of<1>(&kept);
          total *= kept;
          store(shifts + j, shift = most);
        }
        EACH(r, GROUP) x[r] -= shift;
        exponent.template of<GROUP / 2>(x);
        exponent.template of<GROUP / 2>(x + GROUP / 2);
        EACH(r, GROUP) total += x[r];
        store(totals + j, total);
      });
    }
  }
  void merge_column_sums(Range mine) const {
    for (int64_t j = mine.from; j < smaller(mine.to, k); j++) {
      T most = NOTHING, sum = 0;
      for (int t = 0; t < c.threads; t++) most = larger(most, locals[t].shift[j]);
      for (int t = 0; t < c.threads; t++) sum += locals[t].total[j] * exp2_of(T((locals[t].shift[j] - most) * to_base_2));
      ((T *)c.column_shift)[j] = most == NOTHING ? -T(__builtin_inf()) : most;
      ((T *)c.column_sum)[j] = sum;
    }
  }

  // Calls use(j, last, exp(x / epsilon)) with x = x(j, last) of each vector of columns.
  template <class X, class F> FASTCL_INLINE void exponentials(X x, F use) const {
    int64_t j = 0;
    for (; j + AT_ONCE * W <= whole; j += AT_ONCE * W) {
      V<T> e[AT_ONCE];
      EACH(v, AT_ONCE) e[v] = x(j + v * W, false);
      exponent.template of<AT_ONCE>(e);
      EACH(v, AT_ONCE) use(j + v * W, false, e[v]);
    }
    for (; j < padded; j += W) {
      V<T> e = x(j, j == whole);
      exponent.template of<1>(&e);
      use(j, j == whole, e);
    }
  }
  // The same with x = S_j + g_j - shift of a row.
  template <class F> FASTCL_INLINE void exponentials(const Row &s, T shift, F use) const {
    exponentials([&](int64_t j, bool last) { return ((at(s, j, last) + load(potential.high + j)) + load(potential.low + j)) - shift; }, use);
  }
  T largest(const Row &s) const {
    V<T> most[2] = {all<T>(NOTHING), all<T>(NOTHING)};
    int64_t j = 0;
    const auto x = [&](int64_t j, bool last) { return (at(s, j, last) + load(potential.high + j)) + load(potential.low + j); };
    for (; j + 2 * W <= whole; j += 2 * W) EACH(v, 2) {
        const V<T> y = x(j + v * W, false);
        most[v] = y > most[v] ? y : most[v];
      }
    for (; j < padded; j += W) {
      const V<T> y = x(j, j == whole);
      most[0] = y > most[0] ? y : most[0];
    }
    T lanes[W] __attribute__((aligned(FASTCL_BYTES))), result = NOTHING;
    store(lanes, most[0] > most[1] ? most[0] : most[1]);
    for (int64_t l = 0; l < W; l++) result = larger(result, lanes[l]);
    return result;
  }

  // The exponentials of a group of rows, and their sums. Each part of the potential is loaded once for the group. What the loop reads is
  // copied: a store could change members, for all that the compiler knows.
  void group_exponentials(const Out (&e)[GROUP], const Row (&s)[GROUP], const T (&shifts)[GROUP], T (&totals)[GROUP]) const {
    const Exponent<T> exponent = this->exponent;
    const T *const high = potential.high, *const low = potential.low;
    V<T> sums[GROUP];
    EACH(r, GROUP) sums[r] = all<T>(0);
    each([&](int64_t j, bool last) {
      const V<T> h = load(high + j), l = load(low + j);
      V<T> x[GROUP];
      EACH(r, GROUP) x[r] = ((at(s[r], j, last) + h) + l) - shifts[r];
      exponent.template of<GROUP>(x);
      EACH(r, GROUP) {
        e[r].put(j, last, x[r]);
        sums[r] += x[r];
      }
    });
    EACH(r, GROUP) totals[r] = sum<T>(sums[r]);
  }

  void row_pass(int t, int64_t i, int64_t rows) const {
    const Local &l = locals[t];
    const T *const above = (const T *)c.above;
    T factors[GROUP] = {}, shifts[GROUP], totals[GROUP];
    Row lines[GROUP];
    Out e[GROUP];
    if (c.keep) locals[t].pages.map((char *)c.matrix + (i + rows) * row_bytes());
    for (int64_t r = 0; r < GROUP; r++) { // missing rows repeat the first
      lines[r] = r < rows ? scores(t, i + r, r) : lines[0];
      shifts[r] = r < rows ? above ? above[i + r] : largest(lines[r]) : shifts[0];
      T *const to = l.e + (r < rows ? r : 0) * line;
      e[r] = {to, to + whole};
    }
    group_exponentials(e, lines, shifts, totals);
    for (int64_t r = 0; r < rows; r++) {
      T shift = shifts[r], total = totals[r];
      if (above && !(total > ENOUGH)) { // the bound is too far above the row's maximum, or not a bound
        shift = largest(lines[r]);
        V<T> sums = all<T>(0);
        exponentials(lines[r], shift, [&](int64_t j, bool last, V<T> x) {
          e[r].put(j, last, x);
          sums += x;
        });
        total = sum<T>(sums);
      }
      ((T *)c.row_shift)[i + r] = shift;
      ((T *)c.row_sum)[i + r] = total;
      factors[r] = c.mass ? ((const T *)c.mass)[i + r] / total : T(0);
      if (c.matrix && !c.keep) write_row(t, i + r, e[r].whole, 1 / total);
    }
    if (!c.mass) return;
    if (c.keep && rows == GROUP) {
      T *const to = (T *)c.matrix + i * k;
      each([&](int64_t j, bool last) {
        V<T> x[GROUP], sum = load(l.block + j);
        EACH(r, GROUP) {
          x[r] = load(e[r].whole + j);
          sum = fused<T>(x[r], all<T>(factors[r]), sum);
          if (!last) storeu(to + r * k + j, x[r]);
          else
            for (int64_t q = whole; q < k; q++) to[r * k + q] = e[r].tail[q - whole];
        }
        store(l.block + j, sum);
      });
    } else {
      if (c.keep)
        for (int64_t r = 0; r < rows; r++) write_row(t, i + r, e[r].whole, 1);
      add_columns(l, factors, rows);
    }
  }

  void products(int t, int64_t i, int64_t rows) const {
    const Local &l = locals[t];
    T factors[GROUP];
    for (int64_t r = 0; r < rows; r++) {
      V<T> sums = all<T>(0);
      T *const e = l.e + r * line;
      exponentials(scores(t, i + r, r), ((const T *)c.row_shift)[i + r], [&](int64_t j, bool, V<T> x) {
        store(e + j, x);
        sums += x * load(weights + j);
      });
      const T total = ((const T *)c.row_sum)[i + r], y = sum<T>(sums) / total;
      ((T *)c.by_row)[i + r] = y;
      factors[r] = ((const T *)c.mass)[i + r] * y / total;
    }
    add_columns(l, factors, rows);
  }

  void column_products(int t, int64_t i) const {
    const Row s = scores(t, i, 0);
    T high, low;
    split_one(c.potential[i], high, low);
    V<T> sums = all<T>(0);
    exponentials([&](int64_t j, bool last) { return ((at(s, j, last) + high) + low) - load(shifts + j); },
                 [&](int64_t j, bool, V<T> x) { sums += x * load(weights + j); });
    ((T *)c.by_row)[i] = sum<T>(sums);
  }

  void assignment_gradient(int t, int64_t i, int64_t rows) const {
    const Local &l = locals[t];
    T factors[GROUP], taken[GROUP];
    Row gradients[GROUP];
    for (int64_t r = 0; r < rows; r++) {
      const bool given = c.gradient.data;
      if (given) gradients[r] = gradient(t, i + r, r);
      V<T> sums = all<T>(0), totals = all<T>(0);
      T *const e = l.e + r * line;
      exponentials(scores(t, i + r, r), ((const T *)c.row_shift)[i + r], [&](int64_t j, bool last, V<T> x) {
        store(e + j, x);
        totals += x;
        if (given) sums += x * at(gradients[r], j, last);
      });
      if (c.matrix) ((T *)c.row_sum)[i + r] = sum<T>(totals);
      const T total = ((const T *)c.row_sum)[i + r], d = sum<T>(sums) / total;
      ((T *)c.by_row)[i + r] = d;
      factors[r] = 1 / total;
      taken[r] = d + ((const T *)c.less)[i + r];
      if (c.matrix) write_row(t, i + r, e, 1);
    }
    if (!c.gradient.data) {
      for (int64_t r = 0; r < rows; r++) factors[r] *= -taken[r];
      return add_columns(l, factors, rows);
    }
    each([&](int64_t j, bool last) {
      V<T> sum = load(l.block + j);
      for (int64_t r = 0; r < rows; r++) sum += load(l.e + r * line + j) * factors[r] * (at(gradients[r], j, last) - taken[r]);
      store(l.block + j, sum);
    });
  }

  void score_gradient(int t, int64_t i) const {
    const Local &l = locals[t];
    const Row s = scores(t, i, 0);
    const bool given = c.gradient.data;
    const Row g = given ? gradient(t, i, 0) : Row{};
    const T inverse = 1 / ((const T *)c.row_sum)[i], less = ((const T *)c.less)[i];
    V<T> moment = all<T>(0);
    exponentials(s, ((const T *)c.row_shift)[i],
                 [&](int64_t j, bool last, V<T> x) { store(l.e + j, x * inverse * ((given ? at(g, j, last) : all<T>(0)) - less)); });
    for (int64_t m = 0; m < c.term_count; m++) {
      const SinkhornTerm &term = c.terms[m];
      const T *const w = term_weights[m];
      if (term.p) {
        const Split &split = term_potentials[m];
        const T shift = ((const T *)term.shift)[i], p = ((const T *)term.p)[i], q = ((const T *)term.q)[i];
        exponentials([&](int64_t j, bool last) { return ((at(s, j, last) + load(split.high + j)) + load(split.low + j)) - shift; },
                     [&](int64_t j, bool, V<T> x) { store(l.e + j, load(l.e + j) - x * (p + q * load(w + j))); });
      } else {
        T high, low;
        split_one(term.potential[i], high, low);
        const T *const shift = term_shifts[m];
        exponentials([&](int64_t j, bool last) { return ((at(s, j, last) + high) + low) - load(shift + j); },
                     [&](int64_t j, bool, V<T> x) { store(l.e + j, load(l.e + j) - x * load(w + j)); });
      }
    }
    each([&](int64_t j, bool last) {
      const V<T> x = load(l.e + j), product = x * at(s, j, last);
      moment += where<T>(x == all<T>(0), all<T>(0), product); // a score of -inf has weight 0
    });
    ((T *)c.by_row)[i] = sum<T>(moment);
    write_row(t, i, l.e, scale);
  }

  // Writes matrix_i = factor * x in the scores' dtype.
  void write_row(int t, int64_t i, const T *x, T factor) const {
    locals[t].pages.map((char *)c.matrix + (i + 1) * row_bytes());
    switch (c.scores.dtype) {
    case Dtype::float64: return write_as<double>(i, x, factor, [](T y) { return double(y); });
    case Dtype::float32: return write_as<float>(i, x, factor, [](T y) { return float(y); });
    case Dtype::bfloat16: return write_as<uint16_t>(i, x, factor, [](T y) { return narrowed_bfloat(y); });
    case Dtype::float16: return write_as<uint16_t>(i, x, factor, [](T y) { return narrowed_half(y); });
    }
  }
  template <class To, class Convert> void write_as(int64_t i, const T *x, T factor, Convert convert) const {
    To *const to = (To *)c.matrix + i * k;
    // Ordinary stores, which do not bypass the caches: the system has just cleared new memory, so it is in the caches.
    if constexpr (sizeof(To) == sizeof(T)) {
      int64_t j = 0;
      for (; j < whole; j += W) storeu((T *)to + j, load(x + j) * factor);
      for (; j < k; j++) to[j] = To(x[j] * factor);
    } else
      for (int64_t j = 0; j < k; j++) to[j] = convert(x[j] * factor);
  }
};

} // namespace
} // namespace fastcl::FASTCL_ISA
