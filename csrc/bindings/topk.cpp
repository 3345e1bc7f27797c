// Python bindings of top-k.
#include "bindings/call.h"
#include "bindings/families.h"

namespace py = pybind11;

namespace fastcl {
namespace {

std::unique_ptr<Call> topk(const std::string &engine, const py::tuple &numbers) {
  Reader in(numbers);
  TopK call{};
  call.queries = in.rows();
  call.keys = in.rows();
  call.dimension = in.integer();
  call.k = in.integer();
  call.query_ids = in.address<const int32_t>();
  call.key_ids = in.address<const int32_t>();
  call.wide_reals = in.integer();
  call.threads = int(in.integer());
  call.values = in.address();
  call.indices = in.address<int64_t>();
  in.end();
  require(call.queries.data && call.keys.data && call.values && call.indices, "queries, keys, values or indices: a null pointer");
  require(!call.query_ids == !call.key_ids, "ids of one side only");
  require(call.queries.size >= 1 && call.keys.size >= 1 && call.dimension >= 1, "sizes and threads must be positive");
  require(call.k >= 1 && call.threads >= 1, "sizes and threads must be positive");
  require(call.keys.size < INT32_MAX / 2, "more than 2^30 rows");
  return call_of(engine, &Engine::topk, call);
}

} // namespace

void bind_topk(py::module_ &m) { m.def("topk", &topk, py::arg("engine"), py::arg("call")); }

} // namespace fastcl
