// Contrasts of one anchor alone in a mean loss: its own positive (MoCo's key), where all swept contrasts are negatives; or its own hard
// negatives. own_contrasts.py in fastcl/ops/contrastive has the general case. These are O(N H D) operations, in double and without an
// instruction set of their own.
#pragma once
#include "problem.h"
#include <algorithm>
#include <cmath>
#include <limits>

namespace fastcl {

struct OwnRows {
  Rows rows;      // [N * H, D] of the problem's reals, as the anchors: whole rows, H to an anchor. data null: none
  void *gradient; // [N * H, D] reals; null: not needed
};

struct OwnPair {
  double own, other;         // 1 / norms of anchor and contrast; 1 if they are not normalised
  double similarity;         // without the scale
  double along, other_along; // what the normalisation takes off the gradients: the similarity; 0 for norms below the floor
  double slope;              // the derivative of the mean in the logit
};

// Real: of the problem, and of its anchors.
template <class Real> class OwnRowsPass {
public:
  OwnRowsPass(const Problem &p, const OwnRows &own, const Statistics &anchors, OwnPair *pairs)
      : own_(own), s_(anchors), n_(p.anchors.size), each_(own.rows.size / p.anchors.size), d_(p.dimension), normalize_(p.normalize_anchors),
        anchors_(p.anchors), pairs_(pairs), scale_(*static_cast<const Real *>(p.logit_scale)) {}

  // For one positive of each anchor: the mean of log(1 + neg / pos). Replaces the negatives' log-sum-exp by the derivative of the mean
  // in it.
  double mean_of_positives() const {
    Real *const field = static_cast<Real *>(s_.fields[LSE_NEG]);
    const Real *const shift = static_cast<const Real *>(s_.shifts[LSE_NEG]), *const sum = static_cast<const Real *>(s_.sums[LSE_NEG]);
    double total = 0;
    for (int64_t i = 0; i < n_; i++) {
      OwnPair &pair = pairs_[i] = compared(i, i);
      const double logit = scale_ * pair.similarity;
      const double log_ratio = double(shift[i]) - logit + std::log(double(sum[i])), e = std::exp(-std::fabs(log_ratio));
      total += (log_ratio > 0 ? log_ratio : 0) + std::log1p(e) + logit * 0; // an infinite logit gives NaN
      const double weight = (log_ratio > 0 ? 1 : e) / (1 + e) / double(n_);
      pair.slope = -weight;
      field[i] = Real(weight);
    }
    return total / double(n_);
  }

  // Adds hard negatives to the statistics of their anchors.
  void join_negatives(Field log_sum) const {
    Real *const field = static_cast<Real *>(s_.fields[log_sum]), *const shifts = static_cast<Real *>(s_.shifts[log_sum]);
    Real *const sums = static_cast<Real *>(s_.sums[log_sum]), *const negatives = static_cast<Real *>(s_.negatives);
    Real *const ratios = static_cast<Real *>(s_.negative_ratio);
    for (int64_t i = 0; i < n_; i++) {
      double most = sums[i] == 0 ? -std::numeric_limits<double>::infinity() : double(shifts[i]); // the shift of an empty sum is undefined
      for (int64_t k = i * each_; k < (i + 1) * each_; k++) {
        pairs_[k] = compared(i, k);
        most = std::max(most, logit(pairs_[k]));
      }
      const Real shift = Real(most);
      double more = 0;
      for (int64_t k = i * each_; k < (i + 1) * each_; k++) {
        const double t = logit(pairs_[k]);
        more += std::exp(t - double(shift)) + t * 0; // an infinite logit gives NaN
      }
      const double before = sums[i] == 0 ? 0 : double(sums[i]) * std::exp(double(shifts[i]) - double(shift));
      if (log_sum == LSE_ALL && std::isfinite(ratios[i])) ratios[i] = Real(ratios[i] + more * (1 + double(ratios[i])) / before);
      shifts[i] = shift;
      sums[i] = Real(before + more);
      field[i] = Real(double(shift) + std::log(before + more));
      negatives[i] += Real(each_);
    }
  }
  // Their derivatives, from that of the mean in the log-sum-exp.
  void weigh_negatives(Field log_sum) const {
    const Real *const field = static_cast<const Real *>(s_.fields[log_sum]), *const shifts = static_cast<const Real *>(s_.shifts[log_sum]);
    const Real *const sums = static_cast<const Real *>(s_.sums[log_sum]);
    for (int64_t i = 0; i < n_; i++)
      for (int64_t k = i * each_; k < (i + 1) * each_; k++)
        pairs_[k].slope = field[i] == 0 ? 0 : double(field[i]) / double(sums[i]) * std::exp(logit(pairs_[k]) - double(shifts[i]));
  }

  // Adds to the sweep's gradients, null where they are not needed, and writes those of the own rows.
  void add_gradients(void *anchor_gradient, double *scale_gradient) const {
    for (int64_t k = 0; k < n_ * each_; k++) {
      const OwnPair &pair = pairs_[k];
      const int64_t i = k / each_;
      const double factor = pair.slope * scale_;
      const Real *const x = at(anchors_, i), *const y = at(own_.rows, k);
      if (scale_gradient) *scale_gradient += pair.slope * pair.similarity;
      if (anchor_gradient) {
        Real *const to = static_cast<Real *>(anchor_gradient) + i * d_;
        for (int64_t d = 0; d < d_; d++) to[d] = Real(to[d] + factor * pair.own * (y[d] * pair.other - pair.along * (x[d] * pair.own)));
      }
      if (own_.gradient) {
        Real *const to = static_cast<Real *>(own_.gradient) + k * d_;
        for (int64_t d = 0; d < d_; d++) to[d] = Real(factor * pair.other * (x[d] * pair.own - pair.other_along * (y[d] * pair.other)));
      }
    }
  }

private:
  static constexpr double FLOOR = 1e-12, SMALL = 1e-100, LARGE = 1e100; // of a norm; whose squares and products are numbers

  // Rounded as the shifts are: else the difference from a large shift would be that of their roundings.
  double logit(const OwnPair &pair) const { return double(Real(scale_ * pair.similarity)); }
  const Real *at(const Rows &rows, int64_t i) const { return static_cast<const Real *>(rows.data) + i * rows.row_stride; }

  OwnPair compared(int64_t i, int64_t k) const {
    const Real *const x = at(anchors_, i), *const y = at(own_.rows, k);
    if (!normalize_) return {1, 1, product(x, y), 0, 0, 0};
    const double of_x = norm(x), of_y = norm(y);
    OwnPair pair{inverse(of_x), inverse(of_y), 0, 0, 0, 0};
    if (usual(of_x) && usual(of_y)) pair.similarity = product(x, y) * pair.own * pair.other;
    else
      for (int64_t d = 0; d < d_; d++) pair.similarity += x[d] * pair.own * (y[d] * pair.other);
    pair.along = of_x <= FLOOR ? 0 : pair.similarity, pair.other_along = of_y <= FLOOR ? 0 : pair.similarity;
    return pair;
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

  const OwnRows own_;
  const Statistics &s_;
  const int64_t n_, each_, d_;
  const bool normalize_;
  const Rows anchors_;
  OwnPair *const pairs_;
  const double scale_;
};

} // namespace fastcl
