// Functions that csrc/bindings calls and csrc/cuda defines. This header includes nothing of CUDA, so any compiler can read it. Every
// function throws std::runtime_error on failure.
#pragma once
#include <cstdint>
#include <string>

namespace fastcl::cuda {

struct Where {
  int device;
  void *stream; // a cudaStream_t
};

// What is wrong with the driver; empty: nothing. Versions have CUDA's format (13000); 0: there is none.
std::string driver_failure();
int driver_version();
int runtime_version();

int processors(int device); // multiprocessors
bool emulated();            // whether the kernels run on the host, for tests

} // namespace fastcl::cuda
