// Plain records that cross from Python to the engines: sizes, strides, addresses. Nothing here owns memory.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastcl {

enum class Dtype : int { float64, float32, bfloat16, float16 };

struct Rows {
  const void *data;                        // [size, D]
  int64_t size, row_stride, column_stride; // strides in elements
  Dtype dtype;
};

// Logits s_ij = logit_scale * a_i * c_j * <x_i, y_j> + bias_j, as in fastcl/ops/contrastive/records.py.
// Arrays of "reals" are double where `wide_reals`, else float.
struct Problem {
  Rows anchors, contrasts; // contrasts.data null: self-contrast, each anchor against all others
  int64_t dimension;
  const int64_t *anchor_clusters, *contrast_clusters; // null: there are no positives; -1 equals nothing
  const int64_t *anchor_ids, *contrast_ids;           // equal ids make a pair inadmissible; null: none
  const void *logit_scale;                            // [scales] reals: so many problems at once, of the same products
  const void *contrast_bias;                          // [M] reals, or null; -inf leaves a contrast out of every set
  bool normalize_anchors, normalize_contrasts;
  bool wide_reals;
  bool columns; // also the statistics of each contrast over the anchors
  int scales, threads;

  bool self_contrast() const { return contrasts.data == nullptr; }
  const Rows &column_rows() const { return self_contrast() ? anchors : contrasts; }
};

enum Field : int { LSE_ALL, LSE_POS, LSE_NEG, SUM_POS, FIELDS };

// What may be observed besides, for people to look at: largest logits, sums of logits, log-sum-exp and entropy over all, counts,
// sums of logits without their bias.
enum Observed : int { MAX_POS, MAX_NEG, ALL_POS, ALL_NEG, LSE, ENTROPY, NUM_POS, NUM_NEG, PLAIN_POS, PLAIN_NEG, OBSERVED };

// Statistics of one side, or the gradients that come back for them. Null: not wanted.
struct Statistics {
  void *fields[FIELDS];  // [scales, N]
  void *shifts[SUM_POS]; // [scales, N]: of each log-sum-exp, the shift and
  void *sums[SUM_POS];   // [scales, N]: the sum of exp(s_ij - shift)
  void *positives;       // [N]: how many
  void *negatives;       // [N]
  void *negative_ratio;  // [scales, N]: sum over the negatives / sum over the positives
  void *negative_base;   // [scales, N]: the largest logit to base 2 among the negatives,
  void *positive_base;   // [scales, N]: and among the positives, where the forward kept it, else 0
  void *observed;        // [OBSERVED, scales, N]; null: not asked for
  void *inverse_norms;   // [N]: a, where rows are normalised

  Statistics of_scale(int64_t scale, int64_t rows, bool wide_reals) const { // as if there were no other
    Statistics s = *this;
    const auto advance = [&](void *&p) {
      if (p) p = (char *)p + scale * rows * (wide_reals ? 8 : 4);
    };
    for (void *&p : s.fields) advance(p);
    for (void *&p : s.shifts) advance(p);
    for (void *&p : s.sums) advance(p);
    advance(s.negative_ratio);
    advance(s.negative_base);
    advance(s.positive_base);
    advance(s.observed);
    return s;
  }
};

// What the forward of two sets may leave for the backward of the anchors, so that it sweeps only where positives may be. The
// sums are valid only where `valid` says 1: where one base serves all rows. Of one scale only.
struct WeightedSums {
  void *sums;  // [N, D] reals: sum_j exp(s_ij) c_j y_j, without the register tiles that may hold positives; null: not wanted
  void *valid; // [1] real
};

struct Forward {
  Problem problem;
  Statistics anchors, contrasts;
  WeightedSums weighted;
};

struct Backward {
  Problem problem;
  Statistics anchors, contrasts; // as saved, with the fields' gradients in `fields`
  WeightedSums weighted;         // as the forward left them
  bool single_positives;         // the counts are those of the sweep: rows with one positive may be told by them
  double factor = 1;             // of all gradients, which are multiplied by it last: none vanishes on the way
  void *anchor_gradient;         // [N, D]; null: not needed, as below
  void *contrast_gradient;       // [M, D]
  void *scale_gradient;          // [scales] doubles: what is added to it may cancel it
  void *bias_gradient;           // [M]
};

} // namespace fastcl
