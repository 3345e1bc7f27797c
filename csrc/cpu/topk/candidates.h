// The best candidates of one query.
#pragma once
#include "cpu/threads.h"
#include <cstring>

namespace fastcl::FASTCL_ISA {
namespace {

// A product and its key's index as one number, larger for a better candidate. NaN is better than any number, as in torch.topk; among
// equal products the lower index is better.
template <class T> struct Candidate {
  using Int = typename IntOf<T>::type;
  using Bits = typename IntOf<T>::wrapping;
  static constexpr int BITS = 8 * sizeof(T);
  static constexpr Bits SIGN = Bits(1) << (BITS - 1);
  typedef unsigned __int128 Long;
  template <class X, bool IS_FLOAT> struct Of {
    using type = Long;
  };
  template <class X> struct Of<X, true> {
    using type = uint64_t;
  };
  using Number = typename Of<T, sizeof(T) == 4>::type;

  static FASTCL_INLINE Number of(T x, int32_t index) {
    Bits bits;
    x += 0; // -0 and 0 are equal
    memcpy(&bits, &x, sizeof(T));
    bits ^= bits & SIGN ? ~Bits(0) : SIGN; // the order of numbers
    if (x != x) bits = ~Bits(0);
    return Number(bits) << 32 | uint32_t(~index);
  }
  static T value(Number candidate) {
    Bits bits = Bits(candidate >> 32);
    if (bits == ~Bits(0)) return T(__builtin_nan(""));
    bits ^= bits & SIGN ? SIGN : ~Bits(0);
    T x;
    memcpy(&x, &bits, sizeof(T));
    return x;
  }
  static int32_t index(Number candidate) { return int32_t(~uint32_t(candidate)); }
};

// Moves the numbers above some number among them to the front, and returns how many there are; the next one is that number.
template <class Number> int64_t partition(Number *x, int64_t count, uint32_t &chance) {
  const auto one_of_them = [&] {
    chance = 1664525u * chance + 1013904223u; // so that no order of the numbers is slow
    return int64_t(uint64_t(chance) * uint64_t(count) >> 32);
  };
  const int64_t a = one_of_them(), b = one_of_them(), c = one_of_them();
  const int64_t low = x[a] < x[b] ? a : b, high = x[a] < x[b] ? b : a;
  const int64_t middle = x[c] < x[low] ? low : x[c] < x[high] ? c : high;
  const Number pivot = x[middle];
  x[middle] = x[--count];
  int64_t above = 0;
  for (int64_t i = 0; i < count; i++) { // without a branch: a processor would mispredict every other one
    const Number y = x[i];
    x[i] = x[above];
    x[above] = y;
    above += y > pivot;
  }
  x[count] = x[above];
  x[above] = pivot;
  return above;
}
// Moves the k largest to the front, the least of them last.
template <class Number> void select(Number *x, int64_t count, int64_t k) {
  uint32_t chance = 1;
  for (int64_t rank = k - 1; count > 1;) {
    const int64_t above = partition(x, count, chance);
    if (above == rank) return;
    if (above > rank) count = above;
    else x += above + 1, count -= above + 1, rank -= above + 1;
  }
}
template <class Number> void sort(Number *x, int64_t count) { // the largest first
  uint32_t chance = 1;
  while (count > 16) {
    const int64_t above = partition(x, count, chance), rest = count - above - 1;
    if (above < rest) sort(x, above), x += above + 1, count = rest;
    else sort(x + above + 1, rest), count = above;
  }
  for (int64_t i = 1; i < count; i++) {
    const Number y = x[i];
    int64_t at = i;
    for (; at && x[at - 1] < y; at--) x[at] = x[at - 1];
    x[at] = y;
  }
}

// Keeps the k best of all candidates that it is given. A few are kept in order. Of many it collects more than k before it selects the k
// best, because that takes less time than to find each candidate's rank.
template <class T> struct Collection {
  using C = Candidate<T>;
  using Number = typename C::Number;
  static constexpr int64_t ORDERED = 32; // up to so many are kept in order
  Number *kept;                          // [room]
  int64_t count, k, room;

  // m: number of all candidates
  static int64_t room_for(int64_t k, int64_t m) { return k <= ORDERED ? k : smaller(larger(2 * k, k + 16), m); }
  // Whether `worst` has changed, and there are k.
  FASTCL_INLINE bool add(Number candidate) {
    if (k <= ORDERED) return insert(candidate);
    kept[count++] = candidate;
    return count == room && reduce();
  }
  FASTCL_INLINE bool insert(Number candidate) {
    int64_t at = count;
    if (count < k) count++;
    else if (kept[--at] > candidate) return false;
    for (; at && kept[at - 1] < candidate; at--) kept[at] = kept[at - 1];
    kept[at] = candidate;
    return count == k;
  }
  FASTCL_NOINLINE bool reduce() {
    if (count <= k) return false; // there are no others
    select(kept, count, k);
    count = k;
    return true;
  }
  // No number that is as large or smaller matters any more.
  T worst() const {
    const T x = C::value(kept[k - 1]);
    return x != x ? T(__builtin_inf()) : x;
  }
};

} // namespace
} // namespace fastcl::FASTCL_ISA
