// Tests the arithmetic of csrc/cuda/contrastive/tiles.h on the host: which tiles are visited, and where numbers are.
#include "../cuda/contrastive/tiles.h"
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <utility>
#include <vector>

using namespace fastcl::cuda;

namespace {

void require(bool condition, const char *what) {
  if (condition) return;
  std::fprintf(stderr, "cuda_tiles_test: %s\n", what);
  std::exit(1);
}

// Every tile is visited once, interior tiles first; interior tiles overlap neither the range nor the end of the columns.
void walks_visit_each_tile_once() {
  for (int width : {4, 32})
    for (int columns = 1; columns <= 4 * width + 1; columns++)
      for (int low = 0; low <= columns; low++)
        for (int high = low; high <= columns; high++) {
          const Walk w = walk(low, high, columns, width);
          const int tiles = (columns + width - 1) / width;
          require(w.steps() == tiles, "a walk of too few tiles, or of too many");
          std::vector<int> seen(tiles, 0);
          for (int step = 0; step < w.steps(); step++) {
            const int tile = w.tile(step), begin = tile * width, end = begin + width;
            require(tile >= 0 && tile < tiles && seen[tile]++ == 0, "a tile is visited twice");
            const bool meets = high > low && begin < high && end > low;
            if (!w.is_mixed(step)) require(!meets && end <= columns, "an interior tile that is none");
            else require(meets || end > columns, "a tile is mixed without a reason");
          }
          // The walk over mixed tiles only, as in the launch for the columns' positives.
          Walk mixed = w;
          mixed.interior = 0;
          for (int step = 0; step < mixed.steps(); step++) require(mixed.tile(step) == w.tile(w.interior + step), "another walk of the mixed tiles");
        }
}

void pairs_are_what_they_are() {
  const int columns = 9, starts[] = {0, 2, 4}, ends[] = {0, 5, 9};
  for (int i = 0; i < 12; i++)
    for (int j = 0; j < 12; j++)
      for (int name = 0; name < 3; name++)
        for (int other = 0; other < 3; other++)
          for (bool self : {false, true}) {
            const bool expected = j < columns && (!self || i != j) && (name == 0 || name != other);
            require(admissible(i, j, columns, self, name, other) == expected, "admissible");
            for (int k = 0; k < 3; k++) require(in_range(j, starts[k], ends[k]) == (starts[k] <= j && j < ends[k]), "in_range");
          }
}

// A slice's chunks do not overlap, and chunks that are loaded together are in different banks.
void slices_use_all_of_their_memory() {
  std::set<uint32_t> places;
  for (int row = 0; row < BLOCK_ROWS; row++)
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      const uint32_t place = place_of(row, chunk);
      require(place % CHUNK == 0 && place < uint32_t(BLOCK_ROWS) * SLICE && places.insert(place).second, "two chunks in one place");
    }
  for (int row = 0; row < BLOCK_ROWS; row += 8)
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      std::set<uint32_t> banks;
      for (int k = 0; k < 8; k++) banks.insert(place_of(row + k, chunk) % SLICE);
      require(banks.size() == 8, "rows of a matrix in one bank");
    }
}

// ldmatrix gives lane 4 g + t the t-th word of row g of each of its four matrices. mma expects, of A, the rows g and g + 8 of the
// first half of the depth, then of the second; of B, the column g of either half, for two fragments.
void fragments_are_what_products_want() {
  std::map<int, std::pair<int, int>> a, b, transposed; // first row and chunk of each matrix
  for (int lane = 0; lane < 32; lane++) {
    const int matrix = lane / 8, row = lane % 8;
    const auto agree = [&](std::map<int, std::pair<int, int>> &found, int of_row, int chunk) {
      const auto entry = found.emplace(matrix, std::make_pair(of_row - row, chunk)).first->second;
      require(entry == std::make_pair(of_row - row, chunk), "the rows of a matrix lie apart");
    };
    agree(a, a_row(lane), a_chunk(lane));
    agree(b, b_row(lane), b_chunk(lane));
    agree(transposed, transposed_row(lane), transposed_chunk(lane));
  }
  using Matrices = std::map<int, std::pair<int, int>>;
  require(a == Matrices{{0, {0, 0}}, {1, {8, 0}}, {2, {0, 1}}, {3, {8, 1}}}, "A's matrices");
  require(b == Matrices{{0, {0, 0}}, {1, {0, 1}}, {2, {8, 0}}, {3, {8, 1}}}, "B's matrices");
  require(transposed == Matrices{{0, {0, 0}}, {1, {8, 0}}, {2, {0, 1}}, {3, {8, 1}}}, "B's matrices, transposed");
  std::set<std::pair<int, int>> places;
  for (int lane = 0; lane < 32; lane++)
    for (int k = 0; k < 4; k++) {
      const int row = fragment_row(lane, k), column = fragment_column(lane, k);
      require(row >= 0 && row < 16 && column >= 0 && column < 8 && places.insert({row, column}).second, "two lanes have one place");
      require(row == lane / 4 + (k >= 2) * 8 && column == 2 * (lane % 4) + (k & 1), "not the place that is documented");
    }
}

// Each step of a part of the gradient belongs to exactly one of the warps across, and to the slice with which it is multiplied.
void gradients_have_one_owner() {
  std::set<int> steps;
  for (int across = 0; across < WARPS_ACROSS; across++)
    for (int u = 0; u < OWN_STEPS; u++) {
      const int step = own_step(u, across);
      require(steps.insert(step).second, "a step with two owners");
      require(step / STEPS == u / (STEPS / WARPS_ACROSS), "a step of another slice");
    }
  require(int(steps.size()) == PART_SLICES * STEPS && *steps.begin() == 0 && *steps.rbegin() == PART_SLICES * STEPS - 1, "steps without an owner");
}

// Summing over 8 lanes by halves leaves every number in exactly one lane.
void sums_over_rows_have_one_owner() {
  for (int count : {8, 16})
    for (int t = 0; t < 4; t++) {
      std::set<int> numbers;
      for (int g = 0; g < 8; g++)
        for (int k = 0; k < count / 8; k++) numbers.insert(first_kept(4 * g + t, count) + k);
      require(int(numbers.size()) == count && *numbers.rbegin() == count - 1, "a sum without an owner");
    }
}

} // namespace

int main() {
  walks_visit_each_tile_once();
  pairs_are_what_they_are();
  slices_use_all_of_their_memory();
  fragments_are_what_products_want();
  gradients_have_one_owner();
  sums_over_rows_have_one_owner();
  std::puts("ok");
}
