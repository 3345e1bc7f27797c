// Statistics over soft assignments as plain structs: sizes, strides, addresses.
#pragma once
#include "problem.h"

namespace fastcl {

// Arrays of one side, [N] reals each. The forward writes all but the gradients; the backward reads base and total.
struct SoftSide {
  void *lse, *sum, *weight; // log-sum-exp of the logits, sum of w_ij s_ij, sum of w_ij
  void *size;               // number of admissible pairs
  void *base, *total;       // the largest logit to base 2, and the sum of 2^(t - base)
  void *inverse_norms;      // if rows are normalised
  const void *lse_gradient, *sum_gradient;
};

// The pair i, j has weight w_ij = <r_i, q_j>; equal clusters would give weights of 0 and 1.
struct Soft {
  Problem problem;                               // with one scale, without clusters
  Rows anchor_assignments, contrast_assignments; // [N, C], [M, C]; data of the second null for self-contrast
  int64_t assignment_columns;                    // C
  SoftSide anchors, contrasts;                   // contrasts only with problem.columns
  KeptProducts weights;                          // of all pairs, from the forward to the backward; null: both compute them
  bool backward;                                 // compute the gradients below; null: not needed
  void *anchor_gradient, *contrast_gradient;     // [N, D], [M, D]
  void *scale_gradient, *bias_gradient;          // [1] double, [M]
};

} // namespace fastcl
