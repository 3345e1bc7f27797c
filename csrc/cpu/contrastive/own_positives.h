// One more positive for each anchor, its own (MoCo's key), in a mean loss whose swept contrasts are all negatives. own_contrasts.py in
// fastcl/ops/contrastive has the general case. These are O(N D) operations, in double and without an instruction set of their own.
#pragma once
#include "problem.h"
#include <algorithm>
#include <cmath>

namespace fastcl {

struct OwnPositives {
  Rows rows;      // [N, D] of the problem's reals, as the anchors: whole rows. data null: none
  void *gradient; // [N, D] reals; null: not needed
};

struct OwnPair {
  double own, other;         // 1 / norms of anchor and positive; 1 if they are not normalised
  double similarity;         // without the scale
  double along, other_along; // what the normalisation takes off the gradients: the similarity; 0 for norms below the floor
  double weight;             // minus the derivative of the mean in the logit
};

// Real: of the problem, and of its anchors.
template <class Real> class OwnPositivesPass {
public:
  OwnPositivesPass(const Problem &p, const OwnPositives &own, const Statistics &anchors, OwnPair *pairs)
      : own_(own), s_(anchors), n_(p.anchors.size), d_(p.dimension), normalize_(p.normalize_anchors), anchors_(p.anchors), pairs_(pairs),
        scale_(*static_cast<const Real *>(p.logit_scale)) {}

  // The mean of log(1 + neg / pos). Replaces the negatives' log-sum-exp by the derivative of the mean in it.
  double mean() const {
    Real *const field = static_cast<Real *>(s_.fields[LSE_NEG]);
    const Real *const shift = static_cast<const Real *>(s_.shifts[LSE_NEG]), *const sum = static_cast<const Real *>(s_.sums[LSE_NEG]);
    double total = 0;
    for (int64_t i = 0; i < n_; i++) {
      OwnPair &row = pairs_[i] = compared(i);
      const double logit = scale_ * row.similarity;
      const double log_ratio = double(shift[i]) - logit + std::log(double(sum[i])), e = std::exp(-std::fabs(log_ratio));
      total += (log_ratio > 0 ? log_ratio : 0) + std::log1p(e) + logit * 0; // an infinite logit gives NaN
      row.weight = (log_ratio > 0 ? 1 : e) / (1 + e) / double(n_);
      field[i] = Real(row.weight);
    }
    return total / double(n_);
  }

  // Adds to the sweep's gradients, null where they are not needed, and writes the positives'.
  void add_gradients(void *anchor_gradient, double *scale_gradient) const {
    for (int64_t i = 0; i < n_; i++) {
      const OwnPair &row = pairs_[i];
      const double factor = -row.weight * scale_;
      const Real *const x = at(anchors_, i), *const y = at(own_.rows, i);
      if (scale_gradient) *scale_gradient -= row.weight * row.similarity;
      if (anchor_gradient) {
        Real *const to = static_cast<Real *>(anchor_gradient) + i * d_;
        for (int64_t d = 0; d < d_; d++) to[d] = Real(to[d] + factor * row.own * (y[d] * row.other - row.along * (x[d] * row.own)));
      }
      if (own_.gradient) {
        Real *const to = static_cast<Real *>(own_.gradient) + i * d_;
        for (int64_t d = 0; d < d_; d++) to[d] = Real(factor * row.other * (x[d] * row.own - row.other_along * (y[d] * row.other)));
      }
    }
  }

private:
  static constexpr double FLOOR = 1e-12, SMALL = 1e-100, LARGE = 1e100; // of a norm; whose squares and products are numbers

  const Real *at(const Rows &rows, int64_t i) const { return static_cast<const Real *>(rows.data) + i * rows.row_stride; }

  OwnPair compared(int64_t i) const {
    const Real *const x = at(anchors_, i), *const y = at(own_.rows, i);
    if (!normalize_) return {1, 1, product(x, y), 0, 0, 0};
    const double of_x = norm(x), of_y = norm(y);
    OwnPair row{inverse(of_x), inverse(of_y), 0, 0, 0, 0};
    if (usual(of_x) && usual(of_y)) row.similarity = product(x, y) * row.own * row.other;
    else
      for (int64_t d = 0; d < d_; d++) row.similarity += x[d] * row.own * (y[d] * row.other);
    row.along = of_x <= FLOOR ? 0 : row.similarity, row.other_along = of_y <= FLOOR ? 0 : row.similarity;
    return row;
  }
  static bool usual(double norm) { return norm > SMALL && norm < LARGE; }
  static double inverse(double norm) { return norm == 0 ? 0 : 1 / (norm < FLOOR ? FLOOR : norm); }
  double norm(const Real *x) const {
    const double plain = std::sqrt(product(x, x));
    if (usual(plain)) return plain;
    double most = 0, sum = 0;
    for (int64_t d = 0; d < d_; d++) most = std::max(most, std::fabs(double(x[d])));
    if (!(most > 0)) return plain; // zeros, or NaN
    for (int64_t d = 0; d < d_; d++) sum += (x[d] / most) * (x[d] / most);
    return most * std::sqrt(sum);
  }
  double product(const Real *x, const Real *y) const {
    constexpr int64_t LANES = 8;
    double sums[LANES] = {}, sum = 0;
    int64_t d = 0;
    for (; d + LANES <= d_; d += LANES)
      for (int64_t l = 0; l < LANES; l++) sums[l] += double(x[d + l]) * double(y[d + l]);
    for (; d < d_; d++) sum += double(x[d]) * double(y[d]);
    for (const double lane : sums) sum += lane;
    return sum;
  }

  const OwnPositives own_;
  const Statistics &s_;
  const int64_t n_, d_;
  const bool normalize_;
  const Rows anchors_;
  OwnPair *const pairs_;
  const double scale_;
};

} // namespace fastcl
