// A mean loss, at one scale, and its gradient in one call, for batches so small that the way between calls is what takes the time.
#pragma once
#include "engine.h"

namespace fastcl {

// The mean over the rows that count of lse_i - sum_pos_i / num_pos_i; with `problem.columns` the mean of that over the
// anchors and that over the contrasts. A row counts if it has a positive and, with `negatives_only`, a negative.
struct MeanLoss {
  Problem problem;
  bool negatives_only;     // the log-sum-exp is that over the negatives, else over all
  void *loss;              // [1] real
  void *observed;          // [OBSERVED, N] reals; null: not asked for, as below
  void *contrast_observed; // [OBSERVED, M]
  void *anchor_gradient;   // [N, D] reals; null: not needed, as below
  void *contrast_gradient; // [M, D]
  void *scale_gradient;    // [1] double
  void *bias_gradient;     // [M]
};

// With a null workspace it only returns its size in bytes.
int64_t mean_loss(const Engine &engine, const MeanLoss &call, const Arranged &arranged, void *workspace);

} // namespace fastcl
