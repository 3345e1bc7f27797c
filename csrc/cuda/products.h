// Tensor cores, and asynchronous copies from global to shared memory: instructions of sm_80, or the emulator's replacements.
#pragma once
#include "device.h"
#ifdef FASTCL_EMULATOR
#include "tests/emulated_products.h"
#endif

namespace fastcl::cuda {

constexpr float LN2 = 0.6931471805599453f;
constexpr float LOWEST = -1e38f; // initial running maximum: finite, so that differences are never NaN

__device__ inline float infinity() { return __int_as_float(0x7F800000); }

template <class Element> __device__ Element rounded(float x) {
  Element result;
  from_float(x, result);
  return result;
}

#ifdef FASTCL_EMULATOR

__device__ inline uint32_t shared_address(const void *place) { return emulator::shared_address(place); }
__device__ inline float load_shared(uint32_t address) {
  float x;
  memcpy(&x, emulator::shared_place(address, 4), 4);
  return x;
}
__device__ inline void store_shared(uint32_t address, uint32_t word) { memcpy(emulator::shared_place(address, 4), &word, 4); }
__device__ inline void store_shared(uint32_t address, float a, float b) {
  const float both[2] = {a, b};
  memcpy(emulator::shared_place(address, 8), both, 8);
}
__device__ inline void copy_async(uint32_t to, const void *from, bool there) { emulator::copy_async(to, from, there); }
__device__ inline void copy_commit() { emulator::copy_commit(); }
template <int PENDING> __device__ void copy_wait() { emulator::copy_wait(PENDING); }
__device__ inline void load_matrices(uint32_t (&out)[4], uint32_t address) { emulator::load_matrices(out, address, false); }
__device__ inline void load_matrices_transposed(uint32_t (&out)[4], uint32_t address) { emulator::load_matrices(out, address, true); }
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bfloat16) { emulator::multiply_bfloat16(c, a, b); }
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) { emulator::multiply_half(c, a, b); }
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) { emulator::multiply_tf32(c, a, b); }

#else

// The address of a byte in shared memory.
__device__ inline uint32_t shared_address(const void *place) { return uint32_t(__cvta_generic_to_shared(place)); }
__device__ inline float load_shared(uint32_t address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}
__device__ inline void store_shared(uint32_t address, uint32_t word) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(word) : "memory"); }
__device__ inline void store_shared(uint32_t address, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(a), "f"(b) : "memory");
}
// Copies 16 bytes; writes zeros if `there` is false.
__device__ inline void copy_async(uint32_t to, const void *from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
__device__ inline void load_matrices(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}
// c [16, 8] += a b in float32, over a depth of 32 bytes of each row.
#define FASTCL_MULTIPLY(ELEMENT, SHAPE)                                                                                                              \
  __device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], ELEMENT) {                                          \
    asm("mma.sync.aligned." SHAPE " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                                 \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                                                             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                                                         \
  }
FASTCL_MULTIPLY(Bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FASTCL_MULTIPLY(Half, "m16n8k16.row.col.f32.f16.f16.f32")
FASTCL_MULTIPLY(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FASTCL_MULTIPLY

#endif

} // namespace fastcl::cuda
