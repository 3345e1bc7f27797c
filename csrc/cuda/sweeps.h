// Launches of the sweeps; compiled once for each dtype of rows.
#pragma once
#include "gradient.h"
#include "runtime.h"
#include "statistics.h"

namespace fastcl::cuda {

// blocks: 0 for one for each block of rows. The launches set `resident`, `slots` and `whole`.
template <class Element> void launch_statistics(StatisticsSweep sweep, int64_t blocks, const Where &where);
template <class Element> void launch_gradient(GradientSweep sweep, const Where &where);

#ifdef FASTCL_SWEEPS
template <class Element> void launch_statistics(StatisticsSweep sweep, int64_t blocks, const Where &where) {
  constexpr int COLUMNS = StatisticsShape<Element>::COLUMNS;
  const int64_t fixed = KEPT_SIZE + (sweep.lines ? 2 * WARPS_DOWN * COLUMNS * 4 : 0), most = device(where.device).shared;
  sweep.slots = PREFETCH + 1;
  sweep.resident = fixed + feed_size<COLUMNS>(sweep.width, true, sweep.slots) <= most;
  const int64_t shared = fixed + feed_size<COLUMNS>(sweep.width, sweep.resident, sweep.slots);
  launch("statistics", statistics_kernel<Element>, {blocks ? blocks : blocks_of(sweep.n, BLOCK_ROWS), THREADS, shared}, where, sweep);
}

template <class Element> void launch_gradient(GradientSweep sweep, const Where &where) {
  constexpr int COLUMNS = GradientShape<Element>::COLUMNS;
  const int slices = int(blocks_of(sweep.width, SLICE));
  const int64_t most = device(where.device).shared;
  // What serves best comes first: nothing is loaded twice; columns are, for the second product; the block's own rows are too.
  sweep.resident = sweep.whole = true;
  sweep.slots = slices + PREFETCH;
  const auto size = [&] { return TILE_SIZE + feed_size<COLUMNS>(sweep.width, sweep.resident, sweep.slots); };
  if (size() > most) sweep.whole = false, sweep.slots = PREFETCH + 1;
  if (size() > most) sweep.resident = false;
  launch("gradient", gradient_kernel<Element>, {blocks_of(sweep.n, BLOCK_ROWS), THREADS, size(), false, blocks_of(sweep.width, PART)}, where, sweep);
}

template void launch_statistics<FASTCL_SWEEPS>(StatisticsSweep, int64_t, const Where &);
template void launch_gradient<FASTCL_SWEEPS>(GradientSweep, const Where &);
#endif

} // namespace fastcl::cuda
