// Python bindings of the statistics over soft assignments.
#include "bindings/contrastive.h"
#include "bindings/families.h"

namespace py = pybind11;

namespace fastcl {
namespace {

SoftSide read_soft_side(const py::tuple &numbers, bool backward) {
  Reader in(numbers);
  SoftSide s;
  for (void **p : {&s.lse, &s.sum, &s.weight, &s.size, &s.base, &s.total, &s.inverse_norms}) *p = in.address();
  s.lse_gradient = in.address<const void>();
  s.sum_gradient = in.address<const void>();
  in.end();
  require(s.base && s.total, "a side of soft assignments: a null pointer");
  require(backward ? s.lse_gradient && s.sum_gradient : s.lse && s.sum && s.weight && s.size, "a side's fields: a null pointer");
  return s;
}

std::unique_ptr<Call> soft(const std::string &engine, const py::tuple &problem, const py::tuple &assignments, const py::tuple &anchors,
                           const py::object &contrasts, const py::object &gradients) {
  Soft call{};
  Problem &p = call.problem;
  p = read_problem(problem);
  require(!p.anchor_clusters && p.scales == 1, "soft assignments: of one scale, without clusters");
  Reader rows(assignments);
  call.anchor_assignments = rows.rows();
  call.contrast_assignments = rows.rows();
  call.assignment_columns = rows.integer();
  call.weights = {rows.address(), KeptProducts::stride_of(p.column_rows().size)};
  rows.end();
  require(reinterpret_cast<uintptr_t>(call.weights.of) % 64 == 0, "weights: not aligned");
  require(call.anchor_assignments.data && call.assignment_columns >= 1, "assignments: a null pointer, or no columns");
  require(call.anchor_assignments.size == p.anchors.size, "assignments: not of the anchors' size");
  require(!call.contrast_assignments.data == p.self_contrast(), "assignments of contrasts: two sets have them, self-contrast has none");
  require(p.self_contrast() || call.contrast_assignments.size == p.contrasts.size, "assignments: not of the contrasts' size");
  call.backward = !gradients.is_none();
  call.anchors = read_soft_side(anchors, call.backward);
  require(p.columns == !contrasts.is_none(), "columns: statistics of the contrasts wanted but not given, or the reverse");
  if (p.columns) call.contrasts = read_soft_side(contrasts.cast<py::tuple>(), call.backward);
  if (call.backward) {
    const auto outputs = gradients.cast<py::tuple>();
    Reader in(outputs);
    read_gradients(in, call);
    in.end();
  }
  return arranged_call(call, engine_named(engine)->soft);
}

} // namespace

void bind_soft(py::module_ &m) {
  m.def("soft", &soft, py::arg("engine"), py::arg("problem"), py::arg("assignments"), py::arg("anchors"), py::arg("contrasts"), py::arg("gradients"));
}

} // namespace fastcl
