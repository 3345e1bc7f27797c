// Sinkhorn's passes over the scores as plain structs: sizes, strides, addresses. fastcl/ops/sinkhorn/reference.py defines what they
// compute. Arrays of "reals" are double if `wide_reals`, else float; potentials are double.
#pragma once
#include "problem.h"

namespace fastcl {

// The last three take no exponentials: they read e_ij from a matrix, where a row_pass with `keep` or an assignment_gradient wrote them. The
// latter then also writes row_sum.
enum class SinkhornPass : int {
  column_sums,
  row_pass,
  products,
  column_products,
  assignment_gradient,
  score_gradient,
  plan_update,   // s_i = sum_j e_ij w_j, to row_sum; by_column_j = sum_i mass_i / s_i e_ij; matrix_ij = e_ij w_j / s_i
  plan_products, // v and w' of column_factors: s_i = sum_j e_ij v_j, to row_sum; by_row_i = y_i = sum_j e_ij w'_j / s_i;
                 // by_column_j = sum_i mass_i y_i / s_i e_ij
  plan_gradient  // matrix_ij = G_ij / epsilon, G_ij = e_ij ((gradient_ij - less_i) / row_sum_i - sum_m u_mi v_mj (p_mi + q_mi w_mj));
                 // by_row_i = sum_j G_ij S_ij, if it is asked for
};

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
  bool keep;                       // row_pass writes e_ij = exp((S_ij + g_j - row_shift_i) / epsilon) into the matrix, whose dtype is the reals'
  const void *plan;                // e [N, K] in reals, contiguous, may be the matrix; null for passes over the scores
  const void *row_factors;         // u, p and q of each term, [3 / 2 factor_count][N]
  const void *column_factors;      // v and w of each term, [factor_count][K]
  int64_t factor_count;
  const SinkhornTerm *terms;
  int64_t term_count;
};

} // namespace fastcl
