// The sweep of the pair sums: a block computes the sums of its rows over all columns, and their gradient.
//
// It is the structure of the gradient's sweep of the contrastive statistics (contrastive/gradient.h): a tile of products, G in shared
// memory, a second product. Here G needs no earlier sweep, so one launch gives sums and gradient. The rows are the anchors, or the
// contrasts, whose weights then belong to the columns.
//
// Registers hold the gradient, so the sums of rows live in shared memory. A lane owns its places there: one for each of its rows and
// each half of the columns.
#pragma once
#include "cuda/contrastive/gradient.h"
#include "maps.h"
#include <type_traits>

namespace fastcl::cuda {

struct PairSweep : Sweep { // row_bias and column_bias are not times log2(e) here
  Map map;
  float pos_margin, neg_margin;
  bool only_positives;
  const float *row_offset, *column_offset;  // [n], [m]: added to the logits; null: 0
  const float *own_weights, *other_weights; // [2, side_stride(n)], [2, side_stride(m)]: of positives and negatives; null: 0
  float *values;                            // [3, 2, n] in the caller's order, or null: sums, active pairs, pairs
  float *gradient;                          // [n, width], or null: sum_j G_ij c_j y_j, times `scale`
  float *similarity_sums, *slope_sums;      // [n] in the caller's order, or null: sums of G times similarity and of G
  bool whole, add_gradient;                 // as in GradientSweep

  __host__ __device__ bool weighted() const { return own_weights || other_weights; }
};

// Sums of a row in shared memory.
enum RowSum : int { POS_VALUE, NEG_VALUE, SIMILARITIES, SLOPES, POS_ACTIVE, NEG_ACTIVE, POS_COUNT, MISSING, ROW_SUMS };
constexpr int ROW_SUMS_SIZE = ROW_SUMS * WARPS_ACROSS * BLOCK_ROWS * 4, PEAKS_SIZE = 128;

// float16 ends at 2^16 and flushes below 2^-24, so G is multiplied by a power of two, at most HIGHEST, which takes its largest number
// to LIFTED. Norms add a factor of at most 2.
constexpr float LIFTED = 0x1p13f, HIGHEST = 0x1p113f;

// The walk of a block of rows. Where positives are wanted only, others are not visited.
__device__ inline Walk pair_walk(const PairSweep &p, int i0, int columns) {
  if (!p.only_positives) return walk_of(p, i0, columns, false);
  int low = 0, high = 0;
  if (p.start) {
    low = p.start[i0];
    high = p.end[smaller(i0 + BLOCK_ROWS, p.n) - 1];
  }
  Walk found = walk(low, high, p.m, columns);
  found.interior = 0;
  return found;
}

template <class Element> class PairBlock {
  static constexpr int FRAGMENTS = GradientShape<Element>::FRAGMENTS, COLUMNS = GradientShape<Element>::COLUMNS;
  static constexpr bool HALF = std::is_same<Element, Half>::value;
  const PairSweep &p_;
  const Lane at_;
  const int i0_, part_; // part_: the first slice of the block's columns of the gradient
  const float scale_;
  float lift_ = HALF ? HIGHEST : 1;
  float *const sums_; // [ROW_SUMS, WARPS_ACROSS, BLOCK_ROWS]; the last four are integers
  float *const peaks_;
  Dots<Element, FRAGMENTS> dots_; // then G
  Products<Element> products_;

  __device__ __forceinline__ int place(int sum, int r) const { return (sum * WARPS_ACROSS + at_.across) * BLOCK_ROWS + at_.row(r); }

  // Adds what the lanes of a row have found in a tile.
  template <class Number> __device__ __forceinline__ void add(int sum, const Number (&found)[4]) {
#pragma unroll
    for (int r = 0; r < 4; r++) {
      Number total = found[r];
#pragma unroll
      for (int bit = 1; bit <= 2; bit *= 2) total += __shfl_xor_sync(ALL_LANES, total, bit);
      if (at_.lane % 4 == 0) reinterpret_cast<Number *>(sums_)[place(sum, r)] += total;
    }
  }

  // A tile with negatives only.
  template <Map MAP> __device__ __forceinline__ void interior(int j0) {
    float a[4], offset[4], weight[4], values[4] = {}, similarities[4] = {}, slopes[4] = {};
    int active[4] = {};
    const float *own = p_.own_weights ? p_.own_weights + side_stride(p_.n) : nullptr;
    const float *others = p_.other_weights ? p_.other_weights + side_stride(p_.m) : nullptr;
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const int i = i0_ + at_.row(r);
      a[r] = one_of(p_.a, i, i < p_.n, 1.0f);
      offset[r] = one_of(p_.row_offset, i, i < p_.n, 0.0f);
      weight[r] = one_of(own, i, i < p_.n, 0.0f);
    }
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) {
      const int j = j0 + at_.template column<FRAGMENTS>(f);
      const float2 c = two_of(p_.c, j, 1.0f), more = two_of(p_.column_offset, j, 0.0f), other = two_of(others, j, 0.0f);
#pragma unroll
      for (int r = 0; r < 4; r++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float &g = dots_.of(r, f, e);
          const float similarity = similarity_of(g, a[r], e ? c.y : c.x);
          const float s = __fadd_rn(__fmul_rn(similarity, scale_), offset[r] + (e ? more.y : more.x));
          float value;
          mapped<MAP>(s, false, p_.neg_margin, value, g);
          values[r] += value;
          active[r] += value != 0;
          g *= weight[r] + (e ? other.y : other.x);
          similarities[r] += g * similarity;
          slopes[r] += g;
          g *= e ? c.y : c.x;
        }
      }
    }
    if (part_ != 0) return;
    if (p_.values) add(NEG_VALUE, values), add(NEG_ACTIVE, active);
    if (p_.similarity_sums) add(SIMILARITIES, similarities);
    if (p_.slope_sums) add(SLOPES, slopes);
  }

  // Any tile. These are few, so numbers of rows and columns are loaded again for every place.
  template <Map MAP> __device__ __forceinline__ void mixed(int j0) {
    float values[2][4] = {}, similarities[4] = {}, slopes[4] = {};
    int active[2][4] = {}, pairs[4] = {}, missing[4] = {};
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const int i = i0_ + at_.row(r);
      const bool is_row = i < p_.n, clustered = p_.start && is_row;
      const int start = clustered ? p_.start[i] : 0, end = clustered ? p_.end[i] : 0;
      const int name = p_.row_names && is_row ? p_.row_names[i] : 0;
      const float a = one_of(p_.a, i, is_row, 1.0f), row_bias = one_of(p_.row_bias, i, is_row, 0.0f);
      const float row_offset = one_of(p_.row_offset, i, is_row, 0.0f);
#pragma unroll
      for (int f = 0; f < FRAGMENTS; f++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int j = j0 + at_.template column<FRAGMENTS>(f) + e;
          const bool is_column = j < p_.m;
          const int column_name = name && is_column ? p_.column_names[j] : 0;
          const float bias = p_.row_bias ? row_bias : one_of(p_.column_bias, j, is_column, 0.0f);
          const bool member = is_row && !is_left_out(bias) && admissible(i, j, p_.m, p_.self, name, column_name);
          const bool pair = member && in_range(j, start, end);
          const bool counted = member && (pair || !p_.only_positives);
          missing[r] += is_column && !member;
          pairs[r] += pair;
          float &g = dots_.of(r, f, e);
          const float c = one_of(p_.c, j, is_column, 1.0f);
          const float similarity = similarity_of(g, a, c);
          g = 0;
          if (!counted) continue; // the logit of an excluded place may be infinite
          const float more = row_offset + one_of(p_.column_offset, j, is_column, 0.0f) + bias;
          const float s = __fadd_rn(__fmul_rn(similarity, scale_), more);
          float value;
          mapped<MAP>(s, pair, pair ? p_.pos_margin : p_.neg_margin, value, g);
          values[0][r] += pair ? value : 0.0f;
          values[1][r] += pair ? 0.0f : value;
          active[0][r] += pair && value != 0;
          active[1][r] += !pair && value != 0;
          float weight = 0;
          if (p_.own_weights) weight += p_.own_weights[(pair ? 0 : side_stride(p_.n)) + i];
          if (p_.other_weights) weight += p_.other_weights[(pair ? 0 : side_stride(p_.m)) + j];
          g *= weight;
          similarities[r] += g * similarity;
          slopes[r] += g;
          g *= c;
        }
      }
    }
    if (part_ != 0) return;
    if (p_.values) {
      add(POS_VALUE, values[0]), add(NEG_VALUE, values[1]), add(POS_ACTIVE, active[0]), add(NEG_ACTIVE, active[1]);
      add(POS_COUNT, pairs), add(MISSING, missing);
    }
    if (p_.similarity_sums) add(SIMILARITIES, similarities);
    if (p_.slope_sums) add(SLOPES, slopes);
  }

  // Stores G in the form that the second product reads. float16: lifted; where the lift falls, so do the sums.
  __device__ __forceinline__ void store(uint32_t tile) {
    if constexpr (HALF) {
      float peak = 0;
#pragma unroll
      for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
        for (int r = 0; r < 4; r++) peak = fmaxf(peak, fmaxf(fabsf(dots_.of(r, f, 0)), fabsf(dots_.of(r, f, 1))));
      peak = warp_max(peak);
      if (at_.lane == 0) peaks_[threadIdx.x / WARP] = peak;
      __syncthreads();
      for (int k = 0; k < THREADS / WARP; k++) peak = fmaxf(peak, peaks_[k]);
      const float power = bits_to_float(float_to_bits(peak) & 0x7F800000), lift = fminf(lift_, LIFTED / power);
      if (lift < lift_) {
        products_.scale(lift / lift_);
        lift_ = lift;
      }
    }
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
      for (int r = 0; r < 4; r++) put<Element>(tile, at_, r, at_.template column<FRAGMENTS>(f), dots_.of(r, f, 0) * lift_, dots_.of(r, f, 1) * lift_);
  }

  __device__ __forceinline__ float of_row(int sum, int row) const {
    const float *at = sums_ + sum * WARPS_ACROSS * BLOCK_ROWS + row;
    return at[0] + at[BLOCK_ROWS];
  }
  __device__ __forceinline__ int count_of_row(int sum, int row) const {
    const int *at = reinterpret_cast<const int *>(sums_) + sum * WARPS_ACROSS * BLOCK_ROWS + row;
    return at[0] + at[BLOCK_ROWS];
  }

  __device__ __forceinline__ void write_sums() {
    __syncthreads();
    const int row = threadIdx.x, i = i0_ + row;
    if (row >= BLOCK_ROWS || i >= p_.n) return;
    const int64_t to = p_.order ? p_.order[i] : i, n = p_.n;
    if (p_.values) {
      const int pairs = count_of_row(POS_COUNT, row);
      p_.values[to] = of_row(POS_VALUE, row);
      p_.values[n + to] = of_row(NEG_VALUE, row);
      p_.values[2 * n + to] = float(count_of_row(POS_ACTIVE, row));
      p_.values[3 * n + to] = float(count_of_row(NEG_ACTIVE, row));
      p_.values[4 * n + to] = float(pairs);
      p_.values[5 * n + to] = p_.only_positives ? 0.0f : float(p_.m - count_of_row(MISSING, row) - pairs);
    }
    if (p_.similarity_sums) p_.similarity_sums[to] = of_row(SIMILARITIES, row);
    if (p_.slope_sums) p_.slope_sums[to] = of_row(SLOPES, row);
  }

  template <Map MAP> __device__ __forceinline__ void visit(int j0, bool is_mixed) {
    if (is_mixed) mixed<MAP>(j0);
    else interior<MAP>(j0);
  }

public:
  __device__ __forceinline__ PairBlock(const PairSweep &p, int i0, int part, float *sums)
      : p_(p), i0_(i0), part_(part), scale_(*p.scale), sums_(sums), peaks_(sums + ROW_SUMS_SIZE / 4) {
    products_.clear();
    for (int k = threadIdx.x; k < ROW_SUMS_SIZE / 4; k += THREADS) sums_[k] = 0; // visible after the first tile's barriers
  }

  __device__ __forceinline__ void run(uint32_t tile, uint32_t ring) {
    const Walk walk = pair_walk(p_, i0_, COLUMNS);
    const int steps = part_steps(p_.width, part_), again = p_.whole || !p_.gradient ? 0 : int(blocks_of(steps, STEPS));
    Feed<COLUMNS> feed(p_, walk, i0_, ring, again, part_);
    for (int step = 0; step < walk.steps(); step++) {
      dots_.take(feed, at_, p_.exact);
      const int j0 = walk.tile(step) * COLUMNS;
      if (p_.map == Map::softplus) visit<Map::softplus>(j0, walk.is_mixed(step));
      else visit<Map::hinge>(j0, walk.is_mixed(step));
      if (!p_.gradient) continue;
      store(tile);
      products_.take(feed, tile, part_, steps, p_.whole, at_, p_.exact);
    }
    feed.finish();
    if (p_.gradient) products_.write(p_.gradient, i0_, p_.n, p_.width, part_, steps, scale_ / lift_, p_.add_gradient, at_);
    if (part_ == 0) write_sums();
  }
};

template <class Element> __global__ void __launch_bounds__(THREADS, 1) pair_kernel(const __grid_constant__ PairSweep p) {
  char *const memory = shared_memory();
  PairBlock<Element> own(p, blockIdx.x * BLOCK_ROWS, blockIdx.y * PART_SLICES, reinterpret_cast<float *>(memory + TILE_SIZE));
  own.run(shared_address(memory), shared_address(memory) + TILE_SIZE + ROW_SUMS_SIZE + PEAKS_SIZE);
}

} // namespace fastcl::cuda
