// Shared host code of the CUDA files: devices, launches of kernels, error messages. If g++ compiles it with csrc/tests/emulator.h
// in front, the kernels run on the host.
#pragma once
#include "cuda.h"
#include <stdexcept>
#ifndef FASTCL_EMULATOR
#include <cuda_runtime.h>
#endif

namespace fastcl::cuda {

struct Device {
  int processors;   // multiprocessors
  int64_t shared;   // largest shared memory of a block, in bytes
  int architecture; // 80, 90, ...
};

struct Launch {
  int64_t blocks;
  int threads;
  int64_t shared = 0;       // bytes at `shared_memory()` in the kernel
  bool cooperative = false; // all blocks run at the same time, so the kernel may use `grid_barrier`
  int64_t blocks_y = 1;
};

const Device &device(int index);

// Throws std::runtime_error that says what failed, and whether the driver is missing or too old.
void check(cudaError_t error, const char *what);

// Throws unless the device is current. Python makes it current: restoring the previous device here, by cudaSetDevice, would create a
// context on that device, which takes hundreds of megabytes.
void require_current(int device);

void launch_erased(const char *name, const void *kernel, void **arguments, const Launch &launch, const Where &where);

// Launches a kernel on the current device, which is `where.device`; does not wait.
template <class... Parameters>
void launch(const char *name, void (*kernel)(Parameters...), const Launch &shape, const Where &where, Parameters... arguments) {
  if (shape.blocks < 1 || shape.blocks_y < 1) return;
#ifdef FASTCL_EMULATOR
  emulator::run(name, shape.blocks, shape.blocks_y, shape.threads, shape.shared, shape.cooperative, [=] { kernel(arguments...); });
  (void)where;
#else
  void *addresses[] = {(void *)&arguments...};
  launch_erased(name, (const void *)kernel, addresses, shape, where);
#endif
}

} // namespace fastcl::cuda
