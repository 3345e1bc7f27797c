// The largest inner products of each query with keys, as a plain record: sizes, strides, addresses.
#pragma once
#include "problem.h"

namespace fastcl {

struct TopK {
  Rows queries, keys;
  int64_t dimension, k;
  const int32_t *query_ids, *key_ids; // equal ones make a pair inadmissible; null: none
  bool wide_reals;                    // products and values are double, else float
  int threads;
  void *values;     // [N, k] reals, best first; -inf where fewer than k keys are admissible
  int64_t *indices; // [N, k]; -1 there
};

} // namespace fastcl
