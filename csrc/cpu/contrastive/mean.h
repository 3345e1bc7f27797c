// A mean loss, at one scale, and its gradient: in one call, for batches so small that the way between calls is what takes the
// time; or in two.
#pragma once
#include "cpu/engine.h"

namespace fastcl {

// The mean over the rows that count of lse_i - sum_pos_i / num_pos_i; with `problem.columns` the mean of that over the
// anchors and that over the contrasts. A row counts if it has a positive and, with `negatives_only`, a negative.
struct MeanLoss {
  Problem problem;
  bool negatives_only;       // the log-sum-exp is that over the negatives, else over all
  void *kept;                // [MEAN_KEPT, N] reals, with `problem.columns` [MEAN_KEPT, M] behind them: from call to call; null: one call
  WeightedSums weighted;     // of two calls
  void *loss;                // [1] real; null: an earlier call's, which has left `kept`
  const void *loss_gradient; // [1] real, which gradients are multiplied by; null: 1
  void *observed;            // [OBSERVED, N] reals; null: not asked for, as below
  void *contrast_observed;   // [OBSERVED, M]
  void *anchor_gradient;     // [N, D] reals; null: not needed, as below
  void *contrast_gradient;   // [M, D]
  void *scale_gradient;      // [1] double
  void *bias_gradient;       // [M]
};
constexpr int MEAN_KEPT = 9;

// With a null workspace it only returns its size in bytes.
int64_t mean_loss(const Engine &engine, const MeanLoss &call, const Arranged &arranged, void *workspace);

} // namespace fastcl
