// The cosines of a tile's guide rows, a second product beside that of the logits.
#pragma once
#include "cpu/sweep.h"

namespace fastcl::FASTCL_ISA {
namespace {

template <class T> struct GuideTiles {
  using Guided = Sweep<Plain<T>>;
  using Tile = typename Guided::Tile;
  struct Local { // of a thread
    T *block;    // packed rows of a block
    Tile *tile;
  };
  const bool asked;
  const Guided *s = nullptr;
  Local *locals = nullptr;

  GuideTiles(const Problem &p, const Arranged &at, Arena &arena) : asked(p.rules.thresholds) {
    if (!asked) return;
    const Guided sweep(rows_of(p), {{at.anchors.order}, {at.contrasts.order}}, arena, false, false);
    Guided *const kept = arena.take<Guided>(1);
    locals = arena.take<Local>(sweep.threads);
    for (int t = 0; t < sweep.threads; t++) {
      const Local local{arena.take<T>(sweep.block_units()), arena.take<Tile>(1)};
      if (arena.base) locals[t] = local;
    }
    if (arena.base) *kept = sweep;
    s = kept;
  }
  void pack(int t) const {
    if (asked) s->pack(t);
  }
  void pack_block(Range rows, int t) const {
    if (asked) s->pack_block(locals[t].block, rows.from, rows.to, t);
  }
  // The tile at (i0, j0) of the block that begins at `from`; null without a guide.
  FASTCL_INLINE const Tile *cosines(int t, int64_t from, int64_t i0, int64_t j0) const {
    if (!asked) return nullptr;
    Tile &tile = *locals[t].tile;
    s->products(locals[t].block + (i0 - from) * A_ROW, j0, tile, s->contrasts.columns + j0 * s->units);
    EACH(r, MR) EACH(v, NV) {
      const V<T> norms = s->anchors.inverse_norms[i0 + r] * load(s->contrasts.inverse_norms + j0 + v * Guided::W);
      store(tile[r][v], load(tile[r][v]) * norms);
    }
    return &tile;
  }

private:
  static Problem rows_of(const Problem &p) {
    Problem q = p;
    q.anchors = p.rules.anchor_guide;
    q.contrasts = p.rules.contrast_guide;
    q.dimension = p.rules.guide_dimension;
    q.contrast_bias = nullptr;
    q.normalize_anchors = q.normalize_contrasts = true;
    q.rules = {};
    return q;
  }
};

} // namespace
} // namespace fastcl::FASTCL_ISA
