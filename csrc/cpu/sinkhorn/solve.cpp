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
      : engine_(engine), c_(call), n_(call.pass.scores.size), k_(call.pass.columns), inverse_epsilon_(T(1 / call.epsilon)),
        log_prior_((const T *)call.log_prior) {}
  Solver(const Solver &) = delete; // passes read a member by its address

  int64_t workspace() const {
    Sinkhorn most = row_pass(nullptr, 0, true), first = column_sums();
    most.by_column = &most; // any non-null address: a pass with column masses needs the most workspace
    most.weights = &most;   // as a pass over the plan
    return aligned(n_ * int64_t(sizeof(double))) + aligned(5 * n_ * int64_t(sizeof(T))) + aligned(4 * k_ * int64_t(sizeof(T))) +
           std::max(engine_.sinkhorn(most, nullptr), engine_.sinkhorn(first, nullptr)) + 64;
  }

  void run(char *place) {
    f_ = (double *)place, place += aligned(n_ * int64_t(sizeof(double)));
    above_ = (T *)place, dots_ = above_ + n_, shifts_ = dots_ + n_, log_mass_ = shifts_ + n_, mass_ = log_mass_ + n_,
    place += aligned(5 * n_ * int64_t(sizeof(T)));
    shift_ = (T *)place, sum_ = shift_ + k_, masses_ = sum_ + k_, weights_ = masses_ + k_, place += aligned(4 * k_ * int64_t(sizeof(T)));
    passes_ = place;
    normalize_rows();
    for (int64_t i = 0; i < n_; i++) f_[i] = log_mass_[i] == -T(INFINITE) ? -INFINITE : 0;
    if (c_.init) {
      engine_.sinkhorn(row_pass(c_.init, 0, false), passes_);
      update_rows(0);
    }
    first_columns();
    for (int64_t t = 0; t < c_.iterations; t++) {
      const bool last = t + 1 == c_.iterations;
      double *const g = kept(2 + t);
      const double most = plan_at_ < 0 ? NAN : weigh(g, kept(2 + plan_at_));
      Sinkhorn pass = most == most ? over_plan(last) : over_scores(g, t + 1, last);
      if (!last) pass.mass = mass_, pass.by_column = masses_;
      engine_.sinkhorn(pass, passes_);
      if (most == most) {
        update_rows(t + 1, most);
        for (int64_t j = 0; !last && j < k_; j++) masses_[j] *= weights_[j];
      } else {
        update_rows(t + 1);
        plan_at_ = pass.keep && rows_are_near() ? t : -1;
      }
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

  Sinkhorn any_pass() const {
    Sinkhorn pass = c_.pass;
    pass.inverse_epsilon = &inverse_epsilon_;
    return pass;
  }
  void normalize_rows() {
    const T *const marginal = (const T *)c_.log_row_marginal;
    bool uniform = true;
    for (int64_t i = 1; i < n_; i++) uniform &= marginal[i] == marginal[0];
    double total = 0;
    for (int64_t i = 0; i < n_ && !uniform; i++) total += std::exp(double(marginal[i]));
    const double log_total = uniform ? double(marginal[0]) + std::log(double(n_)) : std::log(total);
    for (int64_t i = 0; i < n_; i++) {
      const bool known = uniform && i > 0;
      log_mass_[i] = known ? log_mass_[0] : T(double(marginal[i]) - log_total);
      mass_[i] = known ? mass_[0] : T(std::exp(double(log_mass_[i])));
    }
  }
  Sinkhorn column_sums() const {
    Sinkhorn pass = any_pass();
    pass.pass = SinkhornPass::column_sums;
    pass.matrix = nullptr;
    pass.potential = f_, pass.column_shift = shift_, pass.column_sum = sum_;
    return pass;
  }
  Sinkhorn row_pass(const double *g, int64_t update, bool assignments) const {
    Sinkhorn pass = any_pass();
    pass.pass = SinkhornPass::row_pass;
    if (!assignments) pass.matrix = nullptr;
    pass.potential = g, pass.row_shift = row_shift(update), pass.row_sum = row_shift(update) + c_.row_step;
    return pass;
  }

  Sinkhorn over_scores(const double *g, int64_t update, bool last) {
    // After a column update no entry of the plan exceeds its column's mass, so none exceeds 1: S + g <= -f.
    for (int64_t i = 0; i < n_; i++) above_[i] = T(-f_[i]);
    Sinkhorn pass = row_pass(g, update, last || has_plan());
    pass.above = above_;
    pass.keep = !last && has_plan();
    return pass;
  }
  Sinkhorn over_plan(bool last) const {
    Sinkhorn pass = any_pass();
    pass.pass = SinkhornPass::plan_update;
    pass.plan = c_.pass.matrix;
    if (!last) pass.matrix = nullptr;
    pass.weights = weights_, pass.row_sum = dots_;
    return pass;
  }

  // The matrix of the assignments can hold an iteration's exponentials e_ij = exp((S_ij + g_j - shift_i) / epsilon) where they have its
  // dtype. Those of a later iteration are e_ij w_j, with w_j = exp((g_j - g_j of e) / epsilon).
  bool has_plan() const { return !c_.init && c_.pass.scores.dtype == (sizeof(T) == 8 ? Dtype::float64 : Dtype::float32); }
  // S + g is rounded at the size of the rows' shifts. Where that is much larger than epsilon, the rounding differs from one iteration to the
  // next by more than the exponentials' own error, and each iteration must form its own, which its normalizers then fit.
  bool rows_are_near() const {
    bool near = true;
    for (int64_t i = 0; i < n_; i++) near &= std::fabs(double(shifts_[i])) <= 32 * c_.epsilon;
    return near;
  }
  double passes_inverse() const { return double(inverse_epsilon_); } // of epsilon, as the passes round it
  // Writes w, divided by its largest element, and returns epsilon times that one's logarithm. Exponentials below the smallest normal
  // number, 2^-126, are missing from e, whose rows sum to 2^-24 at least (ENOUGH in passes.h). So if w is within a factor of 2^24, what is
  // missing from a row of the later plan is below 2^-78 an entry. Otherwise NaN: that iteration reads the scores.
  double weigh(const double *g, const double *of_plan) {
    double most = -INFINITE, least = INFINITE;
    for (int64_t j = 0; j < k_; j++) {
      if (without_mass(j)) continue;
      const double difference = g[j] - of_plan[j];
      if (!std::isfinite(difference)) return NAN;
      most = std::max(most, difference), least = std::min(least, difference);
    }
    if (!(most - least <= 24 * std::log(2.) * c_.epsilon)) return NAN;
    const double inverse = passes_inverse();
    for (int64_t j = 0; j < k_; j++) weights_[j] = without_mass(j) ? T(0) : T(std::exp((g[j] - of_plan[j] - most) * inverse));
    return most;
  }

  void update_rows(int64_t update) {
    const T *const shift = row_shift(update), *const sum = shift + c_.row_step;
    for (int64_t i = 0; i < n_; i++) {
      shifts_[i] = shift[i];
      f_[i] = double(T(c_.epsilon) * log_mass_[i]) - (double(shift[i]) + c_.epsilon * std::log(double(sum[i])));
    }
  }
  // The same after a pass over the plan. The shift is the whole normalizer, rounded, and the sum what is left, so that the exponentials of
  // this update, which passes over the scores form again, have this sum.
  void update_rows(int64_t update, double most) {
    T *const shift = row_shift(update), *const sum = shift + c_.row_step;
    const double inverse = passes_inverse();
    for (int64_t i = 0; i < n_; i++) {
      const double log_dot = std::log(double(dots_[i])), offset = double(shifts_[i]) + most, whole = offset + c_.epsilon * log_dot;
      shift[i] = T(whole);
      const double left = log_dot + (offset - double(shift[i])) * inverse; // below 2^-17, as the rows are near
      sum[i] = T(1 + left + left * left / 2);
      f_[i] = double(T(c_.epsilon) * log_mass_[i]) - whole;
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
  const T inverse_epsilon_;
  const T *const log_prior_;
  int64_t plan_at_ = -1;                                                         // iteration whose plan is in the matrix; -1: none
  double *f_ = nullptr;                                                          // [N]
  T *above_ = nullptr, *dots_ = nullptr, *shifts_ = nullptr;                     // [N]; shifts: of the kept exponentials
  T *log_mass_ = nullptr, *mass_ = nullptr;                                      // [N]
  T *shift_ = nullptr, *sum_ = nullptr, *masses_ = nullptr, *weights_ = nullptr; // [K]
  char *passes_ = nullptr;                                                       // workspace of a pass
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
