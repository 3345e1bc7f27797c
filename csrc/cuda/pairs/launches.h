// The pair sums and their gradient on a CUDA device: the description, which csrc/bindings fills, and the call.
#pragma once
#include "cuda/contrastive/launches.h"

namespace fastcl::cuda {

struct PairSums {
  Contrast problem; // of one scale
  int map;          // softplus or hinge, by the number of `Map`
  float pos_margin, neg_margin;
  bool only_positives;
  // In the order of the sorted rows; null: there is none. marked_bias [m]: LEFT_OUT for contrasts that take no part.
  const float *offset, *marked_bias;
  const float *weights; // [2, side_stride(n)]: of positives and of negatives; null: no gradient
  bool symmetric;       // in self-contrast: s_ij = s_ji, so one sweep gives the gradient of both roles
  float *sums;          // [3, 2, n] in the caller's order: values, active pairs, pairs
  // Null where not needed. sums [n, width] float32: workspace; rows [n, d] float32: results.
  float *anchor_sums, *contrast_sums;
  void *anchor_rows, *contrast_rows;
  const float *anchor_norms, *contrast_norms; // of the caller's rows, in the caller's order; null: not normalised
  float *similarity_sums, *slope_sums;        // [n]: with `symmetric` twice an anchor's share
  float *bias;                                // [m]
};

void pair_sums(const PairSums &call, const Where &where);

} // namespace fastcl::cuda
