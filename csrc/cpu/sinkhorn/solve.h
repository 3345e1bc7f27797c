// Sinkhorn's fixed iterations in one call: the updates between the passes, which are O(N + K) numbers, cost more than the
// passes themselves where each is an operation of Python's.
#pragma once
#include "cpu/engine.h"

namespace fastcl {

// One problem of a batch. What is computed stands in fastcl/ops/sinkhorn/solver.py, `pass_by_pass`; reals as in Sinkhorn.
struct SinkhornSolve {
  Sinkhorn pass; // scores, columns, inverse_epsilon, wide_reals, threads and matrix, the assignments' place; nothing else
  double epsilon;
  const void *log_prior;               // [K] reals; -inf: no mass
  const void *log_mass, *mass;         // [N] reals
  const double *init;                  // g [K], -inf where there is no mass; null: none
  int64_t iterations;                  // T
  void *rows;                          // [T + 1][2][N] reals, kept for the backward: shift and sum of each row update
  int64_t row_step;                    // reals from a shift to its sum, and from there to the next shift
  double *columns;                     // [2 T + 2][K], likewise: the first normalizer, potentials, masses
  int64_t column_step;                 // numbers from one of these to the next
  void *row_potential, *col_potential; // [N], [K] reals
};

// Returns the workspace's size in bytes; with a workspace, also solves.
int64_t solve(const Engine &engine, const SinkhornSolve &call, void *workspace);

} // namespace fastcl
