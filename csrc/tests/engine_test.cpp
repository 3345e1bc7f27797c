// Runs forward, backward, Sinkhorn's passes and prototype losses on every engine that this machine supports, over sizes around the
// register tiles and all dtypes and options, and compares with plain loops in double. Exits with 0 if all agree; else prints the first
// case that fails.
//   engine_test PLACE CASES [ENGINE [STEP]]      PLACE: heap or pages, see memory.h; CASES: number of cases per engine; STEP: from
//                                                a case to the next, where only some of them are to run
#include "../cpu/contrastive/arrange.h"
#include "../cpu/dispatch.h"
#include "../cpu/contrastive/mean.h"
#include "formula.h"
#include "sinkhorn_cases.h"
#include "pair_cases.h"
#include "prototype_cases.h"
#include "soft_cases.h"
#include <algorithm>
#include <csignal>
#include <memory>

extern "C" void __sanitizer_set_death_callback(void (*)()) __attribute__((weak));

namespace {

using namespace fastcl;
using formula::Input, formula::Weights, formula::Formula, formula::Gradient;

void crashed(int signal) {
  describe();
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}
std::vector<int64_t> random_ids(Random &random, int64_t size, int64_t kinds) {
  const int64_t names = random.coin() ? 1 : int64_t(1) << 40; // small ids, or ids too large for a table
  std::vector<int64_t> result(size);
  for (int64_t &id : result) {
    id = (random.below(kinds + 1) - 1) * names;
    if (id < 0) id = random.coin() ? -1 : -7; // -1 never matches, -7 matches -7
  }
  return result;
}

struct Case {
  int64_t n, m, d; // m = 0: self-contrast
  Dtype anchors, contrasts;
  int threads;
};

template <class T> struct Outputs { // of one side
  Statistics addresses{};
  Outputs(Pool &pool, int64_t scales, int64_t size, bool normalize, const bool (&wanted)[FIELDS]) {
    const int64_t all = scales * size;
    for (int f = 0; f < FIELDS; f++) {
      if (!wanted[f]) continue;
      addresses.fields[f] = pool.array<T>(all);
      if (f != SUM_POS) addresses.shifts[f] = pool.array<T>(all), addresses.sums[f] = pool.array<T>(all);
    }
    addresses.positives = pool.array<T>(size);
    addresses.negatives = pool.array<T>(size);
    addresses.negative_ratio = pool.array<T>(all);
    addresses.negative_base = pool.array<T>(all);
    addresses.positive_base = pool.array<T>(all);
    if (normalize) addresses.inverse_norms = pool.array<T>(size);
  }
};

// Tolerances of gradients are relative to the largest term of the row, because users see the row's norm.
void level(Gradient &g, int64_t d) {
  for (size_t i = 0; i < g.size.size(); i += d) {
    double most = 0;
    for (int64_t k = 0; k < d; k++) most = std::fmax(most, g.size[i + k]);
    for (int64_t k = 0; k < d; k++) g.size[i + k] = most;
  }
}

template <class T> void check_side(const char *name, const Statistics &got, const formula::Side &expected, double tolerance) {
  static const char *const names[] = {"lse_all", "lse_pos", "lse_neg", "sum_pos"};
  char what[80];
  for (int f = 0; f < FIELDS; f++) {
    std::snprintf(what, sizeof what, "%s %s", name, names[f]);
    Reals sizes(expected.positives.size());
    for (size_t i = 0; i < sizes.size(); i++) {
      const double value = expected.fields[f][i];
      sizes[i] = 1 + (std::isfinite(value) ? std::fabs(value) : 0) + (f == SUM_POS ? expected.positives[i] : 0);
    }
    compare<T>(what, got.fields[f], expected.fields[f], &sizes, tolerance);
  }
  std::snprintf(what, sizeof what, "%s counts", name);
  compare<T>(what, got.positives, expected.positives, nullptr, 0);
  compare<T>(what, got.negatives, expected.negatives, nullptr, 0);
  std::snprintf(what, sizeof what, "%s inverse norms", name);
  compare<T>(what, got.inverse_norms, expected.inverse_norms, nullptr, tolerance);
}

// Random gradients of a side's fields, for each scale. Those of empty sets are zero, as Python passes them.

template <class T>
void incoming(Random &random, Pool &pool, Statistics &side, const std::vector<const formula::Side *> &expected, std::vector<Weights> &weights) {
  const size_t rows = expected[0]->positives.size();
  for (int f = 0; f < FIELDS; f++) {
    if (!side.fields[f]) continue;
    T *to = pool.array<T>(expected.size() * rows);
    side.fields[f] = to;
    for (size_t k = 0; k < expected.size(); k++) {
      weights[k][f].resize(rows);
      for (size_t i = 0; i < rows; i++, to++) {
        const bool empty = f == SUM_POS ? expected[k]->positives[i] == 0 : std::isinf(expected[k]->fields[f][i]);
        weights[k][f][i] = *to = empty ? T(0) : T(random.real());
      }
    }
  }
}

// Compares the gradients that were requested.
template <class T, class Call>
void check_gradients(const Engine &engine, const Case &c, const Call &got, Formula::Gradients expected, double tolerance) {
  level(expected.anchors, c.d);
  level(expected.contrasts, c.d);
  const bool both_bfloat = c.anchors == Dtype::bfloat16 && (!c.m || c.contrasts == Dtype::bfloat16);
  // Products of bfloat16 rows round the logits' gradients to bfloat16.
  const double rounded = both_bfloat && std::string(engine.name) == "avx512_bf16" ? tolerance + 0x1p-8 : tolerance;
  compare<T>("gradient of anchors", got.anchor_gradient, expected.anchors.value, &expected.anchors.size, rounded);
  compare<T>("gradient of contrasts", got.contrast_gradient, expected.contrasts.value, &expected.contrasts.size, rounded);
  compare<double>("gradient of scale", got.scale_gradient, expected.scale.value, &expected.scale.size, tolerance);
  compare<T>("gradient of bias", got.bias_gradient, expected.bias.value, &expected.bias.size, tolerance);
}

// Compares the mean loss and its gradient for the problem of `like`.
template <class T> void check_mean(const Engine &engine, const Case &c, Random &random, Pool &pool, const Backward &like, const Arranged &arranged,
                                   const Formula &truth, double tolerance) {
  const Field log_sum = c.n % 2 ? LSE_NEG : LSE_ALL;
  MeanLoss call{};
  call.problem = like.problem;
  call.negatives_only = log_sum == LSE_NEG;
  call.loss = pool.array<T>(1);
  if (like.anchor_gradient) call.anchor_gradient = pool.array<T>(c.n * c.d);
  if (like.contrast_gradient) call.contrast_gradient = pool.array<T>(c.m * c.d);
  if (like.scale_gradient) call.scale_gradient = pool.array<double>(1);
  if (like.bias_gradient) call.bias_gradient = pool.array<T>(c.m);
  const int sides = call.problem.columns ? 2 : 1;
  const auto run = [&](const MeanLoss &part) { mean_loss(engine, part, arranged, pool.workspace(mean_loss(engine, part, arranged, nullptr))); };
  if (random.coin()) { // in two calls
    call.kept = pool.array<T>(MEAN_KEPT * (c.n + (sides == 2 ? c.m : 0)));
    const bool anchors_only = call.anchor_gradient && !call.contrast_gradient && !call.scale_gradient && !call.bias_gradient;
    if (anchors_only && c.m && sides == 1 && !call.problem.contrast_bias) call.weighted = {pool.array<T>(c.n * c.d), pool.array<T>(1)};
    MeanLoss first = call, second = call;
    first.anchor_gradient = first.contrast_gradient = first.scale_gradient = first.bias_gradient = nullptr;
    second.loss = nullptr;
    T *const factor = pool.array<T>(1);
    *factor = 1;
    second.loss_gradient = factor;
    run(first);
    run(second);
  } else run(call);

  double loss = 0, size = 0;
  const auto mean = [&](const formula::Side &side, Weights &weights) {
    const auto counts = [&](size_t i) { return side.positives[i] > 0 && (log_sum == LSE_ALL || side.negatives[i] > 0); };
    double rows = 0;
    for (size_t i = 0; i < side.positives.size(); i++) rows += counts(i);
    weights[log_sum].resize(side.positives.size());
    weights[SUM_POS].resize(side.positives.size());
    for (size_t i = 0; i < side.positives.size(); i++) {
      if (!counts(i)) continue;
      weights[log_sum][i] = 1 / (rows * sides);
      weights[SUM_POS][i] = -weights[log_sum][i] / side.positives[i];
      loss += weights[log_sum][i] * side.fields[log_sum][i] + weights[SUM_POS][i] * side.fields[SUM_POS][i];
      size += weights[log_sum][i] * (1 + std::fabs(side.fields[log_sum][i])) - weights[SUM_POS][i] * std::fabs(side.fields[SUM_POS][i]);
    }
  };
  Weights row_weights, column_weights;
  mean(truth.rows, row_weights);
  if (sides == 2) mean(truth.columns, column_weights);
  const Reals expected{loss}, sizes{size};
  compare<T>("mean loss", call.loss, expected, &sizes, tolerance);
  check_gradients<T>(engine, c, call, truth.gradients(row_weights, column_weights), tolerance);
}

// Compares top-k, with rows that are not normalised and ids as engines expect them.
template <class T> void check_topk(const Engine &engine, const Case &c, Random &random, Pool &pool, const Input &in, const Problem &p) {
  const int64_t n = c.n, m = in.columns(), k = 1 + random.below(random.coin() ? std::min<int64_t>(m, 5) : m);
  std::vector<int32_t> query_ids, key_ids;
  if (random.coin()) {
    for (int64_t i = 0; i < n; i++) query_ids.push_back(int32_t(random.below(4)) - 2); // -2: a name that no key has
    for (int64_t j = 0; j < m; j++) key_ids.push_back(int32_t(random.below(3)) - 1);
  }
  const TopK call{p.anchors,
                  p.column_rows(),
                  c.d,
                  k,
                  pool.copy(query_ids),
                  pool.copy(key_ids),
                  sizeof(T) == 8,
                  c.threads,
                  pool.array<T>(n * k),
                  pool.array<int64_t>(n * k)};
  engine.topk(call, pool.workspace(engine.topk(call, nullptr)));
  const double tolerance = sizeof(T) == 8 ? 1e-13 : 1e-5;
  for (int64_t i = 0; i < n; i++) {
    Reals products(m), best;
    for (int64_t j = 0; j < m; j++) {
      for (int64_t d = 0; d < c.d; d++) products[j] += in.anchors[i * c.d + d] * (in.self() ? in.anchors : in.contrasts)[j * c.d + d];
      if (query_ids.empty() || query_ids[i] != key_ids[j]) best.push_back(products[j]);
    }
    std::sort(best.rbegin(), best.rend());
    std::vector<bool> seen(m);
    for (int64_t q = 0; q < k; q++) {
      const double value = double(((const T *)call.values)[i * k + q]);
      const int64_t j = call.indices[i * k + q];
      if (q >= int64_t(best.size())) {
        if (j != -1 || value != -std::numeric_limits<double>::infinity()) fail("top-k: a place that is none", q, value, double(j), 0);
        continue;
      }
      if (j < 0 || j >= m || seen[j]) fail("top-k: indices", q, double(j), -1, 0);
      seen[j] = true;
      if (!(std::fabs(value - best[q]) <= tolerance && std::fabs(value - products[j]) <= tolerance)) fail("top-k", q, value, best[q], tolerance);
    }
  }
}

template <class T> void run(const Engine &engine, const Case &c, Place place, uint64_t seed) {
  Random random(seed);
  Pool pool(place);
  Input in{};
  in.n = c.n, in.m = c.m, in.d = c.d;
  in.normalize_anchors = random.coin();
  in.normalize_contrasts = in.self() ? in.normalize_anchors : random.coin();
  const bool wide = random.below(3) == 0; // logits that do not fit a shared exponential
  in.scale = double(T((random.coin() ? 1 : -1) * (wide ? 150 + 100 * random.real() : 6 + 5 * random.real())));

  Forward forward{};
  Problem &p = forward.problem;
  p.dimension = c.d;
  p.threads = c.threads;
  p.wide_reals = sizeof(T) == 8;
  p.anchors = random_rows(random, pool, c.n, c.d, c.anchors, random.below(6) == 0, random.below(4), in.anchors);
  if (!in.self()) p.contrasts = random_rows(random, pool, c.m, c.d, c.contrasts, random.below(6) == 0, random.below(4), in.contrasts);
  p.normalize_anchors = in.normalize_anchors;
  p.normalize_contrasts = in.normalize_contrasts;
  const int64_t kinds = 1 + random.below(1 + c.n / 2);
  const bool lean = !in.self() && random.below(4) == 0; // all negatives, one direction: a queue
  if (!lean && random.below(4)) {
    in.anchor_clusters = random_ids(random, c.n, kinds);
    if (!in.self()) in.contrast_clusters = random_ids(random, c.m, kinds);
    if (in.anchor_clusters.front() > 0 && !in.self()) in.contrast_clusters.back() = in.anchor_clusters.front();
  }
  p.anchor_clusters = pool.copy(in.anchor_clusters);
  p.contrast_clusters = pool.copy(in.contrast_clusters);
  if (!in.self()) {
    if (random.coin()) {
      in.anchor_ids = random_ids(random, c.n, c.n);
      in.contrast_ids = random_ids(random, c.m, c.n);
    }
    if (!lean && random.coin()) {
      T *bias = pool.array<T>(c.m);
      for (int64_t j = 0; j < c.m; j++) in.bias.push_back(bias[j] = T(random.real() * (wide ? 200 : 3)));
      p.contrast_bias = bias;
    }
    p.columns = !lean && random.coin();
  }
  p.anchor_ids = pool.copy(in.anchor_ids);
  p.contrast_ids = pool.copy(in.contrast_ids);
  p.scales = random.below(3) ? 1 : 2 + int(random.coin());
  std::vector<Input> inputs(p.scales, in); // one per scale
  T *const scales = pool.array<T>(p.scales);
  for (int k = 0; k < p.scales; k++) inputs[k].scale = scales[k] = T(k == 0 ? in.scale : in.scale * random.real());
  p.logit_scale = scales;
  bool wanted[FIELDS];
  for (bool &want : wanted) want = random.below(4) > 0;
  forward.anchors = Outputs<T>(pool, p.scales, c.n, in.normalize_anchors, wanted).addresses;
  if (p.columns) forward.contrasts = Outputs<T>(pool, p.scales, c.m, in.normalize_contrasts, wanted).addresses;
  // For a backward of the anchors only.
  const bool weighted = !in.self() && !p.columns && in.bias.empty() && p.scales == 1 && random.below(4) > 0;
  if (weighted) forward.weighted = {pool.array<T>(c.n * c.d), pool.array<T>(1)};

  std::vector<std::unique_ptr<Formula>> truths;
  std::vector<const formula::Side *> rows, columns;
  double largest = 0;
  for (const Input &input : inputs) {
    truths.push_back(std::make_unique<Formula>(input));
    rows.push_back(&truths.back()->rows);
    columns.push_back(&truths.back()->columns);
    largest = std::fmax(largest, truths.back()->largest);
  }
  // The rounding error of a logit is a relative error of its exponential.
  const double tolerance = sizeof(T) == 8 ? 1e-13 * (10 + largest) : 4e-7 * (10 + largest);
  const Arrangements arrangements = arrange(p);
  const Arranged arranged = arrangements.arranged();
  engine.forward(forward, arranged, pool.workspace(engine.forward(forward, arranged, nullptr)));
  for (int k = 0; k < p.scales; k++) {
    check_side<T>("anchors'", forward.anchors.of_scale(k, c.n, p.wide_reals), *rows[k], tolerance);
    if (p.columns) check_side<T>("contrasts'", forward.contrasts.of_scale(k, c.m, p.wide_reals), *columns[k], tolerance);
  }

  Backward backward{};
  backward.problem = p;
  backward.anchors = forward.anchors;
  backward.contrasts = forward.contrasts;
  backward.single_positives = random.coin();
  std::vector<Weights> row_weights(p.scales), column_weights(p.scales);
  incoming<T>(random, pool, backward.anchors, rows, row_weights);
  if (p.columns) incoming<T>(random, pool, backward.contrasts, columns, column_weights);
  backward.weighted = forward.weighted;
  const int64_t needs = weighted ? 1 : random.below(4) ? 15 : random.below(16);
  if (needs & 1) backward.anchor_gradient = pool.array<T>(c.n * c.d);
  if (needs & 2 && !in.self()) backward.contrast_gradient = pool.array<T>(c.m * c.d);
  if (needs & 4) backward.scale_gradient = pool.array<double>(p.scales);
  if (needs & 8 && p.contrast_bias) backward.bias_gradient = pool.array<T>(c.m);
  engine.backward(backward, arranged, pool.workspace(engine.backward(backward, arranged, nullptr)));

  auto expected = truths[0]->gradients(row_weights[0], column_weights[0]);
  for (int k = 1; k < p.scales; k++) expected.add(truths[k]->gradients(row_weights[k], column_weights[k]));
  check_gradients<T>(engine, c, backward, expected, tolerance);
  if (!weighted && p.scales == 1) check_mean<T>(engine, c, random, pool, backward, arranged, *truths[0], tolerance);
  check_topk<T>(engine, c, random, pool, in, p);
  PairCase<T>(engine, random, pool, in, p, tolerance).run();
  SoftCase<T>(engine, random, pool, in, p, sizeof(T) == 8 || random.coin() ? c.anchors : Dtype::float32, tolerance).run();
}

// Dimensions from 1 to 70 in turn (all tails of vectors), and sizes up to 40 and around the 192 rows of the largest tile.
Case case_number(int64_t k, Random &random) {
  const auto size = [&] { return random.below(6) ? 1 + random.below(40) : 185 + random.below(16); };
  Case c{};
  c.d = random.below(12) ? 1 + k % 70 : 120 + random.below(30); // some longer rows, around a chunk of 128
  c.n = size();
  c.m = random.coin() ? 0 : size();
  c.anchors = Dtype(k / 70 % 4);
  c.contrasts = c.m && random.below(3) == 0 ? Dtype(random.below(4)) : c.anchors;
  c.threads = 1 + int(random.below(3));
  return c;
}

} // namespace

int main(int count, char **arguments) {
  if (count < 3) {
    std::fprintf(stderr, "usage: engine_test heap|pages CASES [ENGINE [STEP]]\n");
    return 2;
  }
  const bool pages = std::string(arguments[1]) == "pages";
  const int64_t cases = std::atoll(arguments[2]);
  const std::string only = count > 3 ? arguments[3] : "";
  const int64_t step = count > 4 ? std::atoll(arguments[4]) : 1;
  for (const int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) std::signal(signal, crashed);
  if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(describe);
  for (const Engine *engine : supported_engines()) {
    if (!only.empty() && only != engine->name) continue;
    for (int64_t k = 0; k < cases; k += step) {
      Random random(k);
      const Case c = case_number(k, random);
      const Place place = !pages ? Place::HEAP : k % 2 ? Place::AFTER_A_PAGE : Place::BEFORE_A_PAGE;
      std::snprintf(description, sizeof description, "engine %s, case %lld: N %lld, M %lld, D %lld, %s and %s, %d threads: ", engine->name,
                    (long long)k, (long long)c.n, (long long)c.m, (long long)c.d, name_of(c.anchors), name_of(c.contrasts), c.threads);
      const bool wide = c.anchors == Dtype::float64 || (c.m && c.contrasts == Dtype::float64);
      (wide ? run<double> : run<float>)(*engine, c, place, uint64_t(k) + 1000003);
      std::snprintf(description, sizeof description, "engine %s, Sinkhorn, case %lld: N %lld, K %lld, %s, %d threads: ", engine->name, (long long)k,
                    (long long)c.n, (long long)c.d, name_of(c.anchors), c.threads);
      if (c.anchors == Dtype::float64) SinkhornCase<double>(*engine, c.n, c.d, c.anchors, c.threads, place, uint64_t(k)).run();
      else SinkhornCase<float>(*engine, c.n, c.d, c.anchors, c.threads, place, uint64_t(k)).run();
      std::snprintf(description, sizeof description, "engine %s, prototypes, case %lld: N %lld, K %lld, %s, %d threads: ", engine->name, (long long)k,
                    (long long)c.n, (long long)c.d, name_of(c.anchors), c.threads);
      if (c.anchors == Dtype::float64) PrototypeCase<double>(*engine, c.n, c.d, c.anchors, c.threads, place, uint64_t(k)).run();
      else PrototypeCase<float>(*engine, c.n, c.d, c.anchors, c.threads, place, uint64_t(k)).run();
    }
    std::printf("%s: %lld cases agree\n", engine->name, (long long)((cases + step - 1) / step));
  }
  return 0;
}
