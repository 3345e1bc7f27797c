// The kernels that a call launches, in order. Nothing here allocates or waits; decisions that depend on values are made in the
// kernels.
#include "launches.h"
#include "per_row.h"
#include "rows.h"
#include "sweeps.h"

namespace fastcl::cuda {

namespace {

bool is_normed(const Contrast &p) { return p.anchors.normalize || (!p.self_contrast() && p.contrasts.normalize); }

void arrange(const Contrast &p, const RowSet &set, const Where &where) {
  if (set.arranged && !set.norms && !set.row_norms && !set.row_names && !set.row_bias) return;
  ArrangeRows call{};
  call.source = set.source;
  call.d = p.dimension;
  call.width = p.width;
  call.order = set.order;
  call.rows = set.arranged ? nullptr : set.rows;
  call.dtype = p.dtype;
  call.normalize = set.normalize;
  call.scaled = set.normalize && !set.arranged && p.dtype == Dtype::float16;
  call.norms = set.normalize ? set.norms : nullptr;
  call.row_norms = is_normed(p) ? set.row_norms : nullptr;
  call.names = set.names;
  call.row_names = set.names ? set.row_names : nullptr;
  call.bias = set.bias;
  call.row_bias = set.bias ? set.row_bias : nullptr;
  call.leave_out = set.bias && set.leave_out;
  launch("rows", rows_kernel, {blocks_of(set.source.size, ROW_WARPS), 32 * ROW_WARPS}, where, call);
}

} // namespace

void arrange(const Contrast &p, const Where &where) {
  arrange(p, p.anchors, where);
  if (!p.self_contrast()) arrange(p, p.contrasts, where);
}

void describe(Sweep &sweep, const Contrast &p, const RowSet &rows, const RowSet &columns, int scale) {
  sweep.x = rows.rows;
  sweep.y = columns.rows;
  sweep.n = int(rows.source.size);
  sweep.m = int(columns.source.size);
  sweep.width = p.width * (p.dtype == Dtype::float32 ? 4 : 2);
  if (is_normed(p)) {
    sweep.a = rows.row_norms;
    sweep.c = columns.row_norms;
  }
  sweep.row_bias = rows.bias ? rows.row_bias : nullptr;
  sweep.column_bias = columns.bias ? columns.row_bias : nullptr;
  sweep.start = rows.start;
  sweep.end = rows.end;
  sweep.row_names = rows.names ? rows.row_names : nullptr;
  sweep.column_names = columns.names ? columns.row_names : nullptr;
  sweep.order = rows.order;
  sweep.scale = p.logit_scale + scale;
  sweep.longest = p.longest;
  sweep.largest_bias = p.largest_bias;
  sweep.self = p.self_contrast();
  sweep.exact = p.exact;
}

namespace {

void run(Dtype dtype, const StatisticsSweep &sweep, int64_t blocks, const Where &where) {
  const auto go = dtype == Dtype::bfloat16  ? launch_statistics<Bfloat16>
                  : dtype == Dtype::float16 ? launch_statistics<Half>
                                            : launch_statistics<float>;
  go(sweep, blocks, where);
}
void run(Dtype dtype, const GradientSweep &sweep, const Where &where) {
  const auto go = dtype == Dtype::bfloat16 ? launch_gradient<Bfloat16> : dtype == Dtype::float16 ? launch_gradient<Half> : launch_gradient<float>;
  go(sweep, where);
}

void run(Dtype dtype, const WeightedSweep &sweep, const Where &where) {
  const auto go = dtype == Dtype::bfloat16 ? launch_weighted<Bfloat16> : dtype == Dtype::float16 ? launch_weighted<Half> : launch_weighted<float>;
  go(sweep, where);
}

Launch rows_at_once(int64_t rows, int scales) { return {blocks_of(rows, ROWS_AT_ONCE), ROWS_AT_ONCE, ROWS_AT_ONCE / 32 * 4, false, scales}; }

void make_fields(const ContrastForward &call, const Side &side, int64_t rows, int64_t pairs, const Where &where) {
  const MakeFields own{call.wanted, rows, pairs, side.statistics, side.fields, side.counts, side.parts, side.bases};
  launch("fields", fields_kernel, rows_at_once(rows, call.problem.scales), where, own);
}

void make_weights(const ContrastBackward &call, const Side &side, const RowSet &rows, const Where &where) {
  const MakeWeights own{call.wanted, rows.source.size, side.fields, side.counts, side.parts, side.bases, rows.order, side.weights, side.extremes};
  launch("weights", weights_kernel, rows_at_once(rows.source.size, call.problem.scales), where, own);
}

} // namespace

void finish(const Contrast &p, const RowSet &rows, const float *gradient, const float *norms, void *out, Dtype dtype, const Where &where) {
  const FinishRows call{gradient, rows.rows, p.dtype, int(rows.source.size), p.dimension, p.width, norms, rows.order, out, dtype};
  launch("finish", finish_kernel, {blocks_of(rows.source.size, ROW_WARPS), 32 * ROW_WARPS}, where, call);
}

int extreme_blocks(int64_t rows) { return int(blocks_of(rows, ROWS_AT_ONCE)); }
int line_count(int64_t rows, const Where &where) {
  const int64_t blocks = blocks_of(rows, BLOCK_ROWS), processors = device(where.device).processors;
  return int(blocks < processors ? blocks : processors);
}

void contrast_forward(const ContrastForward &call, const Where &where) {
  require_current(where.device);
  const Contrast &p = call.problem;
  const RowSet &rows = p.anchors, &columns = p.columns();
  const int64_t n = rows.source.size, m = columns.source.size;
  const bool both = call.contrasts.counts != nullptr;
  arrange(p, where);
  if (call.weighted) {
    WeightedSweep sweep{};
    describe(sweep, p, rows, columns, 0);
    sweep.statistics = call.anchors.statistics;
    sweep.weighted = call.weighted;
    run(p.dtype, sweep, where);
    make_fields(call, call.anchors, n, m, where);
    return;
  }
  for (int k = 0; k < p.scales; k++) {
    StatisticsSweep sweep{};
    describe(sweep, p, rows, columns, k);
    sweep.statistics = call.anchors.statistics + 7 * n * k;
    if (!both) {
      run(p.dtype, sweep, 0, where);
      continue;
    }
    const int count = line_count(n, where);
    sweep.lines = call.lines;
    run(p.dtype, sweep, count, where);
    StatisticsSweep back{};
    describe(back, p, columns, rows, k);
    back.statistics = call.contrasts.statistics + 7 * m * k;
    back.mixed_only = true;
    run(p.dtype, back, 0, where);
    const JoinLines lines{sweep, call.lines, count, columns.order, back.statistics};
    launch("columns", columns_kernel, {blocks_of(m, ROWS_AT_ONCE), ROWS_AT_ONCE}, where, lines);
  }
  make_fields(call, call.anchors, n, m, where);
  if (both) make_fields(call, call.contrasts, m, n, where);
}

void contrast_backward(const ContrastBackward &call, const Where &where) {
  require_current(where.device);
  const Contrast &p = call.problem;
  const RowSet &rows = p.anchors, &columns = p.columns();
  const int64_t n = rows.source.size, m = columns.source.size;
  const bool both = call.contrasts.counts != nullptr;
  arrange(p, where);
  make_weights(call, call.anchors, rows, where);
  if (both) make_weights(call, call.contrasts, columns, where);
  float *const middle = call.scalars, *const lift = middle + p.scales, *const factor = lift + p.scales;
  int *const one = reinterpret_cast<int *>(factor + p.scales);
  const auto make_side = [&](const Side &own, int64_t size, const Side &other, int64_t other_size, bool first) {
    MakeSide side{};
    side.n = size;
    side.count = extreme_blocks(size);
    side.other_count = extreme_blocks(other_size);
    side.weights = own.weights;
    side.extremes = own.extremes;
    side.other_extremes = both ? other.extremes : nullptr;
    side.two_sides = both || p.self_contrast();
    side.close = call.close;
    side.scale = p.logit_scale;
    side.side = own.side;
    if (first) side.one = one, side.middle = middle, side.lift = lift, side.factor = factor;
    launch("side", side_kernel, rows_at_once(size, p.scales), where, side);
  };
  make_side(call.anchors, n, call.contrasts, m, true);
  if (both) make_side(call.contrasts, m, call.anchors, n, false);

  const auto sweep_over = [&](bool of_anchors, float *gradient, bool more, float *similarity_sums, float *bias) {
    for (int k = 0; k < p.scales; k++) {
      GradientSweep sweep{};
      describe(sweep, p, of_anchors ? rows : columns, of_anchors ? columns : rows, k);
      const float *own = call.anchors.side + 5 * side_stride(n) * k;
      const float *other = p.self_contrast() ? own : both ? call.contrasts.side + 5 * side_stride(m) * k : nullptr;
      sweep.side = of_anchors ? own : other;
      sweep.other = of_anchors ? other : own;
      sweep.middle = middle + k;
      sweep.one = one + k;
      sweep.factor = factor + k;
      sweep.lift = lift + k;
      sweep.gradient = gradient;
      sweep.similarity_sums = similarity_sums ? similarity_sums + n * k : nullptr;
      sweep.sums = bias;
      sweep.some = call.weighted;
      sweep.add_gradient = more || k > 0;
      sweep.add_sums = k > 0;
      run(p.dtype, sweep, where);
    }
  };
  if (call.weighted) {
    const ApplyWeights weigh{call.weighted, call.anchors.side, factor, n, p.width, call.anchor_sums};
    launch("weighed", weighed_kernel, {blocks_of(n, ROW_WARPS), 32 * ROW_WARPS}, where, weigh);
  }
  const bool without_positives = call.weighted && !rows.start;
  if ((call.anchor_sums || call.similarity_sums) && !without_positives) sweep_over(true, call.anchor_sums, false, call.similarity_sums, nullptr);
  const bool fold = call.folded && call.anchor_rows;
  if (call.contrast_sums || call.bias || fold) {
    // If the two sets are the same, both gradients have the same order of clusters.
    sweep_over(false, fold ? call.anchor_sums : call.contrast_sums, fold, nullptr, call.bias);
  }
  if (call.anchor_rows) finish(p, rows, call.anchor_sums, call.anchor_norms, call.anchor_rows, call.out_dtypes[0], where);
  if (call.contrast_rows) finish(p, columns, call.contrast_sums, call.contrast_norms, call.contrast_rows, call.out_dtypes[1], where);
}

} // namespace fastcl::cuda
