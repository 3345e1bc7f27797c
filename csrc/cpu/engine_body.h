// The entries of one instruction set. Its translation unit includes this file last.
#include "cpu/contrastive/gradient.h"
#include "cpu/contrastive/statistics.h"
#include "cpu/pairs/sums.h"
#include "cpu/prototypes/rows.h"
#include "cpu/sinkhorn/plan.h"
#include "cpu/soft/sweeps.h"
#include "cpu/topk/search.h"

#define FASTCL_STRING_(name) #name
#define FASTCL_STRING(name) FASTCL_STRING_(name)

namespace fastcl::FASTCL_ISA {
namespace {

template <class Mul> int64_t forward_with(const Forward &call, const Arranged &at, void *workspace) {
  Arena arena{(char *)workspace};
  const StatisticsPass<Mul> pass(call, at, arena);
  if (workspace) pass.run();
  return arena.used;
}
template <class Mul> int64_t backward_with(const Backward &call, const Arranged &at, void *workspace) {
  Arena arena{(char *)workspace};
  const GradientPass<Mul> pass(call, at, arena);
  if (workspace) pass.run();
  return arena.used;
}

template <class Mul> int64_t pairs_with(const Pairs &call, const Arranged &at, void *workspace) {
  Arena arena{(char *)workspace};
  const PairPass<Mul> pass(call, at, arena);
  if (workspace) pass.run();
  return arena.used;
}

#if FASTCL_DOT
bool of_bfloat16(const Problem &p) { return p.anchors.dtype == Dtype::bfloat16 && p.column_rows().dtype == Dtype::bfloat16 && !p.wide_reals; }
#endif

int64_t forward(const Forward &call, const Arranged &at, void *workspace) {
  if (call.problem.wide_reals) return forward_with<Plain<double>>(call, at, workspace);
#if FASTCL_DOT
  if (of_bfloat16(call.problem)) return forward_with<Dot>(call, at, workspace);
#endif
  return forward_with<Plain<float>>(call, at, workspace);
}
int64_t backward(const Backward &call, const Arranged &at, void *workspace) {
  if (call.problem.wide_reals) return backward_with<Plain<double>>(call, at, workspace);
#if FASTCL_DOT
  if (of_bfloat16(call.problem)) return backward_with<Dot>(call, at, workspace);
#endif
  return backward_with<Plain<float>>(call, at, workspace);
}
int64_t pairs(const Pairs &call, const Arranged &at, void *workspace) {
  if (call.problem.wide_reals) return pairs_with<Plain<double>>(call, at, workspace);
#if FASTCL_DOT
  if (of_bfloat16(call.problem)) return pairs_with<Dot>(call, at, workspace);
#endif
  return pairs_with<Plain<float>>(call, at, workspace);
}

} // namespace
const Engine engine{FASTCL_STRING(FASTCL_ISA), forward, backward, sinkhorn, topk, soft, pairs, prototypes};
} // namespace fastcl::FASTCL_ISA
