#include "arrange.h"
#include <algorithm>
#include <iterator>
#include <numeric>

namespace fastcl {
namespace {

constexpr int64_t NOTHING = -1; // a missing id: it never matches, not even another NOTHING

// Whether a table indexed by value is cheaper than searching.
bool dense(int64_t least, int64_t most, int64_t size) { return uint64_t(most) - uint64_t(least) < uint64_t(4 * size + 1024); }

// The distinct values except NOTHING, ascending.
std::vector<int64_t> distinct(const int64_t *values, int64_t size) {
  std::vector<int64_t> result;
  result.reserve(size);
  std::copy_if(values, values + size, std::back_inserter(result), [](int64_t v) { return v != NOTHING; });
  if (result.empty()) return result;
  const auto [least, most] = std::minmax_element(result.begin(), result.end());
  if (dense(*least, *most, size)) {
    const int64_t first = *least;
    std::vector<char> present(*most - first + 1);
    for (const int64_t value : result) present[value - first] = 1;
    result.clear();
    for (size_t k = 0; k < present.size(); k++)
      if (present[k]) result.push_back(first + int64_t(k));
  } else {
    std::sort(result.begin(), result.end());
    result.erase(std::unique(result.begin(), result.end()), result.end());
  }
  return result;
}

std::vector<int64_t> common(const int64_t *left, int64_t n, const int64_t *right, int64_t m) {
  const auto a = distinct(left, n), b = distinct(right, m);
  std::vector<int64_t> result;
  std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(result));
  return result;
}

// The position of each value in `known`; `other` for values not in it.
std::vector<int32_t> ranks(const int64_t *values, int64_t size, const std::vector<int64_t> &known, int32_t other) {
  std::vector<int32_t> result(size, other);
  if (known.empty()) return result;
  const int64_t first = known.front(), last = known.back();
  const bool table = dense(first, last, size + int64_t(known.size()));
  std::vector<int32_t> rank(table ? last - first + 1 : 0, other);
  for (size_t k = 0; table && k < known.size(); k++) rank[known[k] - first] = int32_t(k);
  for (int64_t i = 0; i < size; i++) {
    const int64_t value = values[i];
    if (value < first || value > last || value == NOTHING) continue;
    if (table) result[i] = rank[value - first];
    else {
      const auto at = std::lower_bound(known.begin(), known.end(), value);
      if (*at == value) result[i] = int32_t(at - known.begin());
    }
  }
  return result;
}

// Sorts places by number, from `least` to `count` - 1. Stable, so that rows of a cluster keep their order.
void sort_by(const std::vector<int32_t> &numbers, int32_t least, size_t count, std::vector<int32_t> &order) {
  std::vector<int32_t> start(count - least + 1);
  for (const int32_t number : numbers) start[number - least + 1]++;
  std::partial_sum(start.begin(), start.end(), start.begin());
  order.resize(numbers.size());
  for (size_t i = 0; i < numbers.size(); i++) order[start[numbers[i] - least]++] = int32_t(i);
}

// Renumbers in the order of first appearance, so that results do not depend on the ids of clusters.
void renumber(std::vector<int32_t> &numbers, std::vector<int32_t> *others, size_t count) {
  std::vector<int32_t> renamed(count, -1);
  int32_t next = 0;
  for (int32_t &number : numbers)
    if (number >= 0) {
      if (renamed[number] < 0) renamed[number] = next++;
      number = renamed[number];
    }
  if (others)
    for (int32_t &number : *others)
      if (number >= 0) number = renamed[number];
}

std::vector<int32_t> gather(const std::vector<int32_t> &values, const std::vector<int32_t> &order) {
  std::vector<int32_t> result(order.size());
  for (size_t i = 0; i < order.size(); i++) result[i] = values[order[i]];
  return result;
}

// The numbers of a side's rows. Empty: not given.
struct Numbers {
  std::vector<int32_t> cluster, id, sample, group;
};

// Sorts a side by cluster, or else by group, or else by id.
void arrange_side(Arrangement &side, int64_t size, const Numbers &numbers, size_t clusters, size_t ids, size_t groups, int32_t alone) {
  if (!numbers.cluster.empty()) sort_by(numbers.cluster, alone, clusters, side.order);
  else if (!numbers.group.empty()) sort_by(numbers.group, 0, groups, side.order);
  else if (!numbers.id.empty()) sort_by(numbers.id, *std::min_element(numbers.id.begin(), numbers.id.end()), ids, side.order);
  else {
    side.order.resize(size);
    std::iota(side.order.begin(), side.order.end(), 0);
  }
  if (!numbers.cluster.empty()) side.cluster = gather(numbers.cluster, side.order);
  if (!numbers.sample.empty()) side.sample = gather(numbers.sample, side.order);
  if (!numbers.group.empty()) side.group = gather(numbers.group, side.order);
  if (!numbers.id.empty()) {
    side.id = gather(numbers.id, side.order);
    side.matched.resize(size + 1);
    for (int64_t i = 0; i < size; i++) side.matched[i + 1] = side.matched[i] + (side.id[i] >= 0);
  }
}

// Gives rows without a number one of their own, so that they match no other row.
void number_missing(std::vector<int32_t> &numbers, int32_t &count) {
  for (int32_t &number : numbers)
    if (number < 0) number = count++;
}

// Groups of both sides: small numbers in the order of first appearance. Rows in no group have numbers without a partner.
size_t number_groups(const Rules &r, int64_t n, int64_t m, bool self, Numbers (&sides)[2]) {
  auto known = distinct(r.anchor_groups, n);
  if (!self) {
    const auto theirs = distinct(r.contrast_groups, m);
    std::vector<int64_t> all;
    std::set_union(known.begin(), known.end(), theirs.begin(), theirs.end(), std::back_inserter(all));
    known = std::move(all);
  }
  int32_t count = int32_t(known.size());
  sides[0].group = ranks(r.anchor_groups, n, known, -1);
  number_missing(sides[0].group, count);
  if (self) {
    renumber(sides[0].group, nullptr, count);
    return count;
  }
  sides[1].group = ranks(r.contrast_groups, m, known, -1);
  number_missing(sides[1].group, count);
  std::vector<int32_t> renamed(count, -1);
  int32_t next = 0;
  for (Numbers &side : sides)
    for (int32_t &number : side.group) {
      if (renamed[number] < 0) renamed[number] = next++;
      number = renamed[number];
    }
  return count;
}

// Replaces clusters by numbers of (group, cluster), which ascend with the group. -1 and -2 are clusters without a partner.
size_t cluster_within_groups(Numbers (&sides)[2], int count) {
  std::vector<int64_t> keys;
  const auto key = [](const Numbers &side, size_t i) { return (int64_t(side.group[i]) << 32) + side.cluster[i] + 2; };
  for (int side = 0; side < count; side++)
    for (size_t i = 0; i < sides[side].cluster.size(); i++) keys.push_back(key(sides[side], i));
  std::sort(keys.begin(), keys.end());
  keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
  for (int side = 0; side < count; side++) {
    std::vector<int32_t> found(sides[side].cluster.size());
    for (size_t i = 0; i < found.size(); i++) found[i] = int32_t(std::lower_bound(keys.begin(), keys.end(), key(sides[side], i)) - keys.begin());
    sides[side].cluster = std::move(found);
  }
  return keys.size();
}

// Ids that occur once, or not on the other side, become negative numbers that match nothing.
size_t number_ids(const Problem &p, int64_t n, int64_t m, Numbers (&sides)[2]) {
  if (!p.self_contrast()) {
    const auto known = common(p.anchor_ids, n, p.contrast_ids, m);
    sides[0].id = ranks(p.anchor_ids, n, known, -1);
    sides[1].id = ranks(p.contrast_ids, m, known, -2);
    return known.size();
  }
  auto &ids = sides[0].id;
  const auto known = distinct(p.anchor_ids, n);
  ids = ranks(p.anchor_ids, n, known, -1);
  std::vector<int32_t> times(known.size());
  for (const int32_t id : ids)
    if (id >= 0) times[id]++;
  int32_t none = -10; // below the numbers of the padding
  for (int32_t &id : ids)
    if (id < 0 || times[id] == 1) id = none--;
  return known.size();
}

} // namespace

Arrangements arrange(const Problem &p) {
  Arrangements result;
  const Rules &r = p.rules;
  const bool self = p.self_contrast();
  const int64_t n = p.anchors.size, m = p.contrasts.size;
  Numbers sides[2];
  size_t clusters = 0, ids = 0, groups = 0;
  if (p.anchor_clusters && self) {
    const auto known = distinct(p.anchor_clusters, n);
    sides[0].cluster = ranks(p.anchor_clusters, n, known, -1);
    int32_t count = int32_t(known.size());
    number_missing(sides[0].cluster, count); // a cluster of its own matches only the row itself, which is not a contrast of the row
    renumber(sides[0].cluster, nullptr, count);
    clusters = count;
  } else if (p.anchor_clusters) {
    // A cluster without a match on the other side becomes -1 for anchors and -2 for contrasts, which never match.
    const auto known = common(p.anchor_clusters, n, p.contrast_clusters, m);
    clusters = known.size();
    if (clusters) {
      sides[0].cluster = ranks(p.anchor_clusters, n, known, -1);
      sides[1].cluster = ranks(p.contrast_clusters, m, known, -2);
      renumber(sides[0].cluster, &sides[1].cluster, clusters);
    }
  }
  if (p.anchor_ids) ids = number_ids(p, n, m, sides);
  if (!self && !ids) sides[0].id.clear(), sides[1].id.clear();
  if (r.anchor_samples) {
    const auto known = self ? distinct(r.anchor_samples, n) : common(r.anchor_samples, n, r.contrast_samples, m);
    sides[0].sample = ranks(r.anchor_samples, n, known, -1);
    if (!self) sides[1].sample = ranks(r.contrast_samples, m, known, -2);
  }
  if (r.anchor_groups) {
    groups = number_groups(r, n, m, self, sides);
    if (clusters) clusters = cluster_within_groups(sides, self ? 1 : 2);
  }
  arrange_side(result.anchors, n, sides[0], clusters, ids, groups, groups ? 0 : -1);
  if (!self) arrange_side(result.contrasts, m, sides[1], clusters, ids, groups, groups ? 0 : -2);
  return result;
}

} // namespace fastcl
