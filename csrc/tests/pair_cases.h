// Compares sums over pairs and the gradient of their weighted total with plain loops in double, for a random problem. The maps are
// those with a continuous derivative: softplus and the squared hinge of the distance.
#pragma once
#include "../cpu/contrastive/arrange.h"
#include "../cpu/engine.h"
#include "check.h"
#include "formula.h"

namespace {

// Uses the problem of `like` with one scale.
template <class T> class PairCase {
public:
  PairCase(const Engine &engine, Random &random, Pool &pool, const formula::Input &in, const Problem &like, double tolerance)
      : engine_(engine), random_(random), pool_(pool), in_(in), m_(in.columns()), tolerance_(tolerance) {
    Problem &p = call_.problem;
    p = like;
    p.scales = 1;
    p.columns = false;
    squared_ = random.coin();
    call_.map = squared_ ? PairMap::squared : PairMap::softplus;
    call_.margins[0] = 0.3, call_.margins[1] = 1.2;
    call_.only_positives = random.below(4) == 0;
    if (squared_) p.contrast_bias = nullptr; // distances have no bias, and no scale
    scale_ = squared_ ? 1 : in.scale;
    T *const scale = pool.array<T>(1);
    *scale = T(scale_);
    p.logit_scale = scale;
    call_.offset_of_rows = !squared_ && !in.self() && random.coin();
    if (!squared_ && random.coin()) {
      T *const offset = pool.array<T>(call_.offset_of_rows ? in.n : 1);
      for (int64_t i = 0; i < (call_.offset_of_rows ? in.n : 1); i++) offset_.push_back(offset[i] = T(random.real()));
      call_.offset = offset;
    } else call_.offset_of_rows = false;
    T *const weights = pool.array<T>(2 * in.n);
    for (int64_t i = 0; i < 2 * in.n; i++) weights_.push_back(weights[i] = T(random.real()));
    call_.weights = weights;
    for (void **sums : {&call_.values, &call_.active, &call_.counts}) *sums = pool.array<T>(2 * in.n);
    a_ = formula::inverse_norms(in.anchors, in.n, in.d, in.normalize_anchors);
    c_ = in.self() ? a_ : formula::inverse_norms(in.contrasts, in.m, in.d, in.normalize_contrasts);
  }

  void run() {
    const int64_t needs = random_.below(3) ? 31 : random_.below(32);
    if (needs & 1) call_.anchor_gradient = pool_.array<T>(in_.n * in_.d);
    if (needs & 2 && !in_.self()) call_.contrast_gradient = pool_.array<T>(in_.m * in_.d);
    if (needs & 4) call_.scale_gradient = pool_.array<double>(1);
    if (needs & 8 && call_.offset) call_.offset_gradient = pool_.array<double>(offset_.size());
    if (needs & 16 && call_.problem.contrast_bias) call_.bias_gradient = pool_.array<T>(in_.m);
    if (needs == 0) call_.weights = nullptr;
    const Arrangements arrangements = arrange(call_.problem);
    const Arranged arranged = arrangements.arranged();
    engine_.pairs(call_, arranged, pool_.workspace(engine_.pairs(call_, arranged, nullptr)));
    check();
  }

private:
  // The map's value and its derivative by the inner product of the rows as they enter the product.
  std::pair<double, double> mapped(int64_t i, int64_t j, double similarity, bool positive) const {
    if (!squared_) {
      double s = scale_ * similarity + (in_.bias.empty() ? 0 : in_.bias[j]);
      if (!offset_.empty()) s += offset_[call_.offset_of_rows ? i : 0];
      const double t = positive ? -s : s, slope = 1 / (1 + std::exp(-t));
      return {t > 0 ? t + std::log1p(std::exp(-t)) : std::log1p(std::exp(t)), (positive ? -slope : slope) * scale_};
    }
    double square = 0;
    for (int64_t k = 0; k < in_.d; k++) {
      const double apart = in_.anchors[i * in_.d + k] * a_[i] - others()[j * in_.d + k] * c_[j];
      square += apart * apart;
    }
    const double d = std::sqrt(square), above = std::fmax(0, positive ? d - call_.margins[0] : call_.margins[1] - d);
    return {above * above / 2, d == 0 ? 0 : (positive ? -above : above) / d};
  }
  const Reals &others() const { return in_.self() ? in_.anchors : in_.contrasts; }

  void check() {
    Reals values(2 * in_.n), sizes(2 * in_.n, 1.), counts(2 * in_.n);
    formula::Gradient anchors(in_.n * in_.d), contrasts(in_.m * in_.d), scale(1), offset(offset_.size()), bias(m_);
    formula::Gradient &other = in_.self() ? anchors : contrasts;
    for (int64_t i = 0; i < in_.n; i++)
      for (int64_t j = 0; j < m_; j++) {
        const bool admissible = in_.self() ? i != j : in_.anchor_ids.empty() || in_.anchor_ids[i] == -1 || in_.anchor_ids[i] != in_.contrast_ids[j];
        const auto &theirs = in_.self() ? in_.anchor_clusters : in_.contrast_clusters;
        const bool positive = !in_.anchor_clusters.empty() && in_.anchor_clusters[i] != -1 && in_.anchor_clusters[i] == theirs[j];
        if (!admissible || (call_.only_positives && !positive)) continue;
        double product = 0;
        for (int64_t k = 0; k < in_.d; k++) product += in_.anchors[i * in_.d + k] * others()[j * in_.d + k];
        const double similarity = a_[i] * c_[j] * product;
        const auto [value, slope] = mapped(i, j, similarity, positive);
        const int64_t at = (positive ? 0 : in_.n) + i;
        values[at] += value;
        sizes[at] += std::fabs(value) + (squared_ ? 1 : 0);
        counts[at]++;
        const double g = weights_[at] * slope, size = std::fabs(g) + (squared_ ? std::fabs(weights_[at]) : 0);
        scale.add(0, g / scale_ * similarity, size / std::fabs(scale_) * std::fabs(similarity));
        if (!offset_.empty()) offset.add(call_.offset_of_rows ? i : 0, g / scale_, size / std::fabs(scale_));
        bias.add(j, g / scale_, size / std::fabs(scale_));
        for (int64_t k = 0; k < in_.d; k++) {
          const double x = in_.anchors[i * in_.d + k] * a_[i], y = others()[j * in_.d + k] * c_[j];
          anchors.add(i * in_.d + k, g * (squared_ ? y - x : y), size * (std::fabs(y) + std::fabs(x)));
          other.add(j * in_.d + k, g * (squared_ ? x - y : x), size * (std::fabs(y) + std::fabs(x)));
        }
      }
    formula::through(anchors, in_.anchors, a_, in_.n, in_.d, in_.normalize_anchors);
    if (!in_.self()) formula::through(contrasts, in_.contrasts, c_, in_.m, in_.d, in_.normalize_contrasts);
    const bool both_bfloat = call_.problem.anchors.dtype == Dtype::bfloat16 && call_.problem.column_rows().dtype == Dtype::bfloat16;
    // Products of bfloat16 rows round the logits' gradients to bfloat16.
    const double rounded = both_bfloat && std::string(engine_.name) == "avx512_bf16" ? tolerance_ + 0x1p-8 : tolerance_;
    compare<T>("pairs, values", call_.values, values, &sizes, tolerance_);
    compare<T>("pairs, counts", call_.counts, counts, nullptr, 0);
    compare<T>("pairs, gradient of anchors", call_.anchor_gradient, anchors.value, &anchors.size, rounded);
    compare<T>("pairs, gradient of contrasts", call_.contrast_gradient, contrasts.value, &contrasts.size, rounded);
    if (!squared_) compare<double>("pairs, gradient of scale", call_.scale_gradient, scale.value, &scale.size, tolerance_);
    compare<double>("pairs, gradient of offset", call_.offset_gradient, offset.value, &offset.size, tolerance_);
    compare<T>("pairs, gradient of bias", call_.bias_gradient, bias.value, &bias.size, tolerance_);
  }

  const Engine &engine_;
  Random &random_;
  Pool &pool_;
  const formula::Input &in_;
  const int64_t m_;
  const double tolerance_;
  Pairs call_{};
  bool squared_;
  double scale_;
  Reals offset_, weights_, a_, c_;
};

} // namespace
