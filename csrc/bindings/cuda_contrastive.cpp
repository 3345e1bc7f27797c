// Python bindings of the contrastive statistics on CUDA.
#include "bindings/cuda_contrastive.h"
#include "bindings/families.h"
#include "bindings/where.h"

namespace py = pybind11;

namespace fastcl {
namespace {

cuda::RowSet read_set(Reader &in) {
  cuda::RowSet set{};
  set.source = in.rows();
  set.normalize = in.integer();
  set.order = in.address<const int64_t>();
  set.start = in.address<const int>();
  set.end = in.address<const int>();
  set.names = in.address<const int>();
  set.bias = in.address<const float>();
  set.leave_out = in.integer();
  set.rows = in.address();
  set.arranged = in.integer();
  set.norms = in.address<float>();
  set.row_norms = in.address<float>();
  set.row_names = in.address<int>();
  set.row_bias = in.address<float>();
  require(!set.start == !set.end, "clusters: one end of their ranges only");
  require((!set.names || set.row_names) && (!set.bias || set.row_bias), "names or bias: nowhere to put them");
  require(!set.rows == !set.source.data, "rows: a null pointer");
  require(!set.rows || (set.source.size >= 1 && set.source.size < INT32_MAX / 2), "rows: at least one and fewer than 2^30");
  return set;
}

} // namespace

cuda::Contrast read_contrast(const py::tuple &numbers) {
  Reader in(numbers);
  cuda::Contrast p{};
  p.anchors = read_set(in);
  p.contrasts = read_set(in);
  p.dimension = int(in.integer());
  p.width = int(in.integer());
  p.dtype = Dtype(in.integer());
  p.scales = int(in.integer());
  p.logit_scale = in.address<const float>();
  p.longest = in.address<const float>();
  p.largest_bias = in.address<const float>();
  p.exact = in.integer();
  in.end();
  require(p.anchors.rows && p.logit_scale, "anchors or logit_scale: a null pointer");
  require(p.dtype == Dtype::float32 || p.dtype == Dtype::bfloat16 || p.dtype == Dtype::float16, "an unknown dtype");
  require(p.dimension >= 1 && p.scales >= 1, "sizes and scales must be positive");
  require(p.width >= p.dimension && p.width % (p.dtype == Dtype::float32 ? 8 : 16) == 0, "width: not of whole steps");
  return p;
}

namespace {

cuda::Side read_side(const py::tuple &numbers) {
  Reader in(numbers);
  cuda::Side s{};
  for (float **address : {&s.fields, &s.counts, &s.parts, &s.bases, &s.statistics, &s.weights, &s.extremes, &s.side}) *address = in.address<float>();
  in.end();
  return s;
}

cuda::Wanted read_wanted(const py::tuple &numbers) {
  Reader in(numbers);
  cuda::Wanted wanted{};
  for (int &place : wanted.place) place = int(in.integer());
  wanted.log_sums = int(in.integer());
  in.end();
  return wanted;
}

void cuda_contrast_forward(const py::tuple &where, const py::tuple &problem, const py::tuple &wanted, const py::tuple &anchors,
                           const py::tuple &contrasts, int64_t lines, int64_t weighted) {
  cuda::ContrastForward call{};
  call.problem = read_contrast(problem);
  call.wanted = read_wanted(wanted);
  call.anchors = read_side(anchors);
  call.contrasts = read_side(contrasts);
  call.lines = reinterpret_cast<float *>(lines);
  call.weighted = reinterpret_cast<float *>(weighted);
  require(!weighted || (call.problem.scales == 1 && !call.contrasts.counts && call.problem.contrasts.rows && !call.problem.contrasts.bias),
          "weighted sums are of two sets, one way, of one scale and without a bias");
  require(call.anchors.counts && call.anchors.bases && call.anchors.statistics, "anchors' statistics: a null pointer");
  require(!call.contrasts.counts || (call.contrasts.bases && call.contrasts.statistics && lines), "contrasts' statistics: a null pointer");
  const cuda::Where there = read_where(where);
  py::gil_scoped_release release;
  cuda::contrast_forward(call, there);
}

void cuda_contrast_backward(const py::tuple &where, const py::tuple &problem, const py::tuple &wanted, const py::tuple &anchors,
                            const py::tuple &contrasts, const py::tuple &outputs, float close) {
  cuda::ContrastBackward call{};
  call.problem = read_contrast(problem);
  call.wanted = read_wanted(wanted);
  call.anchors = read_side(anchors);
  call.contrasts = read_side(contrasts);
  call.close = close;
  Reader in(outputs);
  call.scalars = in.address<float>();
  call.anchor_sums = in.address<float>();
  call.contrast_sums = in.address<float>();
  call.anchor_rows = in.address();
  call.contrast_rows = in.address();
  for (Dtype &dtype : call.out_dtypes) dtype = Dtype(in.integer());
  call.anchor_norms = in.address<const float>();
  call.contrast_norms = in.address<const float>();
  call.folded = in.integer();
  call.similarity_sums = in.address<float>();
  call.bias = in.address<float>();
  call.weighted = in.address<const float>();
  in.end();
  require(!call.weighted || (call.anchor_sums && !call.contrast_sums && !call.similarity_sums && !call.bias && call.problem.scales == 1),
          "weighted sums give the anchors' gradient only");
  require(call.scalars && call.anchors.weights && call.anchors.side, "workspace: a null pointer");
  require(!call.anchor_rows || call.anchor_sums, "the anchors' gradient: a null pointer");
  require(!call.contrast_rows || call.contrast_sums, "the contrasts' gradient: a null pointer");
  const cuda::Where there = read_where(where);
  py::gil_scoped_release release;
  cuda::contrast_backward(call, there);
}

} // namespace

void bind_cuda_contrastive(py::module_ &m) {
  m.def("contrast_forward", &cuda_contrast_forward);
  m.def("contrast_backward", &cuda_contrast_backward);
  m.def("extreme_blocks", &cuda::extreme_blocks, "how many blocks of so many rows the backward's extremes are of");
  m.def(
      "line_count", [](int64_t rows, const py::tuple &where) { return cuda::line_count(rows, read_where(where)); },
      "how many lines of sums a forward both ways needs");
}

} // namespace fastcl
