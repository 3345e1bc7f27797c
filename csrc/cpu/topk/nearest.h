// The nearest of few keys. Here the keys are the columns of the tiles, packed once, and the queries stream by, in place if their
// layout allows: packing many queries would take a good part of the time of their products with few keys.
#pragma once
#include "call.h"
#include "candidates.h"
#include "cpu/sweep.h"
#include <type_traits>

namespace fastcl::FASTCL_ISA {
namespace {

template <class T> FASTCL_INLINE bool readable(const Rows &rows) { // whether they are contiguous rows of T
  return rows.column_stride == 1 && rows.dtype == (sizeof(T) == 8 ? Dtype::float64 : Dtype::float32);
}

// Packs the rows [first, first + NR) of those before `to` as columns [D][NR], zeros beyond. buffer: [W][round_up(d, 16)]
template <class T> void pack_panel(const Rows &rows, int64_t first, int64_t to, int64_t d, T *buffer, T *out) {
  constexpr int W = Simd<T>::W;
  constexpr int64_t NR = NV * W;
  const int64_t stride = round_up(d, 16);
  for (int64_t i = first; i < first + NR; i += W, out += W) {
    const T *x[W];
    for (int64_t l = 0; l < W; l++) {
      x[l] = buffer + l * stride;
      if (i + l >= to) memset(buffer + l * stride, 0, stride * sizeof(T));
      else if (readable<T>(rows)) x[l] = (const T *)rows.data + (i + l) * rows.row_stride;
      else read_row(rows, i + l, d, buffer + l * stride);
    }
    int64_t k = 0;
    for (; k + W <= d; k += W) {
      V<T> tile[W];
      EACH(l, W) tile[l] = loadu(x[l] + k);
      transpose<T>(tile);
      EACH(l, W) store(out + (k + l) * NR, tile[l]);
    }
    for (; k < d; k++)
      for (int64_t l = 0; l < W; l++) out[k * NR + l] = x[l][k];
  }
}

// Packs rows [from, to) row-major within chunks: a[chunk][row][A_ROW]; zeros from `to` up to `count` rows. buffer: [d]
template <class T> void pack_rows(const Rows &of, int64_t from, int64_t to, int64_t count, int64_t d, T *buffer, T *a) {
  constexpr int64_t A_CHUNK = (BLOCK + MR) * A_ROW;
  for (int64_t r = 0; r < count; r++) {
    const T *x = nullptr;
    if (from + r < to) {
      if (readable<T>(of)) x = (const T *)of.data + (from + r) * of.row_stride;
      else read_row(of, from + r, d, buffer), x = buffer;
    }
    for (int64_t c = 0; c * CHUNK < d; c++) {
      T *const out = a + c * A_CHUNK + r * A_ROW;
      const int64_t units = smaller(CHUNK, d - c * CHUNK);
      if (x) memcpy(out, x + c * CHUNK, units * sizeof(T));
      else memset(out, 0, units * sizeof(T));
    }
  }
}

// Products of MR rows with a packed panel. row: distance of the rows. chunk: distance from a chunk of a row to the next.
template <class T, class Row>
FASTCL_INLINE void multiply_panel(const T *rows, Row row, int64_t chunk, const T *panel, int64_t d, T (&u)[MR][NV][Simd<T>::W]) {
  constexpr int W = Simd<T>::W;
  constexpr int64_t NR = NV * W;
  for (int64_t c = 0; c * CHUNK < d; c++) {
    V<T> x[MR][NV];
    EACH(r, MR) EACH(v, NV) x[r][v] = all<T>(0);
    const T *const z = rows + c * chunk, *const y = panel + c * CHUNK * NR;
    const int64_t depth = smaller(CHUNK, d - c * CHUNK), stride = row;
    if constexpr (std::is_same<Row, int64_t>::value) {
      for (int64_t k = 0; k < depth; k++) {
        V<T> column[NV];
        EACH(v, NV) column[v] = load(y + k * NR + v * W);
        EACH(r, MR) {
          const T own = z[r * stride + k];
          EACH(v, NV) x[r][v] = Plain<T>::multiply(x[r][v], own, column[v]);
        }
      }
    } else multiply<Plain<T>, Row::value, 1>(z, y, depth, x, z + MR * stride);
    if (c == 0) EACH(r, MR) EACH(v, NV) store(u[r][v], x[r][v]);
    else EACH(r, MR) EACH(v, NV) add_to(u[r][v], x[r][v]);
  }
}

// The K nearest.
template <class T, int K> struct NearestPass {
  using C = Candidate<T>;
  using Int = typename Simd<T>::Int;
  static constexpr int W = Simd<T>::W;
  static constexpr int64_t NR = NV * W, A_CHUNK = (BLOCK + MR) * A_ROW;

  struct Best { // of each lane of one query, best first
    T products[K][W];
    Int firsts[K][W]; // the index of the first key of the product's vector; -1: none is above -inf
  };
  struct Local {    // of a thread
    T *block;       // packed queries that are not read in place
    T *buffer;      // [W][round_up(d, 16)]
    Best *best;     // [BLOCK + MR]
    char apart[64]; // keeps threads on separate cache lines
  };
  const TopK &call;
  const int64_t n, m, d, panels, bytes; // bytes: of a number of the queries
  T *const columns;                     // [panels][D][NR]: the keys
  Local *const locals;

  NearestPass(const TopK &call, Arena &arena)
      : call(call), n(call.queries.size), m(call.keys.size), d(call.dimension), panels((m + NR - 1) / NR),
        bytes(call.queries.dtype == Dtype::float64   ? 8
              : call.queries.dtype == Dtype::float32 ? 4
                                                     : 2),
        columns(arena.take<T>(panels * d * NR + 1024)), locals(arena.take<Local>(call.threads)) { // prefetches read beyond the end
    for (int t = 0; t < call.threads; t++) {
      const Local local{arena.take<T>((d + CHUNK - 1) / CHUNK * A_CHUNK), arena.take<T>(W * round_up(d, 16)), arena.take<Best>(BLOCK + MR), {}};
      if (arena.base) locals[t] = local;
    }
  }

  void run() const {
    with_team(call.threads, [&](const Team &team) {
      team.run([&](int t) {
        const Range mine = share(panels, call.threads, t);
        for (int64_t p = mine.from; p < mine.to; p++) pack_panel(call.keys, p * NR, m, d, locals[t].buffer, columns + p * d * NR);
      });
      team.run([&](int t) {
        const Range mine = share(n, call.threads, t, MR);
        for (int64_t from = mine.from; from < mine.to; from += BLOCK) block(locals[t], from, smaller(from + BLOCK, mine.to), mine.to);
      });
    });
  }

private:
  void block(const Local &local, int64_t from, int64_t to, int64_t end) const {
    const int64_t rows = round_up(to - from, MR), stride = call.queries.row_stride;
    const bool in_place = readable<T>(call.queries) && to - from == rows;
    if (!in_place) pack_rows(call.queries, from, to, rows, d, local.buffer, local.block);
    for (int64_t r = 0; r < rows; r++)
      for (int k = 0; k < K; k++)
        for (int l = 0; l < W; l++) local.best[r].products[k][l] = T(-__builtin_inf()), local.best[r].firsts[k][l] = -1;
    // Meanwhile the next block is prefetched into the second-level cache, a few lines with each tile.
    const char *ahead = (const char *)call.queries.data + to * stride * bytes;
    const int64_t next = call.queries.column_stride == 1 && stride > 0 ? (smaller(to + BLOCK, end) - to) * stride * bytes : 0;
    const int64_t step = round_up(next / (rows / MR * panels) + 1, 64);
    int64_t fetched = 0;
    for (int64_t p = 0; p < panels; p++)
      for (int64_t r = 0; r < rows; r += MR) {
        for (const int64_t stop = smaller(fetched + step, next); fetched < stop; fetched += 64) __builtin_prefetch(ahead + fetched, 0, 2);
        T u[MR][NV][W] __attribute__((aligned(64)));
        const T *const panel = columns + p * d * NR;
        if (in_place) multiply_panel<T>((const T *)call.queries.data + (from + r) * stride, stride, CHUNK, panel, d, u);
        else multiply_panel<T>(local.block + r * A_ROW, std::integral_constant<int64_t, A_ROW>(), A_CHUNK, panel, d, u);
        EACH(q, MR) compare(u[q], local.best[r + q], p * NR);
      }
    for (int64_t r = 0; r < to - from; r++) finish(local.best[r], from + r);
  }

  // Compares products of a query with the best so far. NaN is better than any number, and the first of equal ones stays.
  FASTCL_INLINE void compare(const T (&u)[NV][W], Best &best, int64_t first) const {
    V<T> most[K];
    I<T> firsts[K];
    EACH(k, K) {
      most[k] = load(best.products[k]);
      firsts[k] = *(const I<T> *)best.firsts[k];
    }
    EACH(v, NV) {
      V<T> x = load(u[v]);
      const I<T> own = all_int<T>(first + v * W);
      if (first + NR > m) x = where<T>(lanes_from<T>(first + v * W) < all_int<T>(m), x, all<T>(T(-__builtin_inf())));
      I<T> better[K];
      EACH(k, K) better[k] = ~(I<T>)(x <= most[k]) & (I<T>)(most[k] == most[k]);
      if constexpr (K == 2) {
        most[1] = where<T>(better[0], most[0], where<T>(better[1], x, most[1]));
        firsts[1] = better[0] ? firsts[0] : better[1] ? own : firsts[1];
      }
      most[0] = where<T>(better[0], x, most[0]);
      firsts[0] = better[0] ? own : firsts[0];
    }
    EACH(k, K) {
      store(best.products[k], most[k]);
      *(I<T> *)best.firsts[k] = firsts[k];
    }
  }

  void finish(const Best &best, int64_t query) const {
    typename C::Number found[K]; // best first
    int64_t count = 0;
    const auto offer = [&](T product, int64_t key) {
      const typename C::Number own = C::of(product, int32_t(key));
      int64_t at = count < K ? count++ : found[K - 1] < own ? K - 1 : K;
      if (at == K) return;
      for (; at && found[at - 1] < own; at--) found[at] = found[at - 1];
      found[at] = own;
    };
    for (int k = 0; k < K; k++)
      for (int64_t l = 0; l < W; l++)
        if (best.firsts[k][l] >= 0) offer(best.products[k][l], best.firsts[k][l] + l);
    const int64_t above = count;
    for (int64_t key = 0; count < smaller(m, int64_t(K)); key++) { // the others are -inf
      bool among = false;
      for (int64_t q = 0; q < above; q++) among |= C::index(found[q]) == key;
      if (!among) offer(T(-__builtin_inf()), key);
    }
    for (int64_t q = 0, at = query * K; q < K; q++, at++) {
      ((T *)call.values)[at] = q < count ? C::value(found[q]) : T(-__builtin_inf());
      call.indices[at] = q < count ? C::index(found[q]) : -1;
    }
  }
};

constexpr int64_t FEW_KEYS_BYTES = 1 << 21; // of packed keys, which stay in a cache while blocks of queries pass
template <class T> bool few_keys(const TopK &call) {
  const int64_t bytes = round_up(call.keys.size, int64_t(NV * Simd<T>::W)) * call.dimension * int64_t(sizeof(T));
  return call.k <= 2 && !call.key_ids && call.keys.size > 0 && bytes <= FEW_KEYS_BYTES && call.queries.size >= call.threads * BLOCK;
}

} // namespace
} // namespace fastcl::FASTCL_ISA
