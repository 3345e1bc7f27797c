// What csrc/bindings/module.cpp calls, and the kernels' files define. Descriptions stand in problem.h, sinkhorn.h and topk.h; there
// is nothing of CUDA here, so that a compiler without it reads this. Every function throws std::runtime_error.
#pragma once
#include <cstdint>
#include <string>

namespace fastcl::cuda {

struct Where {
  int device;
  void *stream; // a cudaStream_t
};

// What is wrong with the driver, in words; empty: nothing. Versions as CUDA counts them (13000); 0: there is none.
std::string driver_failure();
int driver_version();
int runtime_version();

int processors(int device); // multiprocessors
bool emulated();            // whether the kernels run on the host, for tests

} // namespace fastcl::cuda
