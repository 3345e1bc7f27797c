// Launches of the sweep, compiled once per dtype of rows.
#pragma once
#include "cuda/contrastive/memory.h"
#include "sums.h"

namespace fastcl::cuda {

template <class Element> void launch_pairs(PairSweep sweep, const Where &where);

#ifdef FASTCL_SWEEPS
template <class Element> void launch_pairs(PairSweep sweep, const Where &where) {
  const int64_t shared = choose_memory<Element>(sweep, TILE_SIZE + ROW_SUMS_SIZE + PEAKS_SIZE, device(where.device).shared);
  const int64_t parts = sweep.gradient ? blocks_of(sweep.width, PART) : 1;
  launch("pairs", pair_kernel<Element>, {blocks_of(sweep.n, BLOCK_ROWS), THREADS, shared, false, parts}, where, sweep);
}

template void launch_pairs<FASTCL_SWEEPS>(PairSweep, const Where &);
#endif

} // namespace fastcl::cuda
