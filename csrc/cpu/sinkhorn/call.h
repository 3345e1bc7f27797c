// Sinkhorn's passes over the scores as plain structs: sizes, strides, addresses. fastcl/ops/sinkhorn/reference.py defines what they
// compute. Arrays of "reals" are double if `wide_reals`, else float; potentials are double.
#pragma once
#include "problem.h"

namespace fastcl {

enum class SinkhornPass : int { column_sums, row_pass, products, column_products, assignment_gradient, score_gradient };

// A term that is subtracted from the gradient of the scores, in units of 1 / epsilon. It is already divided by its sums.
struct SinkhornTerm {
  const double *potential; // g [K] of a row term, f [N] of a column term
  const void *shift;       // [N] of a row term, [K] of a column term
  const void *p, *q;       // [N]; null: a column term
  const void *w;           // [K]
};

struct Sinkhorn {
  SinkhornPass pass;
  Rows scores;                 // [N, K]
  int64_t columns;             // K
  const void *inverse_epsilon; // one real
  bool wide_reals;
  int threads;
  const double *potential;         // g [K]; f [N] for column_sums and column_products
  void *row_shift, *row_sum;       // [N]: written by row_pass, else read
  void *column_shift, *column_sum; // [K]: written by column_sums, read by column_products
  const void *above;               // [N]: upper bound of the row's largest S + g; null: unknown
  const void *mass;                // [N]; null: row_pass computes no column masses
  const void *weights;             // w [K]
  const void *less;                // [N]
  void *by_row, *by_column;        // [N], [K]: results of the pass
  Rows gradient;                   // [N, K]: gradient of the assignments; data null: none
  void *matrix;                    // [N, K] in the scores' dtype, contiguous: assignments or the scores' gradient
  const SinkhornTerm *terms;
  int64_t term_count;
};

} // namespace fastcl
