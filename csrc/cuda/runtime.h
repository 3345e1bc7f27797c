// What the host side of every CUDA file shares: where a call runs, how a kernel is launched, what an error says.
// Compiled by g++ with csrc/tests/emulator.h before it, the kernels run on the host.
#pragma once
#include "cuda.h"
#include <stdexcept>
#ifndef FASTCL_EMULATOR
#include <cuda_runtime.h>
#endif

namespace fastcl::cuda {

struct Device {
  int processors;   // multiprocessors
  int64_t shared;   // bytes of shared memory that one block can have
  int architecture; // 80, 90, ...
};

struct Launch {
  int64_t blocks;
  int threads;
  int64_t shared = 0;       // bytes, which a kernel finds at `shared_memory()`
  bool cooperative = false; // all blocks at once: the kernel may wait for the whole grid
  int64_t blocks_y = 1;
};

const Device &device(int index);

// Throws std::runtime_error that says what was done, and of a missing or old driver that it is that.
void check(cudaError_t error, const char *what);

// Makes a device current, and afterwards the one that was.
class DeviceGuard {
public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard &) = delete;

private:
  int before_;
};

void launch_erased(const char *name, const void *kernel, void **arguments, const Launch &launch, const Where &where);

// Launches on the current device, which is `where.device`; does not wait.
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
