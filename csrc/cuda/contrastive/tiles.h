// Which tiles a block of rows visits, which of their places count, and where the numbers of a tile lie: in shared
// memory, and in the registers of the lanes that multiply them. Plain functions of numbers, which the tests run on the
// host.
#pragma once
#include <cstdint>

#if !defined(__CUDACC__) && !defined(FASTCL_EMULATOR)
#define __host__
#define __device__
#endif

namespace fastcl::cuda {

__host__ __device__ inline int smaller(int a, int b) { return a < b ? a : b; }

// Which tiles.

// Tiles of columns that a block of rows meets. `mixed` of them hold a positive, the diagonal, or the ragged end; the
// other `interior` ones are whole tiles of admissible negatives. Mixed are the tiles [first, last), and the ragged last
// one if it is not among them; `hole` of the `full` whole tiles are in that run. Interior tiles come first.
struct Walk {
  int interior, mixed, first, hole, last, full;

  __host__ __device__ int steps() const { return interior + mixed; }
  __host__ __device__ bool is_mixed(int step) const { return step >= interior; }
  __host__ __device__ int tile(int step) const {
    if (step < interior) return step >= first ? step + hole : step;
    const int own = first + step - interior;
    return own < last ? own : full;
  }
};

// [low, high): the columns that the rows may not meet as plain negatives, rounded out to tiles of `width` among
// `columns`.
__host__ __device__ inline Walk walk(int low, int high, int columns, int width) {
  Walk w;
  w.full = columns / width;
  w.first = low / width;
  w.last = high > low ? (high + width - 1) / width : w.first;
  w.hole = smaller(w.last, w.full) - smaller(w.first, w.full);
  const bool ragged = w.full * width < columns && w.last <= w.full;
  w.interior = w.full - w.hole;
  w.mixed = w.last - w.first + (ragged ? 1 : 0);
  return w;
}

// Which places of a mixed tile. Names are those of sample ids, 0 for none.

__host__ __device__ inline bool admissible(int i, int j, int columns, bool self, int row_name, int column_name) {
  return j < columns && !(self && i == j) && !(row_name != 0 && row_name == column_name);
}
// The bias of a contrast that is left out. A finite one may be -inf once it is multiplied by log2(e).
constexpr float LEFT_OUT = __builtin_huge_valf();
__host__ __device__ inline bool is_left_out(float bias) { return bias == LEFT_OUT; }
__host__ __device__ inline bool in_range(int j, int start, int end) { return unsigned(j - start) < unsigned(end - start); }

// Where numbers lie. Rows are cut into slices of 128 bytes, which lie in shared memory row by row; the 8 chunks of 16
// bytes of a row are permuted, so that the same chunk of 8 rows lies in 8 different banks.

constexpr int SLICE = 128, CHUNK = 16, CHUNKS = SLICE / CHUNK, STEP = 32; // bytes; a step of the product's depth takes two chunks
constexpr int STEPS = SLICE / STEP;

__host__ __device__ inline uint32_t place_of(int row, int chunk) { return uint32_t(row * SLICE + ((chunk ^ (row & 7)) * CHUNK)); }

// What a warp multiplies: 32 rows and some columns. Blocks have 4 x 2 warps.
constexpr int WARPS_DOWN = 4, WARPS_ACROSS = 2, THREADS = 32 * WARPS_DOWN * WARPS_ACROSS;
constexpr int WARP_ROWS = 32, BLOCK_ROWS = WARPS_DOWN * WARP_ROWS;

// Of ldmatrix, the row and chunk whose address a lane gives. A's four matrices: rows 0-7, rows 8-15, then the same of
// the second chunk; B's (16 rows of Y, which are columns of the product): first and second chunk of rows 0-7, then of
// rows 8-15.
__host__ __device__ inline int a_row(int lane) { return (lane & 7) + (lane >> 3 & 1) * 8; }
__host__ __device__ inline int a_chunk(int lane) { return lane >> 4; }
__host__ __device__ inline int b_row(int lane) { return (lane & 7) + (lane >> 4) * 8; }
__host__ __device__ inline int b_chunk(int lane) { return lane >> 3 & 1; }
// Of the transposed load, where the depth runs along the rows of Y: rows 0-7 and 8-15 of one chunk, then of the next.
__host__ __device__ inline int transposed_row(int lane) { return a_row(lane); }
__host__ __device__ inline int transposed_chunk(int lane) { return lane >> 4; }

// The row and column, in a tile of 16 x 8, of a lane's place k of 4.
__host__ __device__ inline int fragment_row(int lane, int k) { return lane / 4 + (k / 2) * 8; }
__host__ __device__ inline int fragment_column(int lane, int k) { return lane % 4 * 2 + k % 2; }

// Rows may be so long that a block owns only a part of their gradient: PART bytes of each. Warps across share a part in
// turns of a step.
constexpr int PART_SLICES = 4, PART = PART_SLICES * SLICE, OWN_STEPS = PART_SLICES * STEPS / WARPS_ACROSS;
// The step, within the part, of the u-th of OWN_STEPS that a warp owns.
__host__ __device__ inline int own_step(int u, int across) { return u * WARPS_ACROSS + across; }

// Where `count` numbers are summed over the 8 lanes that share columns, each lane is left with count / 8 of them: the
// first of those.
__host__ __device__ inline int first_kept(int lane, int count) {
  return (lane >> 4 & 1) * (count / 2) + (lane >> 3 & 1) * (count / 4) + (lane >> 2 & 1) * (count / 8);
}

} // namespace fastcl::cuda
