// Compiled without instruction-set flags: the engine runs the passes, and the code between them is cheap.
#include "solve.h"
#include <algorithm>
#include <cmath>
#include <limits>

namespace fastcl {
namespace {

constexpr double INFINITE = std::numeric_limits<double>::infinity();

template <class T> class Solver {
public:
  Solver(const Engine &engine, const SinkhornSolve &call)
      : engine_(engine), c_(call), n_(call.pass.scores.size), k_(call.pass.columns), log_prior_((const T *)call.log_prior),
        log_mass_((const T *)call.log_mass) {}

  int64_t workspace() const {
    Sinkhorn most = row_pass(nullptr, 0, true), first = column_sums();
    most.by_column = &most; // any non-null address: a pass with column masses needs the most workspace
    return aligned(n_ * int64_t(sizeof(double))) + aligned(n_ * int64_t(sizeof(T))) + aligned(3 * k_ * int64_t(sizeof(T))) +
           std::max(engine_.sinkhorn(most, nullptr), engine_.sinkhorn(first, nullptr)) + 64;
  }

  void run(char *place) {
    f_ = (double *)place, place += aligned(n_ * int64_t(sizeof(double)));
    above_ = (T *)place, place += aligned(n_ * int64_t(sizeof(T)));
    shift_ = (T *)place, sum_ = shift_ + k_, masses_ = sum_ + k_, place += aligned(3 * k_ * int64_t(sizeof(T)));
    passes_ = place;
    for (int64_t i = 0; i < n_; i++) f_[i] = log_mass_[i] == -T(INFINITE) ? -INFINITE : 0;
    if (c_.init) {
      engine_.sinkhorn(row_pass(c_.init, 0, false), passes_);
      update_rows(0);
    }
    first_columns();
    for (int64_t t = 0; t < c_.iterations; t++) {
      const bool last = t + 1 == c_.iterations;
      double *const g = kept(2 + t);
      // After a column update no entry of the plan exceeds its column's mass, so none exceeds 1: S + g <= -f.
      for (int64_t i = 0; i < n_; i++) above_[i] = T(-f_[i]);
      Sinkhorn pass = row_pass(g, t + 1, last);
      pass.above = above_;
      if (!last) pass.mass = c_.mass, pass.by_column = masses_;
      engine_.sinkhorn(pass, passes_);
      update_rows(t + 1);
      if (!last) update_columns(t, g);
    }
    const double *const g = kept(1 + c_.iterations);
    for (int64_t i = 0; i < n_; i++) ((T *)c_.row_potential)[i] = T(f_[i]);
    for (int64_t j = 0; j < k_; j++) ((T *)c_.col_potential)[j] = T(g[j]);
  }

private:
  static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  double *kept(int64_t which) const { return c_.columns + which * c_.column_step; }
  T *row_shift(int64_t update) const { return (T *)c_.rows + 2 * update * c_.row_step; }

  Sinkhorn column_sums() const {
    Sinkhorn pass = c_.pass;
    pass.pass = SinkhornPass::column_sums;
    pass.matrix = nullptr;
    pass.potential = f_, pass.column_shift = shift_, pass.column_sum = sum_;
    return pass;
  }
  Sinkhorn row_pass(const double *g, int64_t update, bool assignments) const {
    Sinkhorn pass = c_.pass;
    pass.pass = SinkhornPass::row_pass;
    if (!assignments) pass.matrix = nullptr;
    pass.potential = g, pass.row_shift = row_shift(update), pass.row_sum = row_shift(update) + c_.row_step;
    return pass;
  }

  void update_rows(int64_t update) {
    const T *const shift = row_shift(update), *const sum = shift + c_.row_step;
    for (int64_t i = 0; i < n_; i++) {
      const double total = double(shift[i]) + c_.epsilon * std::log(double(sum[i]));
      f_[i] = double(T(c_.epsilon) * log_mass_[i]) - total;
    }
  }
  void first_columns() {
    engine_.sinkhorn(column_sums(), passes_);
    double *const g = kept(2);
    for (int64_t j = 0; j < k_; j++) {
      kept(0)[j] = shift_[j], kept(1)[j] = sum_[j];
      const double total = double(shift_[j]) + c_.epsilon * std::log(double(sum_[j]));
      g[j] = without_mass(j) ? -INFINITE : double(T(c_.epsilon) * log_prior_[j]) - total;
    }
  }
  void update_columns(int64_t t, const double *g) {
    double *const next = kept(3 + t), *const masses = kept(2 + c_.iterations + t);
    for (int64_t j = 0; j < k_; j++) {
      masses[j] = masses_[j];
      const T mass = masses_[j] < std::numeric_limits<T>::min() ? std::numeric_limits<T>::min() : masses_[j]; // NaN stays NaN
      next[j] = without_mass(j) ? -INFINITE : g[j] + c_.epsilon * (double(log_prior_[j]) - std::log(double(mass)));
    }
  }
  bool without_mass(int64_t j) const { return log_prior_[j] == -T(INFINITE); }

  const Engine &engine_;
  const SinkhornSolve &c_;
  const int64_t n_, k_;
  const T *const log_prior_, *const log_mass_;
  double *f_ = nullptr;                                                        // [N]
  T *above_ = nullptr, *shift_ = nullptr, *sum_ = nullptr, *masses_ = nullptr; // [N], [K], [K], [K]
  char *passes_ = nullptr;                                                     // workspace of a pass
};

template <class T> int64_t solved(const Engine &engine, const SinkhornSolve &call, void *workspace) {
  Solver<T> solver(engine, call);
  if (!workspace) return solver.workspace();
  solver.run((char *)workspace);
  return 0;
}

} // namespace

int64_t solve(const Engine &engine, const SinkhornSolve &call, void *workspace) {
  return call.pass.wide_reals ? solved<double>(engine, call, workspace) : solved<float>(engine, call, workspace);
}

} // namespace fastcl
