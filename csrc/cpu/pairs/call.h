// Sums over pairs of a function of the logit or distance, as plain structs: sizes, strides, addresses.
#pragma once
#include "problem.h"

namespace fastcl {

// As in fastcl/ops/pair_maps.py, which has the formulas.
enum class PairMap : int { softplus, hinge, distance, squared };

// For each anchor the sums over its positives and over its negatives, and the gradient of a weighted total of them.
struct Pairs {
  Problem problem; // with one scale; distances have scale 1 and no bias but -inf
  PairMap map;
  double margins[2];   // of positives and negatives
  bool only_positives; // leaves out the negatives
  const void *offset;  // [N] or [1] reals, added to the logits of each anchor; null: none
  bool offset_of_rows; // [N]; two sets only
  const void *weights; // [2, N] reals, of the sums in the total; null: no gradients

  void *values, *active, *counts; // [2, N] reals: sums of the map, numbers of pairs whose value is not 0, numbers of pairs
  void *anchor_gradient;          // [N, D] reals; null: not needed, as below
  void *contrast_gradient;        // [M, D]
  void *scale_gradient;           // [1] double
  void *offset_gradient;          // [N] or [1] doubles
  void *bias_gradient;            // [M] reals
};

} // namespace fastcl
