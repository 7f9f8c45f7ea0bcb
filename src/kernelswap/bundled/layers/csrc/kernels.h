// The arithmetic behind plain C types: what the ISA-specific files offer and what the torch binding calls.
//
// No torch header is included on either side of this line, so that the templates compile in seconds, once per ISA.
#pragma once
#include <cstdint>

namespace ks {

enum DType { kFloat32 = 0, kBFloat16 = 1 };
enum Act { kSilu = 0, kGeluErf = 1, kGeluTanh = 2, kGeluQuick = 3 };

// All strides count elements. Pointers to data of type `dt` are void; rows of an output are contiguous.
struct Kernels {
  const char* name;
  // y = x / sqrt(mean(x^2) + eps) * (centered + w); x has `rows` rows of n elements, `xs` apart. w may be null (ones).
  void (*rms_norm)(int dt, const void* x, int64_t xs, const void* w, void* y, int64_t rows, int64_t n, double eps, int centered);
  // s = x + d, rounded, and y = rms_norm(s); all rows contiguous.
  void (*add_rms_norm)(int dt, const void* x, const void* d, const void* w, void* s, void* y, int64_t rows, int64_t n, double eps,
                       int centered);
  // dx, and dw += g * x * r, where dw (n floats) may be null.
  void (*rms_norm_backward)(int dt, const void* g, const void* x, const void* w, void* dx, float* dw, int64_t rows, int64_t n,
                            double eps, int centered);
  // y = (x - mean) / sqrt(var + eps) * w + b; w and b may be null.
  void (*layer_norm)(int dt, const void* x, int64_t xs, const void* w, const void* b, void* y, int64_t rows, int64_t n, double eps);
  void (*layer_norm_backward)(int dt, const void* g, const void* x, const void* w, void* dx, float* dw, float* db, int64_t rows,
                              int64_t n, double eps);
  // y = act(a), or act(a) * b where b is not null.
  void (*act_mul)(int dt, int act, const void* a, const void* b, void* y, int64_t n);
  // da = g * act'(a) [* b]; db = g * act(a) where b is not null.
  void (*act_mul_backward)(int dt, int act, const void* g, const void* a, const void* b, void* da, void* db, int64_t n);
  // One row of n: the first r elements are rotated (half-split), the others copied. `inverse` rotates by the negative angle:
  // the transpose of the forward map, hence its gradient.
  void (*rotary)(int dt, const void* x, const void* cos, const void* sin, void* y, int64_t n, int64_t r, int inverse);
  // sum[j] = sum over p of parts[p * n + j], stored as dt.
  void (*reduce)(int dt, const float* parts, int64_t count, int64_t n, void* sum);
};

extern const Kernels baseline;  // SSE2, NEON: whatever the compiler's default is
#if defined(__x86_64__)
extern const Kernels avx2, avx512;
#endif

// The kernels of that name, or the widest that this processor runs for ""; null where it cannot run them.
const Kernels* select(const char* name);

}  // namespace ks
