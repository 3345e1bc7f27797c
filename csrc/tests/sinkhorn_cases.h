// Compares every pass of Sinkhorn with plain loops in double, for a random problem.
#pragma once
#include "../cpu/engine.h"
#include "check.h"

namespace {

// The number stored at `from`.
double loaded(Dtype dtype, const void *from) {
  float single;
  uint16_t half;
  std::memcpy(&half, from, 2);
  switch (dtype) {
  case Dtype::float64: {
    double x;
    std::memcpy(&x, from, 8);
    return x;
  }
  case Dtype::float32: std::memcpy(&single, from, 4); return single;
  case Dtype::bfloat16: {
    const uint32_t word = uint32_t(half) << 16;
    std::memcpy(&single, &word, 4);
    return single;
  }
  case Dtype::float16: {
    const int exponent = half >> 10 & 31, digits = half & 1023;
    const double magnitude = exponent ? std::ldexp(1024 + digits, exponent - 25) : std::ldexp(digits, -24);
    return half & 0x8000 ? -magnitude : magnitude;
  }
  }
  return 0;
}

template <class T> class SinkhornCase {
public:
  SinkhornCase(const Engine &engine, int64_t n, int64_t k, Dtype dtype, int threads, Place place, uint64_t seed)
      : engine_(engine), n_(n), k_(k), random_(seed), pool_(place) {
    call_.scores = rows(dtype, scores_);
    call_.columns = k;
    call_.wide_reals = sizeof(T) == 8;
    call_.threads = threads;
    T *const inverse_epsilon = pool_.template array<T>(1);
    *inverse_epsilon = T(20 + 19 * random_.real());
    scale_ = double(*inverse_epsilon);
    call_.inverse_epsilon = inverse_epsilon;
    g_ = potential(k), f_ = potential(n);
    tolerance_ = (sizeof(T) == 8 ? 1e-15 : 4e-7) * (20 + 5 * scale_); // exponents are a few units large
    normalize_rows();
    normalize_columns();
    mass_ = reals(n, &mass_at_, 0), w_ = reals(k, &w_at_, 1), less_ = reals(n, &less_at_, 1);
  }

  void run() {
    column_sums();
    row_pass();
    products();
    column_products();
    assignment_gradient();
    score_gradient();
    if (call_.scores.dtype != (sizeof(T) == 8 ? Dtype::float64 : Dtype::float32)) return; // only these are kept
    kept_exponentials();
    plan_update();
    plan_products();
    plan_gradient();
  }

private:
  const Engine &engine_;
  const int64_t n_, k_;
  Random random_;
  Pool pool_;
  Sinkhorn call_{};
  double scale_, tolerance_;
  Reals scores_, g_, f_, mass_, w_, less_, row_shift_, row_sum_, column_shift_, column_sum_;
  const T *mass_at_, *w_at_, *less_at_, *row_shift_at_, *row_sum_at_, *column_shift_at_, *column_sum_at_;
  const double *g_at_, *f_at_;

  Rows rows(Dtype dtype, Reals &values) { return random_rows(random_, pool_, n_, k_, dtype, random_.below(6) == 0, random_.below(4), values); }
  Reals potential(int64_t size) {
    Reals result(size);
    for (double &x : result) x = random_.below(9) ? random_.real() : -std::numeric_limits<double>::infinity();
    result[random_.below(size)] = 0; // at least one entry has mass
    return result;
  }
  Reals reals(int64_t size, const T **at, double sign) {
    Reals result(size);
    T *const to = pool_.template array<T>(size);
    for (int64_t i = 0; i < size; i++) result[i] = to[i] = T(sign ? random_.real() : std::fabs(random_.real()) + 0.1);
    *at = to;
    return result;
  }
  const T *as_reals(const Reals &values) { return pool_.copy(std::vector<T>(values.begin(), values.end())); }
  T *out(int64_t size) { return pool_.template array<T>(size); }
  double s(int64_t i, int64_t j) const { return scores_[i * k_ + j]; }
  // exp((x - shift) * scale); 0 for infinite x.
  double exponential(double x, double shift) const { return std::isinf(x) ? 0 : std::exp((x - shift) * scale_); }
  double row_e(int64_t i, int64_t j) const { return exponential(s(i, j) + g_[j], row_shift_[i]); }
  double r(int64_t i, int64_t j) const { return row_e(i, j) / row_sum_[i]; }
  double column_e(int64_t i, int64_t j) const { return exponential(s(i, j) + f_[i], column_shift_[j]); }

  void normalize_rows() {
    row_shift_.assign(n_, 0), row_sum_.assign(n_, 0);
    for (int64_t i = 0; i < n_; i++) {
      double most = -std::numeric_limits<double>::infinity();
      for (int64_t j = 0; j < k_; j++) most = std::fmax(most, s(i, j) + g_[j]);
      row_shift_[i] = double(T(most));
      for (int64_t j = 0; j < k_; j++) row_sum_[i] += row_e(i, j);
      row_sum_[i] = double(T(row_sum_[i]));
    }
    row_shift_at_ = as_reals(row_shift_), row_sum_at_ = as_reals(row_sum_);
    g_at_ = pool_.copy(g_);
  }
  void normalize_columns() {
    column_shift_.assign(k_, 0), column_sum_.assign(k_, 0);
    for (int64_t j = 0; j < k_; j++) {
      double most = -std::numeric_limits<double>::infinity();
      for (int64_t i = 0; i < n_; i++) most = std::fmax(most, s(i, j) + f_[i]);
      column_shift_[j] = double(T(most));
      for (int64_t i = 0; i < n_; i++) column_sum_[j] += column_e(i, j);
      column_sum_[j] = double(T(column_sum_[j]));
    }
    column_shift_at_ = as_reals(column_shift_), column_sum_at_ = as_reals(column_sum_);
    f_at_ = pool_.copy(f_);
  }

  Sinkhorn pass(SinkhornPass which, const double *potential) const {
    Sinkhorn result = call_;
    result.pass = which;
    result.potential = potential;
    return result;
  }
  // An input of this pass, although other passes write it.
  void given_rows(Sinkhorn &call) const { call.row_shift = (void *)row_shift_at_, call.row_sum = (void *)row_sum_at_; }
  void finish(const Sinkhorn &call) { engine_.sinkhorn(call, pool_.workspace(engine_.sinkhorn(call, nullptr))); }
  void compare_logs(const char *what, const T *shift, const T *sum, const Reals &shifts, const Reals &sums) {
    for (size_t i = 0; i < sums.size(); i++) {
      const double got = (double(shift[i]) - shifts[i]) * scale_ + std::log(double(sum[i])), expected = std::log(sums[i]);
      if (!(std::fabs(got - expected) <= tolerance_)) fail(what, int64_t(i), got, expected, tolerance_);
    }
  }
  void compare_matrix(const char *what, const char *matrix, const Reals &expected, double size) {
    const Dtype dtype = call_.scores.dtype;
    const double rounded = dtype == Dtype::bfloat16 ? 0x1p-8 : dtype == Dtype::float16 ? 0x1p-11 : 0;
    const double least = dtype == Dtype::float16 ? 0x1p-24 : 1e-37; // smaller numbers are subnormal or 0
    for (size_t at = 0; at < expected.size(); at++) {
      const double got = loaded(dtype, matrix + at * size_of(dtype)), truth = expected[at];
      const double allowed = tolerance_ * std::fmax(size, std::fabs(truth)) + rounded * std::fabs(truth) + least;
      if (!(std::fabs(got - truth) <= allowed)) fail(what, int64_t(at), got, truth, allowed);
    }
  }

  void column_sums() {
    Sinkhorn call = pass(SinkhornPass::column_sums, f_at_);
    T *const shift = out(k_), *const sum = out(k_);
    call.column_shift = shift, call.column_sum = sum;
    finish(call);
    compare_logs("column sums", shift, sum, column_shift_, column_sum_);
  }
  void row_pass() {
    Sinkhorn call = pass(SinkhornPass::row_pass, g_at_);
    T *const shift = out(n_), *const sum = out(n_);
    call.row_shift = shift, call.row_sum = sum;
    if (random_.coin()) { // a close bound, one that is too large, or none
      Reals above = row_shift_;
      for (double &x : above) x = double(T(x + random_.below(2) * (random_.coin() ? 0.1 : 100) / scale_));
      call.above = as_reals(above);
    }
    const bool masses = random_.coin(), matrix = !masses || random_.coin();
    T *const columns = masses ? out(k_) : nullptr;
    if (masses) call.mass = mass_at_, call.by_column = columns;
    if (matrix) call.matrix = pool_.bytes(n_ * k_ * int64_t(size_of(call_.scores.dtype)));
    finish(call);
    compare_logs("row sums", shift, sum, row_shift_, row_sum_);
    Reals assignments(n_ * k_), sums(k_);
    for (int64_t i = 0; i < n_; i++)
      for (int64_t j = 0; j < k_; j++) sums[j] += mass_[i] * (assignments[i * k_ + j] = r(i, j));
    if (masses) compare<T>("column masses", columns, sums, nullptr, tolerance_);
    if (matrix) compare_matrix("assignments", (const char *)call.matrix, assignments, 0);
  }
  void products() {
    Sinkhorn call = pass(SinkhornPass::products, g_at_);
    given_rows(call);
    T *const y = out(n_), *const columns = out(k_);
    call.mass = mass_at_, call.weights = w_at_, call.by_row = y, call.by_column = columns;
    finish(call);
    Reals by_row(n_), by_column(k_), size(k_, 1);
    for (int64_t i = 0; i < n_; i++) {
      for (int64_t j = 0; j < k_; j++) by_row[i] += r(i, j) * w_[j];
      for (int64_t j = 0; j < k_; j++) by_column[j] += mass_[i] * by_row[i] * r(i, j), size[j] += mass_[i] * r(i, j);
    }
    compare<T>("products by row", y, by_row, nullptr, tolerance_);
    compare<T>("products by column", columns, by_column, &size, tolerance_);
  }
  void column_products() {
    Sinkhorn call = pass(SinkhornPass::column_products, f_at_);
    T *const y = out(n_);
    call.column_shift = (void *)column_shift_at_, call.column_sum = (void *)column_sum_at_, call.weights = w_at_, call.by_row = y;
    finish(call);
    Reals by_row(n_), size(n_, 1);
    for (int64_t i = 0; i < n_; i++)
      for (int64_t j = 0; j < k_; j++) by_row[i] += column_e(i, j) * w_[j], size[i] += column_e(i, j) * std::fabs(w_[j]);
    compare<T>("products of columns", y, by_row, &size, tolerance_);
  }
  void assignment_gradient() {
    Sinkhorn call = pass(SinkhornPass::assignment_gradient, g_at_);
    given_rows(call);
    Reals gradient(n_ * k_);
    if (random_.coin()) call.gradient = rows(call_.scores.dtype, gradient);
    T *const d = out(n_), *const columns = out(k_);
    call.less = less_at_, call.by_row = d, call.by_column = columns;
    finish(call);
    Reals by_row(n_), by_column(k_), size(k_, 1);
    for (int64_t i = 0; i < n_; i++) {
      for (int64_t j = 0; j < k_; j++) by_row[i] += r(i, j) * gradient[i * k_ + j];
      for (int64_t j = 0; j < k_; j++) by_column[j] += r(i, j) * (gradient[i * k_ + j] - by_row[i] - less_[i]), size[j] += 4 * r(i, j);
    }
    compare<T>("mean gradient", d, by_row, nullptr, tolerance_);
    compare<T>("gradient by column", columns, by_column, &size, tolerance_);
  }
  void score_gradient() {
    Sinkhorn call = pass(SinkhornPass::score_gradient, g_at_);
    given_rows(call);
    Reals gradient(n_ * k_);
    if (random_.coin()) call.gradient = rows(call_.scores.dtype, gradient);
    const T *p, *q;
    const Reals of_row = reals(n_, &p, 1), of_pair = reals(n_, &q, 1);
    std::vector<SinkhornTerm> terms;
    const bool row_term = random_.coin(), column_term = random_.coin();
    if (row_term) terms.push_back({g_at_, row_shift_at_, p, q, w_at_});
    if (column_term) terms.push_back({f_at_, column_shift_at_, nullptr, nullptr, w_at_});
    call.terms = terms.data(), call.term_count = int64_t(terms.size());
    T *const moment = out(n_);
    call.less = less_at_, call.by_row = moment, call.matrix = pool_.bytes(n_ * k_ * int64_t(size_of(call_.scores.dtype)));
    finish(call);
    Reals expected(n_ * k_), moments(n_), size(n_, 1);
    for (int64_t i = 0; i < n_; i++)
      for (int64_t j = 0; j < k_; j++) {
        double total = r(i, j) * (gradient[i * k_ + j] - less_[i]);
        if (row_term) total -= row_e(i, j) * (of_row[i] + of_pair[i] * w_[j]);
        if (column_term) total -= column_e(i, j) * w_[j];
        expected[i * k_ + j] = scale_ * total;
        moments[i] += total * s(i, j);
        size[i] += (2 * r(i, j) + 2 * row_e(i, j) + column_e(i, j)) * std::fabs(s(i, j));
      }
    compare<T>("moment", moment, moments, &size, tolerance_);
    compare_matrix("gradient of scores", (const char *)call.matrix, expected, 5 * scale_);
  }
  const T *exponentials() {
    std::vector<T> e(n_ * k_);
    for (int64_t i = 0; i < n_; i++)
      for (int64_t j = 0; j < k_; j++) e[i * k_ + j] = T(row_e(i, j));
    return pool_.copy(e);
  }
  void kept_exponentials() {
    Reals expected(n_ * k_);
    for (int64_t i = 0; i < n_; i++)
      for (int64_t j = 0; j < k_; j++) expected[i * k_ + j] = r(i, j);
    const auto compare_kept = [&](const char *what, T *matrix, const T *sums) {
      for (int64_t at = 0; at < n_ * k_; at++) matrix[at] /= sums[at / k_];
      compare_matrix(what, (const char *)matrix, expected, 0);
    };
    Sinkhorn call = pass(SinkhornPass::row_pass, g_at_);
    T *const shift = out(n_), *const sum = out(n_), *const matrix = out(n_ * k_), *const columns = out(k_);
    call.row_shift = shift, call.row_sum = sum, call.mass = mass_at_, call.by_column = columns, call.matrix = matrix, call.keep = true;
    finish(call);
    Reals masses(k_);
    for (int64_t i = 0; i < n_; i++)
      for (int64_t j = 0; j < k_; j++) masses[j] += mass_[i] * r(i, j);
    compare_logs("row sums", shift, sum, row_shift_, row_sum_);
    compare<T>("column masses", columns, masses, nullptr, tolerance_);
    compare_kept("kept exponentials", matrix, sum);

    call = pass(SinkhornPass::assignment_gradient, g_at_);
    given_rows(call);
    T *const again = out(n_ * k_), *const own = out(n_);
    call.less = less_at_, call.by_row = out(n_), call.by_column = out(k_), call.matrix = again, call.row_sum = own;
    finish(call);
    compare<T>("sums of a gradient's exponentials", own, row_sum_, nullptr, tolerance_);
    compare_kept("exponentials of a gradient", again, own);
  }
  void plan_update() {
    const T *const e = exponentials(), *w;
    const Reals weights = reals(k_, &w, 0);
    Sinkhorn call = pass(SinkhornPass::plan_update, nullptr);
    T *const sum = out(n_), *const matrix = out(n_ * k_), *const columns = out(k_);
    std::memcpy(matrix, e, n_ * k_ * sizeof(T));
    const bool masses = random_.coin(), written = !masses || random_.coin();
    call.plan = matrix, call.weights = w, call.row_sum = sum;
    if (masses) call.mass = mass_at_, call.by_column = columns;
    if (written) call.matrix = matrix; // in place
    finish(call);
    Reals sums(n_), by_column(k_), plan(n_ * k_);
    for (int64_t i = 0; i < n_; i++) {
      for (int64_t j = 0; j < k_; j++) sums[i] += double(e[i * k_ + j]) * weights[j];
      for (int64_t j = 0; j < k_; j++) by_column[j] += mass_[i] / sums[i] * double(e[i * k_ + j]);
      for (int64_t j = 0; j < k_; j++) plan[i * k_ + j] = written ? double(e[i * k_ + j]) * weights[j] / sums[i] : double(e[i * k_ + j]);
    }
    compare<T>("sums of a plan's rows", sum, sums, nullptr, tolerance_);
    if (masses) compare<T>("column masses of a plan", columns, by_column, nullptr, tolerance_);
    compare_matrix("plan", (const char *)matrix, plan, 0);
  }
  void plan_products() {
    const T *const e = exponentials();
    T *const of_column = pool_.template array<T>(2 * k_);
    for (int64_t j = 0; j < k_; j++) of_column[j] = T(std::fabs(random_.real()) + 0.1), of_column[k_ + j] = T(random_.real());
    Sinkhorn call = pass(SinkhornPass::plan_products, nullptr);
    T *const sums = out(n_), *const y = out(n_), *const columns = out(k_);
    call.plan = e, call.column_factors = of_column, call.factor_count = 2, call.mass = mass_at_;
    call.row_sum = sums, call.by_row = y, call.by_column = columns;
    finish(call);
    Reals total(n_), by_row(n_), by_column(k_), size(k_, 0), row_size(n_, 0);
    for (int64_t i = 0; i < n_; i++) {
      for (int64_t j = 0; j < k_; j++) total[i] += double(e[i * k_ + j]) * of_column[j];
      for (int64_t j = 0; j < k_; j++) {
        const double share = double(e[i * k_ + j]) / total[i];
        by_row[i] += share * of_column[k_ + j], row_size[i] += share * std::fabs(of_column[k_ + j]);
      }
      for (int64_t j = 0; j < k_; j++) {
        const double share = mass_[i] * double(e[i * k_ + j]) / total[i];
        by_column[j] += share * by_row[i], size[j] += share * row_size[i];
      }
    }
    compare<T>("sums of a plan's rows", sums, total, nullptr, tolerance_);
    compare<T>("products of a plan by row", y, by_row, &row_size, tolerance_);
    compare<T>("products of a plan by column", columns, by_column, &size, tolerance_);
  }
  void plan_gradient() {
    const T *const e = exponentials();
    Sinkhorn call = pass(SinkhornPass::plan_gradient, nullptr);
    Reals gradient(n_ * k_);
    if (random_.coin()) call.gradient = rows(call_.scores.dtype, gradient);
    const int64_t count = random_.below(4);
    const T *u, *v;
    const Reals of_row = reals(3 * count * n_ + 1, &u, 1), of_column = reals(2 * count * k_ + 1, &v, 1);
    const bool moments = random_.coin();
    T *const moment = moments ? out(n_) : nullptr, *const matrix = out(n_ * k_);
    std::memcpy(matrix, e, n_ * k_ * sizeof(T));
    call.plan = matrix, call.matrix = matrix, call.row_sum = (void *)row_sum_at_, call.less = less_at_, call.by_row = moment;
    if (count) call.row_factors = u, call.column_factors = v, call.factor_count = 2 * count;
    finish(call);
    Reals expected(n_ * k_), by_row(n_), size(n_, 1);
    for (int64_t i = 0; i < n_; i++)
      for (int64_t j = 0; j < k_; j++) {
        double total = (gradient[i * k_ + j] - less_[i]) / row_sum_[i];
        for (int64_t m = 0; m < count; m++) {
          const double *const row = &of_row[3 * m * n_ + i], *const column = &of_column[2 * m * k_ + j];
          total -= row[0] * column[0] * (row[n_] + row[2 * n_] * column[k_]);
        }
        total *= double(e[i * k_ + j]);
        expected[i * k_ + j] = scale_ * total;
        by_row[i] += total * s(i, j);
        size[i] += (2 * r(i, j) + 2 * count * row_e(i, j)) * std::fabs(s(i, j));
      }
    if (moments) compare<T>("moment of a plan", moment, by_row, &size, tolerance_);
    compare_matrix("gradient by a plan", (const char *)matrix, expected, 8 * scale_);
  }
};

} // namespace
