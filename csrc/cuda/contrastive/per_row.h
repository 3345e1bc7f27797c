// Kernels that visit each row once, before, between and after the sweeps over tiles.
//
//     rows_kernel     arranges rows by cluster, padded, with their norms, names and bias
//     columns_kernel  column sums from the lines of a sweep in both directions
//     fields_kernel   the wanted statistics from a forward's sums
//     weights_kernel  weights of the exponentials from the gradients of the statistics
//     side_kernel     the weights in the form that the gradient's sweep reads
//     weighed_kernel  the gradient of rows without positives from the forward's weighted sums
//     finish_kernel   the gradient through the normalisation, in the caller's order and dtype
//
// Version 1: one warp or one thread per row, which loads numbers one by one: all of it is cheap compared with a row of tiles.
#pragma once
#include "launches.h"
#include "weighted.h"

namespace fastcl::cuda {

constexpr int ROWS_AT_ONCE = 256; // threads of a block, with a row each
constexpr int ROW_WARPS = 8;      // rows of a block, with a warp each
constexpr float NORM_FLOOR = 1e-12f, LARGEST_INVERSE = 1.0f / NORM_FLOOR;
// G is scaled so that its largest number is near 2^LARGEST: float16 overflows at 2^16, and would flush shares of 1 / N^2.
constexpr float LARGEST = 11;
// 2^FITS, and sums of some, are in float32's range.
constexpr float FITS = 100;
// Norms beyond which rows are stored near 1, by powers of two: products and gradients of two such rows leave the range.
constexpr float FAR = 1099511627776.0f; // 2^40

__device__ inline float load_as(const void *values, Dtype dtype, int64_t place) {
  if (dtype == Dtype::bfloat16) return to_float(static_cast<const Bfloat16 *>(values)[place]);
  if (dtype == Dtype::float16) return to_float(static_cast<const Half *>(values)[place]);
  return static_cast<const float *>(values)[place];
}
__device__ inline void store_as(void *values, Dtype dtype, int64_t place, float x) {
  if (dtype == Dtype::bfloat16) static_cast<Bfloat16 *>(values)[place] = rounded<Bfloat16>(x);
  else if (dtype == Dtype::float16) static_cast<Half *>(values)[place] = rounded<Half>(x);
  else static_cast<float *>(values)[place] = x;
}
// Writes rows [n, width], padded with zeros, from `source` [n, d] in `order`; and for each row, for pointers that are not null,
//     norms      1 / max(|x|, NORM_FLOOR), in the caller's order; 0 for a row of zeros
//     row_norms  the same for the row as stored in `rows`; 1 for rows that are not normalised
//     row_names, row_bias  the caller's names, and its bias times log2(e), with LEFT_OUT for -inf
//
// Normalised rows whose norm exceeds FAR are multiplied by a power of two that brings their norm near 1.
// scaled: all rows are multiplied by powers of two that bring their norms to 1/2 to 1. All inverse norms then have about the same
// size; otherwise the large inverse norm of a tiny row would push other operands below the range of float16. The multiplication is
// exact except for results below 2^-14, which lose less than 2^-24 of the row's norm.
struct ArrangeRows {
  Rows source;
  int d, width;
  const int64_t *order;
  void *rows; // null: the source is used as it is
  Dtype dtype;
  bool normalize, scaled;
  float *norms, *row_norms;
  const int *names;
  int *row_names;
  const float *bias;
  float *row_bias;
  bool leave_out; // rows with bias -inf are read as zeros
};

__global__ void __launch_bounds__(32 * ROW_WARPS) rows_kernel(const __grid_constant__ ArrangeRows p) {
  const int lane = threadIdx.x % 32;
  const int64_t i = int64_t(blockIdx.x) * ROW_WARPS + threadIdx.x / 32;
  if (i >= p.source.size) return; // the whole warp
  const int64_t row = p.order ? p.order[i] : i, begin = row * p.source.row_stride;
  const int size = p.leave_out && p.bias[row] == -infinity() ? 0 : p.d; // numbers that are read
  float inverse = 1, factor = 1, row_inverse = 1;
  if (p.normalize) {
    float squares = 0;
    for (int d = lane; d < size; d += 32) {
      const float x = load_as(p.source.data, p.source.dtype, begin + d * p.source.column_stride);
      squares += x * x;
    }
    const float norm = __fsqrt_rn(warp_sum(squares));
    inverse = row_inverse = norm == 0 ? 0.0f : __fdiv_rn(1.0f, norm < NORM_FLOOR ? NORM_FLOOR : norm);
    if (norm == 0 || norm > FAR) { // rare
      float largest = 0;
      for (int d = lane; d < size; d += 32)
        largest = fmaxf(largest, fabsf(load_as(p.source.data, p.source.dtype, begin + d * p.source.column_stride)));
      largest = warp_max(largest);
      if (norm == 0) {
        if (largest > 0) inverse = row_inverse = LARGEST_INVERSE; // the squares underflow
      } else {
        const int exponent = 253 - (__float_as_int(largest) >> 23);
        factor = __int_as_float((exponent < 1 ? 1 : exponent) << 23);
        squares = 0;
        for (int d = lane; d < size; d += 32) {
          const float x = load_as(p.source.data, p.source.dtype, begin + d * p.source.column_stride) * factor;
          squares += x * x;
        }
        row_inverse = __fdiv_rn(1.0f, __fsqrt_rn(warp_sum(squares)));
        inverse = row_inverse * factor;
      }
    }
    if (p.scaled && inverse > 0 && inverse < infinity()) {
      factor = __int_as_float(__float_as_int(inverse) & 0x7F800000);
      row_inverse = inverse / factor;
    }
  }
  if (p.rows)
    for (int d = lane; d < p.width; d += 32) {
      const float x = d < size ? load_as(p.source.data, p.source.dtype, begin + d * p.source.column_stride) * factor : 0.0f;
      store_as(p.rows, p.dtype, i * p.width + d, x);
    }
  if (lane != 0) return;
  if (p.norms) p.norms[row] = inverse;
  if (p.row_norms) p.row_norms[i] = row_inverse;
  if (p.row_names) p.row_names[i] = p.names[row];
  if (p.row_bias) {
    const float bias = p.bias[row];
    p.row_bias[i] = bias == -infinity() ? LEFT_OUT : bias == infinity() ? bias - bias : bias * LOG2E;
  }
}

// Merges a sweep's lines into bases and sums of the columns, in the caller's order.
struct JoinLines {
  Sweep sweep;
  const float *lines; // [count, 2, m]
  int count;
  const int64_t *order; // order of columns
  float *statistics;    // [7, m]
};

__global__ void __launch_bounds__(ROWS_AT_ONCE) columns_kernel(const __grid_constant__ JoinLines p) {
  const int64_t m = p.sweep.m, j = int64_t(blockIdx.x) * ROWS_AT_ONCE + threadIdx.x;
  if (j >= m) return;
  const bool narrow = is_narrow(p.sweep);
  float base = narrow ? 0.0f : LOWEST, sum = 0;
  for (int k = 0; k < p.count; k++) {
    const float *line = p.lines + 2 * m * k;
    if (narrow) sum += line[j];
    else join(base, sum, line[m + j], line[j]);
  }
  float *to = p.statistics + (p.order ? p.order[j] : j);
  to[0] = base > LOWEST ? base : 0.0f;
  to[m] = sum;
}

// Writes one side's fields, counts [2, n], parts [2, log_sums, scales, n], and bases [3, scales, n] (to base 2) of its sums over all,
// negatives and positives. statistics [scales, 7, n]: from the sweep. pairs: number of columns of the sweep.
struct MakeFields {
  Wanted wanted;
  int64_t n, pairs;
  const float *statistics;
  float *fields, *counts, *parts, *bases;
};

__global__ void __launch_bounds__(ROWS_AT_ONCE) fields_kernel(const __grid_constant__ MakeFields p) {
  const int64_t i = int64_t(blockIdx.x) * ROWS_AT_ONCE + threadIdx.x, n = p.n, k = blockIdx.y, every = gridDim.y * n, place = k * n + i;
  if (i >= n) return;
  const float *own = p.statistics + 7 * k * n + i;
  const float base = own[0], negative = own[n], positive_base = own[2 * n], positive = own[3 * n];
  // An empty sum does not affect the base. A sum that is NaN does.
  float both_base = positive == 0 ? base : fmaxf(base, positive_base);
  if (negative == 0) both_base = positive_base;
  float everything = negative * exp2_fast(fminf(base - both_base, 0.0f));
  everything += positive * exp2_fast(fminf(positive_base - both_base, 0.0f));
  const float bases[3] = {both_base, positive_base, base}, sums[3] = {everything, positive, negative};
  for (int f = 0; f < SUM_POS; f++) {
    const int64_t field = p.wanted.place[f];
    if (field < 0) continue;
    const float shift = bases[f] * LN2;
    p.fields[field * every + place] = shift + logf(sums[f]);
    p.parts[field * every + place] = shift;
    p.parts[(p.wanted.log_sums + field) * every + place] = sums[f];
  }
  if (p.wanted.place[SUM_POS] >= 0) p.fields[p.wanted.place[SUM_POS] * every + place] = own[4 * n];
  p.bases[place] = both_base;
  p.bases[every + place] = base;
  p.bases[2 * every + place] = positive_base;
  if (k == 0) {
    p.counts[i] = own[5 * n];
    p.counts[n + i] = float(p.pairs) - own[6 * n] - own[5 * n];
  }
}

// weights [scales, 7, n], in `order`: the bases of the sums over all, negatives and positives, what a term 2^(t - base)
// of each gets, and what a positive's logit gets on top. extremes [4, scales, blocks]: of a block of rows the smallest
// and the largest log-sum (to base 2) of those that have a gradient, the largest gradient that a logit can get, and the
// largest log-sum of all.
struct MakeWeights {
  Wanted wanted;
  int64_t n;
  const float *gradients, *counts, *parts, *bases; // gradients of fields etc., in the caller's order
  const int64_t *order;
  float *weights, *extremes;
};

enum Extreme : int { LOWEST_SUM, HIGHEST_SUM, PEAK, HIGHEST_OF_ALL, EXTREMES };
__device__ inline float more_extreme(int what, float a, float b) { return what == LOWEST_SUM ? fminf(a, b) : fmaxf(a, b); }
// The extreme of x over a block's threads, returned to all of them; `room` has a number per warp. NaN is ignored.
__device__ inline float most_extreme(int what, float x, float *room) {
  for (int bit = 16; bit > 0; bit /= 2) x = more_extreme(what, x, __shfl_xor_sync(ALL_LANES, x, bit));
  __syncthreads();
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  for (int warp = 0; warp < ROWS_AT_ONCE / 32; warp++) x = more_extreme(what, x, room[warp]);
  return x;
}
__device__ inline float nothing(int what) { return what == LOWEST_SUM ? infinity() : -infinity(); }

__global__ void __launch_bounds__(ROWS_AT_ONCE) weights_kernel(const __grid_constant__ MakeWeights p) {
  char *const memory = shared_memory();
  const int64_t i = int64_t(blockIdx.x) * ROWS_AT_ONCE + threadIdx.x, n = p.n, k = blockIdx.y, every = gridDim.y * n;
  float found[EXTREMES] = {infinity(), -infinity(), 0, -infinity()};
  if (i < n) {
    const int64_t row = p.order ? p.order[i] : i, place = k * n + row;
    const bool positives = p.counts[row] > 0, negatives = p.counts[n + row] > 0;
    const bool present[FIELDS] = {positives || negatives, positives, negatives, positives};
    const float bases[3] = {p.bases[place], p.bases[2 * every + place], p.bases[every + place]}; // over all, positives, negatives
    float weights[FIELDS] = {};
    for (int f = 0; f < FIELDS; f++) {
      const int64_t field = p.wanted.place[f];
      if (field < 0) continue;
      // For a row that it masks out, a user's formula may divide by a count of zero and give a NaN gradient.
      const float grad = present[f] ? p.gradients[field * every + place] : 0.0f;
      found[PEAK] += fabsf(grad);
      if (f == SUM_POS) {
        weights[f] = grad;
        continue;
      }
      const float shift = p.parts[field * every + place], sum = p.parts[(p.wanted.log_sums + field) * every + place];
      // Another term may have been added to the sum since, which raises its base. The base of an empty sum may be lower, but then
      // the weight is 0 and must not overflow.
      weights[f] = (sum == 0 ? 0.0f : grad / sum) * exp2_fast(fminf((bases[f] * LN2 - shift) * LOG2E, 0.0f));
      if (sum > 0) {
        const float log_sum = shift * LOG2E + log2f(sum);
        found[HIGHEST_OF_ALL] = fmaxf(found[HIGHEST_OF_ALL], log_sum);
        if (grad == 0) continue;
        found[LOWEST_SUM] = fminf(found[LOWEST_SUM], log_sum);
        found[HIGHEST_SUM] = fmaxf(found[HIGHEST_SUM], log_sum);
      }
    }
    float *to = p.weights + 7 * k * n + i;
    to[0] = bases[LSE_ALL];
    to[n] = bases[LSE_NEG];
    to[2 * n] = bases[LSE_POS];
    to[3 * n] = weights[LSE_ALL];
    to[4 * n] = weights[LSE_NEG];
    to[5 * n] = weights[LSE_POS];
    to[6 * n] = weights[SUM_POS];
  }
  for (int what = 0; what < EXTREMES; what++) {
    const float extreme = most_extreme(what, found[what], reinterpret_cast<float *>(memory));
    if (threadIdx.x == 0) p.extremes[(int64_t(what) * gridDim.y + k) * gridDim.x + blockIdx.x] = extreme;
  }
}

// side [scales, 5, side_stride(n)], as the gradient's sweep reads it, of one side's weights; and, where asked for, of
// each scale
//     one     1 where one exponential serves both sides, whose log-sums then differ by less than `close`, but for those that
//             have no gradient: as single positives' of large logits, whose weight is 0
//     middle  the one base, in the middle of these log-sums (to base 2): no logit exceeds the log-sum of a set that it is in,
//             and the highest log-sum of all is less than FITS above, so none overflows
//     lift    the power of two that brings the largest gradient of a logit near 2^LARGEST
//     factor  multiplies the lifted sums of gradients: scale / lift
struct MakeSide {
  int64_t n, count, other_count; // number of blocks of weights_kernel on each side
  const float *weights, *extremes, *other_extremes;
  bool two_sides;
  float close;
  const float *scale;
  float *side;
  int *one; // null: this and the next three are already written
  float *middle, *lift, *factor;
};

// weight * 2^exponent in two halves: the result may be in float32's range when the power is not.
__device__ inline float shifted(float weight, float exponent) {
  const float half = exp2_fast(exponent * 0.5f);
  return weight == 0 ? weight : weight * half * half;
}

__global__ void __launch_bounds__(ROWS_AT_ONCE) side_kernel(const __grid_constant__ MakeSide p) {
  char *const memory = shared_memory();
  auto *room = reinterpret_cast<float *>(memory);
  const int64_t k = blockIdx.y, scales = gridDim.y;
  const auto extreme = [&](int what, const float *extremes, int64_t count, bool of_scale) {
    float found = nothing(what);
    const float *from = extremes + (what * scales + (of_scale ? k : 0)) * count;
    for (int64_t i = threadIdx.x; i < (of_scale ? count : scales * count); i += ROWS_AT_ONCE) found = more_extreme(what, found, from[i]);
    return most_extreme(what, found, room);
  };
  float low = extreme(LOWEST_SUM, p.extremes, p.count, true), high = extreme(HIGHEST_SUM, p.extremes, p.count, true);
  float peak = extreme(PEAK, p.extremes, p.count, false), most = extreme(HIGHEST_OF_ALL, p.extremes, p.count, true);
  if (p.other_extremes) {
    low = fminf(low, extreme(LOWEST_SUM, p.other_extremes, p.other_count, true));
    high = fmaxf(high, extreme(HIGHEST_SUM, p.other_extremes, p.other_count, true));
    peak += extreme(PEAK, p.other_extremes, p.other_count, false);
    most = fmaxf(most, extreme(HIGHEST_OF_ALL, p.other_extremes, p.other_count, true));
  }
  float lift = LARGEST - log2f(fmaxf(peak, 1e-30f));
  lift = peak < infinity() ? exp2f(fminf(fmaxf(floorf(lift), -100.0f), 100.0f)) : 1.0f;
  const float between = high >= low ? (high + low) * 0.5f : 0.0f;
  const bool one = p.two_sides && high - low < p.close && most - between < FITS;
  const float middle = one ? between : 0.0f;
  if (blockIdx.x == 0 && threadIdx.x == 0 && p.one) {
    p.one[k] = one;
    p.middle[k] = middle;
    p.lift[k] = lift;
    p.factor[k] = p.scale[k] / lift;
  }
  const int64_t i = int64_t(blockIdx.x) * ROWS_AT_ONCE + threadIdx.x, n = p.n, stride = side_stride(n);
  if (i >= n) return;
  const float *own = p.weights + 7 * k * n + i;
  const float both_base = own[0], base = own[n], positive_base = own[2 * n];
  float everything = own[3 * n], negative = own[4 * n], positive = own[5 * n];
  if (one) {
    everything = shifted(everything, middle - both_base);
    negative = everything + shifted(negative, middle - base);
    positive = everything + shifted(positive, middle - positive_base);
  } else {
    negative += everything * exp2_fast(fminf(base - both_base, 0.0f));
    positive += everything * exp2_fast(fminf(positive_base - both_base, 0.0f));
  }
  float *to = p.side + 5 * k * stride + i;
  to[0] = base;
  to[stride] = negative * lift;
  to[2 * stride] = positive_base;
  to[3 * stride] = positive * lift;
  to[4 * stride] = own[6 * n] * lift;
}

// gradient [n, width] of rows without positives: weighted sums of columns times a weight per row.
struct ApplyWeights {
  const float *weighted, *side; // side [5, side_stride(n)]
  const float *factor;
  int64_t n, width;
  float *gradient;
};

__global__ void __launch_bounds__(32 * ROW_WARPS) weighed_kernel(const __grid_constant__ ApplyWeights p) {
  const int64_t i = int64_t(blockIdx.x) * ROW_WARPS + threadIdx.x / 32;
  if (i >= p.n) return;
  const float weight = p.side[side_stride(p.n) + i], factor = *p.factor;
  for (int64_t d = threadIdx.x % 32; d < p.width; d += 32) p.gradient[i * p.width + d] = p.weighted[i * p.width + d] * weight * factor;
}

// out [n, d]: the gradient [n, width] through the normalisation, if any, in the caller's order and dtype. Rows with norms below the
// floor were divided by a constant and need no projection.
struct FinishRows {
  const float *gradient;
  const void *rows; // the arranged rows: the caller's times powers of two
  Dtype dtype;
  int n, d, width;
  const float *norms; // of the caller's rows, in the caller's order; null: not normalised
  const int64_t *order;
  void *out;
  Dtype out_dtype;
};

__global__ void __launch_bounds__(32 * ROW_WARPS) finish_kernel(const __grid_constant__ FinishRows p) {
  const int lane = threadIdx.x % 32;
  const int64_t i = int64_t(blockIdx.x) * ROW_WARPS + threadIdx.x / 32;
  if (i >= p.n) return;
  const int64_t row = p.order ? p.order[i] : i;
  const float *g = p.gradient + i * p.width;
  float along = 0, factor = 1;
  if (p.norms) {
    float squares = 0;
    for (int d = lane; d < p.d; d += 32) {
      const float x = load_as(p.rows, p.dtype, i * p.width + d);
      along += x * g[d];
      squares += x * x;
    }
    along = warp_sum(along);
    squares = warp_sum(squares);
    factor = p.norms[row];
    along = factor == 0 || factor >= LARGEST_INVERSE ? 0.0f : along / squares;
  }
  for (int d = lane; d < p.d; d += 32) {
    const float x = p.norms ? load_as(p.rows, p.dtype, i * p.width + d) : 0.0f;
    store_as(p.out, p.out_dtype, row * p.d + d, (g[d] - along * x) * factor);
  }
}

} // namespace fastcl::cuda
