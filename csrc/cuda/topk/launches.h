// The largest inner products of each query with keys, on a GPU.
#pragma once
#include "problem.h"
#include "cuda/cuda.h"

namespace fastcl::cuda {

struct TopKCall {
  Rows queries, keys; // any strides; float64 excepted
  int64_t dimension;
  const int32_t *query_names, *key_names; // equal ones but -1 make a pair inadmissible; null: none
  int64_t slots, span, parts;             // places for each query and part; keys of a part; parts
  int64_t *best;                          // [N, parts, slots], as fastcl/ops/topk/chunked.py packs them, best first
};

constexpr int64_t TOPK_LEAST = 16, TOPK_MOST = 256; // slots: powers of two between

void topk(const Where &where, const TopKCall &call);

} // namespace fastcl::cuda
