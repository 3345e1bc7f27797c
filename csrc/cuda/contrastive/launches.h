// The contrastive statistics and their gradients on a CUDA device: descriptions, which csrc/bindings fills, and calls.
#pragma once
#include "problem.h"
#include "cuda/cuda.h"

namespace fastcl::cuda {

// One set of rows: the caller's rows, and the memory for the arranged rows.
struct RowSet {
  Rows source;
  bool normalize;
  const int64_t *order;   // [n]: the caller's indices of rows sorted by cluster; null: the caller's order
  const int *start, *end; // [n], for sorted rows: range of the other set's rows in the row's cluster; null: there are no positives
  const int *names;       // [n], of the caller's rows: a pair with equal nonzero names is inadmissible; or null
  const float *bias;      // [n], of the caller's rows, or null
  bool leave_out;         // rows with bias -inf are replaced by zeros
  void *rows;             // [n, width], 16 bytes aligned
  bool arranged;          // `rows` is the source itself
  float *norms;           // [n], in the caller's order; null: not wanted
  float *row_norms;       // [n]; null: no set is normalised
  int *row_names;         // [n], with `names`
  float *row_bias;        // [n], with `bias`
};

struct Contrast {
  RowSet anchors, contrasts; // contrasts.rows null: self-contrast
  int dimension, width;      // numbers of a row; numbers of an arranged row, a multiple of 32 bytes
  Dtype dtype;               // dtype of arranged rows: bfloat16, float16 or float32
  int scales;
  const float *logit_scale;            // [scales]
  const float *longest, *largest_bias; // [1], or null: further factors of the bound of the logits
  bool exact;                          // do not round float32 products to tf32
  bool self_contrast() const { return !contrasts.rows; }
  const RowSet &columns() const { return self_contrast() ? anchors : contrasts; }
};

// The position of each field among the wanted ones, -1 if it is not wanted; `log_sums` of them are log-sum-exps.
struct Wanted {
  int place[FIELDS], log_sums;
};

// One side with n rows: fields, counts and parts as in fastcl/ops/contrastive/records.py, in float32.
struct Side {
  float *fields, *counts, *parts;
  float *bases;      // [3, scales, n]: bases (logits to base 2) of the sums over all, negatives and positives
  float *statistics; // [scales, 7, n]: workspace of the forward
  float *weights;    // [scales, 7, n]: workspace of the backward, as those below
  float *extremes;   // [4, scales, extreme_blocks(n)]
  float *side;       // [scales, 5, side_stride(n)]
};

struct ContrastForward {
  Contrast problem;
  Wanted wanted;
  Side anchors, contrasts; // contrasts.counts null: not wanted
  float *lines;            // [line_count(n), 2, m], if the contrasts' statistics are wanted
  float *weighted;         // [n, width]: if contrasts need no gradient, sums from which the backward computes the anchors' gradient; or null
};

struct ContrastBackward {
  Contrast problem;
  Wanted wanted;
  Side anchors, contrasts; // `fields` holds the gradients of the fields
  float close;             // if the log-sums (to base 2) spread over less, one exponential is shared
  float *scalars;          // [4, scales]: workspace
  // Null where not needed. sums [n, width] float32: workspace; rows [n, d]: results. folded: the two sets are the same, and both
  // gradients are added to the anchors'.
  float *anchor_sums, *contrast_sums;
  void *anchor_rows, *contrast_rows;
  Dtype out_dtypes[2];
  const float *anchor_norms, *contrast_norms; // of the caller's rows, in the caller's order; null: not normalised
  bool folded;
  float *similarity_sums; // [scales, n]: sum over an anchor's logits of gradient times similarity; in self-contrast twice that
  float *bias;            // [m], in the caller's order
  const float *weighted;  // from the forward, if only the anchors' gradient is needed; or null
};

int extreme_blocks(int64_t rows);
// Number of blocks of a sweep in both directions; each block has its own line of column sums.
int line_count(int64_t rows, const Where &where);
void contrast_forward(const ContrastForward &call, const Where &where);
void contrast_backward(const ContrastBackward &call, const Where &where);

} // namespace fastcl::cuda
