// Plain structs that Python passes to the engines: sizes, strides, addresses. They own no memory.
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

// Rules about pairs besides clusters and ids. Null: not given. In self-contrast the anchors' arrays serve both sides.
struct Rules {
  const uint64_t *anchor_tags, *contrast_tags; // [N, tag_words]; pairs with a common bit are positives
  int64_t tag_words;
  const int64_t *anchor_samples, *contrast_samples; // pairs with equal numbers are admissible although their ids are equal
  const int64_t *anchor_groups, *contrast_groups;   // pairs with different numbers are inadmissible; -1: in no group
  Rows anchor_guide, contrast_guide;                // [N, guide_dimension]; two sets, one direction
  int64_t guide_dimension;
  const void *thresholds; // [N] reals: a pair that is not positive is inadmissible if its guide rows' cosine is greater; null: no guide
  bool same_rows;         // two sets that are the same rows: no row meets itself
};

// Logits s_ij = logit_scale * a_i * c_j * <x_i, y_j> + bias_j, as in fastcl/ops/contrastive/records.py.
// Arrays of "reals" are double where `wide_reals`, else float.
struct Problem {
  Rows anchors, contrasts; // contrasts.data null: self-contrast, each anchor against all others
  int64_t dimension;
  const int64_t *anchor_clusters, *contrast_clusters; // null: there are no positives; -1 never matches
  const int64_t *anchor_ids, *contrast_ids;           // pairs with equal ids are inadmissible; null: no ids
  const void *logit_scale;                            // [scales] reals: one problem per scale, all from the same products
  const void *contrast_bias;                          // [M] reals, or null; -inf leaves a contrast out of every set
  bool normalize_anchors, normalize_contrasts;
  bool wide_reals;
  bool columns; // also the statistics of each contrast over the anchors
  Rules rules;
  int scales, threads;

  bool self_contrast() const { return contrasts.data == nullptr; }
  const Rows &column_rows() const { return self_contrast() ? anchors : contrasts; }
};

enum Field : int { LSE_ALL, LSE_POS, LSE_NEG, SUM_POS, FIELDS };

// Optional statistics for monitoring: largest logits, sums of logits, log-sum-exp and entropy over all, counts, sums of logits
// without their bias.
enum Observed : int { MAX_POS, MAX_NEG, ALL_POS, ALL_NEG, LSE, ENTROPY, NUM_POS, NUM_NEG, PLAIN_POS, PLAIN_NEG, OBSERVED };

// Statistics of one side, or their incoming gradients. Null: not wanted.
struct Statistics {
  void *fields[FIELDS];  // [scales, N]
  void *shifts[SUM_POS]; // [scales, N]: the shift of each log-sum-exp,
  void *sums[SUM_POS];   // [scales, N]: and its sum of exp(s_ij - shift)
  void *positives;       // [N]: number of positives
  void *negatives;       // [N]: number of negatives
  void *negative_ratio;  // [scales, N]: sum over the negatives / sum over the positives
  void *negative_base;   // [scales, N]: largest logit (to base 2) of the negatives,
  void *positive_base;   // [scales, N]: and of the positives, if the forward kept them, else 0
  void *observed;        // [OBSERVED, scales, N]; null: not wanted
  void *inverse_norms;   // [N]: a, if rows are normalised

  Statistics of_scale(int64_t scale, int64_t rows, bool wide_reals) const { // the statistics of a single scale
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

// Sums that the forward of two sets may compute for the anchors' backward, which then sweeps only tiles that may hold positives.
// The sums are valid only if `valid` is 1, that is, if one base suffices for all rows. For a single scale only.
struct WeightedSums {
  void *sums;  // [N, D] reals: sum_j exp(s_ij) c_j y_j, without the register tiles that may hold positives; null: not wanted
  void *valid; // [1] real
};

// Products of all rows that the forward without groups may keep for the backward, which then computes none.
struct KeptProducts {
  void *of; // [N, stride] reals, by place; null: not kept
  int64_t stride;
  static int64_t stride_of(int64_t contrasts) { return (contrasts + 31) / 32 * 32 + 16; } // whole vectors; rows start in different cache sets
};

struct Forward {
  Problem problem;
  Statistics anchors, contrasts;
  WeightedSums weighted;
  KeptProducts products = {};
};

struct Backward {
  Problem problem;
  Statistics anchors, contrasts; // as saved, with the fields' gradients in `fields`
  WeightedSums weighted;         // from the forward
  bool single_positives;         // the counts include no extra positives, so they identify rows with a single positive
  KeptProducts products = {};    // from the forward
  double factor = 1;             // multiplies all gradients, as the last step, so that none underflows before
  void *anchor_gradient;         // [N, D]; null: not needed, as below
  void *contrast_gradient;       // [M, D]
  void *scale_gradient;          // [scales] doubles: a later addition may cancel it
  void *bias_gradient;           // [M]
};

} // namespace fastcl
