// The submodule with the CUDA kernels. It takes addresses and integers and does not use torch.
#include "cuda/cuda.h"
#include "bindings/families.h"

namespace py = pybind11;

void fastcl::bind_cuda(py::module_ m) {
  m.doc() = "CUDA C++ kernels: (device, stream) and the description of a call.";
  m.def("driver_failure", &cuda::driver_failure, "what is wrong with the driver; empty: nothing");
  m.def("driver_version", &cuda::driver_version, "as CUDA counts, 13000 for 13.0; 0: there is none");
  m.def("runtime_version", &cuda::runtime_version);
  m.def("processors", &cuda::processors, py::arg("device"), "multiprocessors of a device");
  bind_cuda_contrastive(m);
  bind_cuda_pairs(m);
  bind_cuda_sinkhorn(m);
  bind_cuda_topk(m);
  m.attr("emulated") = cuda::emulated();
  m.attr("targets") = FASTCL_CUDA;
}
