// Python bindings of Sinkhorn's passes, and of a fixed number of iterations in one call.
#include "bindings/call.h"
#include "bindings/families.h"
#include "cpu/sinkhorn/solve.h"
#include <vector>

namespace py = pybind11;

namespace fastcl {
namespace {

Sinkhorn read_sinkhorn(const py::tuple &numbers) {
  Reader in(numbers);
  Sinkhorn s{};
  s.pass = SinkhornPass(in.integer());
  s.scores = in.rows();
  s.columns = in.integer();
  s.inverse_epsilon = in.address<const void>();
  s.wide_reals = in.integer();
  s.threads = int(in.integer());
  s.potential = in.address<const double>();
  s.row_shift = in.address();
  s.row_sum = in.address();
  s.column_shift = in.address();
  s.column_sum = in.address();
  s.above = in.address<const void>();
  s.mass = in.address<const void>();
  s.weights = in.address<const void>();
  s.less = in.address<const void>();
  s.by_row = in.address();
  s.by_column = in.address();
  s.gradient = in.rows();
  s.matrix = in.address();
  s.plan = in.address<const void>();
  s.row_factors = in.address<const void>();
  s.column_factors = in.address<const void>();
  s.factor_count = in.integer();
  in.end();
  using P = SinkhornPass;
  const P pass = s.pass;
  const bool columns = pass == P::column_sums || pass == P::column_products;
  const bool of_plan = pass == P::plan_products || pass == P::plan_gradient; // plan_update is only called by solve
  require(of_plan || (pass >= P::column_sums && pass <= P::score_gradient), "an unknown pass");
  require(s.scores.data && s.inverse_epsilon, "scores or inverse_epsilon: a null pointer");
  require(of_plan ? s.plan != nullptr : s.potential && !s.plan, "potential or plan: a null pointer, or one too many");
  require(s.scores.size >= 1 && s.columns >= 1 && s.threads >= 1, "sizes and threads must be positive");
  require(columns ? s.column_shift && s.column_sum : s.row_sum && (of_plan || s.row_shift), "a normalizer: a null pointer");
  require(s.weights || (pass != P::products && pass != P::column_products), "weights: a null pointer");
  require(s.less || (pass != P::assignment_gradient && pass != P::score_gradient && pass != P::plan_gradient), "less: a null pointer");
  require(s.mass || (pass != P::products && pass != P::plan_products), "mass: a null pointer");
  require(s.by_row || pass == P::column_sums || pass == P::row_pass || pass == P::plan_gradient, "by_row: a null pointer");
  require((pass == P::row_pass ? !s.mass : columns || pass == P::score_gradient || pass == P::plan_gradient) == !s.by_column,
          "by_column: a null pointer, or one too many");
  require(s.matrix || (pass != P::score_gradient && pass != P::plan_gradient), "matrix: a null pointer");
  require(s.factor_count >= 0 && s.factor_count % 2 == 0 && (pass != P::plan_products || s.factor_count == 2), "factor_count: unexpected");
  require(!s.factor_count || (s.column_factors && (s.row_factors || pass == P::plan_products)), "row_factors or column_factors: a null pointer");
  require(s.scores.dtype == (s.wide_reals ? Dtype::float64 : Dtype::float32) || !(of_plan || (pass == P::assignment_gradient && s.matrix)),
          "a plan: only of scores in the dtype of the reals");
  require(!s.gradient.data || s.gradient.size == s.scores.size, "gradient: not of the scores' size");
  return s;
}

std::vector<SinkhornTerm> read_terms(const py::tuple &terms) {
  std::vector<SinkhornTerm> result;
  for (const py::handle &numbers : terms) {
    const auto tuple = numbers.cast<py::tuple>();
    Reader in(tuple);
    SinkhornTerm term;
    term.potential = in.address<const double>();
    term.shift = in.address<const void>();
    term.p = in.address<const void>();
    term.q = in.address<const void>();
    term.w = in.address<const void>();
    in.end();
    require(term.potential && term.shift && term.w && !term.p == !term.q, "a term: a null pointer");
    result.push_back(term);
  }
  return result;
}

std::unique_ptr<Call> sinkhorn(const std::string &engine, const py::tuple &numbers, const py::tuple &terms) {
  const Engine *const chosen = engine_named(engine);
  const auto list = std::make_shared<const std::vector<SinkhornTerm>>(read_terms(terms)); // shared, so that it lives as long as the call
  Sinkhorn call = read_sinkhorn(numbers);
  call.term_count = int64_t(list->size());
  call.terms = list->data();
  return std::make_unique<Call>([chosen, call, list](void *workspace) { return chosen->sinkhorn(call, workspace); });
}

std::unique_ptr<Call> sinkhorn_solve(const std::string &engine, double epsilon, const py::tuple &numbers) {
  Reader in(numbers);
  SinkhornSolve s{};
  s.epsilon = epsilon;
  s.pass.scores = in.rows();
  s.pass.columns = in.integer();
  s.pass.wide_reals = in.integer();
  s.pass.threads = int(in.integer());
  s.pass.matrix = in.address();
  s.log_prior = in.address<const void>();
  s.log_row_marginal = in.address<const void>();
  s.init = in.address<const double>();
  s.iterations = in.integer();
  s.rows = in.address();
  s.row_step = in.integer();
  s.columns = in.address<double>();
  s.column_step = in.integer();
  s.row_potential = in.address();
  s.col_potential = in.address();
  in.end();
  require(s.pass.scores.size >= 1 && s.pass.columns >= 1 && s.pass.threads >= 1 && s.iterations >= 1,
          "sizes, threads and iterations must be positive");
  require(epsilon > 0, "epsilon must be positive");
  require(s.pass.scores.data && s.pass.matrix, "scores or matrix: a null pointer");
  require(s.log_prior && s.log_row_marginal, "log_prior or log_row_marginal: a null pointer");
  require(s.rows && s.columns && s.row_potential && s.col_potential, "an output: a null pointer");
  const Engine *const chosen = engine_named(engine);
  return std::make_unique<Call>([=](void *workspace) { return solve(*chosen, s, workspace); });
}

} // namespace

void bind_sinkhorn(py::module_ &m) {
  m.def("sinkhorn", &sinkhorn, py::arg("engine"), py::arg("call"), py::arg("terms"));
  m.def("sinkhorn_solve", &sinkhorn_solve, py::arg("engine"), py::arg("epsilon"), py::arg("call"));
}

} // namespace fastcl
