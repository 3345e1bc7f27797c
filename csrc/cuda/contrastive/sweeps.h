// Launches of the sweeps, compiled once per dtype of rows.
#pragma once
#include "memory.h"
#include "weighted.h"

namespace fastcl::cuda {

// blocks: size of the grid; 0: one per block of rows. The launches decide how to use the shared memory.
template <class Element> void launch_statistics(StatisticsSweep sweep, int64_t blocks, const Where &where);
template <class Element> void launch_gradient(GradientSweep sweep, const Where &where);
template <class Element> void launch_weighted(WeightedSweep sweep, const Where &where);

#ifdef FASTCL_SWEEPS
template <class Element> void launch_statistics(StatisticsSweep sweep, int64_t blocks, const Where &where) {
  constexpr int COLUMNS = StatisticsShape<Element>::COLUMNS;
  const int64_t fixed = KEPT_SIZE + (sweep.lines ? 2 * WARPS_DOWN * COLUMNS * 4 : 0), most = device(where.device).shared;
  const auto size = [&] { return fixed + feed_size<COLUMNS>(sweep.width, sweep.resident, sweep.slots); };
  sweep.resident = true;
  sweep.prefetch = 2;
  sweep.slots = 3;
  if (size() > most) sweep.resident = false;
  if (size() > most) sweep.prefetch = 1, sweep.slots = 2; // fits 100 KiB, the limit of some chips
  launch("statistics", statistics_kernel<Element>, {blocks ? blocks : blocks_of(sweep.n, BLOCK_ROWS), THREADS, size()}, where, sweep);
}

template <class Element> void launch_gradient(GradientSweep sweep, const Where &where) {
  const int64_t shared = choose_memory<Element>(sweep, TILE_SIZE, device(where.device).shared);
  launch("gradient", gradient_kernel<Element>, {blocks_of(sweep.n, BLOCK_ROWS), THREADS, shared, false, blocks_of(sweep.width, PART)}, where, sweep);
}

template <class Element> void launch_weighted(WeightedSweep sweep, const Where &where) {
  const int64_t shared = choose_memory<Element>(sweep, TILE_SIZE + KEPT_SIZE + TOPS_SIZE, device(where.device).shared);
  launch("weighted", weighted_kernel<Element>, {blocks_of(sweep.n, BLOCK_ROWS), THREADS, shared, false, blocks_of(sweep.width, PART)}, where, sweep);
}

template void launch_statistics<FASTCL_SWEEPS>(StatisticsSweep, int64_t, const Where &);
template void launch_gradient<FASTCL_SWEEPS>(GradientSweep, const Where &);
template void launch_weighted<FASTCL_SWEEPS>(WeightedSweep, const Where &);
#endif

} // namespace fastcl::cuda
