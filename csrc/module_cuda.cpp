// The part of the Python module with the CUDA kernels: addresses and integers in, nothing of torch.
#include "cuda/contrastive.h"
#include "cuda/cuda.h"
#include "cuda/sinkhorn.h"
#include "cuda/topk.h"
#include "reader.h"

namespace py = pybind11;
using namespace fastcl;

namespace {

// A call of the CUDA kernels comes with (device, stream); the kernels are started, and not waited for.
cuda::Where read_where(const py::tuple &numbers) {
  Reader in(numbers);
  cuda::Where where{};
  where.device = int(in.integer());
  where.stream = in.address();
  in.end();
  return where;
}

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

cuda::Matrix read_matrix(Reader &in) {
  cuda::Matrix m{};
  m.dtype = Dtype(in.integer());
  m.data = in.address<const void>();
  m.per_batch = in.integer();
  m.per_row = in.integer();
  m.per_column = in.integer();
  require(!m.data || m.dtype != Dtype::float64, "float64 has no CUDA kernels");
  return m;
}

void cuda_sinkhorn_pass(const py::tuple &where, const py::tuple &numbers) {
  Reader in(numbers);
  cuda::SinkhornPassCall c{};
  c.step = cuda::SinkhornStep(in.integer());
  c.scores = read_matrix(in);
  c.gradient = read_matrix(in);
  for (int64_t *size : {&c.batch, &c.rows, &c.columns}) *size = in.integer();
  for (const float **given : {&c.inverse_epsilon, &c.high, &c.low}) *given = in.address<const float>();
  for (float **given : {&c.shift, &c.sum}) *given = in.address<float>();
  for (const float **given : {&c.mass, &c.weights, &c.less}) *given = in.address<const float>();
  for (float **given : {&c.by_row, &c.partial}) *given = in.address<float>();
  c.matrix = in.address();
  for (int64_t *size : {&c.chunk, &c.chunks, &c.row_terms, &c.column_terms}) *size = in.integer();
  for (const float **given :
       {&c.term_high, &c.term_low, &c.term_w, &c.term_shift, &c.term_p, &c.term_q, &c.column_high, &c.column_low, &c.column_shift, &c.column_w})
    *given = in.address<const float>();
  in.end();
  using S = cuda::SinkhornStep;
  const S step = c.step;
  require(step >= S::normalize && step <= S::score_gradient, "an unknown step");
  require(c.batch >= 1 && c.rows >= 1 && c.columns >= 1 && c.columns < INT32_MAX / 2, "sizes must be positive, columns below 2^30");
  require(c.scores.data && c.inverse_epsilon, "scores or inverse_epsilon: a null pointer");
  require(c.high && c.low, "potential: a null pointer");
  require(step == S::column_sums || c.shift, "shift: a null pointer");
  require(step == S::column_sums || step == S::column_products || c.sum, "sum: a null pointer");
  require(step == S::normalize || step == S::column_sums || c.by_row, "by_row: a null pointer");
  require(step != S::products || c.mass, "mass: a null pointer");
  require(step != S::normalize || !c.partial == !c.mass, "mass: a null pointer, or one too many");
  require((step != S::products && step != S::column_products) || c.weights, "weights: a null pointer");
  require((step != S::gradient && step != S::score_gradient) || c.less, "less: a null pointer");
  require(step == S::normalize || step == S::column_products || step == S::score_gradient || c.partial, "partial: a null pointer");
  require(step != S::score_gradient || c.matrix, "matrix: a null pointer");
  require(step == S::column_products || step == S::score_gradient || (c.chunk >= 1 && c.chunks == (c.rows + c.chunk - 1) / c.chunk),
          "chunks do not hold the rows");
  require(c.row_terms >= 0 && c.column_terms >= 0, "a negative number of terms");
  require(!c.row_terms || (c.term_high && c.term_low && c.term_w && c.term_shift && c.term_p && c.term_q), "row terms: a null pointer");
  require(!c.column_terms || (c.column_high && c.column_low && c.column_shift && c.column_w), "column terms: a null pointer");
  const cuda::Where place = read_where(where);
  py::gil_scoped_release release;
  cuda::sinkhorn_pass(place, c);
}

void cuda_sinkhorn_iterations(const py::tuple &where, const py::tuple &numbers, float tolerance) {
  Reader in(numbers);
  cuda::SinkhornIterations c{};
  c.scores = read_matrix(in);
  for (int64_t *size : {&c.batch, &c.rows, &c.columns, &c.iterations, &c.chunk, &c.chunks}) *size = in.integer();
  c.resident = in.integer();
  c.tolerance = tolerance;
  for (const float **given : {&c.inverse_epsilon, &c.epsilon, &c.mass, &c.log_prior}) *given = in.address<const float>();
  c.kept_rows = in.address<float>();
  for (double **given : {&c.kept_g, &c.kept_masses, &c.g}) *given = in.address<double>();
  for (float **given : {&c.error, &c.partial, &c.error_parts}) *given = in.address<float>();
  c.done = in.address<int64_t>();
  c.matrix = in.address();
  in.end();
  require(c.batch >= 1 && c.rows >= 1 && c.columns >= 1 && c.iterations >= 1, "sizes must be positive");
  require(c.columns <= cuda::SINKHORN_WHOLE, "rows are too long to be held whole");
  require(c.chunk >= 1 && c.chunks == (c.rows + c.chunk - 1) / c.chunk, "chunks do not hold the rows");
  require(c.scores.data && c.inverse_epsilon && c.epsilon && c.mass && c.log_prior, "an input: a null pointer");
  require(c.kept_rows && c.kept_g && c.kept_masses && c.partial && c.done && c.matrix, "an output: a null pointer");
  require(tolerance < 0 || (c.g && c.error && c.error_parts), "a tolerance without its workspace");
  const cuda::Where place = read_where(where);
  py::gil_scoped_release release;
  cuda::sinkhorn_iterations(place, c);
}

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

void add_cuda(py::module_ m) {
  m.doc() = "CUDA C++ kernels: (device, stream) and the description of a call.";
  m.def("driver_failure", &cuda::driver_failure, "what is wrong with the driver; empty: nothing");
  m.def("driver_version", &cuda::driver_version, "as CUDA counts, 13000 for 13.0; 0: there is none");
  m.def("runtime_version", &cuda::runtime_version);
  m.def("contrast_forward", &cuda_contrast_forward);
  m.def("contrast_backward", &cuda_contrast_backward);
  m.def("extreme_blocks", &cuda::extreme_blocks, "how many blocks of so many rows the backward's extremes are of");
  m.def(
      "line_count", [](int64_t rows, const py::tuple &where) { return cuda::line_count(rows, read_where(where)); },
      "how many lines of sums a forward both ways needs");
  m.def("processors", &cuda::processors, py::arg("device"), "multiprocessors of a device");
  m.def("sinkhorn_pass", &cuda_sinkhorn_pass, py::arg("where"), py::arg("call"));
  m.def("sinkhorn_iterations", &cuda_sinkhorn_iterations, py::arg("where"), py::arg("call"), py::arg("tolerance"));
  m.def(
      "sinkhorn_plan",
      [](int device, int64_t batch, int64_t rows, int64_t columns, int64_t bytes) {
        const cuda::SinkhornPlan plan = cuda::sinkhorn_plan(device, batch, rows, columns, bytes);
        return py::make_tuple(plan.chunk, plan.chunks, plan.resident);
      },
      py::arg("device"), py::arg("batch"), py::arg("rows"), py::arg("columns"), py::arg("bytes"),
      "(rows of a chunk, chunks, whether they stay on the chip) of all iterations in one launch; chunks 0: there is none");
  m.def("topk", &cuda_topk, py::arg("where"), py::arg("call"));
  m.attr("sinkhorn_whole") = cuda::SINKHORN_WHOLE;
  m.attr("emulated") = cuda::emulated();
  m.attr("targets") = FASTCL_CUDA;
}
