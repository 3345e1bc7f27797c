// Top-k. Keys are streamed in blocks. Tiles of their products with all queries are compared with each query's k-th best so far, and
// better candidates go into the query's heap. Queries are the columns of the tiles, so one comparison handles all lanes.
#pragma once
#include "call.h"
#include "cpu/sweep.h"
#include <type_traits>

namespace fastcl::FASTCL_ISA {
namespace {

// The k best candidates so far, the worst of them on top. NaN is better than any number, as in torch.topk; among equal values the
// lower index is better.
template <class T> struct Heap {
  T *value;
  int32_t *index;
  int64_t count, k;

  static FASTCL_INLINE bool better(T x, int32_t i, T y, int32_t j) {
    if (x != x || y != y) return (x != x && y == y) || (x != x && i < j);
    return x > y || (x == y && i < j);
  }
  FASTCL_INLINE bool below(int64_t a, int64_t b) const { return better(value[b], index[b], value[a], index[a]); }
  void swap(int64_t a, int64_t b) const {
    const T v = value[a];
    const int32_t i = index[a];
    value[a] = value[b], index[a] = index[b];
    value[b] = v, index[b] = i;
  }
  void sift_down(int64_t size) const {
    for (int64_t at = 0;;) {
      int64_t worst = at;
      for (int64_t child = 2 * at + 1; child <= 2 * at + 2 && child < size; child++)
        if (below(child, worst)) worst = child;
      if (worst == at) return;
      swap(at, worst);
      at = worst;
    }
  }
  void push(T x, int32_t i) {
    if (count < k) {
      int64_t at = count++;
      value[at] = x, index[at] = i;
      for (; at && below(at, (at - 1) / 2); at = (at - 1) / 2) swap(at, (at - 1) / 2);
    } else if (better(x, i, value[0], index[0])) {
      value[0] = x, index[0] = i;
      sift_down(count);
    }
  }
  void sort() const { // best first
    for (int64_t size = count; size > 1;) {
      swap(0, --size);
      sift_down(size);
    }
  }
  // The value that a candidate must exceed; NaN while the heap is not full, because no value is <= NaN.
  T threshold() const { return count < k ? T(__builtin_nan("")) : value[0]; }
};

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
  static constexpr int W = Simd<T>::W;
  static constexpr int64_t NR = NV * W;
  static constexpr int64_t A_CHUNK = (BLOCK + MR) * A_ROW;
  static constexpr int64_t FEW = 8;       // up to this many queries, the lanes hold keys
  static constexpr int64_t QUERIES = 256; // smallest number per thread: with fewer, loading the keys from memory would dominate

  const TopK &call;
  const int64_t n, m, d, chunks, panels, padded, query_parts, key_parts;
  T *columns;        // [panels][D][NR]: queries; few: [n][D]
  T *blocks;         // [threads][chunks * A_CHUNK]: keys
  T *buffers;        // [threads][W][row]: buffers for converted rows
  T *heap_values;    // [key_parts][n][k]
  int32_t *heap_ids; // [key_parts][n][k]
  int64_t *counts;   // [key_parts][n]
  T *thresholds;     // [key_parts][padded]
  int32_t *ids;      // [padded]

  TopKPass(const TopK &call, Arena &arena)
      : call(call), n(call.queries.size), m(call.keys.size), d(call.dimension), chunks((d + CHUNK - 1) / CHUNK), panels((n + NR - 1) / NR),
        padded(panels * NR), query_parts(parts(n, call.threads)), key_parts(call.threads / query_parts) {
    columns = arena.take<T>(panels * d * NR + 1024); // prefetches read beyond the end
    blocks = arena.take<T>(call.threads * chunks * A_CHUNK);
    buffers = arena.take<T>(call.threads * W * row());
    heap_values = arena.take<T>(key_parts * n * call.k);
    heap_ids = arena.take<int32_t>(key_parts * n * call.k);
    counts = arena.take<int64_t>(key_parts * n);
    thresholds = arena.take<T>(key_parts * padded);
    ids = arena.take<int32_t>(padded);
  }

  void run() const {
    with_team(call.threads, [&](const Team &team) {
      team.run([&](int t) { pack(t); });
      team.run([&](int t) {
        if (few()) search_few(t);
        else if (t < query_parts * key_parts) search(t);
      });
      team.run([&](int t) { finish(t); });
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
  bool few() const { return n <= FEW; }
  int64_t row() const { return round_up(d, 16); }
  Heap<T> heap(int64_t part, int64_t query) const {
    const int64_t at = part * n + query;
    return {heap_values + at * call.k, heap_ids + at * call.k, counts[at], call.k};
  }

  void pack(int t) const {
    const Range mine = share(padded, call.threads, t, NR);
    T *const buffer = buffers + t * W * row();
    for (int64_t i = mine.from; few() && i < smaller(mine.to, n); i++) read_row(call.queries, i, d, columns + i * d);
    for (int64_t i = mine.from; !few() && i < mine.to; i += W) {
      for (int64_t l = 0; l < W; l++) {
        if (i + l < n) read_row(call.queries, i + l, d, buffer + l * row());
        else memset(buffer + l * row(), 0, row() * sizeof(T));
      }
      T *out = columns + i / NR * NR * d + i % NR;
      int64_t k = 0;
      for (; k + W <= d; k += W, out += W * NR) {
        V<T> tile[W];
        EACH(l, W) tile[l] = loadu(buffer + l * row() + k);
        transpose<T>(tile);
        EACH(l, W) store(out + l * NR, tile[l]);
      }
      for (; k < d; k++, out += NR)
        for (int64_t l = 0; l < W; l++) out[l] = buffer[l * row() + k];
    }
    for (int64_t i = mine.from; i < mine.to; i++) {
      ids[i] = call.query_ids && i < n ? call.query_ids[i] : 0;
      for (int64_t part = 0; part < key_parts; part++) {
        thresholds[part * padded + i] = i < n ? T(__builtin_nan("")) : T(__builtin_inf());
        if (i < n) counts[part * n + i] = 0;
      }
    }
  }

  void search(int t) const {
    const int64_t part = t % key_parts;
    const Range mine = share(panels, int(query_parts), int(t / key_parts)), keys = share(m, int(key_parts), int(part));
    T *const a = blocks + t * chunks * A_CHUNK;
    const bool in_one_piece = call.keys.column_stride == 1 && call.keys.row_stride == d;
    const int64_t bytes = d * (call.keys.dtype == Dtype::float64 ? 8 : call.keys.dtype == Dtype::float32 ? 4 : 2);
    for (int64_t from = keys.from; from < keys.to; from += BLOCK) {
      const int64_t to = smaller(from + BLOCK, keys.to), rows = round_up(to - from, MR);
      // With few queries the rows are multiplied in place, because copying them would take as long.
      const bool in_place = readable() && mine.to - mine.from <= 4 && to - from == rows;
      const T *const first = in_place ? (const T *)call.keys.data + from * call.keys.row_stride : a;
      if (!in_place) block(a, from, to, rows, t);
      // Meanwhile the next block is prefetched into the second-level cache, a few lines with each tile.
      const char *ahead = (const char *)call.keys.data + to * bytes;
      const int64_t next = in_one_piece ? (smaller(to + BLOCK, keys.to) - to) * bytes : 0;
      const int64_t step = round_up(next / (rows / MR * (mine.to - mine.from)) + 1, 64);
      int64_t fetched = 0;
      for (int64_t p = mine.from; p < mine.to; p++)
        for (int64_t i = 0; i < rows; i += MR) {
          for (const int64_t end = smaller(fetched + step, next); fetched < end; fetched += 64) __builtin_prefetch(ahead + fetched, 0, 2);
          if (in_place) tile(first + i * call.keys.row_stride, call.keys.row_stride, CHUNK, p, from + i, to, part);
          else tile(first + i * A_ROW, std::integral_constant<int64_t, A_ROW>(), A_CHUNK, p, from + i, to, part);
        }
    }
  }

  void search_few(int t) const {
    const Range keys = share(m, int(key_parts), t);
    for (int64_t from = keys.from; from < keys.to; from += W) {
      const int64_t count = smaller(int64_t(W), keys.to - from);
      const bool in_place = readable() && count == W;
      T *const buffer = buffers + t * W * row();
      for (int64_t r = 0; !in_place && r < W; r++) read_row(call.keys, smaller(from + r, keys.to - 1), d, buffer + r * row());
      const T *const rows = in_place ? (const T *)call.keys.data + from * call.keys.row_stride : buffer;
      for (int64_t query = 0; query < n; query++) {
        const V<T> x = products(rows, in_place ? call.keys.row_stride : row(), columns + query * d);
        if (!any<T>(~(I<T>)(x <= all<T>(thresholds[t * padded + query])))) continue;
        T found[W] __attribute__((aligned(64)));
        store(found, x);
        offer(t, query, found, 1, from, count);
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

  bool readable() const { // whether keys are contiguous rows of T
    return call.keys.column_stride == 1 && call.keys.dtype == (sizeof(T) == 8 ? Dtype::float64 : Dtype::float32);
  }

  // Packs keys, row-major within chunks: a[chunk][row][A_ROW]; zeros from `to` on.
  void block(T *a, int64_t from, int64_t to, int64_t rows, int t) const {
    T *const buffer = buffers + t * W * row();
    for (int64_t r = 0; r < rows; r++) {
      const T *x = nullptr;
      if (from + r < to) {
        if (readable()) x = (const T *)call.keys.data + (from + r) * call.keys.row_stride;
        else read_row(call.keys, from + r, d, buffer), x = buffer;
      }
      for (int64_t c = 0; c < chunks; c++) {
        T *const out = a + c * A_CHUNK + r * A_ROW;
        const int64_t count = smaller(CHUNK, d - c * CHUNK);
        if (x) memcpy(out, x + c * CHUNK, count * sizeof(T));
        else memset(out, 0, count * sizeof(T));
      }
    }
  }

  // row: distance of keys. chunk: distance from a chunk of a key to the next.
  template <class Row> FASTCL_INLINE void tile(const T *a, Row row, int64_t chunk, int64_t p, int64_t first, int64_t to, int64_t part) const {
    T u[MR][NV][W] __attribute__((aligned(64)));
    const T *const b = columns + p * d * NR;
    for (int64_t c = 0; c < chunks; c++) {
      V<T> x[MR][NV];
      EACH(r, MR) EACH(v, NV) x[r][v] = all<T>(0);
      const T *rows = a + c * chunk, *query = b + c * CHUNK * NR;
      const int64_t depth = smaller(CHUNK, d - c * CHUNK), stride = row;
      if constexpr (std::is_same<Row, int64_t>::value) {
        for (int64_t k = 0; k < depth; k++) {
          V<T> y[NV];
          EACH(v, NV) y[v] = load(query + k * NR + v * W);
          EACH(r, MR) {
            const T z = rows[r * stride + k];
            EACH(v, NV) x[r][v] = Mul::multiply(x[r][v], z, y[v]);
          }
        }
      } else multiply<Mul, A_ROW, 1>(rows, query, depth, x, rows + MR * A_ROW);
      if (c == 0) EACH(r, MR) EACH(v, NV) store(u[r][v], x[r][v]);
      else EACH(r, MR) EACH(v, NV) add_to(u[r][v], x[r][v]);
    }
    const T *const least = thresholds + part * padded + p * NR;
    I<T> candidates[NV];
    EACH(v, NV) {
      const V<T> threshold = load(least + v * W);
      candidates[v] = all_int<T>(0);
      for (int r = 0; r < MR; r++) candidates[v] |= passes(load(u[r][v]), threshold, p * NR + v * W, first + r);
    }
    static_assert(NV == 2, "two vectors");
    if (any<T>(candidates[0] | candidates[1])) insert(u, candidates, p, first, to, part);
  }
  FASTCL_INLINE I<T> passes(V<T> x, V<T> threshold, int64_t query, int64_t key) const {
    I<T> mask = ~(I<T>)(x <= threshold);
    if (call.key_ids) mask &= load_ids<T>(ids + query) != all_int<T>(key < m ? call.key_ids[key] : 0);
    return mask;
  }

  // Offers all keys of the tile, in ascending order, to each query that has a candidate.
  FASTCL_NOINLINE void insert(const T (&u)[MR][NV][W], const I<T> (&candidates)[NV], int64_t p, int64_t first, int64_t to, int64_t part) const {
    const int64_t rows = smaller(int64_t(MR), to - first);
    for (int64_t v = 0; v < NV; v++) {
      typename Simd<T>::Int mask[W] __attribute__((aligned(64)));
      memcpy(mask, &candidates[v], sizeof(mask));
      for (int64_t l = 0; l < W; l++) {
        const int64_t query = p * NR + v * W + l;
        if (mask[l] && query < n) offer(part, query, &u[0][v][l], NV * W, first, rows);
      }
    }
  }
  // Offers `count` keys to a query, in ascending order; its products are `stride` apart.
  void offer(int64_t part, int64_t query, const T *products, int64_t stride, int64_t first, int64_t count) const {
    T &threshold = thresholds[part * padded + query];
    Heap<T> best = heap(part, query);
    for (int64_t r = 0; r < count; r++) {
      const T x = products[r * stride];
      if (x <= threshold || (call.key_ids && call.key_ids[first + r] == ids[query])) continue; // NaN passes
      best.push(x, int32_t(first + r));
      threshold = best.threshold();
    }
    counts[part * n + query] = best.count;
  }

  void finish(int t) const {
    const Range mine = share(n, call.threads, t);
    for (int64_t i = mine.from; i < mine.to; i++) {
      Heap<T> best = heap(0, i);
      for (int64_t part = 1; part < key_parts; part++) {
        const Heap<T> other = heap(part, i);
        for (int64_t q = 0; q < other.count; q++) best.push(other.value[q], other.index[q]);
      }
      best.sort();
      for (int64_t q = 0; q < call.k; q++) {
        ((T *)call.values)[i * call.k + q] = q < best.count ? best.value[q] : T(-__builtin_inf());
        call.indices[i * call.k + q] = q < best.count ? best.index[q] : -1;
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
  return call.wide_reals ? with(TopKPass<double>(call, arena)) : with(TopKPass<float>(call, arena));
}

} // namespace
} // namespace fastcl::FASTCL_ISA
