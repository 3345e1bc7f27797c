// A mean loss at one scale, and its gradient: in one call for small batches, for which the overhead of calls dominates; or in two
// calls.
#pragma once
#include "cpu/engine.h"
#include "own_rows.h"

namespace fastcl {

// The mean of lse_i - sum_pos_i / num_pos_i over the rows that count. With `problem.columns`, the average of this mean over the
// anchors and of that over the contrasts. A row counts if it has a positive and, with `negatives_only`, a negative.
struct MeanLoss {
  Problem problem;
  bool negatives_only;       // use the log-sum-exp over the negatives, else over all
  void *kept;                // [MEAN_KEPT, N] reals, with `problem.columns` then [MEAN_KEPT, M]: from the first call to the second; null: one call
  OwnRows positives;         // one of each anchor: two sets without clusters, one direction, in one call: the loss of a row is log(1 + neg / pos)
  OwnRows negatives;         // hard negatives, in one call without observed statistics; not with positives
  bool weighs;               // with `positives`: weigh the contrasts in the forward, if only the anchors need a gradient
  WeightedSums weighted;     // for two calls
  void *loss;                // [1] real; null: the second call, which reads `kept`
  const void *loss_gradient; // [1] real that multiplies the gradients; null: 1
  void *observed;            // [OBSERVED, N] reals; null: not wanted, also below
  void *contrast_observed;   // [OBSERVED, M]
  void *anchor_gradient;     // [N, D] reals; null: not needed, also below
  void *contrast_gradient;   // [M, D]
  void *scale_gradient;      // [1] double
  void *bias_gradient;       // [M]
};
constexpr int MEAN_KEPT = 9;

// Returns the workspace's size in bytes; with a null workspace does nothing else.
int64_t mean_loss(const Engine &engine, const MeanLoss &call, const Arranged &arranged, void *workspace);

} // namespace fastcl
