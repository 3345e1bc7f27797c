// Which tiles a block of rows visits, which of their places count, and where a tile's numbers are in shared memory and in the
// registers of lanes. Only functions of integers, which the tests run on the host.
#pragma once
#include <cstdint>

#if !defined(__CUDACC__) && !defined(FASTCL_EMULATOR)
#define __host__
#define __device__
#endif

namespace fastcl::cuda {

__host__ __device__ inline int smaller(int a, int b) { return a < b ? a : b; }

// Which tiles are visited.

// The tiles of columns for a block of rows. interior, mixed: numbers of tiles. A mixed tile holds a positive, the diagonal, or the
// ragged end; an interior tile is a whole tile of admissible negatives. The mixed tiles are [first, last), and the ragged last tile
// if it is not among them. There are `full` whole tiles, and `hole` of them are in [first, last). Interior tiles are visited first.
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

// The walk over `columns` columns in tiles of `width`. [low, high): the columns that are not plain negatives for all rows; tiles that
// overlap it are mixed.
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

// Which places of a mixed tile count. The names are of sample ids; 0 means none.

__host__ __device__ inline bool admissible(int i, int j, int columns, bool self, int row_name, int column_name) {
  return j < columns && !(self && i == j) && !(row_name != 0 && row_name == column_name);
}
// Marks the bias of a contrast that is left out. -inf cannot: a finite bias times log2(e) may become -inf.
constexpr float LEFT_OUT = __builtin_huge_valf();
__host__ __device__ inline bool is_left_out(float bias) { return bias == LEFT_OUT; }
__host__ __device__ inline bool in_range(int j, int start, int end) { return unsigned(j - start) < unsigned(end - start); }

// Where numbers are. Rows are split into slices of 128 bytes, which are stored in shared memory row by row. The 8 chunks of 16 bytes
// of a row are permuted, so that the same chunk of 8 rows uses 8 different groups of banks.

constexpr int SLICE = 128, CHUNK = 16, CHUNKS = SLICE / CHUNK, STEP = 32; // bytes; a step of the product's depth takes two chunks
constexpr int STEPS = SLICE / STEP;

__host__ __device__ inline uint32_t place_of(int row, int chunk) { return uint32_t(row * SLICE + ((chunk ^ (row & 7)) * CHUNK)); }

// A warp multiplies 32 rows and some columns. Blocks have 4 x 2 warps.
constexpr int WARPS_DOWN = 4, WARPS_ACROSS = 2, THREADS = 32 * WARPS_DOWN * WARPS_ACROSS;
constexpr int WARP_ROWS = 32, BLOCK_ROWS = WARPS_DOWN * WARP_ROWS;

// For ldmatrix, the row and chunk whose address a lane passes. A's four matrices: rows 0-7 and rows 8-15 of the first chunk, then of
// the second chunk. B's (16 rows of Y, the columns of the product): first and second chunk of rows 0-7, then of rows 8-15.
__host__ __device__ inline int a_row(int lane) { return (lane & 7) + (lane >> 3 & 1) * 8; }
__host__ __device__ inline int a_chunk(int lane) { return lane >> 4; }
__host__ __device__ inline int b_row(int lane) { return (lane & 7) + (lane >> 4) * 8; }
__host__ __device__ inline int b_chunk(int lane) { return lane >> 3 & 1; }
// For the transposed load, with the depth along the rows of Y: rows 0-7 and 8-15 of one chunk, then of the next.
__host__ __device__ inline int transposed_row(int lane) { return a_row(lane); }
__host__ __device__ inline int transposed_chunk(int lane) { return lane >> 4; }

// The row and column, in a tile of 16 x 8, of a lane's place k, 0 to 3.
__host__ __device__ inline int fragment_row(int lane, int k) { return lane / 4 + (k / 2) * 8; }
__host__ __device__ inline int fragment_column(int lane, int k) { return lane % 4 * 2 + k % 2; }

// A block owns at most PART bytes of the gradient of each row; several blocks share longer rows. The warps across alternate in a
// part, a step each.
constexpr int PART_SLICES = 4, PART = PART_SLICES * SLICE, OWN_STEPS = PART_SLICES * STEPS / WARPS_ACROSS;
// The index, within the part, of the u-th of the OWN_STEPS steps of a warp.
__host__ __device__ inline int own_step(int u, int across) { return u * WARPS_ACROSS + across; }

// After `count` numbers are summed over the 8 lanes that share columns, each lane holds count / 8 of the sums; this is the first.
__host__ __device__ inline int first_kept(int lane, int count) {
  return (lane >> 4 & 1) * (count / 2) + (lane >> 3 & 1) * (count / 4) + (lane >> 2 & 1) * (count / 8);
}

} // namespace fastcl::cuda
