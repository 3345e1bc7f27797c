// Top-k. Keys are streamed in blocks. Tiles of their products with all queries are compared with each query's k-th best so far, and
// better candidates are added to the query's collection. Queries are the columns of the tiles, so one comparison handles all lanes. The
// best for k = 1 are in lanes too.
#pragma once
#include "nearest.h"

namespace fastcl::FASTCL_ISA {
namespace {

// A bit for each lane whose mask is set.
template <class T> FASTCL_INLINE uint32_t lanes(I<T> mask) {
#if FASTCL_BYTES == 64
  return sizeof(T) == 8 ? uint32_t(_mm512_movepi64_mask((__m512i)mask)) : uint32_t(_mm512_movepi32_mask((__m512i)mask));
#elif FASTCL_BYTES == 32
  return sizeof(T) == 8 ? uint32_t(_mm256_movemask_pd((__m256d)mask)) : uint32_t(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  EACH(l, Simd<T>::W) bits |= uint32_t(mask[l] & 1) << l;
  return bits;
#endif
}

// The sums of W vectors as the lanes of one vector. All sums add their terms in the same order.
template <class T, int HALF = 1> FASTCL_INLINE V<T> sums(V<T> (&rows)[Simd<T>::W]) {
  constexpr int W = Simd<T>::W;
  if constexpr (HALF < W) {
    using B = Butterfly<T, HALF, std::make_index_sequence<W>>;
    EACH(r, W) if (!(r & (2 * HALF - 1))) rows[r] = B::low(rows[r], rows[r + HALF]) + B::high(rows[r], rows[r + HALF]);
    return sums<T, 2 * HALF>(rows);
  }
  return rows[0];
}

template <class T> struct TopKPass {
  using Mul = Plain<T>;
  using Best = Collection<T>;
  using Number = typename Best::Number;
  using Int = typename Simd<T>::Int;
  static constexpr int W = Simd<T>::W;
  static constexpr int64_t NR = NV * W;
  static constexpr int64_t A_CHUNK = (BLOCK + MR) * A_ROW;
  static constexpr int64_t FEW = 8;               // up to this many queries, the lanes hold keys
  static constexpr int64_t QUERIES = 256;         // smallest number per thread: with fewer, loading the keys from memory would dominate
  static constexpr int64_t GROUP_BYTES = 1 << 20; // of packed queries, which stay in a cache
  static constexpr int64_t PREFETCHED = 1024;     // beyond the last panel

  // Queries that a thread searches for at a time, and what it has found for them.
  struct Group {
    int64_t first, count, panels;
    T *columns;     // [panels][D][NR]: the queries; few: [count][D]
    int32_t *ids;   // [panels][NR]
    T *thresholds;  // [panels][NR]: products up to here do not matter; in lanes the best, NaN before there is one
    Int *nearest;   // [panels][NR], in lanes: the indices of the best, -1 before there is one
    Number *kept;   // [count][room]: collections
    int64_t *sizes; // [count]: of the collections
  };

  const TopK &call;
  const int64_t n, m, d, chunks, query_parts, key_parts, panels, groups, width, room;
  const bool in_lanes; // the best for k = 1 are in `thresholds` and `nearest`; only those of tiles with NaN or an edge in collections
  T *blocks;           // [threads][chunks * A_CHUNK]: keys
  T *buffers;          // [threads][W][row]: buffers for converted rows
  Group *own;          // [threads]: the memory of their groups

  // panels: of the largest part of the queries. width: panels of the largest group.
  TopKPass(const TopK &call, Arena &arena)
      : call(call), n(call.queries.size), m(call.keys.size), d(call.dimension), chunks((d + CHUNK - 1) / CHUNK), query_parts(parts(n, call.threads)),
        key_parts(call.threads / query_parts), panels(round_up(n, NR * query_parts) / NR / query_parts), groups(pieces(panels, d)),
        width((panels + groups - 1) / groups), room(Best::room_for(call.k, m)), in_lanes(call.k == 1 && !few()) {
    blocks = arena.take<T>(call.threads * chunks * A_CHUNK);
    buffers = arena.take<T>(call.threads * W * row());
    own = arena.take<Group>(call.threads);
    const int64_t most = smaller(n, width * NR);
    for (int t = 0; t < call.threads; t++) {
      Group memory{};
      memory.columns = arena.take<T>(few() ? n * d : width * d * NR + PREFETCHED);
      memory.ids = arena.take<int32_t>(width * NR);
      memory.thresholds = arena.take<T>(width * NR);
      memory.nearest = arena.take<Int>(in_lanes ? width * NR : 0);
      memory.kept = arena.take<Number>(most * room);
      memory.sizes = arena.take<int64_t>(most);
      if (arena.base) own[t] = memory;
    }
  }

  void run() const {
    with_team(call.threads, [&](const Team &team) {
      if (key_parts == 1)
        return team.run([&](int t) {
          for (int64_t g = 0; g < groups; g++) search(t, g), finish(t);
        });
      for (int64_t g = 0; g < groups; g++) {
        team.run([&](int t) { search(t, g); });
        team.run([&](int t) { finish(t); });
      }
    });
  }

private:
  // The number of parts of the queries: a divisor of the number of threads. The remaining factor splits the keys.
  static int64_t parts(int64_t n, int64_t threads) {
    int64_t best = 1;
    for (int64_t p = 2; p <= threads; p++)
      if (threads % p == 0 && p * QUERIES <= n) best = p;
    return best;
  }
  static int64_t pieces(int64_t panels, int64_t d) { // the number of groups
    const int64_t most = larger<int64_t>(GROUP_BYTES / int64_t(d * NR * sizeof(T)), 1);
    return (panels + most - 1) / most;
  }
  bool few() const { return n <= FEW; }
  int64_t row() const { return round_up(d, 16); }

  // Group g of thread t, with nothing found yet.
  Group begin(int t, int64_t g) const {
    const Range mine = share(n, int(query_parts), int(t / key_parts), NR);
    Group group = own[t];
    group.first = smaller(mine.from + g * width * NR, mine.to);
    group.count = smaller(mine.to - group.first, width * NR);
    group.panels = (group.count + NR - 1) / NR;
    for (int64_t i = 0; i < group.panels * NR; i++) {
      group.ids[i] = call.query_ids && i < group.count ? call.query_ids[group.first + i] : 0;
      group.thresholds[i] = i < group.count ? T(__builtin_nan("")) : T(__builtin_inf());
      if (in_lanes) group.nearest[i] = -1;
    }
    for (int64_t i = 0; i < group.count; i++) group.sizes[i] = 0;
    return own[t] = group;
  }

  void search(int t, int64_t g) const {
    const Group group = begin(t, g);
    const Range keys = share(m, int(key_parts), int(t % key_parts));
    if (few()) return search_few(group, keys, t);
    for (int64_t p = 0; p < group.panels; p++)
      pack_panel(call.queries, group.first + p * NR, group.first + group.count, d, buffers + t * W * row(), group.columns + p * d * NR);
    T *const a = blocks + t * chunks * A_CHUNK;
    const bool in_one_piece = call.keys.column_stride == 1 && call.keys.row_stride == d;
    const int64_t bytes = d * (call.keys.dtype == Dtype::float64 ? 8 : call.keys.dtype == Dtype::float32 ? 4 : 2);
    for (int64_t from = keys.from; from < keys.to && group.count; from += BLOCK) {
      const int64_t to = smaller(from + BLOCK, keys.to), rows = round_up(to - from, MR);
      // With few queries the rows are multiplied in place, because copying them would take as long.
      const bool in_place = readable<T>(call.keys) && group.panels <= 4 && to - from == rows;
      const T *const first = in_place ? (const T *)call.keys.data + from * call.keys.row_stride : a;
      if (!in_place) pack_rows(call.keys, from, to, rows, d, buffers + t * W * row(), a);
      // Meanwhile the next block is prefetched into the second-level cache, a few lines with each tile.
      const char *ahead = (const char *)call.keys.data + to * bytes;
      const int64_t next = in_one_piece ? (smaller(to + BLOCK, keys.to) - to) * bytes : 0;
      const int64_t step = round_up(next / (rows / MR * group.panels) + 1, 64);
      int64_t fetched = 0;
      for (int64_t p = 0; p < group.panels; p++)
        for (int64_t i = 0; i < rows; i += MR) {
          for (const int64_t end = smaller(fetched + step, next); fetched < end; fetched += 64) __builtin_prefetch(ahead + fetched, 0, 2);
          if (in_place) tile(first + i * call.keys.row_stride, call.keys.row_stride, CHUNK, group, p, {from + i, to});
          else tile(first + i * A_ROW, std::integral_constant<int64_t, A_ROW>(), A_CHUNK, group, p, {from + i, to});
        }
    }
  }

  void search_few(const Group &group, Range keys, int t) const {
    for (int64_t i = 0; i < n; i++) read_row(call.queries, i, d, group.columns + i * d);
    for (int64_t from = keys.from; from < keys.to; from += W) {
      const int64_t count = smaller(keys.to - from, int64_t(W));
      const bool in_place = readable<T>(call.keys) && count == W;
      T *const buffer = buffers + t * W * row();
      for (int64_t r = 0; !in_place && r < W; r++) read_row(call.keys, smaller(from + r, keys.to - 1), d, buffer + r * row());
      const T *const rows = in_place ? (const T *)call.keys.data + from * call.keys.row_stride : buffer;
      for (int64_t i = 0; i < n; i++) {
        const V<T> x = products(rows, in_place ? call.keys.row_stride : row(), group.columns + i * d);
        const I<T> found = ~(I<T>)(x <= all<T>(group.thresholds[i])); // NaN passes
        if (!any<T>(found)) continue;
        for (int64_t r = 0; r < count; r++)
          if (found[r] && !(call.key_ids && call.key_ids[from + r] == group.ids[i])) add(group, i, x[r], from + r);
      }
    }
  }
  // Inner products [W] of a query with W rows at distance `stride`.
  FASTCL_INLINE V<T> products(const T *rows, int64_t stride, const T *query) const {
    V<T> total = all<T>(0);
    for (int64_t from = 0; from < d; from += CHUNK * W) {
      const int64_t to = smaller(from + CHUNK * W, d);
      V<T> x[W];
      EACH(r, W) x[r] = all<T>(0);
      int64_t k = from;
      for (; k + W <= to; k += W) {
        const V<T> y = loadu(query + k);
        EACH(r, W) x[r] = fused<T>(loadu(rows + r * stride + k), y, x[r]);
      }
      if (k < to) {
        const V<T> y = first_of(query + k, to - k);
        EACH(r, W) x[r] = fused<T>(first_of(rows + r * stride + k, to - k), y, x[r]);
      }
      total += sums<T>(x);
    }
    return total;
  }
  static FASTCL_INLINE V<T> first_of(const T *p, int64_t count) { // padded with zeros
    T values[W] __attribute__((aligned(64))) = {};
    for (int64_t l = 0; l < count; l++) values[l] = p[l];
    return load(values);
  }

  // The tile of panel p of the queries and of MR keys. row: distance of keys. chunk: distance from a chunk of a key to the next. places:
  // of the first key, and of the end of all.
  template <class Row> FASTCL_INLINE void tile(const T *keys, Row row, int64_t chunk, const Group &group, int64_t p, Range places) const {
    T u[MR][NV][W] __attribute__((aligned(64)));
    multiply_panel<T>(keys, row, chunk, group.columns + p * d * NR, d, u);
    I<T> candidates = all_int<T>(0);
    EACH(v, NV) {
      const int64_t i = p * NR + v * W;
      const V<T> threshold = load(group.thresholds + i);
      for (int r = 0; r < MR; r++) candidates |= passes(load(u[r][v]), threshold, group, i, places.from + r);
    }
    if (!any<T>(candidates)) return;
    if (in_lanes && places.from + MR <= places.to && compare(u, group, p, places.from)) return;
    collect(u, group, p, places);
  }
  // Which of the products of W queries, the i-th of the group and those after it, with a key matter.
  FASTCL_INLINE I<T> passes(V<T> x, V<T> threshold, const Group &group, int64_t i, int64_t key) const {
    I<T> mask = ~(I<T>)(x <= threshold); // NaN passes
    if (call.key_ids) mask &= load_ids<T>(group.ids + i) != all_int<T>(key < m ? call.key_ids[key] : 0);
    return mask;
  }

  // Compares the tile's products with the best so far. Returns false, having done nothing, if some are NaN.
  FASTCL_INLINE bool compare(const T (&u)[MR][NV][W], const Group &group, int64_t p, int64_t key) const {
    I<T> nan = all_int<T>(0);
    for (int r = 0; r < MR; r++) EACH(v, NV) nan |= load(u[r][v]) != load(u[r][v]);
    if (any<T>(nan)) return false;
    EACH(v, NV) {
      const int64_t i = p * NR + v * W;
      V<T> best = load(group.thresholds + i);
      I<T> index = *(const I<T> *)(group.nearest + i);
      for (int r = 0; r < MR; r++) {
        const V<T> x = load(u[r][v]);
        const I<T> better = passes(x, best, group, i, key + r);
        best = where<T>(better, x, best);
        index = better ? all_int<T>(key + r) : index;
      }
      store(group.thresholds + i, best);
      *(I<T> *)(group.nearest + i) = index;
    }
    return true;
  }

  // Adds the tile's candidates to the collections.
  FASTCL_NOINLINE void collect(const T (&u)[MR][NV][W], const Group &group, int64_t p, Range places) const {
    static_assert(NR <= 32, "a bit for each query");
    const int64_t rows = smaller(places.to - places.from, int64_t(MR)), first = p * NR;
    for (int64_t r = 0; r < rows; r++) {
      uint32_t found = 0;
      EACH(v, NV) {
        const int64_t i = first + v * W;
        found |= lanes<T>(passes(load(u[r][v]), load(group.thresholds + i), group, i, places.from + r)) << (v * W);
      }
      for (; found; found &= found - 1) {
        const int64_t q = __builtin_ctz(found);
        if (first + q < group.count) add(group, first + q, u[r][q / W][q % W], places.from + r); // beyond: infinity times a row of zeros
      }
    }
  }
  Best collection(const Group &group, int64_t i) const { return {group.kept + i * room, group.sizes[i], call.k, room}; }
  FASTCL_INLINE void add(const Group &group, int64_t i, T product, int64_t key) const {
    Best best = collection(group, i);
    const bool reduced = best.add(Best::C::of(product, int32_t(key)));
    group.sizes[i] = best.count;
    if (reduced && !in_lanes) group.thresholds[i] = best.worst();
  }

  // Writes thread t's share of the results for the present groups, which several threads have searched for, each among other keys.
  void finish(int t) const {
    const Group *const found = own + t / key_parts * key_parts;
    const Range mine = share(found->count, int(key_parts), int(t % key_parts));
    for (int64_t i = mine.from; i < mine.to; i++) {
      Best best = collection(found[0], i);
      for (int64_t part = 1; part < key_parts; part++) {
        const Best other = collection(found[part], i);
        for (int64_t q = 0; q < other.count; q++) best.add(other.kept[q]);
      }
      for (int64_t part = 0; in_lanes && part < key_parts; part++)
        if (found[part].nearest[i] >= 0) best.add(Best::C::of(found[part].thresholds[i], int32_t(found[part].nearest[i])));
      best.reduce();
      sort(best.kept, best.count);
      for (int64_t q = 0, at = (found->first + i) * call.k; q < call.k; q++, at++) {
        ((T *)call.values)[at] = q < best.count ? Best::C::value(best.kept[q]) : T(-__builtin_inf());
        call.indices[at] = q < best.count ? Best::C::index(best.kept[q]) : -1;
      }
    }
  }
};

int64_t topk(const TopK &call, void *workspace) {
  Arena arena{(char *)workspace};
  const auto with = [&](auto pass) {
    if (workspace) pass.run();
    return arena.used;
  };
  const auto of = [&](auto zero) {
    using T = decltype(zero);
    if (!few_keys<T>(call)) return with(TopKPass<T>(call, arena));
    return call.k == 1 ? with(NearestPass<T, 1>(call, arena)) : with(NearestPass<T, 2>(call, arena));
  };
  return call.wide_reals ? of(double()) : of(float());
}

} // namespace
} // namespace fastcl::FASTCL_ISA
