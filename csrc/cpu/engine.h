// What the engine of one instruction set offers, as plain pointers: the table that dispatch.cpp chooses from.
#pragma once
#include "problem.h"
#include "cpu/sinkhorn/call.h"
#include "cpu/soft/call.h"
#include "cpu/topk/call.h"

namespace fastcl {

// One side's rows in the order in which the engine walks them; null where there is no such thing.
struct Places {
  const int32_t *order;   // order[place] = row
  const int32_t *cluster; // by place, ascending; equal numbers are positives
  const int32_t *id;      // by place; equal numbers make a pair inadmissible
  const int32_t *matched; // [size + 1]: how many places before have an id that the other side has too
};
struct Arranged {
  Places anchors, contrasts; // contrasts empty for self-contrast
};

struct Engine {
  const char *name;
  // With a null workspace they only return its size in bytes.
  int64_t (*forward)(const Forward &, const Arranged &, void *workspace);
  int64_t (*backward)(const Backward &, const Arranged &, void *workspace);
  int64_t (*sinkhorn)(const Sinkhorn &, void *workspace);
  int64_t (*topk)(const TopK &, void *workspace);
  int64_t (*soft)(const Soft &, const Arranged &, void *workspace);
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

} // namespace fastcl
