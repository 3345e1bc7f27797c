// A fixed number of Sinkhorn's iterations in one call. As Python operations, the updates between the passes, which are only O(N + K)
// numbers, can take longer than the passes.
#pragma once
#include "cpu/engine.h"

namespace fastcl {

// One problem of a batch. `pass_by_pass` in fastcl/ops/sinkhorn/solver.py defines the computation. Reals are as in Sinkhorn.
struct SinkhornSolve {
  Sinkhorn pass; // only scores, columns, wide_reals, threads and matrix (for the assignments) are set
  double epsilon;
  const void *log_prior;               // [K] reals; -inf: no mass
  const void *log_row_marginal;        // [N] reals, not normalised; -inf: no mass
  const double *init;                  // g [K], -inf for columns without mass; null: none
  int64_t iterations;                  // T
  void *rows;                          // [T + 1][2][N] reals, saved for the backward: shift and sum of each row update
  int64_t row_step;                    // distance in reals from a shift to its sum, and from a sum to the next shift
  double *columns;                     // [2 T + 2][K], saved for the backward: the first normalizer, potentials, masses
  int64_t column_step;                 // distance from one of these rows to the next
  void *row_potential, *col_potential; // [N], [K] reals
};

// Returns the workspace's size in bytes; with a workspace, also solves.
int64_t solve(const Engine &engine, const SinkhornSolve &call, void *workspace);

} // namespace fastcl
