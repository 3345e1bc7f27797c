// Each function adds its family's calls to the module.
#pragma once
#include <pybind11/pybind11.h>

namespace fastcl {

void bind_contrastive(pybind11::module_ &m);
void bind_soft(pybind11::module_ &m);
void bind_pairs(pybind11::module_ &m);
void bind_prototypes(pybind11::module_ &m);
void bind_sinkhorn(pybind11::module_ &m);
void bind_topk(pybind11::module_ &m);
void bind_launches(pybind11::module_ &m);

void bind_cuda(pybind11::module_ m); // calls the functions below
void bind_cuda_contrastive(pybind11::module_ &m);
void bind_cuda_pairs(pybind11::module_ &m);
void bind_cuda_sinkhorn(pybind11::module_ &m);
void bind_cuda_topk(pybind11::module_ &m);

} // namespace fastcl
