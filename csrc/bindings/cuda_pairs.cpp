// Python bindings of the pair sums on CUDA.
#include "bindings/cuda_contrastive.h"
#include "bindings/families.h"
#include "bindings/where.h"
#include "cuda/pairs/launches.h"

namespace py = pybind11;

namespace fastcl {
namespace {

void cuda_pair_sums(const py::tuple &where, const py::tuple &problem, const py::tuple &numbers, float pos_margin, float neg_margin) {
  cuda::PairSums call{};
  call.problem = read_contrast(problem);
  call.pos_margin = pos_margin;
  call.neg_margin = neg_margin;
  Reader in(numbers);
  call.map = int(in.integer());
  call.only_positives = in.integer();
  call.symmetric = in.integer();
  call.offset = in.address<const float>();
  call.marked_bias = in.address<const float>();
  call.weights = in.address<const float>();
  call.sums = in.address<float>();
  call.anchor_sums = in.address<float>();
  call.contrast_sums = in.address<float>();
  call.anchor_rows = in.address();
  call.contrast_rows = in.address();
  call.anchor_norms = in.address<const float>();
  call.contrast_norms = in.address<const float>();
  call.similarity_sums = in.address<float>();
  call.slope_sums = in.address<float>();
  call.bias = in.address<float>();
  in.end();
  const cuda::Contrast &p = call.problem;
  require(call.map == 0 || call.map == 1, "map: not softplus or hinge");
  require(p.scales == 1, "pair sums: of one scale");
  require(call.sums, "sums: a null pointer");
  require(!call.symmetric || p.self_contrast(), "symmetric: of self-contrast only");
  require(!p.self_contrast() || !(call.contrast_sums || call.marked_bias), "self-contrast has no contrasts of its own and no bias");
  require(call.weights || !(call.anchor_sums || call.contrast_sums || call.similarity_sums || call.slope_sums || call.bias),
          "weights: a null pointer, with gradients");
  require(!call.anchor_rows == !call.anchor_sums, "the anchors' gradient: a null pointer");
  require(!call.contrast_rows == !call.contrast_sums, "the contrasts' gradient: a null pointer");
  const cuda::Where there = read_where(where);
  py::gil_scoped_release release;
  cuda::pair_sums(call, there);
}

} // namespace

void bind_cuda_pairs(py::module_ &m) { m.def("pair_sums", &cuda_pair_sums); }

} // namespace fastcl
