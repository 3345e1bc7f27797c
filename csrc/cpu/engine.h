// The functions of the engine of one instruction set. dispatch.cpp chooses among the engines.
#pragma once
#include "cpu/pairs/call.h"
#include "cpu/prototypes/call.h"
#include "cpu/sinkhorn/call.h"
#include "cpu/soft/call.h"
#include "cpu/topk/call.h"
#include "problem.h"

namespace fastcl {

// One side's rows in the order in which the engine visits them. Null pointers: not present.
struct Places {
  const int32_t *order;   // order[place] = row
  const int32_t *cluster; // by place, ascending; pairs with equal numbers are positives
  const int32_t *id;      // by place; pairs with equal numbers are inadmissible
  const int32_t *sample;  // by place; pairs with equal numbers are admissible although their ids are equal
  const int32_t *group;   // by place, ascending; pairs with different numbers are inadmissible
  const int32_t *matched; // [size + 1]: number of earlier places whose id also occurs on the other side
};
struct Arranged {
  Places anchors, contrasts; // for self-contrast, contrasts are empty
};

struct Engine {
  const char *name;
  // With a null workspace these functions only return its size in bytes.
  int64_t (*forward)(const Forward &, const Arranged &, void *workspace);
  int64_t (*backward)(const Backward &, const Arranged &, void *workspace);
  int64_t (*sinkhorn)(const Sinkhorn &, void *workspace);
  int64_t (*topk)(const TopK &, void *workspace);
  int64_t (*soft)(const Soft &, const Arranged &, void *workspace);
  int64_t (*pairs)(const Pairs &, const Arranged &, void *workspace);
  int64_t (*prototypes)(const Prototypes &, void *workspace);
};

namespace baseline {
extern const Engine engine;
}
namespace avx2 {
extern const Engine engine;
}
namespace avx512 {
extern const Engine engine;
}
namespace avx512_bf16 {
extern const Engine engine;
}
namespace neon {
extern const Engine engine;
}

} // namespace fastcl
