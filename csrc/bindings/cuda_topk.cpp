// Python bindings of top-k on CUDA.
#include "bindings/families.h"
#include "bindings/where.h"
#include "cuda/topk/launches.h"

namespace py = pybind11;

namespace fastcl {
namespace {

void cuda_topk(const py::tuple &where, const py::tuple &numbers) {
  Reader in(numbers);
  cuda::TopKCall c{};
  c.queries = in.rows();
  c.keys = in.rows();
  c.dimension = in.integer();
  c.query_names = in.address<const int32_t>();
  c.key_names = in.address<const int32_t>();
  c.slots = in.integer();
  c.span = in.integer();
  c.parts = in.integer();
  c.best = in.address<int64_t>();
  in.end();
  require(c.queries.data && c.keys.data && c.best, "queries, keys or best: a null pointer");
  require(c.queries.dtype != Dtype::float64 && c.keys.dtype != Dtype::float64, "float64 has no CUDA kernels");
  require(!c.query_names == !c.key_names, "names of one side only");
  require(c.queries.size >= 1 && c.keys.size >= 1 && c.dimension >= 1 && c.keys.size <= UINT32_MAX, "sizes must be positive, keys below 2^32");
  require(c.slots >= cuda::TOPK_LEAST && c.slots <= cuda::TOPK_MOST && !(c.slots & (c.slots - 1)), "slots: a power of two is expected");
  require(c.span >= 1 && c.parts == (c.keys.size + c.span - 1) / c.span, "parts do not hold the keys");
  const cuda::Where place = read_where(where);
  py::gil_scoped_release release;
  cuda::topk(place, c);
}

} // namespace

void bind_cuda_topk(py::module_ &m) { m.def("topk", &cuda_topk, py::arg("where"), py::arg("call")); }

} // namespace fastcl
