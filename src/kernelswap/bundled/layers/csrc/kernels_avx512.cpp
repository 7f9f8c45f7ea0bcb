// Compiled on every x86_64, used where the processor has it. Standard headers come before the target is raised: nothing of
// them may be compiled for a processor that is not there.
#include <cmath>
#include <cstdint>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define KS_WIDTH 16
#define KS_NAME "avx512"
#define KS_TABLE avx512
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
