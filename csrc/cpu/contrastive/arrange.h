// Sorts rows by cluster, so that positives are in few tiles, and maps ids to small numbers.
#pragma once
#include "cpu/engine.h"
#include <vector>

namespace fastcl {

struct Arrangement {
  std::vector<int32_t> order, cluster, id, sample, group, matched; // as in Places; empty vectors give null pointers
  Places places() const {
    const auto pointer = [](const std::vector<int32_t> &v) { return v.empty() ? nullptr : v.data(); };
    return {pointer(order), pointer(cluster), pointer(id), pointer(sample), pointer(group), pointer(matched)};
  }
};
struct Arrangements {
  Arrangement anchors, contrasts; // for self-contrast, contrasts are empty
  Arranged arranged() const { return {anchors.places(), contrasts.places()}; }
};

Arrangements arrange(const Problem &problem);

} // namespace fastcl
