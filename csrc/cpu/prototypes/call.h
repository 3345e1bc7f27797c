// Cross-entropies of scores against prototypes as plain structs: sizes, strides, addresses. fastcl/ops/prototypes/reference.py defines
// what they are. Arrays of "reals" are double if `wide_reals`, else float.
#pragma once
#include "problem.h"

namespace fastcl {

struct Prototypes {
  const Rows *students, *teachers; // [N, K] each; any dtype and strides
  int64_t student_count, teacher_count;
  int64_t size, columns;  // N, K
  const void *potentials; // [teachers, positions, K] reals, added to the teachers' scores; null: none
  int64_t positions;      // row i has the potentials of position i % positions
  const double *pairs;    // [students, teachers]: the factor of each cross-entropy; those with factor 0 are left out
  const double *scales;   // the inverse temperatures of students and teachers
  bool wide_reals, backward;
  int threads;
  void *kept; // [students + teachers, 2, N]: shift and sum of each row's exponentials; written forward, read backward
  // Forward.
  void *values;      // [N]: sum over the pairs
  void *entropies;   // [N]: sum over the students' crops; null: not wanted
  void *column_sums; // [K]: of the students' softmax over all crops and rows; null: not wanted
  // Backward.
  const void *value_gradient, *entropy_gradient, *column_gradient; // null: 0
  void *const *gradients;                                          // [students] of [N, K], contiguous, in the student's dtype
};

} // namespace fastcl
