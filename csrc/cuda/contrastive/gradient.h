// The backward's sweep: a block computes the gradient of its rows over all columns.
//
// It recomputes the logits with the forward's rounding, and from them G, the gradient of a logit: the row's share (its softmax over
// the columns), the column's share (its softmax over the rows), or both, as in self-contrast. G and its positive term are added in
// float32 and rounded once, norms included, for the product with the columns. No two blocks write to the same place.
//
// A side's input is [5, side_stride(n)], 0 for rows without gradient:
//     0, 1  base and weight of the negatives: 2^(t - base) * weight
//     2, 3  base and weight of the positives
//     4     the constant that is added for a positive: the gradient of the sum of positives' logits
//
// Version 1: 128 x 64 tiles (128 x 32 for float32). G passes through shared memory, so that a warp multiplies 32 rows of it by half
// of the columns of the gradient. With 16 rows and all columns G could stay in registers, but each product would load twice as
// much. Both products use the slices of Y that are still in the ring.
#pragma once
#include "sweep.h"

namespace fastcl::cuda {

struct GradientSweep : Sweep {
  const float *side, *other;   // [5, side_stride(n)], [5, side_stride(m)]; null: no gradient
  const float *middle;         // [1]: the shared base
  const int *one;              // [1]: 1 if the weights of both sides use the shared base
  const float *factor;         // [1]: multiplies the gradient
  const float *lift;           // [1]: factor of the weights, by which sums are divided
  float *gradient;             // [n, width], or null: sum_j G_ij c_j y_j, times factor
  float *similarity_sums;      // [n], or null: sum_j G_ij * similarity
  float *sums;                 // [n] in the caller's order, or null: sum_j G_ij
  bool some;                   // skip blocks of rows without positives: their gradient is already written
  bool whole;                  // all slices of a tile stay in the ring until its end
  bool add_gradient, add_sums; // add to the existing numbers instead of overwriting them
};

template <class Element> struct GradientShape {
  static constexpr int FRAGMENTS = sizeof(Element) == 2 ? 4 : 2, COLUMNS = WARPS_ACROSS * FRAGMENTS * 8;
  static_assert(COLUMNS * sizeof(Element) == SLICE, "a tile of G is a slice");
};
// Padded, because two neighbouring numbers are loaded at once.
__host__ __device__ inline int64_t side_stride(int64_t n) { return (n + 3) / 4 * 4; }

constexpr int TILE_SIZE = BLOCK_ROWS * SLICE;

// Stores G of two neighbouring places in the form that the second product reads.
template <class Element> __device__ __forceinline__ void put(uint32_t tile, const Lane &at, int r, int column, float left, float right) {
  const int byte = column * int(sizeof(Element));
  const uint32_t place = tile + place_of(at.row(r), byte / CHUNK) + byte % CHUNK;
  if constexpr (sizeof(Element) == 4) store_shared(place, left, right);
  else store_shared(place, uint32_t(rounded<Element>(left).bits) | uint32_t(rounded<Element>(right).bits) << 16);
}

// The number of steps that a block owns, from slice `part` on.
__host__ __device__ inline int part_steps(int width, int part) { return smaller(width / STEP - part * STEPS, PART_SLICES * STEPS); }

// The warp's 32 rows of G [BLOCK_ROWS, COLUMNS], stored in shared memory like a slice, times columns of Y.
template <class Element> struct Products {
  static constexpr bool WIDE = sizeof(Element) == 4;
  static constexpr int ACROSS = STEP / (8 * int(sizeof(Element))); // fragments in a step of the columns
  float sums[OWN_STEPS][ACROSS][2][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int u = 0; u < OWN_STEPS; u++)
#pragma unroll
      for (int f = 0; f < ACROSS; f++)
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
          for (int k = 0; k < 4; k++) sums[u][f][m][k] = 0;
  }

  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (int u = 0; u < OWN_STEPS; u++)
#pragma unroll
      for (int f = 0; f < ACROSS; f++)
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
          for (int k = 0; k < 4; k++) sums[u][f][m][k] *= factor;
  }

  static __device__ __forceinline__ void load(uint32_t (&g)[STEPS][2][4], uint32_t tile, int lane) {
#pragma unroll
    for (int k = 0; k < STEPS; k++)
#pragma unroll
      for (int m = 0; m < 2; m++) load_matrices(g[k][m], tile + place_of(m * 16 + a_row(lane), 2 * k + a_chunk(lane)));
  }

  // y: slice S of the part, which has `steps` steps in all.
  template <int S> __device__ __forceinline__ void add(const uint32_t (&g)[STEPS][2][4], uint32_t y, int steps, const Lane &at, bool exact) {
#pragma unroll
    for (int v = 0; v < STEPS / WARPS_ACROSS; v++) {
      constexpr int FIRST = S * STEPS / WARPS_ACROSS;
      const int u = FIRST + v, step = own_step(u, at.across), chunk = 2 * (step - S * STEPS);
      if (step >= steps) continue;
      float part[2][4] = {}; // for float32 rows: the tile's sums are separate, because tensor cores truncate when they add to a long sum
#pragma unroll
      for (int k = 0; k < STEPS; k++) {
        if constexpr (WIDE) {
          const int row = k * 8 + at.lane % 4, column = at.lane / 4;
          uint32_t b[2], large[2], small[2];
#pragma unroll
          for (int h = 0; h < 2; h++) b[h] = __float_as_uint(load_shared(y + place_of(row + 4 * h, chunk + column / 4) + column % 4 * 4));
          split(b, large, small);
#pragma unroll
          for (int m = 0; m < 2; m++) {
            uint32_t of_g[4], rest[4];
            split(g[k][m], of_g, rest);
            if (exact) {
              multiply(part[m], rest, large, Element());
              multiply(part[m], of_g, small, Element());
            }
            multiply(part[m], of_g, large, Element());
          }
        } else {
          uint32_t b[4];
          load_matrices_transposed(b, y + place_of(k * 16 + transposed_row(at.lane), chunk + transposed_chunk(at.lane)));
          const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
          for (int m = 0; m < 2; m++) {
            multiply(sums[u][0][m], g[k][m], left, Element());
            multiply(sums[u][ACROSS - 1][m], g[k][m], right, Element());
          }
        }
      }
      if constexpr (WIDE) {
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
          for (int k = 0; k < 4; k++) sums[u][0][m][k] = __fadd_rn(sums[u][0][m][k], part[m][k]);
      }
    }
  }

  template <int S, int COLUMNS> __device__ __forceinline__ void add_next(Feed<COLUMNS> &feed, const uint32_t (&g)[STEPS][2][4], int part, int steps,
                                                                         bool whole, const Lane &at, bool exact) {
    if (S * STEPS >= steps) return;
    add<S>(g, whole ? feed.earlier(feed.slices() - part - S) : feed.next(), steps, at, exact);
  }
  // Adds the tile's product of G, which all warps have written, with its columns from slice `part` on.
  template <int COLUMNS>
  __device__ __forceinline__ void take(Feed<COLUMNS> &feed, uint32_t tile, int part, int steps, bool whole, const Lane &at, bool exact) {
    __syncthreads(); // G is complete; it is overwritten only after the barrier for the next tile's slices
    uint32_t g[STEPS][2][4];
    load(g, tile + at.down * WARP_ROWS * SLICE, at.lane);
    add_next<0>(feed, g, part, steps, whole, at, exact);
    add_next<1>(feed, g, part, steps, whole, at, exact);
    add_next<2>(feed, g, part, steps, whole, at, exact);
    add_next<3>(feed, g, part, steps, whole, at, exact);
  }

  // Writes the sums times a factor to the rows from i0 on of `to` [n, width of a row in numbers]. more: adds to the existing
  // numbers.
  __device__ __forceinline__ void write(float *to, int i0, int n, int width, int part, int steps, float factor, bool more, const Lane &at) const {
    const int numbers = width / int(sizeof(Element));
#pragma unroll
    for (int u = 0; u < OWN_STEPS; u++) {
      const int step = own_step(u, at.across);
      if (step >= steps) continue;
#pragma unroll
      for (int f = 0; f < ACROSS; f++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
          const int i = i0 + at.row(r);
          const int column = (part * SLICE + step * STEP) / int(sizeof(Element)) + f * 8 + fragment_column(at.lane, 0);
          if (i >= n) continue;
          auto *place = reinterpret_cast<float2 *>(to + int64_t(i) * numbers + column);
          const float2 before = more ? *place : make_float2(0.0f, 0.0f);
          const float *own = sums[u][f][r / 2] + r % 2 * 2;
          *place = make_float2(before.x + own[0] * factor, before.y + own[1] * factor);
        }
    }
  }
};

template <class Element> class GradientBlock {
  static constexpr int FRAGMENTS = GradientShape<Element>::FRAGMENTS, COLUMNS = GradientShape<Element>::COLUMNS;
  const GradientSweep &p_;
  const Lane at_;
  const int i0_, part_; // part_: the first slice of the block's columns of the gradient
  const bool one_;
  const float scale_, middle_;
  float a_[4], base_[4], weight_[4], similarity_sums_[4], sums_[4];
  Dots<Element, FRAGMENTS> dots_;
  Products<Element> products_;

  __device__ __forceinline__ const float *of_other(int k) const { return p_.other + k * side_stride(p_.m); }

  // A tile with negatives only. ONE: with the shared base.
  template <bool ONE> __device__ __forceinline__ void interior(int j0, uint32_t tile) {
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) {
      const int j = j0 + at_.template column<FRAGMENTS>(f);
      const float2 c = two_of(p_.c, j, 1.0f);
      const float2 weight = two_of(p_.other ? of_other(1) : nullptr, j, 0.0f);
      float2 base = make_float2(0.0f, 0.0f);
      if (!ONE && p_.other) base = two_of(of_other(0), j, 0.0f);
#pragma unroll
      for (int r = 0; r < 4; r++) {
        float g[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float similarity = similarity_of(dots_.of(r, f, e), a_[r], e ? c.y : c.x), t = logit_of(similarity, scale_);
          const float other = e ? weight.y : weight.x;
          if (ONE) {
            g[e] = exp2_fast(t - middle_) * (weight_[r] + other);
          } else {
            g[e] = 0;
            if (p_.side) g[e] = exp2_fast(t - base_[r]) * weight_[r];
            if (p_.other) g[e] += exp2_fast(t - (e ? base.y : base.x)) * other;
          }
          similarity_sums_[r] += g[e] * similarity;
          g[e] *= e ? c.y : c.x;
        }
        put<Element>(tile, at_, r, at_.template column<FRAGMENTS>(f), g[0], g[1]);
      }
    }
  }

  // One side's share of the gradient of a logit.
  __device__ __forceinline__ float share(const float *side, int64_t size, int k, bool there, float t, bool pair) const {
    if (!side || !there) return 0;
    const float *of_pair = side + (pair ? 2 * size : 0) + k;
    const float weight = of_pair[size], base = one_ ? middle_ : of_pair[0];
    return exp2_fast(t - base) * weight + (pair ? side[4 * size + k] : 0.0f);
  }

  // Any tile. These are few, so numbers of rows and columns are loaded again for every place.
  __device__ __forceinline__ void mixed(int j0, uint32_t tile) {
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const int i = i0_ + at_.row(r);
      const bool is_row = i < p_.n, clustered = p_.start && is_row;
      const int start = clustered ? p_.start[i] : 0, end = clustered ? p_.end[i] : 0;
      const int name = p_.row_names && is_row ? p_.row_names[i] : 0;
      const float row_bias = one_of(p_.row_bias, i, is_row, 0.0f);
#pragma unroll
      for (int f = 0; f < FRAGMENTS; f++) {
        float g[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int j = j0 + at_.template column<FRAGMENTS>(f) + e;
          const bool is_column = j < p_.m;
          const int column_name = name && is_column ? p_.column_names[j] : 0;
          const float bias = p_.row_bias ? row_bias : one_of(p_.column_bias, j, is_column, 0.0f);
          const float c = one_of(p_.c, j, is_column, 1.0f);
          const float similarity = similarity_of(dots_.of(r, f, e), a_[r], c), t = logit_of(similarity, scale_, p_, bias);
          const bool member = is_row && !is_left_out(bias) && admissible(i, j, p_.m, p_.self, name, column_name);
          const bool pair = member && in_range(j, start, end);
          g[e] = member ? share(p_.side, side_stride(p_.n), i, is_row, t, pair) + share(p_.other, side_stride(p_.m), j, is_column, t, pair) : 0.0f;
          if (member) similarity_sums_[r] += g[e] * similarity; // the similarity of excluded places may be infinite
          sums_[r] += g[e];
          if (member) g[e] *= c;
        }
        put<Element>(tile, at_, r, at_.template column<FRAGMENTS>(f), g[0], g[1]);
      }
    }
  }

  // Sums over lanes and warps for each row; `place` is in shared memory.
  __device__ __forceinline__ void write_sums(float *place) {
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 4; r++) {
#pragma unroll
      for (int bit = 1; bit <= 2; bit *= 2) {
        similarity_sums_[r] += __shfl_xor_sync(ALL_LANES, similarity_sums_[r], bit);
        sums_[r] += __shfl_xor_sync(ALL_LANES, sums_[r], bit);
      }
      if (at_.lane % 4 == 0) {
        place[at_.across * BLOCK_ROWS + at_.row(r)] = similarity_sums_[r];
        place[(WARPS_ACROSS + at_.across) * BLOCK_ROWS + at_.row(r)] = sums_[r];
      }
    }
    __syncthreads();
    const int row = threadIdx.x, i = i0_ + row;
    if (row >= BLOCK_ROWS || i >= p_.n) return;
    const float lift = *p_.lift;
    if (p_.similarity_sums) p_.similarity_sums[i] = (place[row] + place[BLOCK_ROWS + row]) / lift;
    if (p_.sums) {
      float &to = p_.sums[p_.order ? p_.order[i] : i];
      const float sum = (place[WARPS_ACROSS * BLOCK_ROWS + row] + place[(WARPS_ACROSS + 1) * BLOCK_ROWS + row]) / lift;
      to = p_.add_sums ? to + sum : sum;
    }
  }

public:
  __device__ __forceinline__ GradientBlock(const GradientSweep &p, int i0, int part)
      : p_(p), i0_(i0), part_(part), one_(p.one && *p.one), scale_(*p.scale * LOG2E), middle_(p.middle ? *p.middle : 0.0f) {
    products_.clear();
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const int i = i0 + at_.row(r);
      const bool there = i < p.n;
      a_[r] = one_of(p.a, i, there, 1.0f);
      base_[r] = one_of(p.side, i, there, 0.0f);
      weight_[r] = p.side && there ? p.side[side_stride(p.n) + i] : 0.0f;
      similarity_sums_[r] = sums_[r] = 0;
    }
  }

  __device__ __forceinline__ void run(uint32_t shared, float *place) {
    const Walk walk = walk_of(p_, i0_, COLUMNS, false);
    const int steps = part_steps(p_.width, part_);
    Feed<COLUMNS> feed(p_, walk, i0_, shared + TILE_SIZE, p_.whole ? 0 : int(blocks_of(steps, STEPS)), part_);
    for (int step = 0; step < walk.steps(); step++) {
      dots_.take(feed, at_, p_.exact);
      const int j0 = walk.tile(step) * COLUMNS;
      if (walk.is_mixed(step)) mixed(j0, shared);
      else if (one_) interior<true>(j0, shared);
      else interior<false>(j0, shared);
      products_.take(feed, shared, part_, steps, p_.whole, at_, p_.exact);
    }
    feed.finish();
    if (p_.gradient) products_.write(p_.gradient, i0_, p_.n, p_.width, part_, steps, *p_.factor, p_.add_gradient, at_);
    if (part_ == 0) write_sums(place);
  }
};

template <class Element> __global__ void __launch_bounds__(THREADS, 1) gradient_kernel(const __grid_constant__ GradientSweep p) {
  char *const memory = shared_memory();
  const int i0 = blockIdx.x * BLOCK_ROWS;
  if (p.some && p.start[i0] >= p.end[smaller(i0 + BLOCK_ROWS, p.n) - 1]) return; // start and end grow with the row
  GradientBlock<Element> own(p, i0, blockIdx.y * PART_SLICES);
  own.run(shared_address(memory), reinterpret_cast<float *>(memory));
}

} // namespace fastcl::cuda
