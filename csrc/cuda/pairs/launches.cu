// The kernels that a call launches, in order. Nothing here allocates or waits.
#include "cuda/contrastive/rows.h"
#include "launches.h"
#include "sweeps.h"

namespace fastcl::cuda {

namespace {

void run(Dtype dtype, const PairSweep &sweep, const Where &where) {
  const auto go = dtype == Dtype::bfloat16 ? launch_pairs<Bfloat16> : dtype == Dtype::float16 ? launch_pairs<Half> : launch_pairs<float>;
  go(sweep, where);
}

// The anchors are the rows, or with `exchanged` the contrasts.
PairSweep described(const PairSums &call, bool exchanged) {
  const Contrast &p = call.problem;
  const RowSet &anchors = p.anchors, &contrasts = p.columns();
  PairSweep sweep{};
  describe(sweep, p, exchanged ? contrasts : anchors, exchanged ? anchors : contrasts, 0);
  sweep.map = Map(call.map);
  sweep.pos_margin = call.pos_margin;
  sweep.neg_margin = call.neg_margin;
  sweep.only_positives = call.only_positives;
  (exchanged ? sweep.row_bias : sweep.column_bias) = call.marked_bias;
  (exchanged ? sweep.column_offset : sweep.row_offset) = call.offset;
  if (exchanged || call.symmetric) sweep.other_weights = call.weights;
  if (!exchanged) sweep.own_weights = call.weights;
  return sweep;
}

} // namespace

void pair_sums(const PairSums &call, const Where &where) {
  require_current(where.device);
  const Contrast &p = call.problem;
  arrange(p, where);
  PairSweep sweep = described(call, false);
  sweep.values = call.sums;
  sweep.gradient = call.anchor_sums;
  sweep.similarity_sums = call.similarity_sums;
  sweep.slope_sums = call.slope_sums;
  run(p.dtype, sweep, where);
  const bool fold = p.self_contrast() && !call.symmetric && call.anchor_sums;
  if (call.contrast_sums || call.bias || fold) {
    PairSweep back = described(call, true);
    back.gradient = fold ? call.anchor_sums : call.contrast_sums;
    back.add_gradient = fold;
    back.slope_sums = call.bias;
    run(p.dtype, back, where);
  }
  if (call.anchor_rows) finish(p, p.anchors, call.anchor_sums, call.anchor_norms, call.anchor_rows, Dtype::float32, where);
  if (call.contrast_rows) finish(p, p.contrasts, call.contrast_sums, call.contrast_norms, call.contrast_rows, Dtype::float32, where);
}

} // namespace fastcl::cuda
