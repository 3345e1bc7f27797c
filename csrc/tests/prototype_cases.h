// Compares the cross-entropies against prototypes, and their gradients, with plain loops in double, for a random problem.
#pragma once
#include "../cpu/engine.h"
#include "sinkhorn_cases.h"

namespace {

template <class T> class PrototypeCase {
public:
  PrototypeCase(const Engine &engine, int64_t n, int64_t k, Dtype dtype, int threads, Place place, uint64_t seed)
      : engine_(engine), n_(n), k_(k), random_(seed), pool_(place) {
    if (random_.below(12) == 0) n_ = 1 + n % 5, k_ = 1000 + random_.below(1200); // some rows of several pieces
    const int64_t student_count = 1 + random_.below(3), teacher_count = 1 + random_.below(2);
    own_.resize(student_count), goals_.resize(teacher_count);
    for (Reals &values : own_) students_.push_back(rows(students_.empty() ? dtype : any(), values));
    for (Reals &values : goals_) teachers_.push_back(rows(any(), values));
    call_.students = students_.data(), call_.teachers = teachers_.data();
    call_.student_count = student_count, call_.teacher_count = teacher_count;
    call_.size = n_, call_.columns = k_, call_.wide_reals = sizeof(T) == 8, call_.threads = threads;
    call_.positions = 1 + random_.below(3);
    potentials_.assign(teacher_count * call_.positions * k_, 0);
    if (random_.coin()) {
      for (size_t at = 0; at < potentials_.size(); at++)
        potentials_[at] = at % k_ && random_.below(9) == 0 ? -std::numeric_limits<double>::infinity() : double(T(random_.real()));
      call_.potentials = pool_.copy(std::vector<T>(potentials_.begin(), potentials_.end()));
    }
    pairs_.resize(student_count * teacher_count);
    for (double &pair : pairs_) pair = random_.below(4) ? 0.1 + std::fabs(random_.real()) : 0;
    call_.pairs = pool_.copy(pairs_);
    scales_ = {5 + 4 * random_.real(), 15 + 10 * random_.real()};
    call_.scales = pool_.copy(scales_);
    call_.kept = pool_.template array<T>((student_count + teacher_count) * 2 * n_);
    tolerance_ = (sizeof(T) == 8 ? 1e-15 : 4e-7) * 400; // exponents are up to 100
    for (const Reals &scores : own_) p_.push_back(softmax(scores, nullptr, scales_[0]));
    for (int64_t a = 0; a < teacher_count; a++) q_.push_back(softmax(goals_[a], &potentials_[a * call_.positions * k_], scales_[1]));
  }

  void run() {
    forward();
    backward();
  }

private:
  const Engine &engine_;
  int64_t n_, k_;
  Random random_;
  Pool pool_;
  Prototypes call_{};
  std::vector<Rows> students_, teachers_;
  std::vector<Reals> own_, goals_, p_, q_;
  Reals potentials_, pairs_, scales_;
  double tolerance_;

  Dtype any() { return Dtype(sizeof(T) == 8 ? random_.below(4) : 1 + random_.below(3)); }
  Rows rows(Dtype dtype, Reals &values) { return random_rows(random_, pool_, n_, k_, dtype, random_.below(6) == 0, random_.below(4), values); }
  Reals softmax(const Reals &scores, const double *potentials, double scale) const {
    Reals result(n_ * k_);
    for (int64_t i = 0; i < n_; i++) {
      const double *const u = potentials ? potentials + i % call_.positions * k_ : nullptr;
      double most = -std::numeric_limits<double>::infinity(), total = 0;
      for (int64_t j = 0; j < k_; j++) most = std::fmax(most, scores[i * k_ + j] + (u ? u[j] : 0));
      for (int64_t j = 0; j < k_; j++) total += result[i * k_ + j] = std::exp((scores[i * k_ + j] + (u ? u[j] : 0) - most) * scale);
      for (int64_t j = 0; j < k_; j++) result[i * k_ + j] /= total;
    }
    return result;
  }
  static double log_of(double p) { return std::log(std::fmax(p, 1e-300)); }
  double pair(size_t b, size_t a) const { return pairs_[b * goals_.size() + a]; }
  void finish(const Prototypes &call) { engine_.prototypes(call, pool_.workspace(engine_.prototypes(call, nullptr))); }

  void forward() {
    Prototypes call = call_;
    T *const values = pool_.template array<T>(n_), *const entropies = random_.coin() ? pool_.template array<T>(n_) : nullptr;
    T *const columns = random_.coin() ? pool_.template array<T>(k_) : nullptr;
    call.values = values, call.entropies = entropies, call.column_sums = columns;
    finish(call);
    Reals value(n_), entropy(n_), sums(k_);
    for (int64_t i = 0; i < n_; i++)
      for (int64_t j = 0; j < k_; j++)
        for (size_t b = 0; b < own_.size(); b++) {
          const double p = p_[b][i * k_ + j];
          for (size_t a = 0; a < goals_.size(); a++) value[i] -= pair(b, a) * q_[a][i * k_ + j] * log_of(p);
          entropy[i] -= p * log_of(p), sums[j] += p;
        }
    compare<T>("cross-entropies", values, value, nullptr, tolerance_);
    compare<T>("entropies", entropies, entropy, nullptr, tolerance_);
    compare<T>("sums of predictions", columns, sums, nullptr, tolerance_);
  }

  const T *incoming(int64_t size, Reals &values) { // null: no gradient
    values.assign(size, 0);
    if (random_.below(4) == 0) return nullptr;
    for (double &x : values) x = double(T(random_.real()));
    return pool_.copy(std::vector<T>(values.begin(), values.end()));
  }

  void backward() {
    Prototypes call = call_;
    Reals of_values, of_entropies, of_columns;
    call.backward = true;
    call.value_gradient = incoming(n_, of_values);
    call.entropy_gradient = incoming(n_, of_entropies);
    call.column_gradient = incoming(k_, of_columns);
    std::vector<void *> gradients;
    for (const Rows &student : students_) gradients.push_back(pool_.bytes(n_ * k_ * int64_t(size_of(student.dtype))));
    call.gradients = gradients.data();
    finish(call);
    for (size_t b = 0; b < own_.size(); b++)
      for (int64_t i = 0; i < n_; i++) check_row(b, i, (const char *)gradients[b], of_values[i], of_entropies[i], of_columns);
  }
  void check_row(size_t b, int64_t i, const char *gradient, double of_value, double of_entropy, const Reals &of_columns) {
    const Dtype dtype = students_[b].dtype;
    const double rounded = dtype == Dtype::bfloat16 ? 0x1p-8 : dtype == Dtype::float16 ? 0x1p-11 : dtype == Dtype::float32 ? 0x1p-24 : 0;
    const double *const p = &p_[b][i * k_];
    double mean = 0, entropy = 0;
    for (int64_t j = 0; j < k_; j++) mean += p[j] * of_columns[j], entropy -= p[j] * log_of(p[j]);
    for (int64_t j = 0; j < k_; j++) {
      double truth = p[j] * (of_columns[j] - mean) - of_entropy * p[j] * (log_of(p[j]) + entropy), size = 2 * p[j] * (1 + std::fabs(log_of(p[j])));
      for (size_t a = 0; a < goals_.size(); a++) {
        const double q = q_[a][i * k_ + j];
        truth += pair(b, a) * of_value * (p[j] - q), size += pair(b, a) * (p[j] + q);
      }
      truth *= scales_[0], size *= scales_[0];
      const double got = loaded(dtype, gradient + (i * k_ + j) * int64_t(size_of(dtype)));
      const double allowed = tolerance_ * size + rounded * std::fabs(truth) + (dtype == Dtype::float16 ? 0x1p-24 : 1e-37);
      if (!(std::fabs(got - truth) <= allowed)) fail("gradient of scores", i * k_ + j, got, truth, allowed);
    }
  }
};

} // namespace
