// Shared by the sweeps over tiles: their parameters, the ring of rows in shared memory, products.
//
// A block of 8 warps owns 128 rows and visits tiles of columns (tiles.h). Slices of 128 bytes of the tiles' rows are loaded into a
// ring in shared memory, one or two slices ahead of the product. The block's own rows stay in shared memory if they fit; otherwise
// their slices use the same slots.
//
// Version 1: mma.sync and cp.async, the instructions of sm_80, for all newer chips. Rows are multiplied without normalisation; norms
// are applied to the tile. float32 rows are multiplied as sums of two tf32 numbers (three products). That has at least twice the rate
// of FMA and is no less exact, because the two small products have separate sums. These are added to each other first, so that
// <x, y> and <y, x> agree bitwise. Tensor cores truncate when they add to a sum, so for float32 rows they sum only one slice, and
// slices are added outside.
#pragma once
#include "cuda/products.h"
#include "tiles.h"

namespace fastcl::cuda {

struct Sweep {
  const void *x, *y;                   // [n, width], [m, width], padded with zeros
  int n, m, width;                     // numbers of rows and columns; width in bytes
  const float *a, *c;                  // [n], [m]: inverse norms; null: 1
  const float *row_bias, *column_bias; // at most one is not null; times log2(e), or LEFT_OUT
  const int *start, *end;              // [n]: row i's positives are the columns [start_i, end_i); both grow with i
  const int *row_names, *column_names; // a pair with equal nonzero names is inadmissible
  const int64_t *order;                // [n]: the caller's indices of rows
  const float *scale;                  // [1]
  const float *longest, *largest_bias; // [1]: factors of the bound of the logits; null: 1 and 0
  bool self;                           // self-contrast: pairs (i, i) are excluded
  bool exact;                          // multiply float32 in three products, else as tf32
  bool resident;                       // the block's rows stay in shared memory
  int slots, prefetch;                 // of the ring: number of slots, and number of slices that are loaded ahead, 1 or 2
};

// Below this bound of logits (to base 2) no base is subtracted: sums of 2^30 terms of 2^96, or of 2^-96, are in float32's range.
constexpr float NARROW = 96;

// Whether no base is needed. A bound of NaN is not narrow.
__device__ inline bool is_narrow(const Sweep &p) {
  float bound = fabsf(*p.scale) * LOG2E * 1.002f;
  if (p.longest) bound *= *p.longest;
  if (p.largest_bias) bound += *p.largest_bias * LOG2E;
  return bound <= NARROW;
}

// The walk of a block of rows. Interior tiles ignore names and bias. careful: the block of rows is incomplete, so all tiles are mixed.
__device__ inline Walk walk_of(const Sweep &p, int i0, int columns, bool careful) {
  int low = 0, high = 0;
  const int end = smaller(i0 + BLOCK_ROWS, p.n);
  if (p.row_names || p.row_bias || p.column_bias || careful) {
    high = p.m;
  } else if (p.start) {
    low = p.start[i0];
    high = p.end[end - 1];
  } else if (p.self) {
    low = i0;
    high = end;
  }
  return walk(low, high, p.m, columns);
}

// The functions below compute s log2(e) of a pair. Every kernel rounds it in the same way, and (j, i) as (i, j).
__device__ inline float similarity_of(float dot, float a, float c) { return __fmul_rn(dot, __fmul_rn(a, c)); }
__device__ inline float logit_of(float similarity, float scale) { return __fmul_rn(similarity, scale); }
__device__ inline float logit_of(float similarity, float scale, const Sweep &p, float bias) {
  const float t = __fmul_rn(similarity, scale);
  return p.row_bias || p.column_bias ? __fadd_rn(t, bias) : t;
}

// A lane's places in a tile: 4 rows (two fragments with two rows each) and two columns of each fragment across.
struct Lane {
  int lane, down, across;

  __device__ Lane() {
    lane = threadIdx.x % 32;
    down = threadIdx.x / 32 / WARPS_ACROSS;
    across = threadIdx.x / 32 % WARPS_ACROSS;
  }
  __device__ int row(int r) const { return down * WARP_ROWS + r / 2 * 16 + fragment_row(lane, r % 2 * 2); }
  template <int FRAGMENTS> __device__ int column(int f) const { return (across * FRAGMENTS + f) * 8 + fragment_column(lane, 0); }
};

// Two neighbouring numbers of a vector; `otherwise` if it is null.
__device__ inline float2 two_of(const float *values, int j, float otherwise) {
  return values ? *reinterpret_cast<const float2 *>(values + j) : make_float2(otherwise, otherwise);
}
__device__ inline float one_of(const float *values, int j, bool there, float otherwise) { return values && there ? values[j] : otherwise; }

template <int ROWS> __device__ void load_slice(uint32_t to, const void *rows, int row0, int size, int width, int slice) {
  const auto *bytes = static_cast<const unsigned char *>(rows);
#pragma unroll
  for (int k = 0; k < ROWS * CHUNKS / THREADS; k++) {
    const int place = k * THREADS + int(threadIdx.x), row = place / CHUNKS, chunk = place % CHUNKS;
    const int byte = slice * SLICE + chunk * CHUNK;
    const bool there = row0 + row < size && byte < width;
    copy_async(to + place_of(row, chunk), bytes + (there ? int64_t(row0 + row) * width + byte : 0), there);
  }
}

// Loads the slices of a block's walk in the order of the products: for each tile all slices of its rows, then for a second product
// `again` slices from `part` on, unless they are still in the ring.
template <int COLUMNS> class Feed {
public:
  __device__ Feed(const Sweep &p, const Walk &walk, int i0, uint32_t shared, int again, int part)
      : p_(p), walk_(walk), i0_(i0), slices_(int(blocks_of(p.width, SLICE))), again_(again), part_(part), own_(shared) {
    ring_ = shared + (p.resident ? slices_ * BLOCK_ROWS * SLICE : 0);
    slot_size_ = COLUMNS * SLICE + (p.resident ? 0 : BLOCK_ROWS * SLICE);
    if (p.resident) {
      for (int s = 0; s < slices_; s++) load_slice<BLOCK_ROWS>(own_ + s * BLOCK_ROWS * SLICE, p.x, i0, p.n, p.width, s);
      copy_commit();
    }
    for (int k = 0; k < p.prefetch; k++) issue();
  }
  // Waits for the next slice of columns. After the wait all threads are done with the previous slot, so another load starts.
  __device__ uint32_t next() {
    if (p_.prefetch == 2) copy_wait<1>();
    else copy_wait<0>();
    __syncthreads();
    issue();
    const uint32_t at = ring_ + out_ * slot_size_;
    out_ = after(out_);
    return at;
  }
  // The slice of the block's own rows that belongs to the columns' slice at `at`.
  __device__ uint32_t own(int slice, uint32_t at) const { return p_.resident ? own_ + slice * BLOCK_ROWS * SLICE : at + COLUMNS * SLICE; }
  // The address of the slice that was loaded `back` slices before the next one.
  __device__ uint32_t earlier(int back) const { return ring_ + (out_ >= back ? out_ - back : out_ - back + p_.slots) * slot_size_; }
  __device__ int slices() const { return slices_; }
  // The number of steps of the product's depth in a slice.
  __device__ int steps(int slice) const { return smaller((p_.width - slice * SLICE) / STEP, STEPS); }
  __device__ __forceinline__ void finish() {
    copy_wait<0>();
    __syncthreads();
  }

private:
  __device__ int after(int slot) const { return slot + 1 == p_.slots ? 0 : slot + 1; }
  __device__ __forceinline__ void issue() {
    if (step_ < walk_.steps()) {
      const uint32_t to = ring_ + in_ * slot_size_;
      const int slice = item_ < slices_ ? item_ : part_ + item_ - slices_;
      load_slice<COLUMNS>(to, p_.y, walk_.tile(step_) * COLUMNS, p_.m, p_.width, slice);
      if (!p_.resident && item_ < slices_) load_slice<BLOCK_ROWS>(to + COLUMNS * SLICE, p_.x, i0_, p_.n, p_.width, slice);
      in_ = after(in_);
      if (++item_ == slices_ + again_) {
        item_ = 0;
        step_++;
      }
    }
    copy_commit(); // also empty groups, because the wait counts groups
  }
  const Sweep &p_;
  const Walk walk_;
  int i0_, slices_, again_, part_;
  uint32_t own_, ring_;
  int slot_size_, step_ = 0, item_ = 0, in_ = 0, out_ = 0;
};

// Bytes of shared memory of a feed.
template <int COLUMNS> int64_t feed_size(int width, bool resident, int slots) {
  const int64_t own = int64_t(BLOCK_ROWS) * SLICE, columns = COLUMNS * SLICE;
  return resident ? blocks_of(width, SLICE) * own + slots * columns : slots * (own + columns);
}

// Splits a fragment's number into the nearest one that tf32 can represent and the exact rest, of which tensor cores read the first bits.
// Dekker's splitting takes half the instructions of two conversions by cvt.rna, and a NaN stays a NaN: adding half a unit to the bits of
// a device's NaN, 0x7FFFFFFF, would give -0. Numbers from 2^114 on become NaN.
__device__ inline void split(uint32_t x, uint32_t &large, uint32_t &small) {
  const float value = __uint_as_float(x), wide = __fmul_rn(value, 8193.0f), nearest = __fsub_rn(wide, __fsub_rn(wide, value));
  large = __float_as_uint(nearest);
  small = __float_as_uint(__fsub_rn(value, nearest));
}
template <int COUNT> __device__ void split(const uint32_t (&x)[COUNT], uint32_t (&large)[COUNT], uint32_t (&small)[COUNT]) {
#pragma unroll
  for (int k = 0; k < COUNT; k++) split(x[k], large[k], small[k]);
}

// <x_i, y_j> of a warp's 32 rows and 8 FRAGMENTS columns, always with the same instructions in the same order along the depth.
template <class Element, int FRAGMENTS> struct Dots {
  static constexpr bool WIDE = sizeof(Element) == 4;
  float sums[2][FRAGMENTS][4];
  float small[WIDE ? 2 : 1][2][WIDE ? FRAGMENTS : 1][4]; // for float32 rows: the small part of x times y, and of y times x

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
        for (int k = 0; k < 4; k++) {
          sums[m][f][k] = 0;
          if constexpr (WIDE) small[0][m][f][k] = small[1][m][f][k] = 0;
        }
  }

  // x, y: addresses of the warp's rows and columns in a slice in shared memory.
  __device__ __forceinline__ void add(uint32_t x, uint32_t y, int steps, int lane, bool exact) {
    float part[WIDE ? 2 : 1][WIDE ? FRAGMENTS : 1][4] = {}; // for float32 rows: the slice's sums
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
      if (k >= steps) break;
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; m++) load_matrices(a[m], x + place_of(m * 16 + a_row(lane), 2 * k + a_chunk(lane)));
      if constexpr (WIDE) {
        uint32_t large[2][4], rest[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++) split(a[m], large[m], rest[m]);
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f += 2) {
          uint32_t b[4];
          load_matrices(b, y + place_of(f * 8 + b_row(lane), 2 * k + b_chunk(lane)));
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const uint32_t both[2] = {b[2 * h], b[2 * h + 1]};
            uint32_t of_y[2], rest_of_y[2];
            split(both, of_y, rest_of_y);
#pragma unroll
            for (int m = 0; m < 2; m++) {
              multiply(part[m][f + h], large[m], of_y, Element());
              if (exact) {
                multiply(small[0][m][f + h], rest[m], of_y, Element());
                multiply(small[1][m][f + h], large[m], rest_of_y, Element());
              }
            }
          }
        }
      } else {
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f += 2) {
          uint32_t b[4];
          load_matrices(b, y + place_of(f * 8 + b_row(lane), 2 * k + b_chunk(lane)));
          const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
          for (int m = 0; m < 2; m++) {
            multiply(sums[m][f], a[m], left, Element());
            multiply(sums[m][f + 1], a[m], right, Element());
          }
        }
      }
    }
    if constexpr (WIDE) {
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
          for (int k = 0; k < 4; k++) sums[m][f][k] = __fadd_rn(sums[m][f][k], part[m][f][k]);
    }
  }

  __device__ __forceinline__ void finish() {
    if constexpr (WIDE) {
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
          for (int k = 0; k < 4; k++) sums[m][f][k] = __fadd_rn(sums[m][f][k], __fadd_rn(small[0][m][f][k], small[1][m][f][k]));
    }
  }

  // Computes the warp's products for the feed's next tile.
  template <int COLUMNS> __device__ __forceinline__ void take(Feed<COLUMNS> &feed, const Lane &at, bool exact) {
    clear();
    for (int slice = 0; slice < feed.slices(); slice++) {
      const uint32_t y = feed.next();
      add(feed.own(slice, y) + at.down * WARP_ROWS * SLICE, y + at.across * FRAGMENTS * 8 * SLICE, feed.steps(slice), at.lane, exact);
    }
    finish();
  }

  __device__ __forceinline__ float &of(int r, int f, int e) { return sums[r / 2][f][r % 2 * 2 + e]; }
};

} // namespace fastcl::cuda
