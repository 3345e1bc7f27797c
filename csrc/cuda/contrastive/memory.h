// How sweeps with a second product use shared memory.
#pragma once
#include "cuda/runtime.h"
#include "gradient.h"

namespace fastcl::cuda {

// Decides how a sweep with a second product uses shared memory; returns its bytes in addition to `fixed`.
template <class Element, class Products> int64_t choose_memory(Products &sweep, int64_t fixed, int64_t most) {
  constexpr int COLUMNS = GradientShape<Element>::COLUMNS;
  // From best to worst: nothing is loaded twice; columns are loaded twice, for the second product; the block's own rows are also
  // loaded again.
  sweep.resident = sweep.whole = true;
  sweep.prefetch = 2;
  sweep.slots = int(blocks_of(sweep.width, SLICE)) + 2;
  const auto size = [&] { return fixed + feed_size<COLUMNS>(sweep.width, sweep.resident, sweep.slots); };
  if (size() > most) sweep.whole = false, sweep.slots = 3;
  if (size() > most) sweep.resident = false;
  if (size() > most) sweep.prefetch = 1, sweep.slots = 2;
  return size();
}

} // namespace fastcl::cuda
