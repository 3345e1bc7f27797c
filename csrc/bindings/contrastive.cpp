// Python bindings of the contrastive statistics, their gradients and the mean loss.
#include "bindings/contrastive.h"
#include "bindings/families.h"
#include "cpu/contrastive/mean.h"
#include <algorithm>
#include <vector>

namespace py = pybind11;

namespace fastcl {

namespace {

Rules read_rules(Reader &in) {
  Rules r{};
  r.anchor_tags = in.address<const uint64_t>();
  r.contrast_tags = in.address<const uint64_t>();
  r.tag_words = in.integer();
  r.anchor_samples = in.address<const int64_t>();
  r.contrast_samples = in.address<const int64_t>();
  r.anchor_groups = in.address<const int64_t>();
  r.contrast_groups = in.address<const int64_t>();
  r.anchor_guide = in.rows();
  r.contrast_guide = in.rows();
  r.guide_dimension = in.integer();
  r.thresholds = in.address<const void>();
  r.same_rows = in.integer();
  require(!r.anchor_tags || r.tag_words >= 1, "tags: no words");
  require(!r.thresholds || (r.anchor_guide.data && r.contrast_guide.data && r.guide_dimension >= 1), "a guide without rows");
  return r;
}

} // namespace

Problem read_problem(const py::tuple &numbers) {
  Reader in(numbers);
  Problem p{};
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
  if (in.integer()) p.rules = read_rules(in);
  in.end();
  require(p.anchors.data, "anchors: a null pointer");
  require(p.logit_scale, "logit_scale: a null pointer");
  require(p.anchors.size >= 1 && p.dimension >= 1 && p.threads >= 1 && p.scales >= 1, "sizes, scales and threads must be positive");
  require(p.self_contrast() || p.contrasts.size >= 1, "sizes and threads must be positive");
  require(p.anchors.size < INT32_MAX / 2 && p.contrasts.size < INT32_MAX / 2, "more than 2^30 rows");
  if (p.self_contrast()) {
    require(!p.contrast_clusters && !p.contrast_ids && !p.contrast_bias && !p.columns, "self-contrast takes clusters and ids only");
    require(!p.rules.thresholds && !p.rules.same_rows, "self-contrast takes no guide");
    p.contrasts.size = 0;
  } else {
    require(!p.anchor_clusters == !p.contrast_clusters, "clusters of one side only");
    require(!p.anchor_ids == !p.contrast_ids, "ids of one side only");
    const Rules &r = p.rules;
    require(!r.anchor_tags == !r.contrast_tags && !r.anchor_samples == !r.contrast_samples && !r.anchor_groups == !r.contrast_groups,
            "rules of one side only");
    require(!r.thresholds || !p.columns, "a guide: of one direction only");
  }
  return p;
}

std::shared_ptr<const void> with_negatives_alone(Problem &p) {
  require(p.self_contrast(), "negatives_alone: of self-contrast");
  const int64_t *const clusters = p.anchor_clusters, size = p.anchors.size;
  if (!clusters || std::none_of(clusters, clusters + size, [](int64_t c) { return c < -1; })) return nullptr;
  const auto copy = std::make_shared<std::vector<int64_t>>(clusters, clusters + size);
  for (int64_t &cluster : *copy) cluster = std::max<int64_t>(cluster, -1);
  p.anchor_clusters = copy->data();
  return copy;
}

namespace {

Statistics read_statistics(const py::tuple &numbers) {
  Reader in(numbers);
  Statistics s;
  for (void *&field : s.fields) field = in.address();
  for (void *&shift : s.shifts) shift = in.address();
  for (void *&sum : s.sums) sum = in.address();
  s.positives = in.address();
  s.negatives = in.address();
  s.negative_ratio = in.address();
  s.negative_base = in.address();
  s.positive_base = in.address();
  s.observed = in.address();
  s.inverse_norms = in.address();
  in.end();
  for (int f = 0; f < SUM_POS; f++) require(!s.fields[f] || (s.shifts[f] && s.sums[f]), "a log-sum-exp without its parts");
  require(s.positives && s.negatives && s.negative_ratio && s.negative_base && s.positive_base, "counts: a null pointer");
  return s;
}

WeightedSums read_weighted(Reader &in, const Problem &p) {
  WeightedSums w;
  w.sums = in.address();
  w.valid = in.address();
  require(!w.sums == !w.valid, "weighted sums without their validity, or the reverse");
  require(!w.sums || !(p.self_contrast() || p.columns || p.contrast_bias), "weighted sums: two sets without bias, one direction only");
  require(!w.sums || p.scales == 1, "weighted sums: of one scale only");
  const Rules &r = p.rules;
  require(!w.sums || !(r.anchor_tags || r.anchor_samples || r.anchor_groups || r.thresholds || r.same_rows), "weighted sums: without rules");
  return w;
}

// The part of the description that forward and backward share.
template <class Description> Description described(const py::tuple &problem, const py::tuple &anchors, const py::object &contrasts, Reader &outputs) {
  Description call{};
  call.problem = read_problem(problem);
  call.anchors = read_statistics(anchors);
  require(call.problem.columns == !contrasts.is_none(), "columns: statistics of the contrasts wanted but not given, or the reverse");
  if (!contrasts.is_none()) call.contrasts = read_statistics(contrasts.cast<py::tuple>());
  call.weighted = read_weighted(outputs, call.problem);
  return call;
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
  return arranged_call(call, engine_named(engine)->forward);
}

std::unique_ptr<Call> backward(const std::string &engine, const py::tuple &problem, const py::tuple &anchors, const py::object &contrasts,
                               const py::tuple &outputs) {
  Reader in(outputs);
  auto call = described<Backward>(problem, anchors, contrasts, in);
  call.single_positives = in.integer();
  read_gradients(in, call);
  in.end();
  require_anchors_only(call);
  return arranged_call(call, engine_named(engine)->backward);
}

// Of rows of the problem's reals.
OwnRows read_own(const py::tuple &numbers, const Problem &p) {
  Reader in(numbers);
  OwnRows own{in.rows(), in.address()};
  in.end();
  const Dtype real = p.wide_reals ? Dtype::float64 : Dtype::float32;
  require(own.rows.data && own.rows.size >= p.anchors.size && own.rows.size % p.anchors.size == 0, "own rows: as many for each anchor");
  require(own.rows.dtype == real && p.anchors.dtype == real, "own rows: of the reals' dtype");
  require(own.rows.column_stride == 1 && p.anchors.column_stride == 1, "own rows: whole rows");
  return own;
}

std::unique_ptr<Call> mean(const std::string &engine, const py::tuple &problem, const py::tuple &outputs, bool narrow, bool negatives_alone,
                           const py::object &positives, const py::object &negatives) {
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
  if (!positives.is_none()) {
    const Problem &p = call.problem;
    call.positives = read_own(positives.cast<py::tuple>(), p);
    require(call.positives.rows.size == p.anchors.size && negatives.is_none(), "positives: one for each anchor, without hard negatives");
    require(!p.self_contrast() && !p.columns && !p.anchor_clusters, "positives: two sets without clusters, one direction");
    require(call.negatives_only && !call.kept && call.loss, "positives: in one call, with the negatives' log-sum-exp");
    require(!call.bias_gradient && !call.contrast_gradient, "positives: contrasts and their bias get no gradient");
    call.weighs = call.anchor_gradient && !call.scale_gradient && !call.problem.contrast_bias && !call.problem.anchor_ids;
  }
  if (!negatives.is_none()) {
    call.negatives = read_own(negatives.cast<py::tuple>(), call.problem);
    require(!call.kept && call.loss && !call.observed && !call.contrast_observed, "negatives: in one call, without observed statistics");
  }
  const auto clusters = negatives_alone ? with_negatives_alone(call.problem) : nullptr;
  const auto scale = std::make_shared<Narrowed>();
  call.scale_gradient = scale->in_place_of(call.scale_gradient, narrow);
  const Engine *const chosen = engine_named(engine);
  return arranged_call(call, [=](const MeanLoss &c, const Arranged &arranged, void *workspace) {
    const int64_t size = mean_loss(*chosen, c, arranged, workspace);
    if (workspace) scale->write(c.problem.wide_reals);
    (void)clusters; // alive as long as the call
    return size;
  });
}

} // namespace

void bind_contrastive(py::module_ &m) {
  m.def("forward", &forward, py::arg("engine"), py::arg("problem"), py::arg("anchors"), py::arg("contrasts"), py::arg("outputs"));
  m.def("backward", &backward, py::arg("engine"), py::arg("problem"), py::arg("anchors"), py::arg("contrasts"), py::arg("outputs"));
  m.def("mean", &mean, py::arg("engine"), py::arg("problem"), py::arg("outputs"), py::arg("narrow") = false, py::arg("negatives_alone") = false,
        py::arg("positives") = py::none(), py::arg("negatives") = py::none(),
        "narrow: the scale's gradient is a real, not a double; negatives_alone: rows with any negative cluster have none, not only those "
        "with -1; positives: one more of each anchor, negatives: the same number of hard ones, whole rows of the reals' dtype, and where "
        "their gradient goes");
}

} // namespace fastcl
