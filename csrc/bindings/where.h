// The device and stream of a call of the CUDA kernels.
#pragma once
#include "bindings/reader.h"
#include "cuda/cuda.h"

namespace fastcl {

// Python passes (device, stream) with each call; the call starts kernels and does not wait for them.
inline cuda::Where read_where(const pybind11::tuple &numbers) {
  Reader in(numbers);
  cuda::Where where{};
  where.device = int(in.integer());
  where.stream = in.address();
  in.end();
  return where;
}

} // namespace fastcl
