// All iterations in one cooperative launch. A block owns a chunk of a problem's rows. The chunk stays in shared memory if all chunks
// fit; otherwise each iteration reads the scores once. An iteration processes the rows and the column sums of each chunk. After a
// barrier each block adds some columns over the chunks, in order, and updates their potential. A second barrier ends the iteration.
#include "rows.h"

namespace fastcl::cuda {
namespace {

constexpr int ROWS = 1;                             // rows of a group at once: two do not fit into the registers
constexpr float SMALLEST = 1.1754943508222875e-38f; // smallest mass of a column, so that its logarithm is finite

__host__ __device__ int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
__device__ int bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

template <class T> __device__ void copy_rows(const Matrix &from, int64_t b, int64_t first, int64_t last, int64_t columns, char *to) {
  T *place = reinterpret_cast<T *>(to);
  for (int64_t i = first; i < last; i++)
    for (int64_t j = threadIdx.x; j < columns; j += SINKHORN_THREADS) place[(i - first) * columns + j] = row_of<T>(from, b, i)[j * from.per_column];
}

// Loads g [K] in two parts.
__device__ void load_potential(const double *g, int64_t columns, const SharedRows &shared) {
  for (int64_t j = threadIdx.x; j < columns; j += SINKHORN_THREADS) {
    const float high = float(g[j]);
    shared.high[j] = high;
    shared.low[j] = high == -INFINITY || high == INFINITY ? 0 : float(g[j] - double(high));
  }
}

// Sums columns over the chunks, updates their potential, and writes the error of every 32 columns.
__device__ void update_columns(const SinkhornIterations &call, int64_t t, const double *g, double *next, float *scratch) {
  const int64_t k = call.columns, tiles = blocks_of(k, WARP);
  const int own = int(threadIdx.x) / WARP;
  const double epsilon = *call.epsilon;
  for (int64_t task = blockIdx.x; task < call.batch * tiles; task += gridDim.x) {
    const int64_t b = task / tiles, j = task % tiles * WARP + lane();
    float sum = 0;
    if (j < k)
      for (int64_t chunk = own; chunk < call.chunks; chunk += WARPS) sum += call.partial[(b * call.chunks + chunk) * k + j];
    scratch[threadIdx.x] = sum;
    __syncthreads();
    if (own == 0) {
      for (int w = 1; w < WARPS; w++) sum += scratch[w * WARP + lane()];
      float difference = 0;
      if (j < k) {
        const float log_prior = call.log_prior[b * k + j];
        call.kept_masses[(call.tolerance < 0 ? t : 0) * call.batch * k + b * k + j] = sum;
        const double log_mass = log(double(sum < SMALLEST ? SMALLEST : sum)); // NaN stays NaN
        next[b * k + j] = log_prior == -INFINITY ? double(-INFINITY) : g[b * k + j] + epsilon * (log_prior - log_mass);
        difference = fabsf(sum - expf(log_prior));
      }
      difference = warp_sum(difference);
      if (call.tolerance >= 0 && lane() == 0) call.error_parts[task] = difference;
    }
    __syncthreads();
  }
}

// Whether any problem of the batch misses the tolerance. All blocks get the same result.
__device__ bool unfinished(const SinkhornIterations &call, float *flags) {
  const int64_t tiles = blocks_of(call.columns, WARP);
  const int own = int(threadIdx.x) / WARP;
  bool open = false;
  for (int64_t b = own; b < call.batch; b += WARPS) {
    float error = 0;
    for (int64_t tile = lane(); tile < tiles; tile += WARP) error += call.error_parts[b * tiles + tile];
    error = warp_sum(error);
    if (blockIdx.x == 0 && lane() == 0) call.error[b] = error;
    open |= error >= call.tolerance; // false for NaN, which ends the iterations
  }
  if (lane() == 0) flags[own] = open;
  __syncthreads();
  for (int w = 0; w < WARPS; w++) open |= flags[w] != 0;
  __syncthreads();
  return open;
}

__global__ void __launch_bounds__(SINKHORN_THREADS) iterations_kernel(const SinkhornIterations call) {
  const int64_t n = call.rows, k = call.columns, each = call.batch * k, b = blockIdx.x / call.chunks, chunk = blockIdx.x % call.chunks;
  const int64_t first = chunk * call.chunk, last = first + call.chunk < n ? first + call.chunk : n;
  const SharedRows shared(k);
  float *const scratch = shared.low; // [SINKHORN_THREADS], used between the passes over rows
  char *const held = reinterpret_cast<char *>(shared.low + larger(k, SINKHORN_THREADS));
  if (call.resident) {
    if (call.scores.dtype == Dtype::float32) copy_rows<float>(call.scores, b, first, last, k, held);
    else copy_rows<Half>(call.scores, b, first, last, k, held); // any dtype of two bytes
  }
  if (threadIdx.x == 0) {
    RowsOfBatch rows{};
    rows.scores = call.scores;
    rows.scores.data = static_cast<const char *>(call.scores.data) + b * call.scores.per_batch * bytes_of(call.scores.dtype);
    rows.scores.per_batch = 0;
    if (call.resident) rows.scores = {held - first * k * bytes_of(call.scores.dtype), call.scores.dtype, 0, k, 1};
    rows.columns = int(k);
    rows.scale = *call.inverse_epsilon * LOG2E;
    rows.mass = call.mass + b * n;
    *shared.rows = rows;
  }
  const bool fixed = call.tolerance < 0;
  bool last_pass = false; // of the rows: writes assignments, without column sums
  int64_t t = 0;
  for (;;) {
    const double *g = fixed ? call.kept_g + t * each : call.g + (t & 1) * each;
    last_pass |= fixed && t + 1 == call.iterations;
    load_potential(g + b * k, k, shared);
    if (threadIdx.x == 0) {
      RowsOfBatch &rows = *shared.rows;
      rows.shift = call.kept_rows + ((fixed ? 2 * t : 0) * call.batch + b) * n;
      rows.sum = rows.shift + call.batch * n;
      rows.matrix = last_pass ? static_cast<char *>(call.matrix) + b * n * k * bytes_of(call.scores.dtype) : nullptr;
      rows.sums = !last_pass;
    }
    __syncthreads(); // also for the scores
    whole_rows<SinkhornStep::normalize, ROWS>(first, last, shared);
    if (last_pass) break;
    for (int64_t j = threadIdx.x; j < k; j += SINKHORN_THREADS) call.partial[(b * call.chunks + chunk) * k + j] = shared.high[j];
    grid_barrier();
    update_columns(call, t, g, fixed ? call.kept_g + (t + 1) * each : call.g + ((t + 1) & 1) * each, scratch);
    grid_barrier();
    if (fixed || (unfinished(call, scratch) && t + 1 < call.iterations)) t++;
    else last_pass = true; // repeats the pass with this iteration's potential
  }
  if (!fixed && chunk == 0)
    for (int64_t j = threadIdx.x; j < k; j += SINKHORN_THREADS) call.kept_g[b * k + j] = call.g[(t & 1) * each + b * k + j];
  if (blockIdx.x == 0 && threadIdx.x == 0) *call.done = t + 1;
}

int64_t shared_bytes(int64_t columns, int64_t held) {
  return SharedRows::bytes(columns, false) + 4 * (larger(columns, SINKHORN_THREADS) - columns) + held;
}

} // namespace

SinkhornPlan sinkhorn_plan(int index, int64_t batch, int64_t rows, int64_t columns, int64_t bytes) {
  const Device &here = device(index);
  const int64_t most = batch ? here.processors / batch : 0; // chunks per problem: one block per multiprocessor
  if (columns > SINKHORN_WHOLE || most < 1 || rows < 1) return {0, 0, false};
  const int64_t chunk = blocks_of(rows, most < rows ? most : rows), chunks = blocks_of(rows, chunk);
  return {chunk, chunks, shared_bytes(columns, chunk * columns * bytes) <= here.shared};
}

void sinkhorn_iterations(const Where &where, const SinkhornIterations &call) {
  require_current(where.device);
  const int64_t held = call.resident ? call.chunk * call.columns * (call.scores.dtype == Dtype::float32 ? 4 : 2) : 0;
  const Launch shape{call.batch * call.chunks, SINKHORN_THREADS, shared_bytes(call.columns, held), true};
  launch("sinkhorn iterations", iterations_kernel, shape, where, call);
}

} // namespace fastcl::cuda
