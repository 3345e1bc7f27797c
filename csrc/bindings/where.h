// Where a call of the CUDA kernels runs.
#pragma once
#include "bindings/reader.h"
#include "cuda/cuda.h"

namespace fastcl {

// A call of the CUDA kernels comes with (device, stream); the kernels are started, and not waited for.
inline cuda::Where read_where(const pybind11::tuple &numbers) {
  Reader in(numbers);
  cuda::Where where{};
  where.device = int(in.integer());
  where.stream = in.address();
  in.end();
  return where;
}

} // namespace fastcl
