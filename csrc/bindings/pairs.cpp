// Python bindings of the sums over pairs.
#include "bindings/contrastive.h"
#include "bindings/families.h"
#include "cpu/pairs/call.h"

namespace py = pybind11;

namespace fastcl {
namespace {

std::unique_ptr<Call> pairs(const std::string &engine, const py::tuple &problem, const py::tuple &numbers, double pos_margin, double neg_margin) {
  Pairs call{};
  const Problem &p = call.problem = read_problem(problem);
  require(p.scales == 1 && !p.columns, "pair sums: of one scale, in one direction");
  Reader in(numbers);
  const int64_t map = in.integer();
  require(map >= 0 && map <= int64_t(PairMap::squared), "map: not one of the pair maps");
  call.map = PairMap(map);
  call.margins[0] = pos_margin;
  call.margins[1] = neg_margin;
  call.only_positives = in.integer();
  call.offset = in.address<const void>();
  call.offset_of_rows = in.integer();
  require(!call.offset_of_rows || (call.offset && !p.self_contrast()), "offset of rows: of two sets only");
  call.weights = in.address<const void>();
  call.values = in.address();
  call.active = in.address();
  call.counts = in.address();
  call.anchor_gradient = in.address();
  call.contrast_gradient = in.address();
  call.scale_gradient = in.address();
  call.offset_gradient = in.address();
  call.bias_gradient = in.address();
  in.end();
  require(call.values && call.active && call.counts, "sums: a null pointer");
  const bool differentiated = call.anchor_gradient || call.contrast_gradient || call.scale_gradient || call.offset_gradient || call.bias_gradient;
  require(call.weights || !differentiated, "weights: a null pointer, with gradients");
  require(!call.contrast_gradient || !p.self_contrast(), "contrast_gradient: self-contrast has none");
  require(!call.bias_gradient || p.contrast_bias, "bias_gradient: there is no bias");
  require(!call.offset_gradient || call.offset, "offset_gradient: there is no offset");
  return arranged_call(call, engine_named(engine)->pairs);
}

} // namespace

void bind_pairs(py::module_ &m) {
  m.def("pairs", &pairs, py::arg("engine"), py::arg("problem"), py::arg("numbers"), py::arg("pos_margin"), py::arg("neg_margin"));
}

} // namespace fastcl
