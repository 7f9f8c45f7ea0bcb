// The compiler's own default (SSE2 on x86_64, NEON on aarch64), and the choice at run time.
#include <cstring>

#define KS_WIDTH 4
#define KS_NAME "baseline"
#define KS_TABLE baseline
#include "kernels.inc"

namespace ks {

const Kernels* select(const char* name) {
  auto wanted = [&](const Kernels& k) { return !*name || !std::strcmp(name, k.name); };
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool has2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool has512 = has2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has512 && wanted(avx512)) return &avx512;
  if (has2 && wanted(avx2)) return &avx2;
#endif
  return wanted(baseline) ? &baseline : nullptr;
}

}  // namespace ks
