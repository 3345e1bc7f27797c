#include "mean.h"
#include <algorithm>
#include <cmath>

namespace fastcl {
namespace {

struct Memory {
  char *base; // null: only counts
  int64_t used = 0;
  void *take(int64_t bytes) {
    void *const p = base ? base + used : nullptr;
    used += bytes;
    return p;
  }
};

Statistics taken(Memory &memory, Field log_sum, int64_t bytes) {
  Statistics s{};
  void **const wanted[MEAN_KEPT] = {&s.fields[log_sum], &s.shifts[log_sum], &s.sums[log_sum], &s.fields[SUM_POS], &s.positives,
                                    &s.negatives,       &s.negative_ratio,  &s.negative_base, &s.positive_base};
  for (void **p : wanted) *p = memory.take(bytes);
  return s;
}

// The mean over one side's rows; overwrites the fields with its derivatives times `share`.
template <class Real> double mean(const Statistics &s, Field log_sum, bool need_negatives, int64_t size, double share) {
  Real *const lse = static_cast<Real *>(s.fields[log_sum]), *const sum = static_cast<Real *>(s.fields[SUM_POS]);
  const Real *const positives = static_cast<const Real *>(s.positives), *const negatives = static_cast<const Real *>(s.negatives);
  const Real *const negative_ratio = static_cast<const Real *>(s.negative_ratio);
  const auto counts = [&](int64_t i) { return positives[i] > 0 && (!need_negatives || negatives[i] > 0); };
  double total = 0, count = 0;
  for (int64_t i = 0; i < size; i++) {
    if (!counts(i)) continue;
    // The logit of a single positive is its log-sum: what is left, log(1 + neg / pos), does not cancel as the negatives vanish, nor
    // where large logits are all alike. A positive so far below the negatives may have underflown.
    if (log_sum == LSE_ALL && positives[i] == 1 && negative_ratio[i] < Real(1e30)) total += std::log1p(double(negative_ratio[i]));
    else total += double(lse[i]) - double(sum[i]) / double(positives[i]);
    count += 1;
  }
  const double weight = count > 0 ? share / count : 0;
  for (int64_t i = 0; i < size; i++) {
    lse[i] = counts(i) ? Real(weight) : Real(0);
    sum[i] = counts(i) ? Real(-weight / double(positives[i])) : Real(0);
  }
  return count > 0 ? total / count : 0;
}

// Writes the loss to `call.loss`, and overwrites the fields with the gradients for the backward.
template <class Real> void reduce(const MeanLoss &call, Field log_sum, const Statistics &anchors, const Statistics &contrasts) {
  const Problem &p = call.problem;
  const double share = p.columns ? 0.5 : 1;
  double loss = share * mean<Real>(anchors, log_sum, call.negatives_only, p.anchors.size, share);
  if (p.columns) loss += share * mean<Real>(contrasts, log_sum, call.negatives_only, p.contrasts.size, share);
  *static_cast<Real *>(call.loss) = Real(loss);
}

// Whether one call for both passes keeps the products: memory stays proportional to that of the rows.
bool keeps_products(const MeanLoss &call) {
  const Problem &p = call.problem;
  if (p.rules.anchor_groups || !call.loss) return false;
  const int64_t n = p.anchors.size, m = p.column_rows().size;
  return n * m <= 2 * (n + m) * p.dimension;
}

// As `reduce`, with contrasts of each anchor's own.
template <class Real> void reduce_own(const MeanLoss &call, Field log_sum, const Statistics &anchors, const Statistics &contrasts, OwnPair *pairs) {
  if (call.positives.rows.data) {
    *static_cast<Real *>(call.loss) = Real(OwnRowsPass<Real>(call.problem, call.positives, anchors, pairs).mean_of_positives());
    return;
  }
  const OwnRowsPass<Real> own(call.problem, call.negatives, anchors, pairs);
  own.join_negatives(log_sum);
  reduce<Real>(call, log_sum, anchors, contrasts);
  own.weigh_negatives(log_sum);
}
template <class Real> void add_own(const MeanLoss &call, const OwnRows &own, const Statistics &anchors, OwnPair *pairs) {
  OwnRowsPass<Real>(call.problem, own, anchors, pairs).add_gradients(call.anchor_gradient, static_cast<double *>(call.scale_gradient));
}

} // namespace

int64_t mean_loss(const Engine &engine, const MeanLoss &call, const Arranged &arranged, void *workspace) {
  const Problem &p = call.problem;
  const int64_t real = p.wide_reals ? sizeof(double) : sizeof(float);
  const Field log_sum = call.negatives_only ? LSE_NEG : LSE_ALL;
  Memory memory{static_cast<char *>(workspace)}, kept{static_cast<char *>(call.kept)};
  Memory &between = call.kept ? kept : memory;
  Statistics anchors = taken(between, log_sum, p.anchors.size * real), contrasts{};
  if (p.columns) contrasts = taken(between, log_sum, p.contrasts.size * real);
  anchors.observed = call.observed;
  contrasts.observed = call.contrast_observed;
  const OwnRows &own = call.positives.rows.data ? call.positives : call.negatives;
  const bool owned = own.rows.data;
  const auto align = [&] { memory.used = (memory.used + 63) / 64 * 64; };
  align();
  OwnPair *const pairs = owned ? static_cast<OwnPair *>(memory.take(own.rows.size * int64_t(sizeof(OwnPair)))) : nullptr;
  WeightedSums weighted = call.weighted;
  if (call.weighs) weighted = {memory.take(p.anchors.size * p.dimension * real), memory.take(real)};
  static char present; // in place of what only counts: the passes take more memory where there are weighted sums
  if (call.weighs && !workspace) weighted = {&present, &present};
  align();
  Backward backward{p, anchors, contrasts, weighted};
  if (call.loss_gradient)
    backward.factor = p.wide_reals ? *static_cast<const double *>(call.loss_gradient) : *static_cast<const float *>(call.loss_gradient);
  backward.single_positives = true; // there are no extra positives
  backward.anchor_gradient = call.anchor_gradient;
  backward.contrast_gradient = call.contrast_gradient;
  backward.scale_gradient = call.scale_gradient;
  backward.bias_gradient = call.bias_gradient;
  const bool differentiated = call.anchor_gradient || call.contrast_gradient || call.scale_gradient || call.bias_gradient;
  KeptProducts products{};
  if (differentiated && !call.weighs && keeps_products(call)) {
    products.stride = KeptProducts::stride_of(p.column_rows().size);
    products.of = memory.take(p.anchors.size * products.stride * real);
    align();
  }
  backward.products = products;
  const int64_t before = memory.used;
  void *const rest = workspace ? memory.base + before : nullptr; // used by the forward, then by the backward
  int64_t most = 0;
  if (call.loss) {
    most = engine.forward({p, anchors, contrasts, weighted, products}, arranged, rest);
    if (workspace && owned) (p.wide_reals ? reduce_own<double> : reduce_own<float>)(call, log_sum, anchors, contrasts, pairs);
    else if (workspace) (p.wide_reals ? reduce<double> : reduce<float>)(call, log_sum, anchors, contrasts);
  }
  if (differentiated) most = std::max(most, engine.backward(backward, arranged, rest));
  if (workspace && owned && (differentiated || own.gradient)) (p.wide_reals ? add_own<double> : add_own<float>)(call, own, anchors, pairs);
  return before + most;
}

} // namespace fastcl
