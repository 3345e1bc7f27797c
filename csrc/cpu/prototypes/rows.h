// Cross-entropies of scores against prototypes, and their gradients, row by row. Each pass reads a row in pieces that stay in the
// first-level cache: all teachers' pieces first, then each student's. A thread owns a range of rows.
#pragma once
#include "call.h"
#include "cpu/sinkhorn/exponent.h"
#include "cpu/sweep.h"

namespace fastcl::FASTCL_ISA {
namespace {

template <class T> struct PrototypeRun {
  static constexpr int64_t W = Simd<T>::W;
  static constexpr int64_t PIECE = 1024;    // columns of a piece; a multiple of every 2 * W
  static constexpr int64_t BLOCK_ROWS = 64; // rows that are summed before the sum is added to the thread's: bounds the rounding error
  static constexpr T NOTHING = sizeof(T) == 8 ? T(-__DBL_MAX__) : T(-__FLT_MAX__);
  static constexpr T PADDING = NOTHING / 2; // a student's score of no weight: differences from it stay finite

  struct State { // of one crop's row
    T most;      // largest score so far
    double sum;  // of exponentials
    double less; // of exponentials times distances from the largest score: for the entropy
  };
  struct Local {
    T *teachers; // [teachers][PIECE]: exponentials, backward the assignments
    T *scores;   // [PIECE]: a student's, converted or padded
    T *result;   // [PIECE]
    State *states;        // [students + teachers]
    double *before;       // [teachers]: sums without the current piece
    double *cross;        // [students][teachers]: sums of a teacher's exponentials times distances from the student's largest score
    T *block, *total;     // [padded]: column sums
    T *weighted, *entropy; // [students]: sum of p h, and the entropy, of a row
  };

  const Prototypes &c;
  const int64_t n, k, padded, students, teachers;
  T student_scale, student_base_2, teacher_base_2; // base 2: times log2(e)
  T *slopes;                                       // [padded]: gradient of the column sums
  Local *locals;

  PrototypeRun(const Prototypes &call, Arena &arena)
      : c(call), n(call.size), k(call.columns), padded(round_up(k, W)), students(call.student_count), teachers(call.teacher_count), student_scale(0),
        student_base_2(0), teacher_base_2(0) {
    slopes = c.column_gradient ? arena.template take<T>(padded) : nullptr;
    locals = arena.template take<Local>(c.threads);
    for (int t = 0; t < c.threads; t++) {
      Local l{};
      l.teachers = arena.template take<T>(teachers * PIECE);
      l.scores = arena.template take<T>(PIECE);
      l.result = arena.template take<T>(PIECE);
      l.states = arena.template take<State>(students + teachers);
      l.before = arena.template take<double>(teachers);
      l.cross = arena.template take<double>(students * teachers);
      l.weighted = arena.template take<T>(students);
      l.entropy = arena.template take<T>(students);
      if (sums_columns()) {
        l.block = arena.template take<T>(padded);
        l.total = arena.template take<T>(padded);
      }
      if (arena.base) locals[t] = l;
    }
    if (!arena.base) return;
    student_scale = T(c.scales[0]);
    student_base_2 = T(LOG2E * c.scales[0]);
    teacher_base_2 = T(LOG2E * c.scales[1]);
    for (int64_t j = 0; slopes && j < padded; j++) slopes[j] = j < k ? ((const T *)c.column_gradient)[j] : T(0);
  }

  void run() const {
    with_team(c.threads, [&](const Team &team) {
      team.run([&](int t) {
        const Range mine = share(n, c.threads, t);
        if (c.backward) {
          for (int64_t i = mine.from; i < mine.to; i++) backward(t, i);
          return;
        }
        const Local &l = locals[t];
        if (l.total) memset(l.total, 0, padded * sizeof(T));
        for (int64_t block = mine.from; block < mine.to; block += BLOCK_ROWS) {
          if (l.block) memset(l.block, 0, padded * sizeof(T));
          for (int64_t i = block; i < smaller(mine.to, block + BLOCK_ROWS); i++) forward(t, i);
          for (int64_t j = 0; l.total && j < padded; j += W) add_to(l.total + j, load(l.block + j));
        }
      });
      if (sums_columns())
        team.run([&](int t) {
          const Range mine = share(k, c.threads, t, W);
          for (int64_t j = mine.from; j < mine.to; j++) {
            T sum = 0;
            for (int u = 0; u < c.threads; u++) sum += locals[u].total[j];
            ((T *)c.column_sums)[j] = sum;
          }
        });
    });
  }

private:
  bool sums_columns() const { return !c.backward && c.column_sums; }
  double pair(int64_t b, int64_t a) const { return c.pairs[b * teachers + a]; }
  static bool lies_so(const Rows &rows) { return rows.column_stride == 1 && rows.dtype == (sizeof(T) == 8 ? Dtype::float64 : Dtype::float32); }
  static int64_t width(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }
  static FASTCL_INLINE T largest_lane(V<T> v) {
    T lanes[W] __attribute__((aligned(FASTCL_BYTES))), most = NOTHING;
    store(lanes, v);
    for (int64_t l = 0; l < W; l++) most = larger(most, lanes[l]);
    return most;
  }

  // A mass times a distance; 0 for mass 0, although the distance from a score of -inf is infinite.
  static FASTCL_INLINE V<T> mass_times(V<T> mass, V<T> distance) { return where<T>(mass == all<T>(0), mass, mass * distance); }

  // Columns [from, from + count) of a row: in place if its layout allows it, else in the buffer. Padded to whole vectors.
  const T *piece(const Rows &rows, int64_t i, int64_t from, int64_t count, T *buffer, T rest) const {
    if (lies_so(rows) && count % W == 0) return (const T *)rows.data + i * rows.row_stride + from;
    Rows part = rows;
    part.data = (const char *)rows.data + from * rows.column_stride * width(rows.dtype);
    read_row(part, i, count, buffer);
    for (int64_t j = count; j < round_up(count, W); j++) buffer[j] = rest;
    return buffer;
  }
  // Stores a teacher's scores plus its potential, and returns the largest.
  T teacher_piece(int64_t a, int64_t i, int64_t from, int64_t count, T *out) const {
    const T *const x = piece(c.teachers[a], i, from, count, out, -T(__builtin_inf()));
    const T *const u = c.potentials ? (const T *)c.potentials + (a * c.positions + i % c.positions) * k + from : nullptr;
    V<T> most = all<T>(NOTHING);
    const int64_t whole = count / W * W;
    for (int64_t j = 0; j < whole; j += W) {
      const V<T> y = u ? loadu(x + j) + loadu(u + j) : loadu(x + j);
      storeu(out + j, y);
      most = y > most ? y : most;
    }
    T result = largest_lane(most);
    for (int64_t j = whole; j < count; j++) {
      out[j] = u ? x[j] + u[j] : x[j];
      result = larger(result, out[j]);
    }
    return result;
  }
  const T *student_piece(const Local &l, int64_t b, int64_t i, int64_t from, int64_t count) const {
    return piece(c.students[b], i, from, count, l.scores, PADDING);
  }
  T *kept(int64_t crop, int64_t i) const { return (T *)c.kept + crop * 2 * n + i; }

  void forward(int t, int64_t i) const {
    const Local &l = locals[t];
    for (int64_t s = 0; s < students + teachers; s++) l.states[s] = {NOTHING, 0, 0};
    for (int64_t s = 0; s < students * teachers; s++) l.cross[s] = 0;
    for (int64_t from = 0; from < k; from += PIECE) {
      const int64_t count = smaller(PIECE, k - from), wide = round_up(count, W);
      for (int64_t a = 0; a < teachers; a++) {
        State &s = l.states[students + a];
        T *const e = l.teachers + a * PIECE;
        const T most = larger(s.most, teacher_piece(a, i, from, count, e));
        if (from && most > s.most) {
          const double factor = exp2_of(double(s.most - most) * double(teacher_base_2));
          s.sum *= factor;
          for (int64_t b = 0; b < students; b++) l.cross[b * teachers + a] *= factor;
        }
        s.most = most;
        l.before[a] = s.sum;
        V<T> sums = all<T>(0);
        for (int64_t j = 0; j < wide; j += W) {
          const V<T> x = exp2_down<T>((load(e + j) - most) * teacher_base_2);
          store(e + j, x);
          sums += x;
        }
        s.sum += double(sum<T>(sums));
      }
      for (int64_t b = 0; b < students; b++) {
        State &s = l.states[b];
        const T *const x = student_piece(l, b, i, from, count);
        V<T> mosts = all<T>(s.most);
        for (int64_t j = 0; j < wide; j += W) {
          const V<T> y = loadu(x + j);
          mosts = y > mosts ? y : mosts;
        }
        const T most = largest_lane(mosts);
        if (from && most > s.most) {
          const double further = double(most) - double(s.most), factor = exp2_of(-further * double(student_base_2));
          s.less = (s.less + further * s.sum) * factor;
          s.sum *= factor;
          for (int64_t a = 0; a < teachers; a++)
            if (pair(b, a) != 0) l.cross[b * teachers + a] += further * l.before[a];
        }
        s.most = most;
        V<T> sums = all<T>(0), less = all<T>(0);
        const bool entropy = c.entropies;
        for (int64_t j = 0; j < wide; j += W) {
          const V<T> distance = most - loadu(x + j), e = exp2_down<T>(distance * -student_base_2);
          sums += e;
          if (entropy) less += mass_times(e, distance);
        }
        s.sum += double(sum<T>(sums));
        if (entropy) s.less += double(sum<T>(less));
        for (int64_t a = 0; a < teachers; a++) {
          if (pair(b, a) == 0) continue;
          const T *const e = l.teachers + a * PIECE;
          V<T> cross[2] = {all<T>(0), all<T>(0)};
          int64_t j = 0;
          for (; j + 2 * W <= wide; j += 2 * W) EACH(v, 2) cross[v] += mass_times(load(e + j + v * W), most - loadu(x + j + v * W));
          if (j < wide) cross[0] += mass_times(load(e + j), most - loadu(x + j));
          l.cross[b * teachers + a] += double(sum<T>(cross[0] + cross[1]));
        }
      }
    }
    double value = 0, entropy = 0;
    for (int64_t b = 0; b < students; b++) {
      State &s = l.states[b];
      if (s.most <= PADDING) s.sum = __builtin_nan(""); // no score above -inf: the sum is that of the padding
      const double log_sum = __builtin_log(s.sum);
      for (int64_t a = 0; a < teachers; a++)
        if (pair(b, a) != 0) value += pair(b, a) * (log_sum + l.cross[b * teachers + a] / l.states[students + a].sum * c.scales[0]);
      entropy += log_sum + s.less / s.sum * c.scales[0];
    }
    for (int64_t s = 0; s < students + teachers; s++) {
      kept(s, i)[0] = l.states[s].most;
      kept(s, i)[n] = T(l.states[s].sum);
    }
    ((T *)c.values)[i] = T(value);
    if (c.entropies) ((T *)c.entropies)[i] = T(entropy);
    if (sums_columns())
      for (int64_t b = 0; b < students; b++) add_columns(l, b, i);
  }

  // Calls use(j, score, exponential) for each vector of a student's row, a piece at a time.
  template <class F> FASTCL_INLINE void each(const Local &l, int64_t b, int64_t i, int64_t from, int64_t count, F use) const {
    const T most = kept(b, i)[0];
    const T *const x = student_piece(l, b, i, from, count);
    for (int64_t j = 0; j < round_up(count, W); j += W) {
      const V<T> y = loadu(x + j);
      use(j, y, exp2_down<T>((most - y) * -student_base_2));
    }
  }
  void add_columns(const Local &l, int64_t b, int64_t i) const {
    const T inverse = 1 / kept(b, i)[n];
    for (int64_t from = 0; from < k; from += PIECE)
      each(l, b, i, from, smaller(PIECE, k - from), [&](int64_t j, V<T>, V<T> e) { add_to(l.block + from + j, e * inverse); });
  }

  // What the gradients of entropy and column sums need of a row before the first gradient is written.
  void look_ahead(const Local &l, int64_t b, int64_t i) const {
    const T most = kept(b, i)[0], total = kept(b, i)[n];
    double weighted = 0, less = 0;
    for (int64_t from = 0; from < k; from += PIECE) {
      V<T> part[2] = {all<T>(0), all<T>(0)};
      each(l, b, i, from, smaller(PIECE, k - from), [&](int64_t j, V<T> y, V<T> e) {
        if (slopes) part[0] += e * load(slopes + from + j);
        part[1] += mass_times(e, most - y);
      });
      weighted += double(sum<T>(part[0]));
      less += double(sum<T>(part[1]));
    }
    l.weighted[b] = T(weighted / double(total));
    l.entropy[b] = T(__builtin_log(double(total)) + less / double(total) * c.scales[0]);
  }

  void backward(int t, int64_t i) const {
    const Local &l = locals[t];
    const bool further = c.entropy_gradient || slopes;
    for (int64_t b = 0; further && b < students; b++) look_ahead(l, b, i);
    const T outer = c.value_gradient ? ((const T *)c.value_gradient)[i] * student_scale : T(0);
    const T of_entropy = c.entropy_gradient ? ((const T *)c.entropy_gradient)[i] * student_scale : T(0);
    for (int64_t from = 0; from < k; from += PIECE) {
      const int64_t count = smaller(PIECE, k - from), wide = round_up(count, W);
      for (int64_t a = 0; c.value_gradient && a < teachers; a++) {
        T *const e = l.teachers + a * PIECE;
        teacher_piece(a, i, from, count, e);
        const T most = kept(students + a, i)[0], inverse = 1 / kept(students + a, i)[n];
        for (int64_t j = 0; j < wide; j += W) store(e + j, exp2_down<T>((load(e + j) - most) * teacher_base_2) * inverse);
      }
      for (int64_t b = 0; b < students; b++) {
        double factors = 0;
        bool first = true;
        for (int64_t a = 0; c.value_gradient && a < teachers; a++) {
          const T factor = T(pair(b, a));
          if (factor == 0) continue;
          factors += pair(b, a);
          const T *const e = l.teachers + a * PIECE;
          for (int64_t j = 0; j < wide; j += W) store(l.result + j, first ? factor * load(e + j) : load(l.result + j) + factor * load(e + j));
          first = false;
        }
        if (first) memset(l.result, 0, wide * sizeof(T));
        const T of_softmax = T(factors), most = kept(b, i)[0], total = kept(b, i)[n], inverse = 1 / total;
        if (!further)
          each(l, b, i, from, count, [&](int64_t j, V<T>, V<T> e) { store(l.result + j, (e * inverse * of_softmax - load(l.result + j)) * outer); });
        else {
          const T weighted = l.weighted[b], log_sum = log_of(total) - l.entropy[b];
          each(l, b, i, from, count, [&](int64_t j, V<T> y, V<T> e) {
            const V<T> p = e * inverse;
            V<T> g = (p * of_softmax - load(l.result + j)) * outer;
            if (slopes) g += p * (load(slopes + from + j) - weighted) * student_scale;
            if (of_entropy != 0) g -= where<T>(p == all<T>(0), p, p * ((y - most) * student_scale - log_sum)) * of_entropy;
            store(l.result + j, g);
          });
        }
        write(b, i, from, count, l.result);
      }
    }
  }

  void write(int64_t b, int64_t i, int64_t from, int64_t count, const T *x) const {
    const int64_t place = i * k + from;
    void *const to = c.gradients[b];
    switch (c.students[b].dtype) {
    case Dtype::float64: return write_as((double *)to + place, count, x, [](T y) { return double(y); });
    case Dtype::float32: return write_as((float *)to + place, count, x, [](T y) { return float(y); });
    case Dtype::bfloat16: return write_as((uint16_t *)to + place, count, x, [](T y) { return narrowed_bfloat(y); });
    case Dtype::float16: return write_as((uint16_t *)to + place, count, x, [](T y) { return narrowed_half(y); });
    }
  }
  template <class To, class Convert> static void write_as(To *to, int64_t count, const T *x, Convert convert) {
    for (int64_t j = 0; j < count; j++) to[j] = convert(x[j]);
  }
};

int64_t prototypes(const Prototypes &call, void *workspace) {
  Arena arena{(char *)workspace};
  if (call.wide_reals) {
    const PrototypeRun<double> run(call, arena);
    if (workspace) run.run();
  } else {
    const PrototypeRun<float> run(call, arena);
    if (workspace) run.run();
  }
  return arena.used;
}

} // namespace
} // namespace fastcl::FASTCL_ISA
