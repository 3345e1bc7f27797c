// Sinkhorn's passes on a GPU: their descriptions and launches. fastcl/ops/sinkhorn/reference.py defines what the passes compute. All
// numbers but the scores are float. Potentials have two parts; the second is the rounding error of the first.
//
// Exponentials are exp2((S + potential - shift) * scale) with scale = log2(e) / epsilon. The sum is formed before the product because
// its terms nearly cancel where the plan has mass. Additions have a fixed order: each chunk of rows writes a partial sum over its
// rows, and the partial sums are added in the order of chunks.
#pragma once
#include "problem.h"
#include "cuda/cuda.h"

namespace fastcl::cuda {

struct Matrix { // [B, N, K] with any strides, in elements; data null: none
  const void *data;
  Dtype dtype;
  int64_t per_batch, per_row, per_column;
};

// The first three have a kernel for whole rows, and for longer rows one kernel for sums over rows and one for column sums.
enum class SinkhornStep : int { normalize, products, gradient, column_products, column_sums, score_gradient };

struct SinkhornPassCall {
  SinkhornStep step;
  Matrix scores, gradient;
  int64_t batch, rows, columns; // B, N, K
  const float *inverse_epsilon; // [1]
  const float *high, *low;      // g [B, K]; f [B, N] for column_products and column_sums
  float *shift, *sum;           // [B, N]: written by normalize, else read; for column_products shift [B, K]
  const float *mass;            // [B, N]
  const float *weights;         // w [B, K]
  const float *less;            // [B, N]
  float *by_row;                // [B, N]
  float *partial;               // [B, chunks, K]; null: column sums are not wanted. For column_sums [2, B, chunks, K]
  void *matrix;                 // [B, N, K] in the scores' dtype, contiguous; null: not wanted
  int64_t chunk, chunks;        // rows per chunk, number of chunks
  // For score_gradient, stacked: row terms, then column terms.
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
  float *kept_rows;    // [T, 2, B, N]: shift and sum of each iteration; with a tolerance of the last one (T = 1)
  double *kept_g;      // [T, B, K]: g of each iteration; the first is an input
  double *kept_masses; // [T, B, K]: column masses after each iteration; without a tolerance, not after the last
  float *error;        // [B]: L1 error of the column masses after the last iteration; only with a tolerance
  int64_t *done;       // [1]
  void *matrix;        // [B, N, K]: assignments
  float *partial;      // [B, chunks, K]
  float *error_parts;  // [B, ceil(K / 32)]
  double *g;           // [2, B, K]: only with a tolerance
  int64_t chunk, chunks;
  bool resident; // the scores stay in shared memory; else each iteration reads them once
};

// The division of each problem's rows for SinkhornIterations: `chunks` blocks of `chunk` rows. chunks = 0: not supported.
struct SinkhornPlan {
  int64_t chunk, chunks;
  bool resident;
};

constexpr int SINKHORN_THREADS = 512, SINKHORN_WIDTH = 16;                     // threads of a block; columns of a row that a thread holds
constexpr int64_t SINKHORN_WHOLE = int64_t(SINKHORN_THREADS) * SINKHORN_WIDTH; // most columns of a row that is held whole

SinkhornPlan sinkhorn_plan(int device, int64_t batch, int64_t rows, int64_t columns, int64_t bytes);
void sinkhorn_pass(const Where &where, const SinkhornPassCall &call);
void sinkhorn_iterations(const Where &where, const SinkhornIterations &call);

} // namespace fastcl::cuda
