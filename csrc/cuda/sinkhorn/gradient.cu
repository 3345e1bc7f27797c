// The gradient of the scores: R (gradient - less) minus terms, each with its own softmax. A warp owns a few rows.
#include "passes.h"
#include "rows.h"

namespace fastcl::cuda {
namespace {

constexpr int THREADS = 256, ROWS = 4, STRIP = 4;

__global__ void __launch_bounds__(THREADS) score_gradient_kernel(const SinkhornPassCall call) {
  const int64_t n = call.rows, k = call.columns, per_batch = blocks_of(n, ROWS);
  const int64_t task = int64_t(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP;
  if (task >= call.batch * per_batch) return; // holds for a whole warp
  const int64_t b = task / per_batch, i = task % per_batch * ROWS;
  const float inverse_epsilon = *call.inverse_epsilon, scale = inverse_epsilon * LOG2E;
  float moment[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) moment[r] = 0;
  for (int64_t start = 0; start < k; start += WARP * STRIP) {
    const int first = int(start) + lane(), mine = columns_of_lane(int(k), first, WARP);
    float score[ROWS][STRIP], total[ROWS][STRIP];
    load(call.scores, b, i, n, first, WARP, mine, score);
    if (call.gradient.data) {
      load(call.gradient, b, i, n, first, WARP, mine, total);
    } else {
#pragma unroll
      for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int c = 0; c < STRIP; c++) total[r][c] = 0;
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if (i + r >= n) continue;
      const int64_t at = b * n + i + r;
      const float shift = call.shift[at], each = 1 / call.sum[at], less = call.less[at];
#pragma unroll
      for (int c = 0; c < STRIP; c++) {
        const int64_t j = first + c * WARP;
        if (j >= k) continue;
        const float t = score[r][c] + call.high[b * k + j] + call.low[b * k + j];
        total[r][c] = exp2_fast((t - shift) * scale) * each * (total[r][c] - less);
      }
    }
    for (int64_t term = 0; term < call.row_terms; term++) {
      const int64_t columns = (term * call.batch + b) * k, rows = (term * call.batch + b) * n + i;
      float high[STRIP], low[STRIP], w[STRIP];
#pragma unroll
      for (int c = 0; c < STRIP; c++) {
        const int64_t j = first + c * WARP;
        high[c] = j < k ? call.term_high[columns + j] : -INFINITY;
        low[c] = j < k ? call.term_low[columns + j] : 0;
        w[c] = j < k ? call.term_w[columns + j] : 0;
      }
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        if (i + r >= n) continue;
        const float shift = call.term_shift[rows + r], p = call.term_p[rows + r], q = call.term_q[rows + r];
#pragma unroll
        for (int c = 0; c < STRIP; c++) total[r][c] -= exp2_fast((score[r][c] + high[c] + low[c] - shift) * scale) * (p + q * w[c]);
      }
    }
    for (int64_t term = 0; term < call.column_terms; term++) {
      const int64_t columns = (term * call.batch + b) * k, rows = (term * call.batch + b) * n + i;
      float shift[STRIP], w[STRIP];
#pragma unroll
      for (int c = 0; c < STRIP; c++) {
        const int64_t j = first + c * WARP;
        shift[c] = j < k ? call.column_shift[columns + j] : INFINITY;
        w[c] = j < k ? call.column_w[columns + j] : 0;
      }
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        if (i + r >= n) continue;
        const float high = call.column_high[rows + r], low = call.column_low[rows + r];
#pragma unroll
        for (int c = 0; c < STRIP; c++) total[r][c] -= exp2_fast((score[r][c] + high + low - shift[c]) * scale) * w[c];
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
      for (int c = 0; c < STRIP; c++) {
        const int64_t j = first + c * WARP;
        if (i + r >= n || j >= k) continue;
        if (total[r][c] != 0) moment[r] += total[r][c] * score[r][c]; // a score of -inf has weight 0
        store(call.matrix, call.scores.dtype, (b * n + i + r) * k + j, total[r][c] * inverse_epsilon);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    moment[r] = warp_sum(moment[r]);
    if (lane() == 0 && i + r < n) call.by_row[b * n + i + r] = moment[r];
  }
}

} // namespace

void sinkhorn_score_gradient(const Where &where, const SinkhornPassCall &call) {
  const Launch shape{blocks_of(call.batch * blocks_of(call.rows, ROWS), THREADS / WARP), THREADS};
  launch("sinkhorn score gradient", score_gradient_kernel, shape, where, call);
}

// Launches the kernels of a pass.
void sinkhorn_pass(const Where &where, const SinkhornPassCall &call) {
  require_current(where.device);
  const bool sums = call.partial != nullptr, columns = sums || call.matrix;
  switch (call.step) {
  case SinkhornStep::score_gradient: return sinkhorn_score_gradient(where, call);
  case SinkhornStep::column_products: return sinkhorn_long_rows(where, call);
  case SinkhornStep::column_sums: return sinkhorn_columns(where, call);
  default:
    if (call.columns <= SINKHORN_WHOLE) return sinkhorn_whole_rows(where, call);
    // Without a gradient the sums over rows are zero, and the caller has written them.
    if (call.step != SinkhornStep::gradient || call.gradient.data) sinkhorn_long_rows(where, call);
    if (columns) sinkhorn_columns(where, call);
  }
}

} // namespace fastcl::cuda
