// Rules about pairs besides clusters and ids: tags, samples, groups, and a guide, whose cosines are a second product beside the tile.
#pragma once
#include "engine.h"
#include "threads.h"

namespace fastcl::FASTCL_ISA {
namespace {

// One side's data, by place. Null: not present. Numbers of the padding never match.
struct RulesOfSide {
  const int32_t *sample, *group; // [padded]; groups ascend
  const int32_t *row;            // [padded]: the caller's row; only of two sets that are the same rows
  const int32_t *tags;           // [words][padded], 32 tags to a word
  const int32_t *own_words;      // [size][2 * words]: of each row the words that are not 0, as pairs of place and value
  const int32_t *own_count;      // [size]: their number
  int64_t size;
};

template <class T> struct PairRules {
  static constexpr int W = Simd<T>::W;
  RulesOfSide anchors, contrasts; // the same for self-contrast
  int64_t words, padded;          // words of a row; of the contrasts
  T *thresholds;                  // [anchors.padded], of the guide's cosines; null: no guide
  bool any;                       // some pairs of existing places may be inadmissible

  PairRules(const Problem &p, const Arranged &at, int64_t anchors_padded, int64_t contrasts_padded, Arena &arena)
      : words(2 * p.rules.tag_words), padded(contrasts_padded) {
    const bool self = p.self_contrast();
    anchors = side(p, p.rules.anchor_tags, at.anchors, p.anchors.size, anchors_padded, -3, arena);
    contrasts = self ? anchors : side(p, p.rules.contrast_tags, at.contrasts, p.contrasts.size, contrasts_padded, -4, arena);
    thresholds = p.rules.thresholds ? arena.take<T>(anchors_padded) : nullptr;
    any = p.rules.anchor_groups || p.rules.same_rows || p.rules.thresholds; // pointers into the arena are null while it counts
    for (int64_t i = 0; arena.base && thresholds && i < anchors_padded; i++)
      thresholds[i] = i < anchors.size ? ((const T *)p.rules.thresholds)[at.anchors.order[i]] : T(0);
  }

  // Whether a tile of anchors [i0, i1) and contrasts [j0, j1) needs masks.
  FASTCL_INLINE bool mixed(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    if (anchors.tags || thresholds) return true;
    if (anchors.row && i0 < j1 && j0 < i1) return true;
    return anchors.group && !(anchors.group[i0] == contrasts.group[j1 - 1] && contrasts.group[j0] == anchors.group[i1 - 1]);
  }
  // Whether no anchor of [i0, i1) is in the group of a contrast of [j0, j1).
  FASTCL_INLINE bool apart(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    return anchors.group && (anchors.group[i1 - 1] < contrasts.group[j0] || contrasts.group[j1 - 1] < anchors.group[i0]);
  }
  // The contrasts that may be in the groups of anchors [i0, i1).
  Range together(int64_t i0, int64_t i1) const {
    if (!anchors.group) return {0, contrasts.size};
    return {first(contrasts, anchors.group[i0]), first(contrasts, anchors.group[i1 - 1] + 1)};
  }
  // The number of places of `others` in the group of place i.
  static int64_t members(const RulesOfSide &side, int64_t i, const RulesOfSide &others) {
    return first(others, side.group[i] + 1) - first(others, side.group[i]);
  }
  FASTCL_INLINE I<T> same_group(int64_t i, int64_t j) const { return load_ids<T>(contrasts.group + j) == all_int<T>(anchors.group[i]); }
  FASTCL_INLINE I<T> same_sample(int64_t i, int64_t j) const { return load_ids<T>(contrasts.sample + j) == all_int<T>(anchors.sample[i]); }
  FASTCL_INLINE I<T> other_row(int64_t i, int64_t j) const { return load_ids<T>(contrasts.row + j) != all_int<T>(anchors.row[i]); }
  // Whether row i shares a tag with the columns from j on.
  FASTCL_INLINE I<T> shared(int64_t i, int64_t j, bool exists) const {
    I<T> found = all_int<T>(0);
    if (!exists) return found;
    const int32_t *own = anchors.own_words + i * 2 * words;
    for (int32_t k = 0; k < anchors.own_count[i]; k++) found |= load_ids<T>(contrasts.tags + own[2 * k] * padded + j) & all_int<T>(own[2 * k + 1]);
    return found != all_int<T>(0);
  }
  FASTCL_INLINE I<T> within(int64_t i, V<T> cosines) const { return ~(cosines > all<T>(thresholds[i])); }

private:
  static int64_t first(const RulesOfSide &side, int64_t group) { // the first place whose group is not less
    int64_t from = 0, to = side.size;
    while (from < to) {
      const int64_t middle = (from + to) / 2;
      if (side.group[middle] < group) from = middle + 1;
      else to = middle;
    }
    return from;
  }
  static const int32_t *copied(const int32_t *from, int64_t size, int64_t padded, int32_t none, Arena &arena) {
    if (!from) return nullptr;
    int32_t *const to = arena.take<int32_t>(padded);
    for (int64_t i = 0; arena.base && i < padded; i++) to[i] = i < size ? from[i] : none;
    return to;
  }
  RulesOfSide side(const Problem &p, const uint64_t *tags, const Places &at, int64_t size, int64_t padded, int32_t none, Arena &arena) const {
    RulesOfSide s{};
    s.size = size;
    s.sample = copied(at.sample, size, padded, none, arena);
    // the padding is in no group; it comes last, so its number is the largest
    s.group = copied(at.group, size, padded, INT32_MAX + (none + 3), arena);
    s.row = p.rules.same_rows ? copied(at.order, size, padded, none, arena) : nullptr;
    if (!tags) return s;
    int32_t *const by_word = arena.take<int32_t>(words * padded), *const own = arena.take<int32_t>(size * 2 * words);
    int32_t *const count = arena.take<int32_t>(size);
    s.tags = by_word, s.own_words = own, s.own_count = count;
    if (!arena.base) return s;
    for (int64_t k = 0; k < words * padded; k++) by_word[k] = 0;
    for (int64_t i = 0; i < size; i++) {
      const uint64_t *const from = tags + at.order[i] * (words / 2);
      count[i] = 0;
      for (int64_t k = 0; k < words; k++) {
        const int32_t word = int32_t(from[k / 2] >> (k % 2 * 32));
        if (!word) continue;
        by_word[k * padded + i] = word;
        own[i * 2 * words + 2 * count[i]] = int32_t(k);
        own[i * 2 * words + 2 * count[i] + 1] = word;
        count[i]++;
      }
    }
    return s;
  }
};

} // namespace
} // namespace fastcl::FASTCL_ISA
