// The forward's sweep: one pass computes statistics of each row over the columns, and with `lines` also of each column over the
// rows.
//
// STATISTICS [7, n], in the caller's order: base and sum of 2^(t - base) over the negatives, base and sum over the positives, sum of
// the positives' logits, number of positives, number of inadmissible pairs; t = s log2(e).
//
// If a bound on the logits allows it, no base is subtracted, and row and column share one exponential. Otherwise each lane keeps a
// running maximum for each of its rows, and a column uses the maximum of its tile. Sums over positives, which are few, are in shared
// memory.
//
// LINES [blocks of the grid, 2, m]: each block's part of the columns' sums over negatives, and their bases. Each block writes only its
// own line: no atomics, and a fixed order of additions. The columns' sums over positives come from a second launch, `mixed_only`, with
// rows and columns exchanged, which visits only the few tiles that may hold positives.
//
// Version 1: 128 x 128 tiles (128 x 64 for float32), 32 x 64 per warp. The tiles are wider than the backward's because registers hold
// nothing else.
#pragma once
#include "sweep.h"

namespace fastcl::cuda {

struct StatisticsSweep : Sweep {
  float *statistics;
  float *lines; // null: not wanted
  bool mixed_only;
};

template <class Element> struct StatisticsShape {
  static constexpr int FRAGMENTS = sizeof(Element) == 2 ? 8 : 4, COLUMNS = WARPS_ACROSS * FRAGMENTS * 8;
};

// Numbers of a row in shared memory, separately for each of the warps across: [KEPT, WARPS_ACROSS, BLOCK_ROWS].
enum Kept : int { BASE, SUM, POSITIVE_BASE, POSITIVE_SUM, SUM_POSITIVE, NUM_POSITIVE, NUM_INADMISSIBLE, KEPT };
constexpr int KEPT_SIZE = KEPT * WARPS_ACROSS * BLOCK_ROWS * 4;

// Raises a base to at least `top`, and returns the factor for sums with the old base.
__device__ inline float raise(float &base, float top) {
  const float old = base;
  base = fmaxf(old, top);
  return exp2_fast(old - base);
}
// Adds a sum with another base.
__device__ inline void join(float &base, float &sum, float other_base, float other) {
  const float fading = raise(base, other_base);
  sum = sum * fading + other * exp2_fast(other_base - base);
}

// Sums COUNT numbers over the 8 lanes that share columns. At each step a lane keeps half of its numbers and sends the other half to
// the lane that keeps those. It ends with COUNT / 8 numbers. `kept_by` selects the same ones.
template <int COUNT, int BIT = 16, int NUMBERS> __device__ __forceinline__ void sum_over_rows(float (&v)[NUMBERS], int lane) {
  if constexpr (BIT >= 4) {
    constexpr int HALF = COUNT / 2;
    const bool upper = lane & BIT;
#pragma unroll
    for (int k = 0; k < HALF; k++) {
      const float given = upper ? v[k] : v[k + HALF], own = upper ? v[k + HALF] : v[k];
      v[k] = own + __shfl_xor_sync(ALL_LANES, given, BIT);
    }
    sum_over_rows<HALF, BIT / 2>(v, lane);
  }
}
template <int COUNT, int BIT = 16, int NUMBERS> __device__ __forceinline__ void kept_by(float (&v)[NUMBERS], int lane) {
  if constexpr (BIT >= 4) {
    constexpr int HALF = COUNT / 2;
#pragma unroll
    for (int k = 0; k < HALF; k++) v[k] = lane & BIT ? v[k + HALF] : v[k];
    kept_by<HALF, BIT / 2>(v, lane);
  }
}
// The statistics of a block of rows with tiles of 16 FRAGMENTS columns: logits of a tile, sums over its positives, the final writes.
// The classes below sum the negatives.
template <class Element, int FRAGMENTS> class RowStatistics {
protected:
  static constexpr int COLUMNS = WARPS_ACROSS * FRAGMENTS * 8;
  const StatisticsSweep &p_;
  const Lane at_;
  const int i0_;
  const float scale_;
  float *const kept_; // in shared memory
  float a_[4], base_[4], sum_[4];
  Dots<Element, FRAGMENTS> dots_;

  __device__ __forceinline__ RowStatistics(const StatisticsSweep &p, int i0, bool narrow, float *kept)
      : p_(p), i0_(i0), scale_(*p.scale * LOG2E), kept_(kept) {
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const int i = i0 + at_.row(r);
      a_[r] = one_of(p.a, i, i < p.n, 1.0f);
      base_[r] = narrow ? 0.0f : LOWEST;
      sum_[r] = 0;
    }
    for (int k = threadIdx.x; k < KEPT * WARPS_ACROSS * BLOCK_ROWS; k += THREADS)
      kept[k] = k / (WARPS_ACROSS * BLOCK_ROWS) == POSITIVE_BASE ? LOWEST : 0.0f;
  }
  __device__ __forceinline__ float &kept_of(int what, int row, int across) { return kept_[(what * WARPS_ACROSS + across) * BLOCK_ROWS + row]; }

  // The logits of a tile with negatives only.
  __device__ __forceinline__ void interior_logits(int j0) {
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) {
      const float2 c = two_of(p_.c, j0 + at_.template column<FRAGMENTS>(f), 1.0f);
#pragma unroll
      for (int r = 0; r < 4; r++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float &t = dots_.of(r, f, e);
          t = logit_of(similarity_of(t, a_[r], e ? c.y : c.x), scale_);
        }
    }
  }

  // The logits of any tile, -inf for places that are not negatives; and the sums over its positives.
  __device__ __forceinline__ void mixed_logits(int j0) {
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const int row = at_.row(r), i = i0_ + row;
      const bool is_row = i < p_.n, clustered = p_.start && is_row;
      const int start = clustered ? p_.start[i] : 0, end = clustered ? p_.end[i] : 0;
      const int name = p_.row_names && is_row ? p_.row_names[i] : 0;
      const float row_bias = one_of(p_.row_bias, i, is_row, 0.0f);
      float positive_top = LOWEST;
      uint32_t pairs = 0;
      int inadmissible = 0;
#pragma unroll
      for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int j = j0 + at_.template column<FRAGMENTS>(f) + e;
          const bool is_column = j < p_.m;
          const int column_name = name && is_column ? p_.column_names[j] : 0;
          const float bias = p_.row_bias ? row_bias : one_of(p_.column_bias, j, is_column, 0.0f);
          float &t = dots_.of(r, f, e);
          t = logit_of(similarity_of(t, a_[r], one_of(p_.c, j, is_column, 1.0f)), scale_, p_, bias);
          const bool left_out = is_left_out(bias);
          const bool member = is_row && !left_out && admissible(i, j, p_.m, p_.self, name, column_name);
          inadmissible += is_column && (left_out || (name != 0 && name == column_name));
          if (member && in_range(j, start, end)) {
            pairs |= 1u << (2 * f + e);
            positive_top = fmaxf(positive_top, t);
          } else if (!member) {
            t = -infinity();
          }
        }
      if (__any_sync(ALL_LANES, pairs != 0 || inadmissible != 0)) {
        positive_top = fmaxf(positive_top, __shfl_xor_sync(ALL_LANES, positive_top, 1));
        positive_top = fmaxf(positive_top, __shfl_xor_sync(ALL_LANES, positive_top, 2));
        float positive = 0, logits = 0;
        int count = __popc(pairs);
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
          for (int e = 0; e < 2; e++)
            if (pairs >> (2 * f + e) & 1) {
              float &t = dots_.of(r, f, e);
              positive += exp2_fast(t - positive_top);
              logits += t;
              t = -infinity();
            }
#pragma unroll
        for (int bit = 1; bit <= 2; bit *= 2) {
          positive += __shfl_xor_sync(ALL_LANES, positive, bit);
          logits += __shfl_xor_sync(ALL_LANES, logits, bit);
          count += __shfl_xor_sync(ALL_LANES, count, bit);
          inadmissible += __shfl_xor_sync(ALL_LANES, inadmissible, bit);
        }
        if (at_.lane % 4 == 0) { // one lane per row, so there is no race
          join(kept_of(POSITIVE_BASE, row, at_.across), kept_of(POSITIVE_SUM, row, at_.across), positive_top, positive);
          kept_of(SUM_POSITIVE, row, at_.across) += logits;
          float &positives = kept_of(NUM_POSITIVE, row, at_.across), &others = kept_of(NUM_INADMISSIBLE, row, at_.across);
          positives = __int_as_float(__float_as_int(positives) + count);
          others = __int_as_float(__float_as_int(others) + inadmissible);
        }
      }
    }
  }

  __device__ __forceinline__ void write_rows() {
#pragma unroll
    for (int r = 0; r < 4; r++) {
#pragma unroll
      for (int bit = 1; bit <= 2; bit *= 2) {
        const float other_base = __shfl_xor_sync(ALL_LANES, base_[r], bit), other = __shfl_xor_sync(ALL_LANES, sum_[r], bit);
        join(base_[r], sum_[r], other_base, other);
      }
      if (at_.lane % 4 == 0) {
        kept_of(BASE, at_.row(r), at_.across) = base_[r];
        kept_of(SUM, at_.row(r), at_.across) = sum_[r];
      }
    }
    __syncthreads();
    const int row = threadIdx.x, i = i0_ + row;
    if (row < BLOCK_ROWS && i < p_.n) {
      float base = kept_of(BASE, row, 0), sum = kept_of(SUM, row, 0), logits = kept_of(SUM_POSITIVE, row, 0);
      float positive_base = kept_of(POSITIVE_BASE, row, 0), positive = kept_of(POSITIVE_SUM, row, 0);
      int positives = __float_as_int(kept_of(NUM_POSITIVE, row, 0)), inadmissible = __float_as_int(kept_of(NUM_INADMISSIBLE, row, 0));
      for (int across = 1; across < WARPS_ACROSS; across++) {
        join(base, sum, kept_of(BASE, row, across), kept_of(SUM, row, across));
        join(positive_base, positive, kept_of(POSITIVE_BASE, row, across), kept_of(POSITIVE_SUM, row, across));
        logits += kept_of(SUM_POSITIVE, row, across);
        positives += __float_as_int(kept_of(NUM_POSITIVE, row, across));
        inadmissible += __float_as_int(kept_of(NUM_INADMISSIBLE, row, across));
      }
      float *to = p_.statistics + (p_.order ? p_.order[i] : i);
      const int64_t n = p_.n;
      to[0] = base > LOWEST ? base : 0.0f;
      to[n] = sum;
      to[2 * n] = positive_base > LOWEST ? positive_base : 0.0f;
      to[3 * n] = positive;
      to[4 * n] = logits * LN2;
      to[5 * n] = float(positives);
      to[6 * n] = float(inadmissible + p_.self);
    }
    __syncthreads(); // the next block of rows overwrites shared memory
  }
};

template <class Element> class StatisticsBlock : RowStatistics<Element, StatisticsShape<Element>::FRAGMENTS> {
  static constexpr int FRAGMENTS = StatisticsShape<Element>::FRAGMENTS, COLUMNS = StatisticsShape<Element>::COLUMNS, COUNT = 2 * FRAGMENTS;
  using Base = RowStatistics<Element, FRAGMENTS>;
  using Base::p_, Base::at_, Base::i0_, Base::base_, Base::sum_, Base::dots_;
  const bool narrow_;
  float *const columns_; // in shared memory

  // Sums the negatives of a tile for its rows; with BOTH also for its columns, which share the exponentials.
  template <bool BOTH> __device__ __forceinline__ void add_rows(float (&by_column)[COUNT]) {
#pragma unroll
    for (int r = 0; r < 4; r++) {
      if (!narrow_) {
        float top = LOWEST;
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) top = fmaxf(top, fmaxf(dots_.of(r, f, 0), dots_.of(r, f, 1)));
        sum_[r] *= raise(base_[r], top);
      }
#pragma unroll
      for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float x = exp2_fast(dots_.of(r, f, e) - base_[r]);
          sum_[r] += x;
          if (BOTH) by_column[2 * f + e] += x;
        }
    }
  }

  // Adds the columns' sums over the tile's rows to the block's line.
  __device__ __forceinline__ void add_columns(int j0, float (&by_column)[COUNT], float *line, bool first) {
    float top[COUNT];
    if (!narrow_) {
#pragma unroll
      for (int k = 0; k < COUNT; k++) {
        top[k] = LOWEST;
#pragma unroll
        for (int r = 0; r < 4; r++) top[k] = fmaxf(top[k], dots_.of(r, k / 2, k % 2));
#pragma unroll
        for (int bit = 4; bit <= 16; bit *= 2) top[k] = fmaxf(top[k], __shfl_xor_sync(ALL_LANES, top[k], bit));
        by_column[k] = 0;
#pragma unroll
        for (int r = 0; r < 4; r++) by_column[k] += exp2_fast(dots_.of(r, k / 2, k % 2) - top[k]);
      }
      kept_by<COUNT>(top, at_.lane);
    }
    sum_over_rows<COUNT>(by_column, at_.lane);
#pragma unroll
    for (int k = 0; k < COUNT / 8; k++) {
      const int number = first_kept(at_.lane, COUNT) + k;
      const int place = at_.down * COLUMNS + at_.template column<FRAGMENTS>(number / 2) + number % 2;
      columns_[place] = by_column[k];
      if (!narrow_) columns_[WARPS_DOWN * COLUMNS + place] = top[k];
    }
    __syncthreads(); // the barrier for the next tile's slices comes before this is overwritten
    const int own = threadIdx.x, j = j0 + own;
    if (own < COLUMNS && j < p_.m) { // a column of the line always belongs to the same thread
      float sum = columns_[own], base = narrow_ ? 0.0f : columns_[WARPS_DOWN * COLUMNS + own];
      for (int down = 1; down < WARPS_DOWN; down++) {
        const int place = down * COLUMNS + own;
        if (narrow_) sum += columns_[place];
        else join(base, sum, columns_[WARPS_DOWN * COLUMNS + place], columns_[place]);
      }
      if (!first) {
        if (narrow_) sum += line[j];
        else join(base, sum, line[int64_t(p_.m) + j], line[j]);
      }
      line[j] = sum;
      if (!narrow_) line[int64_t(p_.m) + j] = base;
    }
  }

public:
  __device__ __forceinline__ StatisticsBlock(const StatisticsSweep &p, int i0, bool narrow, float *kept, float *columns)
      : Base(p, i0, narrow, kept), narrow_(narrow), columns_(columns) {}

  __device__ __forceinline__ void run(uint32_t shared, float *line, bool first) {
    Walk walk = walk_of(p_, i0_, COLUMNS, line && i0_ + BLOCK_ROWS > p_.n);
    if (p_.mixed_only) walk.interior = 0;
    Feed<COLUMNS> feed(p_, walk, i0_, shared, 0, 0);
    for (int step = 0; step < walk.steps(); step++) {
      dots_.take(feed, at_, p_.exact);
      const int j0 = walk.tile(step) * COLUMNS;
      float by_column[COUNT];
#pragma unroll
      for (int k = 0; k < COUNT; k++) by_column[k] = 0;
      if (walk.is_mixed(step)) this->mixed_logits(j0);
      else this->interior_logits(j0);
      if (line) add_rows<true>(by_column);
      else add_rows<false>(by_column);
      if (line) add_columns(j0, by_column, line, first);
    }
    feed.finish();
    this->write_rows();
  }
};

template <class Element> __global__ void __launch_bounds__(THREADS, 1) statistics_kernel(const __grid_constant__ StatisticsSweep p) {
  char *const memory = shared_memory();
  constexpr int COLUMNS = StatisticsShape<Element>::COLUMNS;
  float *kept = reinterpret_cast<float *>(memory), *columns = kept + KEPT_SIZE / 4;
  const uint32_t shared = shared_address(memory) + KEPT_SIZE + (p.lines ? 2 * WARPS_DOWN * COLUMNS * 4 : 0);
  float *line = p.lines ? p.lines + 2 * int64_t(p.m) * blockIdx.x : nullptr;
  const bool narrow = is_narrow(p);
  const int blocks = int(blocks_of(p.n, BLOCK_ROWS));
  for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
    StatisticsBlock<Element> own(p, block * BLOCK_ROWS, narrow, kept, columns);
    own.run(shared, line, block == int(blockIdx.x));
  }
}

} // namespace fastcl::cuda
