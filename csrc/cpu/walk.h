// The order in which threads visit tiles whose results are added to rows of both sides.
#pragma once
#include "cpu/sweep.h"

namespace fastcl::FASTCL_ISA {
namespace {

// Members of the team never write to the same rows at the same time, and the order of additions to a row depends only on the planned
// number of threads. `Pass` has
//   s                              the sweep
//   writes_rows, writes_columns    what a tile adds to: a row of the anchors' side, one of the contrasts' side
//   fixed_blocks                   blocks of BLOCK rows whatever the number of threads, else blocks of equal size
//   block<KIND>(t, rows)           called once per block of rows, before its tiles
//   tile<KIND>(t, rows, columns)
template <class Pass> struct Walk {
  static constexpr int64_t NR = Pass::NR;
  const Pass &pass;

  template <auto KIND> void run(const Team &team) const {
    const auto &s = pass.s;
    const int threads = s.threads;
    if (s.self && threads == 1) return team.run([&](int t) { triangle<KIND>(t, {0, s.anchors.size}); });
    if (s.self) { // a tournament of 2 * threads groups of rows: in each round every group is paired with another
      const int last = 2 * threads - 1;
      const auto group = [&](int k) { return share(s.anchors.size, 2 * threads, k, NR); };
      for (int round = 0; round < last; round++)
        team.run([&](int t) {
          const int left = t == 0 ? last : (round + t) % last, right = t == 0 ? round : (round - t + last) % last;
          if (round == 0) {
            triangle<KIND>(t, group(left));
            triangle<KIND>(t, group(right));
          }
          rectangle<KIND>(t, group(smaller(left, right)), group(larger(left, right)));
        });
      return;
    }
    const Range rows{0, s.anchors.size}, cols{0, s.contrasts.size};
    if (!pass.writes_columns)
      return team.run([&](int t) { rectangle<KIND>(t, share(rows.to, threads, t, pass.fixed_blocks ? int64_t(MR) : NR), cols); });
    if (!pass.writes_rows) return team.run([&](int t) { rectangle<KIND>(t, rows, share(cols.to, threads, t, NR)); });
    for (int round = 0; round < threads; round++)
      team.run([&](int t) { rectangle<KIND>(t, share(rows.to, threads, t, NR), share(cols.to, threads, (t + round) % threads, NR)); });
  }

private:
  static int64_t block_size(Range r) { // equal blocks
    const int64_t size = r.to - r.from, blocks = (size + BLOCK - 1) / BLOCK;
    return blocks ? round_up((size + blocks - 1) / blocks, NR) : NR;
  }
  template <auto KIND> void triangle(int t, Range r) const {
    const int64_t step = block_size(r);
    for (int64_t i = r.from; i < r.to; i += step) {
      const Range rows{i, smaller(r.to, i + step)};
      pass.template block<KIND>(t, rows);
      for (int64_t j = i; j < r.to; j += step) pass.template tile<KIND>(t, rows, {j, smaller(r.to, j + step)});
    }
  }
  template <auto KIND> void rectangle(int t, Range r, Range c) const {
    const int64_t step = pass.fixed_blocks ? BLOCK : block_size(r), across = block_size(c);
    for (int64_t i = r.from; i < r.to; i += step) {
      const Range rows{i, smaller(r.to, i + step)};
      pass.template block<KIND>(t, rows);
      for (int64_t j = c.from; j < c.to; j += across) pass.template tile<KIND>(t, rows, {j, smaller(c.to, j + across)});
    }
  }
};

// Fills the register tiles below the diagonal of a square of `size` rows from those above: its numbers are symmetric.
template <class Mul> void mirror(typename Mul::Real *g, int64_t size) {
  using T = typename Mul::Real;
  constexpr int W = Simd<T>::W;
  constexpr int64_t NR = NV * W, G_ROW = Sweep<Mul>::G_ROW;
  for (int64_t j = 0; j + NR < size; j += NR)
    for (int64_t i = round_up(j + NR, MR); i < size; i += W)
      for (int64_t c = j; c < j + NR; c += W) {
        V<T> part[W];
        EACH(l, W) part[l] = loadu(g + (c + l) * G_ROW + i);
        transpose<T>(part);
        const int64_t count = smaller(size - i, int64_t(W));
        for (int64_t l = 0; l < count; l++) store(g + (i + l) * G_ROW + c, part[l]);
      }
  // The last tile's overhang is multiplied too. Clear it: leftover subnormal numbers would take a hundred times as long.
  const int64_t last = (size - 1) / MR * MR;
  for (int64_t i = size; i < last + MR; i++) memset(g + i * G_ROW, 0, last / NR * NR * sizeof(T));
}

// Converts a register tile at (r0, c0) of a tile's numbers to pairs along the rows, for products that sum over the rows.
#if FASTCL_DOT
template <int64_t ROW> FASTCL_INLINE void store_transposed(float *to, const typename Sweep<Dot>::Tile &g, int64_t r0, int64_t c0) {
  const __m512i interleave =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  EACH(pair, MR / 2) EACH(v, NV) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)load(g[2 * pair + 1][v]), (__m512)load(g[2 * pair][v]));
    _mm512_store_si512(to + (r0 / 2 + pair) * ROW + c0 + v * Sweep<Dot>::W, _mm512_permutexvar_epi16(interleave, both));
  }
}
#endif

} // namespace
} // namespace fastcl::FASTCL_ISA
