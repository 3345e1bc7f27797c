// Kernels that visit each row once: what comes before, between and after the sweeps over tiles.
//
//     rows_kernel     rows in the order of their clusters, padded, with what belongs to each
//     columns_kernel  the columns' sums, of the lines of a sweep both ways
//     fields_kernel   the wanted statistics, of a forward's sums
//     weights_kernel  what the gradients of the statistics make of each sum
//     side_kernel     the same as the gradient's sweep reads it
//     weighed_kernel  the gradient of rows without positives, of what the forward left of it
//     finish_kernel   the gradient off the normalised rows, in the caller's order and dtype
//
// Version 1: a warp a row or a thread a row, numbers loaded one by one: none of it takes as long as a row of tiles.
#pragma once
#include "launches.h"
#include "weighted.h"

namespace fastcl::cuda {

constexpr int ROWS_AT_ONCE = 256; // threads of a block, a row each
constexpr int ROW_WARPS = 8;      // rows of a block, a warp each
constexpr float NORM_FLOOR = 1e-12f, LARGEST_INVERSE = 1.0f / NORM_FLOOR;
// G is lifted until its largest number lies near 2^LARGEST: float16 ends at 2^16, and would flush a share of 1 / N^2.
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
// Of `source` [n, d], in `order`: rows [n, width], zeros behind; and of each row, where there is such a pointer,
//     norms      1 / max(|x|, NORM_FLOOR), in the caller's order; 0 for a row of zeros
//     row_norms  the same for the row as it is stored in `rows`; 1 for rows that are taken as they are
//     row_names, row_bias  the caller's names, and its bias times log2(e), of -inf LEFT_OUT
//
// Normalised rows whose norm exceeds FAR are stored with norms near 1, multiplied by powers of two.
// scaled: all rows are stored with norms of 1/2 to 1, multiplied by powers of two. Inverse norms are then of one size: that
// of a tiny row would take the numbers that others' products are made of below the range of float16. The power is exact
// but for numbers that it takes below 2^-14, which lose less than 2^-24 of the row's norm.
struct ArrangeRows {
  Rows source;
  int d, width;
  const int64_t *order;
  void *rows; // null: taken as they are
  Dtype dtype;
  bool normalize, scaled;
  float *norms, *row_norms;
  const int *names;
  int *row_names;
  const float *bias;
  float *row_bias;
  bool leave_out; // rows whose bias is -inf are read as zeros
};

__global__ void __launch_bounds__(32 * ROW_WARPS) rows_kernel(const __grid_constant__ ArrangeRows p) {
  const int lane = threadIdx.x % 32;
  const int64_t i = int64_t(blockIdx.x) * ROW_WARPS + threadIdx.x / 32;
  if (i >= p.source.size) return; // the whole warp
  const int64_t row = p.order ? p.order[i] : i, begin = row * p.source.row_stride;
  const int size = p.leave_out && p.bias[row] == -infinity() ? 0 : p.d; // that are read
  float inverse = 1, factor = 1, row_inverse = 1;
  if (p.normalize) {
    float squares = 0;
    for (int d = lane; d < size; d += 32) {
      const float x = load_as(p.source.data, p.source.dtype, begin + d * p.source.column_stride);
      squares += x * x;
    }
    const float norm = __fsqrt_rn(warp_sum(squares));
    inverse = row_inverse = norm == 0 ? 0.0f : __fdiv_rn(1.0f, norm < NORM_FLOOR ? NORM_FLOOR : norm);
    if (norm == 0 || norm > FAR) { // hardly ever
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

// The bases and sums of the columns of a sweep, in the caller's order, from its lines.
struct JoinLines {
  Sweep sweep;
  const float *lines; // [count, 2, m]
  int count;
  const int64_t *order; // of columns
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

// One side's fields, counts [2, n] and parts [2, log_sums, scales, n]; the bases [3, scales, n] of its sums over all,
// negatives and positives, to base 2. statistics [scales, 7, n] are the sweep's, `pairs` the columns that it met.
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
  // An empty sum says nothing about the base. (A sum that is NaN does.)
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
  const float *gradients, *counts, *parts, *bases; // of fields, in the caller's order
  const int64_t *order;
  float *weights, *extremes;
};

enum Extreme : int { LOWEST_SUM, HIGHEST_SUM, PEAK, HIGHEST_OF_ALL, EXTREMES };
__device__ inline float more_extreme(int what, float a, float b) { return what == LOWEST_SUM ? fminf(a, b) : fmaxf(a, b); }
// Of a block's threads; `room` has a number for each warp. Everybody gets it. A number that is none does not count.
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
    const float bases[3] = {p.bases[place], p.bases[2 * every + place], p.bases[every + place]}; // of all, positives, negatives
    float weights[FIELDS] = {};
    for (int f = 0; f < FIELDS; f++) {
      const int64_t field = p.wanted.place[f];
      if (field < 0) continue;
      // A user's formula may well divide by a count of zero in a row that it masks out, and send NaN back.
      const float grad = present[f] ? p.gradients[field * every + place] : 0.0f;
      found[PEAK] += fabsf(grad);
      if (f == SUM_POS) {
        weights[f] = grad;
        continue;
      }
      const float shift = p.parts[field * every + place], sum = p.parts[(p.wanted.log_sums + field) * every + place];
      // The sum may since have been joined by another term, and its base have been raised. That of an empty sum may
      // have fallen: there is nothing to weight then, and nothing to overflow.
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
//     factor  what the lifted sums of gradients are multiplied by: scale / lift
struct MakeSide {
  int64_t n, count, other_count; // blocks of weights_kernel, of either side
  const float *weights, *extremes, *other_extremes;
  bool two_sides;
  float close;
  const float *scale;
  float *side;
  int *one; // null: filled in already, as the others
  float *middle, *lift, *factor;
};

// weight 2^exponent, by halves: the result may be in float32's range where the power is not.
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

// gradient [n, width] of rows without positives: weighted sums of columns times a weight for each row.
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

// out [n, d]: the gradient [n, width], off the rows where they were normalised, in the caller's order and dtype. Below
// the floor of the norm a row was divided by a constant, and there is nothing to project.
struct FinishRows {
  const float *gradient;
  const void *rows; // as they were arranged: the caller's times powers of two
  Dtype dtype;
  int n, d, width;
  const float *norms; // of the caller's rows, in its order; null: taken as they are
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
