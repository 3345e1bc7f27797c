// The statistics and their gradients by plain loops over all pairs, in double. Each gradient comes with the size of its summands, to
// which tolerances are relative.
#pragma once
#include "../problem.h"
#include <array>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace formula {

using fastcl::FIELDS, fastcl::LSE_ALL, fastcl::LSE_NEG, fastcl::LSE_POS, fastcl::SUM_POS;
using Reals = std::vector<double>;
using Weights = std::array<Reals, FIELDS>; // weights of each field's rows; empty for unused fields

struct Input {
  int64_t n, m, d; // m = 0: self-contrast
  Reals anchors, contrasts;
  std::vector<int64_t> anchor_clusters, contrast_clusters, anchor_ids, contrast_ids; // empty: none; -1 never matches
  Reals bias;                                                                        // empty: none
  double scale;
  bool normalize_anchors, normalize_contrasts;

  bool self() const { return m == 0; }
  int64_t columns() const { return self() ? n : m; }
};

struct Side {
  Reals fields[FIELDS], positives, negatives, inverse_norms;
};

struct Gradient {
  Reals value, size;
  explicit Gradient(int64_t count) : value(count), size(count) {}
  void add(int64_t k, double x, double absolute) {
    value[k] += x;
    size[k] += absolute;
  }
};

inline Reals inverse_norms(const Reals &rows, int64_t count, int64_t d, bool normalize) {
  Reals result(count, 1.);
  for (int64_t i = 0; normalize && i < count; i++) {
    double square = 0;
    for (int64_t k = 0; k < d; k++) square += rows[i * d + k] * rows[i * d + k];
    result[i] = square == 0 ? 0 : 1 / std::fmax(std::sqrt(square), 1e-12);
  }
  return result;
}

// Maps the gradient of a_i x_i to that of x_i, for `count` rows of d numbers. Tolerances are relative to a row's largest term.
inline void through(Gradient &g, const Reals &x, const Reals &inverse, int64_t count, int64_t d, bool normalize) {
  for (int64_t i = 0; i < count; i++) {
    double along = 0, size = 0, most = 0;
    for (int64_t k = i * d; k < (i + 1) * d; k++) {
      along += g.value[k] * x[k] * inverse[i];
      size += g.size[k] * std::fabs(x[k]) * inverse[i];
    }
    for (int64_t k = i * d; k < (i + 1) * d; k++) {
      const double unit = x[k] * inverse[i];
      if (normalize) g.value[k] = inverse[i] * (g.value[k] - unit * along), g.size[k] = inverse[i] * (g.size[k] + std::fabs(unit) * size);
      most = std::fmax(most, g.size[k]);
    }
    for (int64_t k = i * d; k < (i + 1) * d; k++) g.size[k] = most;
  }
}

class Formula {
public:
  explicit Formula(const Input &input)
      : in(input), a(inverse_norms(in.anchors, in.n, in.d, in.normalize_anchors)),
        c(in.self() ? a : inverse_norms(in.contrasts, in.m, in.d, in.normalize_contrasts)), similarity(in.n * in.columns()) {
    for (int64_t i = 0; i < in.n; i++)
      for (int64_t j = 0; j < in.columns(); j++) {
        double product = 0;
        for (int64_t k = 0; k < in.d; k++) product += in.anchors[i * in.d + k] * contrasts()[j * in.d + k];
        similarity[i * in.columns() + j] = a[i] * c[j] * product;
        largest = std::fmax(largest, std::fabs(logit(i, j)));
      }
    rows = side(false);
    if (!in.self()) columns = side(true);
  }

  // Gradients of the sum over fields and rows of weight * field. `weights` are [FIELDS][N], for the contrasts [FIELDS][M]; empty for
  // unused fields.
  struct Gradients {
    Gradient anchors, contrasts, scale, bias;
    void add(const Gradients &other) { // adds those of another scale
      for (const auto &[mine, more] : {std::pair{&anchors, &other.anchors}, std::pair{&contrasts, &other.contrasts}, std::pair{&bias, &other.bias}})
        for (size_t i = 0; i < mine->value.size(); i++) mine->add(int64_t(i), more->value[i], more->size[i]);
      scale.value.push_back(other.scale.value[0]);
      scale.size.push_back(other.scale.size[0]);
    }
  };
  Gradients gradients(const Weights &row_weights, const Weights &column_weights) const {
    Gradients g{Gradient(in.n * in.d), Gradient(in.m * in.d), Gradient(1), Gradient(in.columns())};
    Gradient &other = in.self() ? g.anchors : g.contrasts;
    for (int64_t i = 0; i < in.n; i++)
      for (int64_t j = 0; j < in.columns(); j++) {
        if (!admissible(i, j)) continue;
        double x = 0, absolute = 0;
        const auto add = [&](const Side &side, const Weights &weights, int64_t at) {
          for (int f = 0; f < FIELDS; f++) {
            const bool in_set = f == LSE_ALL || (f == LSE_NEG) != positive(i, j);
            if (weights[f].empty() || !in_set) continue;
            const double term = weights[f][at] * (f == SUM_POS ? 1 : std::exp(logit(i, j) - side.fields[f][at]));
            x += term;
            absolute += std::fabs(term);
          }
        };
        add(rows, row_weights, i);
        if (!in.self()) add(columns, column_weights, j);
        const double u = similarity[i * in.columns() + j];
        g.scale.add(0, x * u, absolute * std::fabs(u));
        g.bias.add(j, x, absolute);
        for (int64_t k = 0; k < in.d; k++) {
          const double xk = in.anchors[i * in.d + k] * a[i] * in.scale, yk = contrasts()[j * in.d + k] * c[j] * in.scale;
          g.anchors.add(i * in.d + k, x * yk, absolute * std::fabs(yk));
          other.add(j * in.d + k, x * xk, absolute * std::fabs(xk));
        }
      }
    project(g.anchors, in.anchors, a, in.n, in.normalize_anchors);
    if (!in.self()) project(g.contrasts, in.contrasts, c, in.m, in.normalize_contrasts);
    return g;
  }

  const Input &in;
  const Reals a, c;
  Side rows, columns;
  double largest = 0; // |logit|

private:
  const Reals &contrasts() const { return in.self() ? in.anchors : in.contrasts; }
  double logit(int64_t i, int64_t j) const { return in.scale * similarity[i * in.columns() + j] + (in.bias.empty() ? 0 : in.bias[j]); }
  bool admissible(int64_t i, int64_t j) const {
    if (in.self()) return i != j;
    return in.anchor_ids.empty() || in.anchor_ids[i] == -1 || in.anchor_ids[i] != in.contrast_ids[j];
  }
  bool positive(int64_t i, int64_t j) const {
    if (in.anchor_clusters.empty() || in.anchor_clusters[i] == -1) return false;
    return in.anchor_clusters[i] == (in.self() ? in.anchor_clusters[j] : in.contrast_clusters[j]);
  }
  Side side(bool transposed) const {
    const int64_t size = transposed ? in.m : in.n, others = transposed ? in.n : in.columns();
    Side result;
    result.inverse_norms = transposed ? c : a;
    result.positives.resize(size);
    result.negatives.resize(size);
    for (Reals &field : result.fields) field.resize(size);
    for (int64_t p = 0; p < size; p++) {
      double most[SUM_POS], sum[SUM_POS] = {};
      for (double &value : most) value = -std::numeric_limits<double>::infinity();
      for (int pass = 0; pass < 2; pass++)
        for (int64_t q = 0; q < others; q++) {
          const int64_t i = transposed ? q : p, j = transposed ? p : q;
          if (!admissible(i, j)) continue;
          const double s = logit(i, j);
          const bool is_positive = positive(i, j);
          for (const int f : {int(LSE_ALL), int(is_positive ? LSE_POS : LSE_NEG)})
            if (pass == 0) most[f] = std::fmax(most[f], s);
            else sum[f] += std::exp(s - most[f]);
          if (pass == 0) continue;
          (is_positive ? result.positives : result.negatives)[p]++;
          if (is_positive) result.fields[SUM_POS][p] += s;
        }
      for (int f = 0; f < SUM_POS; f++) result.fields[f][p] = most[f] + std::log(sum[f]);
    }
    return result;
  }
  // Maps the gradient of a_i x_i to that of x_i.
  void project(Gradient &g, const Reals &x, const Reals &inverse, int64_t count, bool normalize) const {
    for (int64_t i = 0; normalize && i < count; i++) {
      double along = 0, size = 0;
      for (int64_t k = i * in.d; k < (i + 1) * in.d; k++) {
        along += g.value[k] * x[k] * inverse[i];
        size += g.size[k] * std::fabs(x[k]) * inverse[i];
      }
      for (int64_t k = i * in.d; k < (i + 1) * in.d; k++) {
        const double unit = x[k] * inverse[i];
        g.value[k] = inverse[i] * (g.value[k] - unit * along);
        g.size[k] = inverse[i] * (g.size[k] + std::fabs(unit) * size);
      }
    }
  }

  Reals similarity;
};

} // namespace formula
