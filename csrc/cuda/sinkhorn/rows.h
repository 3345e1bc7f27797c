// Rows that are held whole. A group of warps reads a few rows once, reduces them, and adds them to its column sums, which stay in
// registers for all rows of a chunk.
#pragma once
#include "cuda/device.h"
#include "launches.h"

namespace fastcl::cuda {

constexpr float NOTHING = -3.4028234663852886e38f; // initial running maximum: finite, so that differences are never NaN
constexpr int ROWS_AT_ONCE = 2;                    // largest number for a group
constexpr int WARPS = SINKHORN_THREADS / WARP;

// Row i of batch b in memory.
template <class T> __device__ const T *row_of(const Matrix &m, int64_t b, int64_t i) {
  return static_cast<const T *>(m.data) + b * m.per_batch + i * m.per_row;
}

// x[r][c] = the number in row i + r, column first + c * step, for c < mine; 0 elsewhere.
template <class T, int ROWS, int WIDTH>
__device__ void load_as(const Matrix &m, int64_t b, int64_t i, int64_t rows, int first, int step, int mine, float (&x)[ROWS][WIDTH]) {
  T raw[ROWS][WIDTH];
  const int64_t stride = step * m.per_column;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const T *at = row_of<T>(m, b, i + r) + first * m.per_column;
    const int there = i + r < rows ? mine : 0;
#pragma unroll
    for (int c = 0; c < WIDTH; c++, at += stride) {
      raw[r][c] = T{};
      if (c < there) raw[r][c] = *at;
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int c = 0; c < WIDTH; c++) x[r][c] = to_float(raw[r][c]);
}
template <int ROWS, int WIDTH>
__device__ void load(const Matrix &m, int64_t b, int64_t i, int64_t rows, int first, int step, int mine, float (&x)[ROWS][WIDTH]) {
  if (m.dtype == Dtype::float32) load_as<float>(m, b, i, rows, first, step, mine, x);
  else if (m.dtype == Dtype::bfloat16) load_as<Bfloat16>(m, b, i, rows, first, step, mine, x);
  else load_as<Half>(m, b, i, rows, first, step, mine, x);
}

// The number of columns first, first + step, ... below `columns`.
__device__ inline int columns_of_lane(int columns, int first, int step) { return first < columns ? (columns - first + step - 1) / step : 0; }

__device__ inline void store(void *matrix, Dtype dtype, int64_t at, float x) {
  if (dtype == Dtype::float32) from_float(x, static_cast<float *>(matrix)[at]);
  else if (dtype == Dtype::bfloat16) from_float(x, static_cast<Bfloat16 *>(matrix)[at]);
  else from_float(x, static_cast<Half *>(matrix)[at]);
}

// The number of warps that share a row: a power of two.
__host__ __device__ inline int warps_of_row(int64_t columns) {
  int warps = 1;
  while (warps * WARP * SINKHORN_WIDTH < columns) warps *= 2;
  return warps;
}

// Reduces each of a few rows over all lanes of the group, in the order of lanes and warps.
class Group {
public:
  __device__ Group(int warps, float *scratch) : warps_(warps), first_(int(threadIdx.x) / WARP / warps * warps), scratch_(scratch) {}
  __device__ int index() const { return first_ / warps_; }
  template <int ROWS> __device__ void sum(float (&x)[ROWS]) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) x[r] = warp_sum(x[r]);
    exchange(x, [](float a, float b) { return a + b; });
  }
  template <int ROWS> __device__ void max(float (&x)[ROWS]) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) x[r] = warp_max(x[r]);
    exchange(x, [](float a, float b) { return fmaxf(a, b); });
  }

private:
  // Alternates between two buffers: a buffer is overwritten only after the barrier that follows its last read.
  template <int ROWS, class Join> __device__ void exchange(float (&x)[ROWS], Join join) {
    if (warps_ == 1) return;
    float *place = scratch_ + turn_ * WARPS * ROWS;
    turn_ ^= 1;
    if (lane() == 0)
#pragma unroll
      for (int r = 0; r < ROWS; r++) place[int(threadIdx.x) / WARP * ROWS + r] = x[r];
    part_barrier(1 + index(), warps_ * WARP);
#pragma unroll
    for (int r = 0; r < ROWS; r++) x[r] = place[first_ * ROWS + r];
    for (int w = 1; w < warps_; w++)
#pragma unroll
      for (int r = 0; r < ROWS; r++) x[r] = join(x[r], place[(first_ + w) * ROWS + r]);
  }
  int warps_, first_, turn_ = 0;
  float *scratch_;
};

// The inputs and outputs of a pass for the rows of one problem.
struct RowsOfBatch {
  Matrix scores, gradient; // `data` already includes per_batch
  int columns;
  float scale; // log2(e) / epsilon
  float *shift, *sum;
  const float *mass, *less;
  float *by_row;
  void *matrix;
  bool sums; // compute column sums
};

// A block's shared memory.
struct SharedRows {
  RowsOfBatch *rows;           // in shared memory, because registers are few
  float *scratch;              // for exchanges within the group
  float *high, *low, *weights; // [K]; at the end `high` holds the column sums

  __device__ explicit SharedRows(int64_t columns) {
    rows = reinterpret_cast<RowsOfBatch *>(shared_memory());
    scratch = reinterpret_cast<float *>(rows + 1);
    high = scratch + 2 * WARPS * ROWS_AT_ONCE;
    low = high + columns;
    weights = low + columns;
  }
  static int64_t bytes(int64_t columns, bool weighted) {
    return int64_t(sizeof(RowsOfBatch)) + 4 * (2 * WARPS * ROWS_AT_ONCE + (weighted ? 3 : 2) * columns);
  }
};

// Processes rows [first, last) of a problem, with the potential in shared memory. Leaves the column sums in `shared.high`.
template <SinkhornStep STEP, int ROWS> __device__ void whole_rows(int64_t first, int64_t last, const SharedRows &shared) {
  const RowsOfBatch &rows = *shared.rows;
  const int warps = warps_of_row(rows.columns);
  Group group(warps, shared.scratch);
  const int step = warps * WARP, column = int(threadIdx.x) % step, groups = WARPS / warps;
  const int mine = columns_of_lane(rows.columns, column, step);
  float totals[SINKHORN_WIDTH];
#pragma unroll
  for (int c = 0; c < SINKHORN_WIDTH; c++) totals[c] = 0;

  for (int64_t i = first + group.index() * ROWS; i < last; i += groups * ROWS) {
    float t[ROWS][SINKHORN_WIDTH], shift[ROWS], sum[ROWS], weight[ROWS];
    load(rows.scores, 0, i, last, column, step, mine, t);
#pragma unroll
    for (int c = 0; c < SINKHORN_WIDTH; c++) {
      const float high = c < mine ? shared.high[column + c * step] : -INFINITY, low = c < mine ? shared.low[column + c * step] : 0;
#pragma unroll
      for (int r = 0; r < ROWS; r++) t[r][c] = t[r][c] + high + low;
    }
    if (STEP == SinkhornStep::normalize) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        shift[r] = NOTHING;
#pragma unroll
        for (int c = 0; c < SINKHORN_WIDTH; c++) shift[r] = fmaxf(shift[r], t[r][c]);
      }
      group.max(shift);
    } else {
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        shift[r] = i + r < last ? rows.shift[i + r] : INFINITY;
        sum[r] = i + r < last ? rows.sum[i + r] : 1;
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int c = 0; c < SINKHORN_WIDTH; c++) t[r][c] = exp2_fast((t[r][c] - shift[r]) * rows.scale);

    if (STEP == SinkhornStep::normalize) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        sum[r] = 0;
#pragma unroll
        for (int c = 0; c < SINKHORN_WIDTH; c++) sum[r] += t[r][c];
      }
      group.sum(sum);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        if (i + r < last && column == 0) rows.shift[i + r] = shift[r], rows.sum[i + r] = sum[r];
        weight[r] = rows.sums && i + r < last ? rows.mass[i + r] / sum[r] : 0;
        if (rows.matrix && i + r < last) {
          const float each = 1 / sum[r];
#pragma unroll
          for (int c = 0; c < SINKHORN_WIDTH; c++)
            if (c < mine) store(rows.matrix, rows.scores.dtype, (i + r) * rows.columns + column + c * step, t[r][c] * each);
        }
      }
    } else if (STEP == SinkhornStep::products) {
      float y[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; r++) y[r] = 0;
#pragma unroll
      for (int c = 0; c < SINKHORN_WIDTH; c++) {
        const float w = c < mine ? shared.weights[column + c * step] : 0;
#pragma unroll
        for (int r = 0; r < ROWS; r++) y[r] += t[r][c] * w;
      }
      group.sum(y);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        y[r] /= sum[r];
        if (i + r < last && column == 0) rows.by_row[i + r] = y[r];
        weight[r] = i + r < last ? rows.mass[i + r] * y[r] / sum[r] : 0;
      }
    } else { // gradient
      float given[ROWS][SINKHORN_WIDTH], d[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        d[r] = 0;
#pragma unroll
        for (int c = 0; c < SINKHORN_WIDTH; c++) given[r][c] = 0;
      }
      if (rows.gradient.data) {
        load(rows.gradient, 0, i, last, column, step, mine, given);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
          for (int c = 0; c < SINKHORN_WIDTH; c++) d[r] += t[r][c] * given[r][c];
        group.sum(d);
      }
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        d[r] /= sum[r];
        if (i + r < last && column == 0) rows.by_row[i + r] = d[r];
        const float less = i + r < last ? d[r] + rows.less[i + r] : 0;
        weight[r] = i + r < last ? 1 / sum[r] : 0;
#pragma unroll
        for (int c = 0; c < SINKHORN_WIDTH; c++) t[r][c] *= given[r][c] - less;
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int c = 0; c < SINKHORN_WIDTH; c++) totals[c] += t[r][c] * weight[r];
  }

  if (!rows.sums) return;
  for (int g = 0; g < groups; g++) { // one group after another
    __syncthreads();                 // all threads have also read the potential
    if (g == group.index())
#pragma unroll
      for (int c = 0; c < SINKHORN_WIDTH; c++) {
        float &sum = shared.high[column + c * step];
        if (c < mine) sum = g ? sum + totals[c] : totals[c];
      }
  }
  __syncthreads();
}

} // namespace fastcl::cuda
