// A forward that prepares the anchors' gradient, for contrasts that need none (a queue). It computes the statistics of each row, and
//
//     weighted [n, width] = sum_j 2^(t_ij - base_i) c_j y_j  over the negatives, base_i as in the statistics,
//
// from which the backward computes the gradient with a factor per row: 4 n m D operations in all instead of 6. The backward sweeps
// only blocks of rows that have positives.
//
// Version 1: tiles and products are those of the gradient. The two warps that share rows need a common base, a running maximum, which
// they exchange through shared memory.
#pragma once
#include "gradient.h"
#include "statistics.h"

namespace fastcl::cuda {

struct WeightedSweep : StatisticsSweep {
  float *weighted;
  bool whole; // as in GradientSweep
};

// Factor of the weights. Exponentials are at most 1, times inverse norms below 2; float16 overflows at 2^16 and flushes below 2^-24.
constexpr float WEIGHTS_LIFT = 16384;
constexpr int TOPS_SIZE = WARPS_ACROSS * BLOCK_ROWS * 4;

template <class Element> class WeightedBlock : RowStatistics<Element, GradientShape<Element>::FRAGMENTS> {
  static constexpr int FRAGMENTS = GradientShape<Element>::FRAGMENTS, COLUMNS = GradientShape<Element>::COLUMNS;
  using Base = RowStatistics<Element, FRAGMENTS>;
  using Base::at_, Base::i0_, Base::base_, Base::sum_, Base::dots_;
  const WeightedSweep &p_;
  const int part_;
  float *const tops_; // in shared memory: the largest logit of each row, for each warp across
  Products<Element> products_;

  // Raises the bases of rows to the tile's largest logits, and rescales the sums.
  __device__ __forceinline__ void raise_bases() {
#pragma unroll
    for (int r = 0; r < 4; r++) {
      float top = LOWEST;
#pragma unroll
      for (int f = 0; f < FRAGMENTS; f++) top = fmaxf(top, fmaxf(dots_.of(r, f, 0), dots_.of(r, f, 1)));
#pragma unroll
      for (int bit = 1; bit <= 2; bit *= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, bit));
      if (at_.lane % 4 == 0) tops_[at_.across * BLOCK_ROWS + at_.row(r)] = top;
    }
    __syncthreads(); // overwritten only after the barrier for the next tile's slices
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const float top = fmaxf(tops_[at_.row(r)], tops_[BLOCK_ROWS + at_.row(r)]), fading = raise(base_[r], top);
      sum_[r] *= fading;
#pragma unroll
      for (int u = 0; u < OWN_STEPS; u++)
#pragma unroll
        for (int f = 0; f < Products<Element>::ACROSS; f++)
#pragma unroll
          for (int e = 0; e < 2; e++) products_.sums[u][f][r / 2][r % 2 * 2 + e] *= fading;
    }
  }

  __device__ __forceinline__ void weigh(int j0, uint32_t tile) {
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) {
      const int j = j0 + at_.template column<FRAGMENTS>(f);
      const float c[2] = {one_of(p_.c, j, j < p_.m, 1.0f) * WEIGHTS_LIFT, one_of(p_.c, j + 1, j + 1 < p_.m, 1.0f) * WEIGHTS_LIFT};
#pragma unroll
      for (int r = 0; r < 4; r++) {
        float x[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          x[e] = exp2_fast(dots_.of(r, f, e) - base_[r]);
          sum_[r] += x[e];
          x[e] *= c[e];
        }
        put<Element>(tile, at_, r, at_.template column<FRAGMENTS>(f), x[0], x[1]);
      }
    }
  }

public:
  __device__ __forceinline__ WeightedBlock(const WeightedSweep &p, int i0, int part, float *kept, float *tops)
      : Base(p, i0, false, kept), p_(p), part_(part), tops_(tops) {
    products_.clear();
  }

  __device__ __forceinline__ void run(uint32_t tile, uint32_t shared) {
    const Walk walk = walk_of(p_, i0_, COLUMNS, false);
    const int steps = part_steps(p_.width, part_);
    Feed<COLUMNS> feed(p_, walk, i0_, shared, p_.whole ? 0 : int(blocks_of(steps, STEPS)), part_);
    for (int step = 0; step < walk.steps(); step++) {
      dots_.take(feed, at_, p_.exact);
      const int j0 = walk.tile(step) * COLUMNS;
      if (walk.is_mixed(step)) this->mixed_logits(j0);
      else this->interior_logits(j0);
      raise_bases();
      weigh(j0, tile);
      products_.take(feed, tile, part_, steps, p_.whole, at_, p_.exact);
    }
    feed.finish();
    products_.write(p_.weighted, i0_, p_.n, p_.width, part_, steps, 1 / WEIGHTS_LIFT, false, at_);
    if (part_ == 0) this->write_rows();
  }
};

template <class Element> __global__ void __launch_bounds__(THREADS, 1) weighted_kernel(const __grid_constant__ WeightedSweep p) {
  char *const memory = shared_memory();
  auto *const kept = reinterpret_cast<float *>(memory + TILE_SIZE), *const tops = kept + KEPT_SIZE / 4;
  const uint32_t shared = shared_address(memory);
  WeightedBlock<Element> own(p, blockIdx.x * BLOCK_ROWS, blockIdx.y * PART_SLICES, kept, tops);
  own.run(shared, shared + TILE_SIZE + KEPT_SIZE + TOPS_SIZE);
}

} // namespace fastcl::cuda
