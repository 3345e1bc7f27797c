// The contrastive statistics and their gradients on a CUDA device: what csrc/bindings reads from Python, and starts.
#pragma once
#include "problem.h"
#include "cuda/cuda.h"

namespace fastcl::cuda {

// One set of rows: the caller's, and where they are to be arranged.
struct RowSet {
  Rows source;
  bool normalize;
  const int64_t *order;   // [n]: the caller's places of rows sorted by cluster; null: as they lie
  const int *start, *end; // [n], sorted: the other set's rows of the row's cluster; null: there are no positives
  const int *names;       // [n], of the caller's rows: equal and not 0 for pairs that are inadmissible; or null
  const float *bias;      // [n], of the caller's rows, or null
  bool leave_out;         // rows whose bias is -inf become zeros, whatever they hold
  void *rows;             // [n, width], 16 bytes aligned
  bool arranged;          // `rows` are the source itself
  float *norms;           // [n], in the caller's order; null: not wanted
  float *row_norms;       // [n]; null: no set is normalised
  int *row_names;         // [n], with `names`
  float *row_bias;        // [n], with `bias`
};

struct Contrast {
  RowSet anchors, contrasts; // contrasts.rows null: self-contrast
  int dimension, width;      // numbers of a row, and of an arranged one: a multiple of 32 bytes
  Dtype dtype;               // of arranged rows: bfloat16, float16 or float32
  int scales;
  const float *logit_scale;            // [scales]
  const float *longest, *largest_bias; // [1], or null: bounds of the logits besides the scale
  bool exact;                          // float32 products are not rounded to tf32
  bool self_contrast() const { return !contrasts.rows; }
  const RowSet &columns() const { return self_contrast() ? anchors : contrasts; }
};

// The place of each of FIELDS among those wanted, -1 where it is not; `log_sums` of them are log-sum-exps.
struct Wanted {
  int place[FIELDS], log_sums;
};

// Of one side, n rows: fields, counts and parts as in fastcl/ops/contrastive/records.py, with float32 numbers.
struct Side {
  float *fields, *counts, *parts;
  float *bases;      // [3, scales, n]: of the sums over all, negatives and positives, to base 2
  float *statistics; // [scales, 7, n]: workspace of the forward
  float *weights;    // [scales, 7, n]: workspace of the backward, as those below
  float *extremes;   // [4, scales, extreme_blocks(n)]
  float *side;       // [scales, 5, side_stride(n)]
};

struct ContrastForward {
  Contrast problem;
  Wanted wanted;
  Side anchors, contrasts; // contrasts.counts null: not wanted
  float *lines;            // [line_count(n), 2, m], where the contrasts' statistics are wanted
  float *weighted;         // [n, width]: where contrasts need no gradient, what the backward of the anchors is made of; or null
};

struct ContrastBackward {
  Contrast problem;
  Wanted wanted;
  Side anchors, contrasts; // with the gradients of fields in `fields`
  float close;             // log-sums (to base 2) that spread over less share one exponential
  float *scalars;          // [4, scales]: workspace
  // Null where not needed. [n, width] float32, workspace; rows [n, d] as they leave; folded: two sets that are one,
  // both gradients are the anchors'.
  float *anchor_sums, *contrast_sums;
  void *anchor_rows, *contrast_rows;
  Dtype out_dtypes[2];
  const float *anchor_norms, *contrast_norms; // of the caller's rows, in its order; null: taken as they are
  bool folded;
  float *similarity_sums; // [scales, n]: of gradient and similarity of each anchor's logits, twice that in self-contrast
  float *bias;            // [m], in the caller's order
  const float *weighted;  // as the forward left it, where nothing but the anchors' gradient is needed; or null
};

int extreme_blocks(int64_t rows);
// Blocks of a sweep both ways, each of which has a line of sums of its own.
int line_count(int64_t rows, const Where &where);
void contrast_forward(const ContrastForward &call, const Where &where);
void contrast_backward(const ContrastBackward &call, const Where &where);

} // namespace fastcl::cuda
