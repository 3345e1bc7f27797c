// Streaming top-k. A block owns some queries and a part of the keys, and goes through tiles of 64 keys: products in float, then
// each warp takes its queries' rows of the tile, and appends what beats the worst of the best so far to a list behind them.
// When a tile might not fit there, the list is sorted. Candidates are packed with their places into 64 bits whose order is
// total, so that the best are the same whatever the order: the lower place wins a tie.
#include "device.h"
#include "topk.h"

namespace fastcl::cuda {
namespace {

constexpr int THREADS = 256, TILE = 64, DEPTH = 16, PAD = 4; // keys of a tile; numbers of a row at once
constexpr int64_t NO_PLACE = INT64_MIN;                      // worse than any that is admissible

// The order is that of the value, NaN first, and of equal ones by the lower place, of below 2^32.
__host__ __device__ int64_t packed(float value, int64_t place) {
  const uint32_t given = float_to_bits(value + 0.0f), bits = value == value ? given : 0x7fc00000u; // -0 + 0 is 0
  const int32_t ordered = int32_t(bits) ^ (int32_t(bits) >> 31 & 0x7fffffff);
  return int64_t(uint64_t(uint32_t(ordered)) << 32 | uint64_t(0xffffffffu - uint32_t(place)));
}

// 16 numbers of each of COUNT rows from `first` on, transposed: to[k][row], 0 outside.
template <class T, int COUNT> __device__ void load_as(const Rows &rows, int64_t first, int64_t start, int64_t dimension, float (&x)[COUNT * DEPTH / THREADS]) {
#pragma unroll
  for (int q = 0; q < COUNT * DEPTH / THREADS; q++) {
    const int at = q * THREADS + int(threadIdx.x);
    const int64_t i = first + at / DEPTH, k = start + at % DEPTH;
    T raw{};
    if (i < rows.size && k < dimension) raw = static_cast<const T *>(rows.data)[i * rows.row_stride + k * rows.column_stride];
    x[q] = to_float(raw);
  }
}
template <int COUNT> __device__ void load(const Rows &rows, int64_t first, int64_t start, int64_t dimension, float (&x)[COUNT * DEPTH / THREADS]) {
  if (rows.dtype == Dtype::float32) load_as<float, COUNT>(rows, first, start, dimension, x);
  else if (rows.dtype == Dtype::bfloat16) load_as<Bfloat16, COUNT>(rows, first, start, dimension, x);
  else load_as<Half, COUNT>(rows, first, start, dimension, x);
}
template <int COUNT> __device__ void place(const float (&x)[COUNT * DEPTH / THREADS], float *to) {
#pragma unroll
  for (int q = 0; q < COUNT * DEPTH / THREADS; q++) {
    const int at = q * THREADS + int(threadIdx.x);
    to[at % DEPTH * (COUNT + PAD) + at / DEPTH] = x[q];
  }
}

// A bitonic network of one warp, largest first.
__device__ void sort(int64_t *list, int size) {
  for (int run = 2; run <= size; run *= 2)
    for (int step = run / 2; step > 0; step /= 2) {
      for (int pair = lane(); pair < size / 2; pair += WARP) {
        const int low = pair / step * 2 * step + pair % step, high = low + step;
        const int64_t a = list[low], b = list[high];
        const bool falling = (low & run) == 0;
        if (falling ? a < b : a > b) list[low] = b, list[high] = a;
      }
      __syncwarp();
    }
}

// Room for the best `slots`, and behind them for two tiles' candidates at least.
__host__ __device__ int list_size(int slots) { return slots < TILE ? 2 * TILE : 2 * slots; }

template <int ROWS> int64_t shared_bytes(int slots) {
  return ROWS * int64_t(list_size(slots)) * 8 + 4 * (DEPTH * (ROWS + PAD + TILE + PAD) + ROWS * (TILE + 1));
}

template <int ROWS> __global__ void __launch_bounds__(THREADS, 2) topk_kernel(const TopKCall call) {
  constexpr int HIGH = ROWS / 16, WARP_ROWS = ROWS / (THREADS / WARP); // rows of a thread's products; of a warp's lists
  const int slots = int(call.slots), size = list_size(slots), own = int(threadIdx.x) / WARP;
  int64_t *const lists = reinterpret_cast<int64_t *>(shared_memory()); // [ROWS, size]
  float *const left = reinterpret_cast<float *>(lists + ROWS * size); // [DEPTH, ROWS + PAD]
  float *const right = left + DEPTH * (ROWS + PAD);                   // [DEPTH, TILE + PAD]
  float *const products = right + DEPTH * (TILE + PAD);               // [ROWS, TILE + 1]
  const int64_t first = blockIdx.x * int64_t(ROWS), start = blockIdx.y * call.span;
  const int64_t end = start + call.span < call.keys.size ? start + call.span : call.keys.size;
  for (int at = int(threadIdx.x); at < ROWS * size; at += THREADS) lists[at] = NO_PLACE;
  int filled[WARP_ROWS];
#pragma unroll
  for (int r = 0; r < WARP_ROWS; r++) filled[r] = slots;
  const int row = int(threadIdx.x) / 16 * HIGH, column = int(threadIdx.x) % 16 * 4;

  for (int64_t tile = start; tile < end; tile += TILE) {
    float sum[HIGH][4] = {};
    float x[ROWS * DEPTH / THREADS], y[TILE * DEPTH / THREADS];
    load<ROWS>(call.queries, first, 0, call.dimension, x);
    load<TILE>(call.keys, tile, 0, call.dimension, y);
    for (int64_t k = 0; k < call.dimension; k += DEPTH) {
      __syncthreads(); // the last numbers, and the last tile's products, have been read
      place<ROWS>(x, left);
      place<TILE>(y, right);
      __syncthreads();
      if (k + DEPTH < call.dimension) { // on their way while these are multiplied
        load<ROWS>(call.queries, first, k + DEPTH, call.dimension, x);
        load<TILE>(call.keys, tile, k + DEPTH, call.dimension, y);
      }
#pragma unroll
      for (int d = 0; d < DEPTH; d++) {
        float a[HIGH], b[4];
#pragma unroll
        for (int r = 0; r < HIGH; r++) a[r] = left[d * (ROWS + PAD) + row + r];
#pragma unroll
        for (int c = 0; c < 4; c++) b[c] = right[d * (TILE + PAD) + column + c];
#pragma unroll
        for (int r = 0; r < HIGH; r++)
#pragma unroll
          for (int c = 0; c < 4; c++) sum[r][c] += a[r] * b[c];
      }
    }
#pragma unroll
    for (int r = 0; r < HIGH; r++)
#pragma unroll
      for (int c = 0; c < 4; c++) products[(row + r) * (TILE + 1) + column + c] = sum[r][c];
    __syncthreads();
#pragma unroll
    for (int r = 0; r < WARP_ROWS; r++) {
      const int mine = own * WARP_ROWS + r;
      int64_t *const list = lists + mine * size;
      if (first + mine >= call.queries.size) continue; // a whole warp
      const int32_t name = call.query_names ? call.query_names[first + mine] : -1;
#pragma unroll
      for (int half = 0; half < TILE; half += WARP) {
        const int64_t j = tile + half + lane();
        const int64_t candidate = packed(products[mine * (TILE + 1) + half + lane()], j);
        const bool better = j < end && candidate > list[slots - 1] && !(name != -1 && call.key_names[j] == name);
        const unsigned all = __ballot_sync(ALL_LANES, better);
        if (better) list[filled[r] + __popc(all & ((1u << lane()) - 1))] = candidate;
        filled[r] += __popc(all);
      }
      __syncwarp();
      if (filled[r] + TILE > size) {
        sort(list, size);
        for (int at = slots + lane(); at < size; at += WARP) list[at] = NO_PLACE;
        __syncwarp();
        filled[r] = slots;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < WARP_ROWS; r++) {
    const int mine = own * WARP_ROWS + r;
    if (first + mine >= call.queries.size) continue;
    __syncwarp(); // of a part without keys, too
    sort(lists + mine * size, size);
    for (int at = lane(); at < slots; at += WARP)
      call.best[((first + mine) * call.parts + blockIdx.y) * slots + at] = lists[mine * size + at];
  }
}

} // namespace

void topk(const Where &where, const TopKCall &call) {
  const DeviceGuard guard(where.device);
  const int slots = int(call.slots);
  const auto start = [&](auto kernel, int64_t rows, int64_t shared) {
    launch("top-k", kernel, Launch{blocks_of(call.queries.size, rows), THREADS, shared, false, call.parts}, where, call);
  };
  if (shared_bytes<64>(slots) <= device(where.device).shared) start(topk_kernel<64>, 64, shared_bytes<64>(slots));
  else start(topk_kernel<16>, 16, shared_bytes<16>(slots));
}

} // namespace fastcl::cuda
