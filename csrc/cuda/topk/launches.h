// The largest inner products of each query with keys, on a GPU.
#pragma once
#include "problem.h"
#include "cuda/cuda.h"

namespace fastcl::cuda {

struct TopKCall {
  Rows queries, keys; // any strides; not float64
  int64_t dimension;
  const int32_t *query_names, *key_names; // a pair with equal names other than -1 is inadmissible; null: no names
  int64_t slots, span, parts;             // slots per query and part; keys per part; number of parts
  int64_t *best;                          // [N, parts, slots], packed as in fastcl/ops/topk/chunked.py, best first
};

constexpr int64_t TOPK_LEAST = 16, TOPK_MOST = 256; // slots: a power of two between these

void topk(const Where &where, const TopKCall &call);

} // namespace fastcl::cuda
