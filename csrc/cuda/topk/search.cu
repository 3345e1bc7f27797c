// Streaming top-k. A block owns some queries and a part of the keys, and processes tiles of 64 keys. It computes the products; then
// each warp appends the candidates of its queries that are better than the worst of the best so far to the queries' lists. When the
// next tile might not fit, the list is sorted. A candidate and its place are packed into 64 bits with a total order, so the result
// does not depend on the order of candidates; the lower place wins a tie.
#include "cuda/products.h"
#include "launches.h"

namespace fastcl::cuda {
namespace {

constexpr int THREADS = 256, TILE = 64, PAD = 4; // threads of a block, keys of a tile, padding
constexpr int64_t NO_PLACE = INT64_MIN;          // smaller than every admissible candidate

// Larger is better: NaN first, then the greater value, then the lower place. Places are below 2^32.
__device__ int64_t packed(float value, int64_t place) {
  const uint32_t given = float_to_bits(value + 0.0f), bits = value == value ? given : 0x7fc00000u; // -0 + 0 is 0
  const int32_t ordered = int32_t(bits) ^ (int32_t(bits) >> 31 & 0x7fffffff);
  return int64_t(uint64_t(uint32_t(ordered)) << 32 | uint64_t(0xffffffffu - uint32_t(place)));
}

// Products of ROWS queries and a tile of keys, DEPTH numbers at a time: `fetch` reads them, `place` stores them in shared memory,
// `multiply` adds their products, and `write` stores the sums. This class reads rows of any dtype, and multiplies in float.
template <int ROWS, class Element> class Products {
public:
  static constexpr int DEPTH = 16;
  static constexpr int64_t BYTES = 4 * DEPTH * (ROWS + PAD + TILE + PAD);
  __device__ explicit Products(char *shared) : left_(reinterpret_cast<float *>(shared)), right_(left_ + DEPTH * (ROWS + PAD)) {}
  __device__ void fetch(const TopKCall &call, int64_t query, int64_t key, int64_t start) {
    load<ROWS>(call.queries, query, start, call.dimension, x_);
    load<TILE>(call.keys, key, start, call.dimension, y_);
  }
  __device__ void place() {
    place_in<ROWS>(x_, left_);
    place_in<TILE>(y_, right_);
  }
  __device__ void clear() {
#pragma unroll
    for (int r = 0; r < HIGH; r++)
#pragma unroll
      for (int c = 0; c < 4; c++) sum_[r][c] = 0;
  }
  __device__ void multiply() {
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      float a[HIGH], b[4];
#pragma unroll
      for (int r = 0; r < HIGH; r++) a[r] = left_[d * (ROWS + PAD) + row() + r];
#pragma unroll
      for (int c = 0; c < 4; c++) b[c] = right_[d * (TILE + PAD) + column() + c];
#pragma unroll
      for (int r = 0; r < HIGH; r++)
#pragma unroll
        for (int c = 0; c < 4; c++) sum_[r][c] += a[r] * b[c];
    }
  }
  __device__ void write(float *products) const {
#pragma unroll
    for (int r = 0; r < HIGH; r++)
#pragma unroll
      for (int c = 0; c < 4; c++) products[(row() + r) * (TILE + 1) + column() + c] = sum_[r][c];
  }

private:
  static constexpr int HIGH = ROWS / 16; // rows of a thread's products, with 4 columns
  static __device__ int row() { return int(threadIdx.x) / 16 * HIGH; }
  static __device__ int column() { return int(threadIdx.x) % 16 * 4; }
  template <class T, int COUNT>
  static __device__ void load_as(const Rows &rows, int64_t first, int64_t start, int64_t dimension, float (&x)[COUNT * DEPTH / THREADS]) {
#pragma unroll
    for (int q = 0; q < COUNT * DEPTH / THREADS; q++) {
      const int at = q * THREADS + int(threadIdx.x);
      const int64_t i = first + at / DEPTH, k = start + at % DEPTH;
      T raw{};
      if (i < rows.size && k < dimension) raw = static_cast<const T *>(rows.data)[i * rows.row_stride + k * rows.column_stride];
      x[q] = to_float(raw);
    }
  }
  template <int COUNT>
  static __device__ void load(const Rows &rows, int64_t first, int64_t start, int64_t dimension, float (&x)[COUNT * DEPTH / THREADS]) {
    if (rows.dtype == Dtype::float32) load_as<float, COUNT>(rows, first, start, dimension, x);
    else if (rows.dtype == Dtype::bfloat16) load_as<Bfloat16, COUNT>(rows, first, start, dimension, x);
    else load_as<Half, COUNT>(rows, first, start, dimension, x);
  }
  template <int COUNT> static __device__ void place_in(const float (&x)[COUNT * DEPTH / THREADS], float *to) {
#pragma unroll
    for (int q = 0; q < COUNT * DEPTH / THREADS; q++) {
      const int at = q * THREADS + int(threadIdx.x);
      to[at % DEPTH * (COUNT + PAD) + at / DEPTH] = x[q];
    }
  }
  float *left_, *right_; // transposed: [DEPTH, rows + PAD]
  float x_[ROWS * DEPTH / THREADS], y_[TILE * DEPTH / THREADS], sum_[HIGH][4];
};

// For rows of one 16-bit dtype, on tensor cores: a warp multiplies 16 rows with WIDE times 8 keys, 16 x 8 products at once.
template <int ROWS, class Element> class TensorProducts {
public:
  static constexpr int DEPTH = 32, PITCH = DEPTH + 8; // 80 bytes from row to row: the 8 rows of a fragment use different banks
  static constexpr int64_t BYTES = 2 * PITCH * (ROWS + TILE);
  __device__ explicit TensorProducts(char *shared) : left_(reinterpret_cast<Element *>(shared)), right_(left_ + ROWS * PITCH) {}
  __device__ void fetch(const TopKCall &call, int64_t query, int64_t key, int64_t start) {
    if (owner() < ROWS) load(call.queries, query + owner(), start, call.dimension, x_);
    load(call.keys, key + owner(), start, call.dimension, y_);
  }
  __device__ void place() {
    if (owner() < ROWS) *reinterpret_cast<Eight *>(left_ + owner() * PITCH + part()) = x_;
    *reinterpret_cast<Eight *>(right_ + owner() * PITCH + part()) = y_;
  }
  __device__ void clear() {
#pragma unroll
    for (int w = 0; w < WIDE; w++)
#pragma unroll
      for (int c = 0; c < 4; c++) sum_[w][c] = 0;
  }
  __device__ void multiply() {
#pragma unroll
    for (int d = 0; d < DEPTH; d += 16) {
      const int at = d + lane() % 4 * 2;
      const Element *a = left_ + (row() + lane() / 4) * PITCH + at;
      const uint32_t rows[4] = {pair(a), pair(a + 8 * PITCH), pair(a + 8), pair(a + 8 * PITCH + 8)};
#pragma unroll
      for (int w = 0; w < WIDE; w++) {
        const Element *b = right_ + (column() + 8 * w + lane() / 4) * PITCH + at;
        const uint32_t keys[2] = {pair(b), pair(b + 8)};
        cuda::multiply(sum_[w], rows, keys, Element{});
      }
    }
  }
  __device__ void write(float *products) const {
#pragma unroll
    for (int w = 0; w < WIDE; w++)
#pragma unroll
      for (int c = 0; c < 4; c++) products[(row() + lane() / 4 + c / 2 * 8) * (TILE + 1) + column() + 8 * w + lane() % 4 * 2 + c % 2] = sum_[w][c];
  }

private:
  struct alignas(16) Eight {
    Element x[8];
  };
  static constexpr int BANDS = ROWS / 16, WIDE = BANDS; // bands of 16 rows, each shared by 8 / BANDS warps
  static __device__ int row() { return int(threadIdx.x) / WARP % BANDS * 16; }
  static __device__ int column() { return int(threadIdx.x) / WARP / BANDS * WIDE * 8; }
  static __device__ int owner() { return int(threadIdx.x) / 4; } // the row whose 8 numbers from `part` on this thread loads
  static __device__ int part() { return int(threadIdx.x) % 4 * 8; }
  static __device__ uint32_t pair(const Element *at) { return *reinterpret_cast<const uint32_t *>(at); }
  static __device__ void load(const Rows &rows, int64_t i, int64_t start, int64_t dimension, Eight &x) {
    const int64_t k = start + part();
    const Element *at = static_cast<const Element *>(rows.data) + i * rows.row_stride + k * rows.column_stride;
    if (i < rows.size && k + 8 <= dimension && rows.column_stride == 1 && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
      x = *reinterpret_cast<const Eight *>(at);
      return;
    }
#pragma unroll
    for (int q = 0; q < 8; q++) {
      x.x[q] = Element{};
      if (i < rows.size && k + q < dimension) x.x[q] = at[q * rows.column_stride];
    }
  }
  Element *left_, *right_; // [rows, PITCH]
  Eight x_, y_;
  float sum_[WIDE][4];
};

// Sorts a list, largest first: a bitonic network of one warp.
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

// Size of a list: the best `slots`, followed by space for the candidates of at least one tile.
__host__ __device__ int list_size(int slots) { return slots < TILE ? 2 * TILE : 2 * slots; }

template <int ROWS, class Multiply> int64_t shared_bytes(int slots) {
  return ROWS * int64_t(list_size(slots)) * 8 + 4 * ROWS * (TILE + 1) + Multiply::BYTES;
}

template <int ROWS, class Multiply> __global__ void __launch_bounds__(THREADS, ROWS == 64 ? 1 : 2) topk_kernel(const TopKCall call) {
  constexpr int WARP_ROWS = ROWS / (THREADS / WARP); // number of a warp's lists
  const int slots = int(call.slots), size = list_size(slots), own = int(threadIdx.x) / WARP;
  int64_t *const lists = reinterpret_cast<int64_t *>(shared_memory());    // [ROWS, size]
  float *const products = reinterpret_cast<float *>(lists + ROWS * size); // [ROWS, TILE + 1]
  Multiply tiles(reinterpret_cast<char *>(products + ROWS * (TILE + 1)));
  const int64_t first = blockIdx.x * int64_t(ROWS), start = blockIdx.y * call.span;
  const int64_t end = start + call.span < call.keys.size ? start + call.span : call.keys.size;
  for (int at = int(threadIdx.x); at < ROWS * size; at += THREADS) lists[at] = NO_PLACE;
  int filled[WARP_ROWS];
#pragma unroll
  for (int r = 0; r < WARP_ROWS; r++) filled[r] = slots;

  for (int64_t tile = start; tile < end; tile += TILE) {
    tiles.clear();
    tiles.fetch(call, first, tile, 0);
    for (int64_t k = 0; k < call.dimension; k += Multiply::DEPTH) {
      __syncthreads(); // all threads have read the previous numbers and the previous tile's products
      tiles.place();
      __syncthreads();
      if (k + Multiply::DEPTH < call.dimension) tiles.fetch(call, first, tile, k + Multiply::DEPTH); // overlaps with the products
      tiles.multiply();
    }
    tiles.write(products);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < WARP_ROWS; r++) {
      const int mine = own * WARP_ROWS + r;
      int64_t *const list = lists + mine * size;
      if (first + mine >= call.queries.size) continue; // holds for a whole warp
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
    __syncwarp(); // every part has keys, so a block barrier has followed the initialisation of the lists
    sort(lists + mine * size, size);
    for (int at = lane(); at < slots; at += WARP) call.best[((first + mine) * call.parts + blockIdx.y) * slots + at] = lists[mine * size + at];
  }
}

template <template <int, class> class Multiply, class Element> void start(const Where &where, const TopKCall &call) {
  const int slots = int(call.slots);
  const auto run = [&](auto kernel, int64_t rows, int64_t shared) {
    launch("top-k", kernel, Launch{blocks_of(call.queries.size, rows), THREADS, shared, false, call.parts}, where, call);
  };
  const int64_t wide = shared_bytes<64, Multiply<64, Element>>(slots);
  if (wide <= device(where.device).shared) run(topk_kernel<64, Multiply<64, Element>>, 64, wide);
  else run(topk_kernel<16, Multiply<16, Element>>, 16, shared_bytes<16, Multiply<16, Element>>(slots));
}

} // namespace

void topk(const Where &where, const TopKCall &call) {
  require_current(where.device);
  const Dtype dtype = call.queries.dtype;
  if (dtype != call.keys.dtype || dtype == Dtype::float32) start<Products, float>(where, call);
  else if (dtype == Dtype::bfloat16) start<TensorProducts, Bfloat16>(where, call);
  else start<TensorProducts, Half>(where, call);
}

} // namespace fastcl::cuda
