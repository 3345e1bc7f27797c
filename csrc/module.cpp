// The Python module: addresses and integers in, nothing of torch. A call is described first; it then says how much
// workspace it wants, and runs on that with the interpreter's lock released.
#include "cpu/arrange.h"
#include "cpu/dispatch.h"
#include "cpu/mean.h"
#include "cpu/solve.h"
#include "reader.h"
#include <memory>
#include <pybind11/stl.h>
#include <variant>

namespace py = pybind11;
using namespace fastcl;

#ifdef FASTCL_CUDA
void add_cuda(py::module_ m); // csrc/module_cuda.cpp
#endif

namespace {

Problem read_problem(const py::tuple &numbers) {
  Reader in(numbers);
  Problem p;
  p.anchors = in.rows();
  p.contrasts = in.rows();
  p.dimension = in.integer();
  p.anchor_clusters = in.address<const int64_t>();
  p.contrast_clusters = in.address<const int64_t>();
  p.anchor_ids = in.address<const int64_t>();
  p.contrast_ids = in.address<const int64_t>();
  p.logit_scale = in.address<const void>();
  p.scales = int(in.integer());
  p.contrast_bias = in.address<const void>();
  p.normalize_anchors = in.integer();
  p.normalize_contrasts = in.integer();
  p.wide_reals = in.integer();
  p.columns = in.integer();
  p.threads = int(in.integer());
  in.end();
  require(p.anchors.data, "anchors: a null pointer");
  require(p.logit_scale, "logit_scale: a null pointer");
  require(p.anchors.size >= 1 && p.dimension >= 1 && p.threads >= 1 && p.scales >= 1, "sizes, scales and threads must be positive");
  require(p.self_contrast() || p.contrasts.size >= 1, "sizes and threads must be positive");
  require(p.anchors.size < INT32_MAX / 2 && p.contrasts.size < INT32_MAX / 2, "more than 2^30 rows");
  if (p.self_contrast()) {
    require(!p.contrast_clusters && !p.anchor_ids && !p.contrast_ids && !p.contrast_bias && !p.columns, "self-contrast takes clusters only");
    p.contrasts.size = 0;
  } else {
    require(!p.anchor_clusters == !p.contrast_clusters, "clusters of one side only");
    require(!p.anchor_ids == !p.contrast_ids, "ids of one side only");
  }
  return p;
}

Statistics read_statistics(const py::tuple &numbers) {
  Reader in(numbers);
  Statistics s;
  for (void *&field : s.fields) field = in.address();
  for (void *&shift : s.shifts) shift = in.address();
  for (void *&sum : s.sums) sum = in.address();
  s.positives = in.address();
  s.negatives = in.address();
  s.negative_share = in.address();
  s.negative_base = in.address();
  s.positive_base = in.address();
  s.observed = in.address();
  s.inverse_norms = in.address();
  in.end();
  for (int f = 0; f < SUM_POS; f++) require(!s.fields[f] || (s.shifts[f] && s.sums[f]), "a log-sum-exp without its parts");
  require(s.positives && s.negatives && s.negative_share && s.negative_base && s.positive_base, "counts: a null pointer");
  return s;
}

// A described call: arranged once, and run on a workspace of the size that it names.
class Call {
public:
  Call(const Engine *engine, std::variant<Forward, Backward, MeanLoss> call) : engine_(engine), call_(std::move(call)) {
    const Problem &problem = std::visit([](const auto &c) -> const Problem & { return c.problem; }, call_);
    py::gil_scoped_release release;
    arrangements_ = arrange(problem);
    workspace_ = start(nullptr);
  }
  int64_t workspace() const { return workspace_ + 64; }
  void run(int64_t address) const {
    require(address, "workspace: a null pointer");
    py::gil_scoped_release release;
    start(reinterpret_cast<void *>((address + 63) / 64 * 64));
  }

private:
  int64_t start(void *workspace) const {
    const Arranged arranged = arrangements_.arranged();
    if (const Forward *forward = std::get_if<Forward>(&call_)) return engine_->forward(*forward, arranged, workspace);
    if (const Backward *backward = std::get_if<Backward>(&call_)) return engine_->backward(*backward, arranged, workspace);
    return mean_loss(*engine_, std::get<MeanLoss>(call_), arranged, workspace);
  }
  const Engine *engine_;
  std::variant<Forward, Backward, MeanLoss> call_;
  Arrangements arrangements_;
  int64_t workspace_;
};

const Engine *engine_named(const std::string &name) {
  for (const Engine *engine : supported_engines())
    if (engine->name == name) return engine;
  throw std::invalid_argument("fastcl: no engine " + name + " on this machine");
}

WeightedSums read_weighted(Reader &in, const Problem &p) {
  WeightedSums w;
  w.sums = in.address();
  w.valid = in.address();
  require(!w.sums == !w.valid, "weighted sums without their validity, or the reverse");
  require(!w.sums || !(p.self_contrast() || p.columns || p.contrast_bias), "weighted sums: two sets without bias, one direction only");
  require(!w.sums || p.scales == 1, "weighted sums: of one scale only");
  return w;
}

// What forward and backward are told alike.
template <class Description> Description described(const py::tuple &problem, const py::tuple &anchors, const py::object &contrasts, Reader &outputs) {
  Description call{};
  call.problem = read_problem(problem);
  call.anchors = read_statistics(anchors);
  require(call.problem.columns == !contrasts.is_none(), "columns: statistics of the contrasts wanted but not given, or the reverse");
  if (!contrasts.is_none()) call.contrasts = read_statistics(contrasts.cast<py::tuple>());
  call.weighted = read_weighted(outputs, call.problem);
  return call;
}

template <class Description> void read_gradients(Reader &outputs, Description &call) {
  call.anchor_gradient = outputs.address();
  call.contrast_gradient = outputs.address();
  call.scale_gradient = outputs.address();
  call.bias_gradient = outputs.address();
  require(!call.contrast_gradient || !call.problem.self_contrast(), "contrast_gradient: self-contrast has none");
  require(!call.bias_gradient || call.problem.contrast_bias, "bias_gradient: there is no bias");
}

template <class Description> void require_anchors_only(const Description &call) {
  require(!call.weighted.sums || (call.anchor_gradient && !call.contrast_gradient && !call.scale_gradient && !call.bias_gradient),
          "weighted sums give the anchors' gradient only");
}

std::unique_ptr<Call> forward(const std::string &engine, const py::tuple &problem, const py::tuple &anchors, const py::object &contrasts,
                              const py::tuple &outputs) {
  Reader in(outputs);
  const auto call = described<Forward>(problem, anchors, contrasts, in);
  in.end();
  return std::make_unique<Call>(engine_named(engine), call);
}

std::unique_ptr<Call> backward(const std::string &engine, const py::tuple &problem, const py::tuple &anchors, const py::object &contrasts,
                               const py::tuple &outputs) {
  Reader in(outputs);
  auto call = described<Backward>(problem, anchors, contrasts, in);
  call.single_positives = in.integer();
  read_gradients(in, call);
  in.end();
  require_anchors_only(call);
  return std::make_unique<Call>(engine_named(engine), call);
}

std::unique_ptr<Call> mean(const std::string &engine, const py::tuple &problem, const py::tuple &outputs) {
  Reader in(outputs);
  MeanLoss call{};
  call.problem = read_problem(problem);
  call.negatives_only = in.integer();
  call.kept = in.address();
  call.weighted = read_weighted(in, call.problem);
  call.loss = in.address();
  call.loss_gradient = in.address();
  call.observed = in.address();
  call.contrast_observed = in.address();
  require(!call.contrast_observed || call.problem.columns, "contrast_observed: the contrasts' statistics are not wanted");
  read_gradients(in, call);
  in.end();
  require(call.loss || call.kept, "loss: a null pointer, and no statistics of it");
  require(call.loss || call.loss_gradient, "loss_gradient: a null pointer, in a call of the gradients alone");
  require(!call.loss || !call.loss_gradient, "loss_gradient: given before there is a loss");
  const bool differentiated = call.anchor_gradient || call.contrast_gradient || call.scale_gradient || call.bias_gradient;
  require(!call.kept || !call.loss || !differentiated, "kept: between a call of the loss and one of the gradients");
  require(!call.weighted.sums || call.kept, "weighted sums: between two calls only");
  if (!call.loss) require_anchors_only(call);
  require(call.problem.scales == 1, "a mean loss: of one scale only");
  return std::make_unique<Call>(engine_named(engine), call);
}

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
  in.end();
  using P = SinkhornPass;
  const P pass = s.pass;
  require(pass >= P::column_sums && pass <= P::score_gradient, "an unknown pass");
  require(s.scores.data && s.inverse_epsilon && s.potential, "scores, inverse_epsilon or potential: a null pointer");
  require(s.scores.size >= 1 && s.columns >= 1 && s.threads >= 1, "sizes and threads must be positive");
  const bool columns = pass == P::column_sums || pass == P::column_products, weighted = pass == P::products || pass == P::column_products;
  require(columns ? s.column_shift && s.column_sum : s.row_shift && s.row_sum, "a normalizer: a null pointer");
  require(!weighted || s.weights, "weights: a null pointer");
  require((pass == P::row_pass) || columns || s.less || pass == P::products, "less: a null pointer");
  require(pass != P::products || s.mass, "mass: a null pointer");
  require(pass == P::column_sums || pass == P::row_pass || s.by_row, "by_row: a null pointer");
  require((pass == P::row_pass ? !s.mass : columns || pass == P::score_gradient) == !s.by_column, "by_column: a null pointer, or one too many");
  require(pass != P::score_gradient || s.matrix, "matrix: a null pointer");
  require(!s.gradient.data || s.gradient.size == s.scores.size, "gradient: not of the scores' size");
  return s;
}

class SinkhornCall {
public:
  SinkhornCall(const Engine *engine, const py::tuple &call, const py::tuple &terms) : engine_(engine), call_(read_sinkhorn(call)) {
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
      terms_.push_back(term);
    }
    call_.terms = terms_.data();
    call_.term_count = int64_t(terms_.size());
  }
  SinkhornCall(const SinkhornCall &) = delete;
  int64_t workspace() const { return engine_->sinkhorn(call_, nullptr) + 64; }
  void run(int64_t address) const {
    require(address, "workspace: a null pointer");
    py::gil_scoped_release release;
    engine_->sinkhorn(call_, reinterpret_cast<void *>((address + 63) / 64 * 64));
  }

private:
  const Engine *engine_;
  Sinkhorn call_;
  std::vector<SinkhornTerm> terms_;
};

std::unique_ptr<SinkhornCall> sinkhorn(const std::string &engine, const py::tuple &call, const py::tuple &terms) {
  return std::make_unique<SinkhornCall>(engine_named(engine), call, terms);
}

class SolveCall {
public:
  SolveCall(const Engine *engine, const SinkhornSolve &call) : engine_(engine), call_(call) {}
  int64_t workspace() const { return solve(*engine_, call_, nullptr) + 64; }
  void run(int64_t address) const {
    require(address, "workspace: a null pointer");
    py::gil_scoped_release release;
    solve(*engine_, call_, reinterpret_cast<void *>((address + 63) / 64 * 64));
  }

private:
  const Engine *engine_;
  SinkhornSolve call_;
};

std::unique_ptr<SolveCall> sinkhorn_solve(const std::string &engine, double epsilon, const py::tuple &numbers) {
  Reader in(numbers);
  SinkhornSolve s{};
  s.epsilon = epsilon;
  s.pass.scores = in.rows();
  s.pass.columns = in.integer();
  s.pass.inverse_epsilon = in.address<const void>();
  s.pass.wide_reals = in.integer();
  s.pass.threads = int(in.integer());
  s.pass.matrix = in.address();
  s.log_prior = in.address<const void>();
  s.log_mass = in.address<const void>();
  s.mass = in.address<const void>();
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
  require(s.pass.scores.data && s.pass.inverse_epsilon && s.pass.matrix, "scores, inverse_epsilon or matrix: a null pointer");
  require(s.log_prior && s.log_mass && s.mass, "log_prior, log_mass or mass: a null pointer");
  require(s.rows && s.columns && s.row_potential && s.col_potential, "an output: a null pointer");
  return std::make_unique<SolveCall>(engine_named(engine), s);
}

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

class SoftCall {
public:
  SoftCall(const Engine *engine, const Soft &call) : engine_(engine), call_(call) {
    py::gil_scoped_release release;
    arrangements_ = arrange(call_.problem);
  }
  int64_t workspace() const { return engine_->soft(call_, arrangements_.arranged(), nullptr) + 64; }
  void run(int64_t address) const {
    require(address, "workspace: a null pointer");
    py::gil_scoped_release release;
    engine_->soft(call_, arrangements_.arranged(), reinterpret_cast<void *>((address + 63) / 64 * 64));
  }

private:
  const Engine *engine_;
  const Soft call_;
  Arrangements arrangements_;
};

std::unique_ptr<SoftCall> soft(const std::string &engine, const py::tuple &problem, const py::tuple &assignments, const py::tuple &anchors,
                               const py::object &contrasts, const py::object &gradients) {
  Soft call{};
  Problem &p = call.problem;
  p = read_problem(problem);
  require(!p.anchor_clusters && p.scales == 1, "soft assignments: of one scale, without clusters");
  Reader rows(assignments);
  call.anchor_assignments = rows.rows();
  call.contrast_assignments = rows.rows();
  call.assignment_columns = rows.integer();
  rows.end();
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
  return std::make_unique<SoftCall>(engine_named(engine), call);
}

class TopKCall {
public:
  TopKCall(const Engine *engine, const TopK &call) : engine_(engine), call_(call) {}
  int64_t workspace() const { return engine_->topk(call_, nullptr) + 64; }
  void run(int64_t address) const {
    require(address, "workspace: a null pointer");
    py::gil_scoped_release release;
    engine_->topk(call_, reinterpret_cast<void *>((address + 63) / 64 * 64));
  }

private:
  const Engine *engine_;
  const TopK call_;
};

std::unique_ptr<TopKCall> topk(const std::string &engine, const py::tuple &numbers) {
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
  return std::make_unique<TopKCall>(engine_named(engine), call);
}

std::vector<std::string> names(const std::vector<const Engine *> &engines) {
  std::vector<std::string> result;
  for (const Engine *engine : engines) result.push_back(engine->name);
  return result;
}

} // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "fastcl's engines in C++: addresses and integers in, nothing of torch.";
  py::class_<Call>(m, "Call")
      .def_property_readonly("workspace", &Call::workspace, "bytes of workspace that `run` needs")
      .def("run", &Call::run, py::arg("workspace"));
  m.def("forward", &forward, py::arg("engine"), py::arg("problem"), py::arg("anchors"), py::arg("contrasts"), py::arg("outputs"));
  m.def("backward", &backward, py::arg("engine"), py::arg("problem"), py::arg("anchors"), py::arg("contrasts"), py::arg("outputs"));
  m.def("mean", &mean, py::arg("engine"), py::arg("problem"), py::arg("outputs"));
  py::class_<SinkhornCall>(m, "SinkhornCall")
      .def_property_readonly("workspace", &SinkhornCall::workspace, "bytes of workspace that `run` needs")
      .def("run", &SinkhornCall::run, py::arg("workspace"));
  m.def("sinkhorn", &sinkhorn, py::arg("engine"), py::arg("call"), py::arg("terms"));
  py::class_<SolveCall>(m, "SinkhornSolveCall")
      .def_property_readonly("workspace", &SolveCall::workspace, "bytes of workspace that `run` needs")
      .def("run", &SolveCall::run, py::arg("workspace"));
  m.def("sinkhorn_solve", &sinkhorn_solve, py::arg("engine"), py::arg("epsilon"), py::arg("call"));
  py::class_<SoftCall>(m, "SoftCall")
      .def_property_readonly("workspace", &SoftCall::workspace, "bytes of workspace that `run` needs")
      .def("run", &SoftCall::run, py::arg("workspace"));
  m.def("soft", &soft, py::arg("engine"), py::arg("problem"), py::arg("assignments"), py::arg("anchors"), py::arg("contrasts"), py::arg("gradients"));
  py::class_<TopKCall>(m, "TopKCall")
      .def_property_readonly("workspace", &TopKCall::workspace, "bytes of workspace that `run` needs")
      .def("run", &TopKCall::run, py::arg("workspace"));
  m.def("topk", &topk, py::arg("engine"), py::arg("call"));
  m.def("built_engines", [] { return names(built_engines()); }, "instruction sets that this build has an engine for");
  m.def("supported_engines", [] { return names(supported_engines()); }, "those that this machine runs, slowest first");
  m.def(
      "choose_engine",
      [](const std::string &cap) {
        const Choice choice = choose_engine(cap);
        return py::make_tuple(choice.engine ? py::object(py::str(choice.engine->name)) : py::object(py::none()), choice.reason);
      },
      py::arg("cap"), "(name or None, reason); `cap` names the newest instruction set allowed, or is empty");
#ifdef FASTCL_CUDA
  add_cuda(m.def_submodule("cuda"));
#endif
  m.attr("compiler") = FASTCL_COMPILER;
  m.attr("version") = FASTCL_VERSION;
}
