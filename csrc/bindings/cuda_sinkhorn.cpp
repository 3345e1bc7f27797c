// Python bindings of Sinkhorn on CUDA.
#include "bindings/families.h"
#include "bindings/where.h"
#include "cuda/sinkhorn/launches.h"

namespace py = pybind11;

namespace fastcl {
namespace {

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

} // namespace

void bind_cuda_sinkhorn(py::module_ &m) {
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
  m.attr("sinkhorn_whole") = cuda::SINKHORN_WHOLE;
}

} // namespace fastcl
