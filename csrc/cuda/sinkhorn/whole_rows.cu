// Passes over rows that are held whole: one read of the scores. A block owns a chunk of a problem's rows.
#include "passes.h"
#include "rows.h"

namespace fastcl::cuda {
namespace {

__device__ Matrix of_batch(Matrix m, int64_t b) {
  const int64_t bytes = m.dtype == Dtype::float32 ? 4 : 2;
  if (m.data) m.data = static_cast<const char *>(m.data) + b * m.per_batch * bytes;
  m.per_batch = 0;
  return m;
}

template <SinkhornStep STEP> __global__ void __launch_bounds__(SINKHORN_THREADS) whole_rows_kernel(const SinkhornPassCall call) {
  const int64_t b = blockIdx.x / call.chunks, chunk = blockIdx.x % call.chunks, n = call.rows, k = call.columns;
  const SharedRows shared(k);
  for (int64_t j = threadIdx.x; j < k; j += SINKHORN_THREADS) {
    shared.high[j] = call.high[b * k + j];
    shared.low[j] = call.low[b * k + j];
    if (STEP == SinkhornStep::products) shared.weights[j] = call.weights[b * k + j];
  }
  if (threadIdx.x == 0) {
    RowsOfBatch &rows = *shared.rows;
    rows.scores = of_batch(call.scores, b);
    rows.gradient = of_batch(call.gradient, b);
    rows.columns = int(k);
    rows.scale = *call.inverse_epsilon * LOG2E;
    rows.shift = call.shift + b * n;
    rows.sum = call.sum + b * n;
    rows.mass = call.mass ? call.mass + b * n : nullptr;
    rows.less = call.less ? call.less + b * n : nullptr;
    rows.by_row = call.by_row ? call.by_row + b * n : nullptr;
    rows.matrix = call.matrix ? static_cast<char *>(call.matrix) + b * n * k * (call.scores.dtype == Dtype::float32 ? 4 : 2) : nullptr;
    rows.sums = call.partial != nullptr;
  }
  __syncthreads();
  const int64_t first = chunk * call.chunk, last = first + call.chunk < n ? first + call.chunk : n;
  whole_rows<STEP, STEP == SinkhornStep::gradient ? 1 : ROWS_AT_ONCE>(first, last, shared);
  if (call.partial)
    for (int64_t j = threadIdx.x; j < k; j += SINKHORN_THREADS) call.partial[(b * call.chunks + chunk) * k + j] = shared.high[j];
}

} // namespace

void sinkhorn_whole_rows(const Where &where, const SinkhornPassCall &call) {
  const bool weighted = call.step == SinkhornStep::products;
  const Launch launch_shape{call.batch * call.chunks, SINKHORN_THREADS, SharedRows::bytes(call.columns, weighted)};
  if (call.step == SinkhornStep::normalize) launch("sinkhorn normalize", whole_rows_kernel<SinkhornStep::normalize>, launch_shape, where, call);
  else if (weighted) launch("sinkhorn products", whole_rows_kernel<SinkhornStep::products>, launch_shape, where, call);
  else launch("sinkhorn gradient", whole_rows_kernel<SinkhornStep::gradient>, launch_shape, where, call);
}

} // namespace fastcl::cuda
