// Passes over rows that are too long to be held whole: they read the scores once for the sums over rows, and again for the columns.
#include "passes.h"
#include "rows.h"

namespace fastcl::cuda {
namespace {

constexpr int THREADS = 256, STRIP = 8; // columns that a lane holds

// A warp owns a few rows.
template <SinkhornStep STEP> __global__ void __launch_bounds__(THREADS) long_rows_kernel(const SinkhornPassCall call) {
  const int64_t n = call.rows, k = call.columns;
  const int64_t per_batch = blocks_of(n, ROWS_AT_ONCE), task = int64_t(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP;
  if (task >= call.batch * per_batch) return; // holds for a whole warp
  const int64_t b = task / per_batch, i = task % per_batch * ROWS_AT_ONCE;
  const float scale = *call.inverse_epsilon * LOG2E;
  constexpr bool COLUMNS = STEP == SinkhornStep::column_products; // the softmax over the rows of a column, with the rows' potential
  float most[ROWS_AT_ONCE], total[ROWS_AT_ONCE], high[ROWS_AT_ONCE], low[ROWS_AT_ONCE];
#pragma unroll
  for (int r = 0; r < ROWS_AT_ONCE; r++) {
    const bool inside = i + r < n;
    most[r] = STEP == SinkhornStep::normalize ? NOTHING : COLUMNS || !inside ? INFINITY : call.shift[b * n + i + r];
    high[r] = COLUMNS && inside ? call.high[b * n + i + r] : -INFINITY;
    low[r] = COLUMNS && inside ? call.low[b * n + i + r] : 0;
    total[r] = 0;
  }
  for (int64_t start = 0; start < k; start += WARP * STRIP) {
    const int first = int(start) + lane(), mine = columns_of_lane(int(k), first, WARP);
    float t[ROWS_AT_ONCE][STRIP], other[STRIP];
    load(call.scores, b, i, n, first, WARP, mine, t);
#pragma unroll
    for (int c = 0; c < STRIP; c++) {
      const int64_t j = first + c * WARP;
      other[c] = COLUMNS ? INFINITY : 0; // the column's shift
      if (COLUMNS) {
        if (j < k) other[c] = call.shift[b * k + j];
      } else {
        const float g = j < k ? call.high[b * k + j] : -INFINITY, rest = j < k ? call.low[b * k + j] : 0;
#pragma unroll
        for (int r = 0; r < ROWS_AT_ONCE; r++) t[r][c] = t[r][c] + g + rest;
      }
    }
    if (STEP == SinkhornStep::normalize) {
#pragma unroll
      for (int r = 0; r < ROWS_AT_ONCE; r++) {
        float largest = most[r];
#pragma unroll
        for (int c = 0; c < STRIP; c++) largest = fmaxf(largest, t[r][c]);
        total[r] *= exp2_fast((most[r] - largest) * scale);
        most[r] = largest;
#pragma unroll
        for (int c = 0; c < STRIP; c++) total[r] += exp2_fast((t[r][c] - largest) * scale);
      }
      continue;
    }
    float given[ROWS_AT_ONCE][STRIP];
    if (STEP == SinkhornStep::gradient) load(call.gradient, b, i, n, first, WARP, mine, given);
#pragma unroll
    for (int c = 0; c < STRIP; c++) {
      const int64_t j = first + c * WARP;
      const float w = STEP != SinkhornStep::gradient && j < k ? call.weights[b * k + j] : 0;
#pragma unroll
      for (int r = 0; r < ROWS_AT_ONCE; r++) {
        const float difference = COLUMNS ? t[r][c] + high[r] + low[r] - other[c] : t[r][c] - most[r];
        total[r] += exp2_fast(difference * scale) * (STEP == SinkhornStep::gradient ? given[r][c] : w);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS_AT_ONCE; r++) {
    if (STEP == SinkhornStep::normalize) {
      const float largest = warp_max(most[r]);
      total[r] *= exp2_fast((most[r] - largest) * scale);
      most[r] = largest;
    }
    total[r] = warp_sum(total[r]);
    if (lane() || i + r >= n) continue;
    const int64_t at = b * n + i + r;
    if (STEP == SinkhornStep::normalize) call.shift[at] = most[r], call.sum[at] = total[r];
    else call.by_row[at] = COLUMNS ? total[r] : total[r] / call.sum[at];
  }
}

constexpr int ROW_LANES = THREADS / WARP, STEP_ROWS = 4; // threads that share a column; rows that a thread holds

// A block owns 32 columns of a chunk of rows.
template <SinkhornStep STEP> __global__ void __launch_bounds__(THREADS) long_columns_kernel(const SinkhornPassCall call) {
  const int64_t n = call.rows, k = call.columns, tiles = blocks_of(k, WARP);
  const int64_t tile = blockIdx.x % tiles, chunk = blockIdx.x / tiles % call.chunks, b = blockIdx.x / tiles / call.chunks;
  const int64_t j = tile * WARP + lane(), own = threadIdx.x / WARP;
  const int64_t first = chunk * call.chunk, last = first + call.chunk < n ? first + call.chunk : n;
  const float scale = *call.inverse_epsilon * LOG2E;
  constexpr bool SUMS = STEP == SinkhornStep::column_sums;
  const float g = !SUMS && j < k ? call.high[b * k + j] : -INFINITY, rest = !SUMS && j < k ? call.low[b * k + j] : 0;
  float most = NOTHING, total = 0;
  for (int64_t i = first + own * STEP_ROWS; i < last; i += ROW_LANES * STEP_ROWS) {
    float t[STEP_ROWS][1], given[STEP_ROWS][1];
    load(call.scores, b, i, last, int(j), WARP, j < k, t);
    if (STEP == SinkhornStep::gradient && call.gradient.data) load(call.gradient, b, i, last, int(j), WARP, j < k, given);
    if (SUMS) {
      float largest = most;
#pragma unroll
      for (int r = 0; r < STEP_ROWS; r++) {
        const bool inside = i + r < last && j < k;
        t[r][0] = inside ? t[r][0] + call.high[b * n + i + r] + call.low[b * n + i + r] : -INFINITY;
        largest = fmaxf(largest, t[r][0]);
      }
      total *= exp2_fast((most - largest) * scale);
      most = largest;
#pragma unroll
      for (int r = 0; r < STEP_ROWS; r++) total += exp2_fast((t[r][0] - largest) * scale);
    }
#pragma unroll
    for (int r = 0; r < (SUMS ? 0 : STEP_ROWS); r++) {
      if (i + r >= last) continue;
      const int64_t at = b * n + i + r;
      const float e = exp2_fast((t[r][0] + g + rest - call.shift[at]) * scale), sum = call.sum[at];
      if (STEP == SinkhornStep::normalize) {
        if (call.matrix && j < k) store(call.matrix, call.scores.dtype, at * k + j, e * (1 / sum));
        total += call.partial ? e * (call.mass[at] / sum) : 0;
      } else if (STEP == SinkhornStep::products) {
        total += e * (call.mass[at] * call.by_row[at] / sum);
      } else {
        const float weight = call.gradient.data ? given[r][0] : 0;
        total += e * (weight - (call.by_row[at] + call.less[at])) * (1 / sum);
      }
    }
  }
  if (!call.partial) return;
  float *parts = reinterpret_cast<float *>(shared_memory()); // [2, ROW_LANES, 32]
  parts[threadIdx.x] = most;
  parts[THREADS + threadIdx.x] = total;
  __syncthreads();
  if (own || j >= k) return;
  float largest = NOTHING, sum = 0;
  if (SUMS)
    for (int w = 0; w < ROW_LANES; w++) largest = fmaxf(largest, parts[w * WARP + lane()]);
  for (int w = 0; w < ROW_LANES; w++)
    sum += parts[THREADS + w * WARP + lane()] * (SUMS ? exp2_fast((parts[w * WARP + lane()] - largest) * scale) : 1);
  const int64_t at = (b * call.chunks + chunk) * k + j;
  if (SUMS) {
    call.partial[at] = sum == 0 ? -INFINITY : largest; // a non-empty sum has a term of 1
    call.partial[call.batch * call.chunks * k + at] = sum;
  } else {
    call.partial[at] = sum;
  }
}

} // namespace

void sinkhorn_long_rows(const Where &where, const SinkhornPassCall &call) {
  const Launch shape{blocks_of(call.batch * blocks_of(call.rows, ROWS_AT_ONCE), THREADS / WARP), THREADS};
  switch (call.step) {
  case SinkhornStep::normalize: return launch("sinkhorn normalize", long_rows_kernel<SinkhornStep::normalize>, shape, where, call);
  case SinkhornStep::products: return launch("sinkhorn products", long_rows_kernel<SinkhornStep::products>, shape, where, call);
  case SinkhornStep::gradient: return launch("sinkhorn gradient", long_rows_kernel<SinkhornStep::gradient>, shape, where, call);
  default: return launch("sinkhorn column products", long_rows_kernel<SinkhornStep::column_products>, shape, where, call);
  }
}

void sinkhorn_columns(const Where &where, const SinkhornPassCall &call) {
  const Launch shape{blocks_of(call.columns, WARP) * call.chunks * call.batch, THREADS, 2 * THREADS * 4};
  switch (call.step) {
  case SinkhornStep::normalize: return launch("sinkhorn columns", long_columns_kernel<SinkhornStep::normalize>, shape, where, call);
  case SinkhornStep::products: return launch("sinkhorn columns", long_columns_kernel<SinkhornStep::products>, shape, where, call);
  case SinkhornStep::gradient: return launch("sinkhorn columns", long_columns_kernel<SinkhornStep::gradient>, shape, where, call);
  default: return launch("sinkhorn column sums", long_columns_kernel<SinkhornStep::column_sums>, shape, where, call);
  }
}

} // namespace fastcl::cuda
