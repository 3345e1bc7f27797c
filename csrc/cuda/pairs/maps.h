// The maps of a pair's logit on a device, as in fastcl/ops/pair_maps.py. Those of distances have no kernels here.
#pragma once
#include "cuda/contrastive/sweep.h"

namespace fastcl::cuda {

enum class Map : int { softplus, hinge };

// 1 / x for 1 <= x <= 2.
__device__ inline float reciprocal(float x) {
#ifdef FASTCL_EMULATOR
  return 1 / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// log(1 + u) for 0 <= u <= 1, with a relative error below 2e-7: a minimax polynomial of log(1 + u) / u.
__device__ inline float log1p_of_unit(float u) {
  float p = 0.0052326878999137275f;
  p = __fmaf_rn(p, u, -0.02950521327447293f);
  p = __fmaf_rn(p, u, 0.07822591034925812f);
  p = __fmaf_rn(p, u, -0.1366324227205363f);
  p = __fmaf_rn(p, u, 0.19106005104412294f);
  p = __fmaf_rn(p, u, -0.24842981790442767f);
  p = __fmaf_rn(p, u, 0.3331909675437183f);
  p = __fmaf_rn(p, u, -0.4999949313792834f);
  p = __fmaf_rn(p, u, 0.999999969879359f);
  return p * u;
}

// The value and derivative at a logit. A positive's value falls with the logit, a negative's grows. NaN stays NaN.
template <Map MAP> __device__ __forceinline__ void mapped(float s, bool positive, float margin, float &value, float &slope) {
  if constexpr (MAP == Map::softplus) {
    const float z = positive ? -s : s, u = exp2_fast(fabsf(z) * -LOG2E), p = reciprocal(1 + u);
    value = (z <= 0 ? 0.0f : z) + log1p_of_unit(u);
    slope = z >= 0 ? p : u * p;
  } else {
    const float z = positive ? margin - s : s - margin;
    value = z <= 0 ? 0.0f : z;
    slope = z > 0 ? 1.0f : value;
  }
  if (positive) slope = -slope;
}

} // namespace fastcl::cuda
