// Tests what the emulator computes and which errors it detects: runs the case with the given name and prints its result.
#include "emulator.cpp"
#include <cstdio>

namespace {

float out[256];

// Each thread writes a number and reads its right neighbour's.
void neighbours(bool barrier) {
  float *shared = (float *)emulator::shared_memory();
  shared[threadIdx.x] = float(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

void warp_sums() {
  float x = float(threadIdx.x);
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  out[threadIdx.x] = x + float(__popc(__ballot_sync(0xffffffffu, threadIdx.x % 3 == 0)));
}

void parts() { // each half has its own barriers, the second half more of them
  float *shared = (float *)emulator::shared_memory();
  const int half = threadIdx.x >= blockDim.x / 2;
  shared[threadIdx.x] = float(blockIdx.x);
  for (int k = 0; k < 1 + half; k++) emulator::part_barrier(1 + half, int(blockDim.x / 2));
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

void grid() { // the first block reads what the last has written
  if (blockIdx.x + 1 == gridDim.x) out[128 + threadIdx.x] = 7;
  emulator::grid_barrier();
  if (blockIdx.x == 0) out[threadIdx.x] = out[128 + threadIdx.x];
}

void diverging() {
  if (threadIdx.x < 40) __syncthreads();
}

void unequal_lanes() {
  if (threadIdx.x % 2) __shfl_sync(0xffffffffu, 1.0, 0);
  else __shfl_sync(0xffffffffu, 1.0f, 0);
}

void outside() { emulator::shared_memory()[128 + threadIdx.x] = 0; }

} // namespace

int main(int, char **arguments) {
  const std::string name = arguments[1];
  const auto run = [&](int64_t blocks, bool cooperative, const std::function<void()> &kernel) {
    emulator::run(arguments[1], blocks, 1, 64, name == "outside" ? 128 : 256, cooperative, kernel);
  };
  if (name == "neighbours") run(1, false, [] { neighbours(true); });
  if (name == "no_barrier") run(1, false, [] { neighbours(false); });
  if (name == "warp_sums") run(1, false, warp_sums);
  if (name == "parts") run(3, false, parts);
  if (name == "grid") run(3, true, grid);
  if (name == "diverging") run(1, false, diverging);
  if (name == "unequal_lanes") run(1, false, unequal_lanes);
  if (name == "outside") run(1, false, outside);
  for (int t = 0; t < 64; t++) std::printf("%g ", double(out[t]));
}
