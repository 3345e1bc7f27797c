// Reads the descriptions of rows that the kernels of several families sweep over.
#pragma once
#include "bindings/reader.h"
#include "cuda/contrastive/launches.h"

namespace fastcl {

cuda::Contrast read_contrast(const pybind11::tuple &numbers);

} // namespace fastcl
