// Python bindings of the cross-entropies against prototypes.
#include "bindings/call.h"
#include "bindings/families.h"
#include <vector>

namespace py = pybind11;

namespace fastcl {
namespace {

struct Lists { // they live as long as the call
  std::vector<Rows> students, teachers;
  std::vector<void *> gradients;
};

std::vector<Rows> read_crops(const py::tuple &numbers, int64_t size) {
  std::vector<Rows> crops;
  for (const py::handle &crop : numbers) {
    Reader in(crop.cast<py::tuple>());
    crops.push_back(in.rows());
    in.end();
    require(crops.back().data && crops.back().size == size, "scores: a null pointer, or not of the rows' number");
  }
  return crops;
}

std::unique_ptr<Call> prototypes(const std::string &engine, const py::tuple &students, const py::tuple &teachers, const py::tuple &numbers,
                                 const py::object &gradients) {
  Reader in(numbers);
  Prototypes call{};
  call.size = in.integer();
  call.columns = in.integer();
  call.potentials = in.address<const void>();
  call.positions = in.integer();
  call.pairs = in.address<const double>();
  call.scales = in.address<const double>();
  call.wide_reals = in.integer();
  call.threads = int(in.integer());
  for (void **p : {&call.kept, &call.values, &call.entropies, &call.column_sums}) *p = in.address();
  for (const void **p : {&call.value_gradient, &call.entropy_gradient, &call.column_gradient}) *p = in.address<const void>();
  in.end();
  require(call.size >= 1 && call.columns >= 1 && call.positions >= 1 && call.threads >= 1, "sizes, positions and threads must be positive");
  const auto lists = std::make_shared<Lists>();
  lists->students = read_crops(students, call.size);
  lists->teachers = read_crops(teachers, call.size);
  call.backward = !gradients.is_none();
  if (call.backward) {
    Reader out(gradients.cast<py::tuple>());
    for (size_t b = 0; b < lists->students.size(); b++) {
      lists->gradients.push_back(out.address());
      require(lists->gradients.back(), "a student's gradient: a null pointer");
    }
    out.end();
  }
  require(call.pairs && call.scales && call.kept && (call.backward || call.values), "pairs, scales, kept or values: a null pointer");
  call.students = lists->students.data();
  call.teachers = lists->teachers.data();
  call.gradients = lists->gradients.data();
  call.student_count = int64_t(lists->students.size());
  call.teacher_count = int64_t(lists->teachers.size());
  const Engine *const chosen = engine_named(engine);
  return std::make_unique<Call>([chosen, call, lists](void *workspace) { return chosen->prototypes(call, workspace); });
}

} // namespace

void bind_prototypes(py::module_ &m) {
  m.def("prototypes", &prototypes, py::arg("engine"), py::arg("students"), py::arg("teachers"), py::arg("call"), py::arg("gradients"));
}

} // namespace fastcl
