#include "dispatch.h"

namespace fastcl {
namespace {

bool supported(const Engine *engine) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const std::string name = engine->name;
  if (name == "baseline") return true;
  if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (name == "avx512") return avx512;
  if (name == "avx512_bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
  return false;
#else
  (void)engine;
  return true; // every 64-bit ARM processor has NEON
#endif
}

// On a Xeon with AVX-512-bf16, products of bfloat16 pairs ran at half the rate of FMA, so converting the rows to float is twice as
// fast, and more exact. On Zen 5 pairs run at twice the rate of FMA.
bool opt_in(const Engine *engine) {
#if defined(__x86_64__)
  return std::string(engine->name) == "avx512_bf16" && __builtin_cpu_is("intel");
#else
  (void)engine;
  return false;
#endif
}

} // namespace

std::vector<const Engine *> built_engines() {
  return {
#if defined(FASTCL_ENGINE_baseline)
      &baseline::engine,
#endif
#if defined(FASTCL_ENGINE_avx2)
      &avx2::engine,
#endif
#if defined(FASTCL_ENGINE_avx512)
      &avx512::engine,
#endif
#if defined(FASTCL_ENGINE_avx512_bf16)
      &avx512_bf16::engine,
#endif
#if defined(FASTCL_ENGINE_neon)
      &neon::engine,
#endif
  };
}

std::vector<const Engine *> supported_engines() {
  std::vector<const Engine *> result;
  for (const Engine *engine : built_engines())
    if (supported(engine)) result.push_back(engine);
  return result;
}

Choice choose_engine(const std::string &cap) {
  const auto built = built_engines();
  if (built.empty()) return {nullptr, "this build carries no engine: it was not built for x86-64 or 64-bit ARM"};
  std::string names;
  for (const Engine *engine : built) names += (names.empty() ? "" : ", ") + std::string(engine->name);
  const Engine *last = nullptr;
  bool reached = false;
  for (const Engine *engine : built) {
    if (reached) break;
    reached = engine->name == cap;
    if (!supported(engine)) continue;
    if (opt_in(engine) && !reached) continue;
    last = engine;
  }
  if (!cap.empty() && !reached) return {nullptr, "expected one of " + names + ", got '" + cap + "'"};
  return {last, cap.empty() ? "the fastest that this machine has" : "at most " + cap};
}

} // namespace fastcl
