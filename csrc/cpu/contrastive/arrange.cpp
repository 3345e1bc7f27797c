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

void arrange_side(Arrangement &side, int64_t size, const std::vector<int32_t> *clusters, size_t cluster_count, const std::vector<int32_t> *ids,
                  size_t id_count, int32_t alone) {
  if (clusters) sort_by(*clusters, alone, cluster_count, side.order);
  else if (ids) sort_by(*ids, alone, id_count, side.order);
  else {
    side.order.resize(size);
    std::iota(side.order.begin(), side.order.end(), 0);
  }
  if (clusters) side.cluster = gather(*clusters, side.order);
  if (ids) {
    side.id = gather(*ids, side.order);
    side.matched.resize(size + 1);
    for (int64_t i = 0; i < size; i++) side.matched[i + 1] = side.matched[i] + (side.id[i] >= 0);
  }
}

} // namespace

Arrangements arrange(const Problem &p) {
  Arrangements result;
  const int64_t n = p.anchors.size, m = p.contrasts.size;
  if (p.self_contrast()) {
    if (!p.anchor_clusters) {
      arrange_side(result.anchors, n, nullptr, 0, nullptr, 0, 0);
      return result;
    }
    const auto known = distinct(p.anchor_clusters, n);
    auto numbers = ranks(p.anchor_clusters, n, known, -1);
    int32_t count = int32_t(known.size());
    for (int32_t &number : numbers)
      if (number < 0) number = count++; // its own cluster: it matches only the row itself, which is not a contrast of the row
    renumber(numbers, nullptr, count);
    arrange_side(result.anchors, n, &numbers, count, nullptr, 0, 0);
    return result;
  }
  // An id without a match on the other side becomes -1 for anchors and -2 for contrasts, which never match.
  std::vector<int32_t> clusters[2], ids[2];
  size_t cluster_count = 0, id_count = 0;
  if (p.anchor_clusters) {
    const auto known = common(p.anchor_clusters, n, p.contrast_clusters, m);
    clusters[0] = ranks(p.anchor_clusters, n, known, -1);
    clusters[1] = ranks(p.contrast_clusters, m, known, -2);
    cluster_count = known.size();
    renumber(clusters[0], &clusters[1], cluster_count);
  }
  if (p.anchor_ids) {
    const auto known = common(p.anchor_ids, n, p.contrast_ids, m);
    ids[0] = ranks(p.anchor_ids, n, known, -1);
    ids[1] = ranks(p.contrast_ids, m, known, -2);
    id_count = known.size();
  }
  for (int side = 0; side < 2; side++)
    arrange_side(side ? result.contrasts : result.anchors, side ? m : n, cluster_count ? &clusters[side] : nullptr, cluster_count,
                 id_count ? &ids[side] : nullptr, id_count, side ? -2 : -1);
  return result;
}

} // namespace fastcl
