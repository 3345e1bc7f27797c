// The largest inner products of each query with keys, as a plain struct: sizes, strides, addresses.
#pragma once
#include "problem.h"

namespace fastcl {

struct TopK {
  Rows queries, keys;
  int64_t dimension, k;
  const int32_t *query_ids, *key_ids; // pairs with equal ids are inadmissible; null: no ids
  bool wide_reals;                    // products and values are double, else float
  int threads;
  void *values;     // [N, k] reals, best first; -inf if fewer than k keys are admissible
  int64_t *indices; // [N, k]; -1 for these
};

} // namespace fastcl
