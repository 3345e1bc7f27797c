// Python bindings of the sums over pairs.
#include "bindings/contrastive.h"
#include "bindings/families.h"
#include "cpu/pairs/call.h"

namespace py = pybind11;

namespace fastcl {
namespace {

// The sum of weights times values, [] reals.
template <class Real> void add_up(const Pairs &call, const void *of_sums, void *total) {
  const Real *const weights = static_cast<const Real *>(of_sums), *const values = static_cast<const Real *>(call.values);
  double sum = 0;
  for (int64_t i = 0; i < 2 * call.problem.anchors.size; i++) sum += double(weights[i]) * double(values[i]);
  *static_cast<Real *>(total) = Real(sum);
}

std::unique_ptr<Call> pairs(const std::string &engine, const py::tuple &problem, const py::tuple &numbers, double pos_margin, double neg_margin,
                            int64_t total, bool narrow, bool negatives_alone) {
  Pairs call{};
  Problem &p = call.problem = read_problem(problem);
  const auto clusters = negatives_alone ? with_negatives_alone(p) : nullptr;
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
  const bool own_sums = total && !call.values && !call.active && !call.counts;
  require(own_sums || (call.values && call.active && call.counts), "sums: a null pointer");
  const bool differentiated = call.anchor_gradient || call.contrast_gradient || call.scale_gradient || call.offset_gradient || call.bias_gradient;
  require(call.weights || !differentiated, "weights: a null pointer, with gradients");
  require(!call.contrast_gradient || !p.self_contrast(), "contrast_gradient: self-contrast has none");
  require(!call.bias_gradient || p.contrast_bias, "bias_gradient: there is no bias");
  require(!call.offset_gradient || call.offset, "offset_gradient: there is no offset");
  require(!total || call.weights, "total: without weights");
  require(!narrow || !call.offset_of_rows, "narrow: of single numbers only");
  const void *const weights = call.weights;
  if (!differentiated) call.weights = nullptr; // the engine then computes no slopes
  struct Numbers {
    Narrowed scale, offset;
  };
  const auto gradients = std::make_shared<Numbers>();
  call.scale_gradient = gradients->scale.in_place_of(call.scale_gradient, narrow);
  call.offset_gradient = gradients->offset.in_place_of(call.offset_gradient, narrow);
  const Engine *const chosen = engine_named(engine);
  return arranged_call(call, [=](Pairs c, const Arranged &arranged, void *workspace) {
    const bool wide = c.problem.wide_reals;
    const int64_t bytes = own_sums ? (2 * c.problem.anchors.size * (wide ? 8 : 4) + 63) / 64 * 64 : 0; // of each kind of sums
    if (own_sums && workspace) {
      char *const sums = static_cast<char *>(workspace);
      c.values = sums;
      c.active = sums + bytes;
      c.counts = sums + 2 * bytes;
      workspace = sums + 3 * bytes;
    }
    const int64_t size = chosen->pairs(c, arranged, workspace) + 3 * bytes;
    if (!workspace) return size;
    (void)clusters; // alive as long as the call
    gradients->scale.write(wide);
    gradients->offset.write(wide);
    if (total) (wide ? add_up<double> : add_up<float>)(c, weights, reinterpret_cast<void *>(total));
    return size;
  });
}

} // namespace

void bind_pairs(py::module_ &m) {
  m.def("pairs", &pairs, py::arg("engine"), py::arg("problem"), py::arg("numbers"), py::arg("pos_margin"), py::arg("neg_margin"),
        py::arg("total") = 0, py::arg("narrow") = false, py::arg("negatives_alone") = false,
        "total: address of the sum of weights times values, which may stand for the sums; narrow: gradients of scale and offset are reals, "
        "not doubles; negatives_alone: rows with any negative cluster have none, not only those with -1");
}

} // namespace fastcl
