// Sinkhorn's passes on a GPU: descriptions, and what their kernels share. What the passes compute stands in
// fastcl/ops/sinkhorn/reference.py. All numbers but the scores are float; potentials come in two parts, of which the second
// is what the first rounded off.
//
// Exponentials are exp2((S + potential - shift) * scale) with scale = log2(e) / epsilon: the sum comes first, as its terms
// nearly cancel where it matters. Nothing is added up by two threads without an order: sums over rows leave as one partial
// sum for each chunk of rows, and are added in the order of chunks.
#pragma once
#include "problem.h"
#include "cuda/cuda.h"

namespace fastcl::cuda {

struct Matrix { // [B, N, K] at any strides, in elements; data null: none
  const void *data;
  Dtype dtype;
  int64_t per_batch, per_row, per_column;
};

// The first three have kernels for whole rows, and for longer ones a kernel for what rows reduce to and one for columns.
enum class SinkhornStep : int { normalize, products, gradient, column_products, column_sums, score_gradient };

struct SinkhornPassCall {
  SinkhornStep step;
  Matrix scores, gradient;
  int64_t batch, rows, columns; // B, N, K
  const float *inverse_epsilon; // [1]
  const float *high, *low;      // g [B, K]; f [B, N] of column_products and column_sums
  float *shift, *sum;           // [B, N]: written by normalize, else read; shift [B, K] of column_products
  const float *mass;            // [B, N]
  const float *weights;         // w [B, K]
  const float *less;            // [B, N]
  float *by_row;                // [B, N]
  float *partial;               // [B, chunks, K]; null: sums of columns are not wanted. Of column_sums [2, B, chunks, K]
  void *matrix;                 // [B, N, K] of the scores' dtype in one piece; null: not wanted
  int64_t chunk, chunks;        // rows of a chunk, and how many of them
  // Of score_gradient, stacked: row terms, then column terms.
  int64_t row_terms, column_terms;
  const float *term_high, *term_low, *term_w; // [terms, B, K]
  const float *term_shift, *term_p, *term_q;  // [terms, B, N]; p and q divided by their rows' sums
  const float *column_high, *column_low;      // [terms, B, N]
  const float *column_shift, *column_w;       // [terms, B, K]; w divided by the columns' sums
};

// All iterations in one launch.
struct SinkhornIterations {
  Matrix scores;
  int64_t batch, rows, columns;
  const float *inverse_epsilon, *epsilon;
  const float *mass;      // [B, N]
  const float *log_prior; // [B, K]
  int64_t iterations;
  float tolerance;     // negative: none
  float *kept_rows;    // [T, 2, B, N]: shift and sum of iteration t, or with a tolerance of the last one (T = 1)
  double *kept_g;      // [T, B, K]: g of each iteration, of which the first is given
  double *kept_masses; // [T, B, K]: the columns' masses after each, without a tolerance not after the last
  float *error;        // [B]: L1 error of the columns after the last; where there is a tolerance
  int64_t *done;       // [1]
  void *matrix;        // [B, N, K]: assignments
  float *partial;      // [B, chunks, K]
  float *error_parts;  // [B, ceil(K / 32)]
  double *g;           // [2, B, K]: with a tolerance
  int64_t chunk, chunks;
  bool resident; // the scores stay in shared memory; else each iteration reads them once
};

// How the rows of each batch are dealt out for SinkhornIterations: `chunks` blocks of `chunk` rows. chunks = 0: not at all.
struct SinkhornPlan {
  int64_t chunk, chunks;
  bool resident;
};

constexpr int SINKHORN_THREADS = 512, SINKHORN_WIDTH = 16;                     // of a block; columns that a thread holds of a row
constexpr int64_t SINKHORN_WHOLE = int64_t(SINKHORN_THREADS) * SINKHORN_WIDTH; // columns of the longest row held whole

SinkhornPlan sinkhorn_plan(int device, int64_t batch, int64_t rows, int64_t columns, int64_t bytes);
void sinkhorn_pass(const Where &where, const SinkhornPassCall &call);
void sinkhorn_iterations(const Where &where, const SinkhornIterations &call);

} // namespace fastcl::cuda
