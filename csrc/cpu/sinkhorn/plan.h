// Passes over the exponentials e that a row update left in memory. They take none themselves: the plan of another iteration is the same
// matrix with other factors for its rows and columns.
#pragma once
#include "passes.h"

namespace fastcl::FASTCL_ISA {
namespace {

template <class T> struct PlanPasses {
  using Run = SinkhornRun<T>;
  using Row = typename Run::Row;
  static constexpr int64_t W = Run::W, GROUP = Run::GROUP, LINES = Run::LINES;
  static constexpr int64_t PAIR = 2; // rows whose gradients are computed together

  const Run &all_;
  const Sinkhorn &c = all_.c;

  void run(int t, Range mine) const {
    switch (c.pass) {
    case SinkhornPass::plan_update: return all_.by_groups(t, mine, [&](int64_t i, int64_t rows) { update(t, i, rows); });
    case SinkhornPass::plan_products: return all_.by_groups(t, mine, [&](int64_t i, int64_t rows) { products(t, i, rows); });
    default:
      for (int64_t i = mine.from; i < mine.to; i += PAIR) gradient(t, i, smaller(mine.to - i, PAIR));
    }
  }

private:
  Row row(int t, int64_t i, int64_t which) const {
    const T *const at = (const T *)c.plan + i * all_.k;
    T *const tail = all_.locals[t].tails + (2 * LINES + which) * W;
    for (int64_t j = all_.whole; j < all_.padded; j++) tail[j - all_.whole] = j < all_.k ? at[j] : T(0);
    return {at, tail};
  }

  // The products of a group of rows with weights [padded]. Missing rows repeat the first.
  template <int COUNT>
  void dots(int t, int64_t i, int64_t rows, const T *const (&weights)[COUNT], Row (&lines)[GROUP], T (&result)[COUNT][GROUP]) const {
    V<T> sums[COUNT][GROUP];
    EACH(r, GROUP) {
      lines[r] = r < rows ? row(t, i + r, r) : lines[0];
      EACH(v, COUNT) sums[v][r] = all<T>(0);
    }
    all_.each([&](int64_t j, bool last) {
      V<T> w[COUNT];
      EACH(v, COUNT) w[v] = load(weights[v] + j);
      EACH(r, GROUP) {
        const V<T> e = Run::at(lines[r], j, last);
        EACH(v, COUNT) sums[v][r] = fused<T>(e, w[v], sums[v][r]);
      }
    });
    EACH(r, GROUP) EACH(v, COUNT) result[v][r] = sum<T>(sums[v][r]);
  }
  // block_j += sum_r factor_r e_rj; the factors of missing rows are 0.
  void add_columns(int t, const Row (&lines)[GROUP], const T (&factors)[GROUP]) const {
    T *const block = all_.locals[t].block;
    all_.each([&](int64_t j, bool last) {
      V<T> sum = load(block + j);
      EACH(r, GROUP) sum = fused<T>(last ? load(lines[r].tail) : loadu(lines[r].whole + j), all<T>(factors[r]), sum);
      store(block + j, sum);
    });
  }

  void update(int t, int64_t i, int64_t rows) const {
    T sums[1][GROUP], factors[GROUP] = {};
    Row lines[GROUP];
    dots<1>(t, i, rows, {all_.weights}, lines, sums);
    for (int64_t r = 0; r < rows; r++) {
      const T sum = sums[0][r];
      ((T *)c.row_sum)[i + r] = sum;
      if (c.mass) factors[r] = ((const T *)c.mass)[i + r] / sum;
    }
    if (c.mass) add_columns(t, lines, factors);
    if (c.matrix) // last: it may take the place of e
      for (int64_t r = 0; r < rows; r++) write(i + r, lines[r], 1 / sums[0][r]);
  }
  void write(int64_t i, const Row &line, T factor) const {
    const T *const weights = all_.weights;
    const int64_t whole = all_.whole, k = all_.k;
    T *const to = (T *)c.matrix + i * k;
    for (int64_t j = 0; j < whole; j += W) storeu(to + j, loadu(line.whole + j) * load(weights + j) * factor);
    for (int64_t j = whole; j < k; j++) to[j] = line.tail[j - whole] * weights[j] * factor;
  }

  void products(int t, int64_t i, int64_t rows) const {
    T sums[2][GROUP], factors[GROUP] = {};
    Row lines[GROUP];
    dots<2>(t, i, rows, {all_.factors, all_.factors + all_.line}, lines, sums);
    for (int64_t r = 0; r < rows; r++) {
      const T total = sums[0][r], y = sums[1][r] / total;
      ((T *)c.row_sum)[i + r] = total;
      ((T *)c.by_row)[i + r] = y;
      factors[r] = ((const T *)c.mass)[i + r] * y / total;
    }
    add_columns(t, lines, factors);
  }

  void gradient(int t, int64_t i, int64_t rows) const {
    Row lines[PAIR], gradients[PAIR], scores[PAIR];
    V<T> moments[PAIR];
    const T *by_row[PAIR];
    T less[PAIR], inverse[PAIR], *to[PAIR];
    const int64_t n = all_.n, k = all_.k, whole = all_.whole, line = all_.line, terms = c.factor_count / 2;
    const T scale = all_.scale, *const by_column = all_.factors;
    const bool given = c.gradient.data, moment = c.by_row;
    for (int64_t r = 0; r < PAIR; r++) { // a missing row repeats the first, and writes the same numbers
      const int64_t at = i + (r < rows ? r : 0);
      lines[r] = row(t, at, r);
      if (given) gradients[r] = all_.gradient(t, at, r);
      if (moment) scores[r] = all_.scores(t, at, r);
      by_row[r] = terms ? (const T *)c.row_factors + at : nullptr;
      less[r] = ((const T *)c.less)[at], inverse[r] = 1 / ((const T *)c.row_sum)[at];
      to[r] = (T *)c.matrix + at * k;
      moments[r] = all<T>(0);
    }
    const auto columns = [&](auto count, int64_t j, bool last) { // of a few vectors
      constexpr int COUNT = decltype(count)::value;
      V<T> x[PAIR][COUNT];
      EACH(r, PAIR) EACH(v, COUNT) x[r][v] = ((given ? Run::at(gradients[r], j + v * W, last) : all<T>(0)) - less[r]) * inverse[r];
      for (int64_t m = 0; m < terms; m++) {
        V<T> u[PAIR], p[PAIR], q[PAIR];
        EACH(r, PAIR) u[r] = all<T>(-by_row[r][3 * m * n]), p[r] = all<T>(by_row[r][(3 * m + 1) * n]), q[r] = all<T>(by_row[r][(3 * m + 2) * n]);
        EACH(v, COUNT) {
          const V<T> factor = load(by_column + 2 * m * line + j + v * W), w = load(by_column + (2 * m + 1) * line + j + v * W);
          EACH(r, PAIR) x[r][v] = fused<T>(u[r] * factor, fused<T>(q[r], w, p[r]), x[r][v]); // p + q w cancels, so it comes first
        }
      }
      V<T> e[PAIR][COUNT]; // all are read before one is written: a missing row is the first
      EACH(r, PAIR) EACH(v, COUNT) e[r][v] = Run::at(lines[r], j + v * W, last);
      EACH(r, PAIR) EACH(v, COUNT) {
        const V<T> g = e[r][v] * x[r][v];
        if (moment) moments[r] += where<T>(g == all<T>(0), all<T>(0), g * Run::at(scores[r], j + v * W, last)); // a score of -inf has weight 0
        if (!last) storeu(to[r] + j + v * W, g * scale);
        else
          for (int64_t l = 0; l < k - whole; l++) to[r][whole + l] = g[l] * scale;
      }
    };
    int64_t j = 0;
    for (; j + 4 * W <= whole; j += 4 * W) columns(std::integral_constant<int, 4>(), j, false);
    for (; j < whole; j += W) columns(std::integral_constant<int, 1>(), j, false);
    if (j < k) columns(std::integral_constant<int, 1>(), j, true);
    if (moment)
      for (int64_t r = 0; r < rows; r++) ((T *)c.by_row)[i + r] = sum<T>(moments[r]);
  }
};

int64_t sinkhorn(const Sinkhorn &call, void *workspace) {
  Arena arena{(char *)workspace};
  if (call.wide_reals) {
    const SinkhornRun<double> run(call, arena);
    if (workspace) run.run();
  } else {
    const SinkhornRun<float> run(call, arena);
    if (workspace) run.run();
  }
  return arena.used;
}

} // namespace
} // namespace fastcl::FASTCL_ISA
