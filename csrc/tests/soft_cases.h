// Compares soft assignments, forward and backward, with plain loops in double, for a random problem.
#pragma once
#include "../cpu/contrastive/arrange.h"
#include "../cpu/engine.h"
#include "check.h"
#include "formula.h"
#include <limits>

namespace {

// Uses the problem of `like` without its clusters and with one scale.
template <class T> class SoftCase {
public:
  SoftCase(const Engine &engine, Random &random, Pool &pool, const formula::Input &in, const Problem &like, Dtype dtype, double tolerance)
      : engine_(engine), random_(random), pool_(pool), in_(in), m_(in.columns()), tolerance_(tolerance) {
    Problem &p = call_.problem;
    p = like;
    p.anchor_clusters = p.contrast_clusters = nullptr;
    p.scales = 1;
    call_.assignment_columns = random.below(8) ? 1 + random.below(40) : 120 + random.below(20);
    call_.anchor_assignments = assignments(in.n, dtype, r_);
    if (in.self()) q_ = r_;
    else call_.contrast_assignments = assignments(in.m, dtype, q_);
    call_.anchors = outputs(in.n, p.normalize_anchors);
    if (p.columns) call_.contrasts = outputs(in.m, p.normalize_contrasts);
    a_ = formula::inverse_norms(in.anchors, in.n, in.d, in.normalize_anchors);
    c_ = in.self() ? a_ : formula::inverse_norms(in.contrasts, in.m, in.d, in.normalize_contrasts);
    if (random.below(2)) {
      call_.weights.stride = KeptProducts::stride_of(m_);
      call_.weights.of = pool.workspace(in.n * call_.weights.stride * int64_t(sizeof(T)));
    }
    pairs();
  }

  void run() {
    const Arrangements arrangements = arrange(call_.problem);
    const Arranged arranged = arrangements.arranged();
    engine_.soft(call_, arranged, pool_.workspace(engine_.soft(call_, arranged, nullptr)));
    const Truth rows = truth(in_.n, m_, [&](int64_t i, int64_t j) { return i * m_ + j; });
    const Truth columns = truth(m_, in_.n, [&](int64_t j, int64_t i) { return i * m_ + j; });
    check("anchors'", call_.anchors, rows, a_);
    if (call_.problem.columns) check("contrasts'", call_.contrasts, columns, c_);

    call_.backward = true;
    Reals lse[2], sum[2];
    incoming(call_.anchors, in_.n, lse[0], sum[0]);
    if (call_.problem.columns) incoming(call_.contrasts, in_.m, lse[1], sum[1]);
    const int64_t needs = random_.below(3) ? 15 : random_.below(16);
    if (needs & 1) call_.anchor_gradient = pool_.array<T>(in_.n * in_.d);
    if (needs & 2 && !in_.self()) call_.contrast_gradient = pool_.array<T>(in_.m * in_.d);
    if (needs & 4) call_.scale_gradient = pool_.array<double>(1);
    if (needs & 8 && call_.problem.contrast_bias) call_.bias_gradient = pool_.array<T>(in_.m);
    engine_.soft(call_, arranged, pool_.workspace(engine_.soft(call_, arranged, nullptr)));
    check_gradients(rows, columns, lse, sum);
  }

private:
  struct Truth {
    Reals lse, sum, sum_size, weight, weight_size, size;
  };

  Rows assignments(int64_t size, Dtype dtype, Reals &values) {
    return random_rows(random_, pool_, size, call_.assignment_columns, dtype, random_.below(6) == 0, random_.below(4), values);
  }
  SoftSide outputs(int64_t size, bool normalize) {
    SoftSide s{};
    for (void **p : {&s.lse, &s.sum, &s.weight, &s.size, &s.base, &s.total}) *p = pool_.array<T>(size);
    if (normalize) s.inverse_norms = pool_.array<T>(size);
    return s;
  }
  void pairs() {
    for (int64_t i = 0; i < in_.n; i++)
      for (int64_t j = 0; j < m_; j++) {
        double product = 0, weight = 0, size = 0;
        for (int64_t k = 0; k < in_.d; k++) product += in_.anchors[i * in_.d + k] * others()[j * in_.d + k];
        for (int64_t k = 0, c = call_.assignment_columns; k < c; k++) {
          weight += r_[i * c + k] * q_[j * c + k];
          size += std::fabs(r_[i * c + k] * q_[j * c + k]);
        }
        similarity_.push_back(a_[i] * c_[j] * product);
        logit_.push_back(in_.scale * similarity_.back() + (in_.bias.empty() ? 0 : in_.bias[j]));
        weight_.push_back(weight);
        weight_size_.push_back(size);
        admissible_.push_back(in_.self() ? i != j : in_.anchor_ids.empty() || in_.anchor_ids[i] == -1 || in_.anchor_ids[i] != in_.contrast_ids[j]);
      }
  }
  template <class Place> Truth truth(int64_t rows, int64_t columns, Place place) const {
    Truth t{Reals(rows), Reals(rows), Reals(rows, 1.), Reals(rows), Reals(rows, 1.), Reals(rows)};
    for (int64_t i = 0; i < rows; i++) {
      double most = -std::numeric_limits<double>::infinity(), total = 0;
      for (int64_t j = 0; j < columns; j++)
        if (admissible_[place(i, j)]) most = std::fmax(most, logit_[place(i, j)]);
      for (int64_t j = 0; j < columns; j++) {
        const int64_t k = place(i, j);
        if (!admissible_[k]) continue;
        total += std::exp(logit_[k] - most);
        t.sum[i] += weight_[k] * logit_[k];
        t.sum_size[i] += weight_size_[k] * (1 + std::fabs(logit_[k]));
        t.weight[i] += weight_[k];
        t.weight_size[i] += weight_size_[k];
        t.size[i]++;
      }
      t.lse[i] = most + std::log(total);
    }
    return t;
  }
  void check(const char *side, const SoftSide &got, const Truth &expected, const Reals &norms) const {
    char what[80];
    const auto compared = [&](const char *field, const void *values, const Reals &truth, const Reals *sizes, double tolerance) {
      std::snprintf(what, sizeof what, "soft, %s %s", side, field);
      compare<T>(what, values, truth, sizes, tolerance);
    };
    compared("log-sum-exp", got.lse, expected.lse, nullptr, tolerance_);
    compared("sum", got.sum, expected.sum, &expected.sum_size, tolerance_);
    compared("weight", got.weight, expected.weight, &expected.weight_size, tolerance_);
    compared("size", got.size, expected.size, nullptr, 0);
    compared("inverse norms", got.inverse_norms, norms, nullptr, tolerance_);
  }
  void incoming(SoftSide &side, int64_t size, Reals &lse, Reals &sum) {
    T *const first = pool_.array<T>(size), *const second = pool_.array<T>(size);
    for (int64_t i = 0; i < size; i++) {
      lse.push_back(first[i] = T(random_.real()));
      sum.push_back(second[i] = T(random_.real()));
    }
    side.lse_gradient = first, side.sum_gradient = second;
    side.lse = side.sum = side.weight = side.size = side.inverse_norms = nullptr;
  }
  const Reals &others() const { return in_.self() ? in_.anchors : in_.contrasts; }

  void check_gradients(const Truth &rows, const Truth &columns, const Reals (&lse)[2], const Reals (&sum)[2]) {
    formula::Gradient anchors(in_.n * in_.d), contrasts(in_.m * in_.d), scale(1), bias(m_);
    formula::Gradient &other = in_.self() ? anchors : contrasts;
    for (int64_t i = 0; i < in_.n; i++)
      for (int64_t j = 0; j < m_; j++) {
        const int64_t at = i * m_ + j;
        if (!admissible_[at]) continue;
        double g = 0, size = 0;
        const auto add = [&](const Truth &side, int64_t k, double of_lse, double of_sum) {
          const double softmax = of_lse * std::exp(logit_[at] - side.lse[k]);
          g += softmax + of_sum * weight_[at];
          size += std::fabs(softmax) + std::fabs(of_sum) * weight_size_[at];
        };
        add(rows, i, lse[0][i], sum[0][i]);
        if (!lse[1].empty()) add(columns, j, lse[1][j], sum[1][j]);
        scale.add(0, g * similarity_[at], size * std::fabs(similarity_[at]));
        bias.add(j, g, size);
        for (int64_t k = 0; k < in_.d; k++) {
          const double x = in_.anchors[i * in_.d + k] * a_[i] * in_.scale, y = others()[j * in_.d + k] * c_[j] * in_.scale;
          anchors.add(i * in_.d + k, g * y, size * std::fabs(y));
          other.add(j * in_.d + k, g * x, size * std::fabs(x));
        }
      }
    formula::through(anchors, in_.anchors, a_, in_.n, in_.d, in_.normalize_anchors);
    if (!in_.self()) formula::through(contrasts, in_.contrasts, c_, in_.m, in_.d, in_.normalize_contrasts);
    compare<T>("soft, gradient of anchors", call_.anchor_gradient, anchors.value, &anchors.size, tolerance_);
    compare<T>("soft, gradient of contrasts", call_.contrast_gradient, contrasts.value, &contrasts.size, tolerance_);
    compare<double>("soft, gradient of scale", call_.scale_gradient, scale.value, &scale.size, tolerance_);
    compare<T>("soft, gradient of bias", call_.bias_gradient, bias.value, &bias.size, tolerance_);
  }

  const Engine &engine_;
  Random &random_;
  Pool &pool_;
  const formula::Input &in_;
  const int64_t m_;
  const double tolerance_;
  Soft call_{};
  Reals r_, q_, a_, c_, similarity_, logit_, weight_, weight_size_;
  std::vector<bool> admissible_;
};

} // namespace
