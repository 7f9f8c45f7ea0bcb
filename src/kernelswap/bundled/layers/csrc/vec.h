// Vectors of KS_WIDTH floats in the compiler's own extension (GCC, Clang): one source for SSE2, NEON, AVX2 and AVX-512.
//
// Everything is computed in float32; bfloat16 exists in loads and stores alone. Included inside an ISA's own namespace.
// Functions take and return vectors, so all of them are inlined: no vector crosses a call.

constexpr int W = KS_WIDTH;
#define KS_INLINE static inline __attribute__((always_inline))
#define KS_UNROLL _Pragma("GCC unroll 4")

typedef float F __attribute__((vector_size(W * 4)));
typedef int32_t I __attribute__((vector_size(W * 4)));
typedef uint32_t U __attribute__((vector_size(W * 4)));
typedef uint16_t H __attribute__((vector_size(W * 2)));
typedef float FMem __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t HMem __attribute__((vector_size(W * 2), aligned(2), may_alias));

KS_INLINE F all(float v) { return F{} + v; }
KS_INLINE F pick(I mask, F yes, F no) { return (F)((mask & (I)yes) | (~mask & (I)no)); }

struct Float32 {
  using T = float;
  KS_INLINE F load(const T* p) { return *(const FMem*)p; }
  KS_INLINE void store(T* p, F v) { *(FMem*)p = v; }
};

struct BFloat16 {
  using T = uint16_t;
  KS_INLINE F load(const T* p) { return (F)(__builtin_convertvector((H) * (const HMem*)p, U) << 16); }
  KS_INLINE void store(T* p, F v) {  // to nearest, ties to even; a NaN stays one
    U bits = (U)v;
    U rounded = (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16;
    U nan = (U)(v != v);
    *(HMem*)p = __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), H);
  }
};

template <class D>
KS_INLINE F load_some(const typename D::T* p, int64_t k) {  // k < W elements, zeros after them
  typename D::T buffer[W] = {};
  __builtin_memcpy(buffer, p, k * sizeof(typename D::T));
  return D::load(buffer);
}

template <class D>
KS_INLINE void store_some(typename D::T* p, F v, int64_t k) {
  typename D::T buffer[W];
  D::store(buffer, v);
  __builtin_memcpy(p, buffer, k * sizeof(typename D::T));
}

KS_INLINE float total(F v) {
  float sum = 0;
  for (int i = 0; i < W; i++) sum += v[i];
  return sum;
}

// e^x. Cody-Waite reduction by ln 2 in two parts, then the Taylor-like minimax polynomial of degree 6 on [-ln2/2, ln2/2].
// 2^k is multiplied in two halves so that the whole range, subnormal results and overflow to inf included, comes out right.
KS_INLINE F exponential(F x) {
  x = pick(x > 89.0f, all(89.0f), x);  // comparisons are false for NaN, which passes through
  x = pick(x < -104.0f, all(-104.0f), x);
  const F magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  F shifted = x * 1.44269504f + magic;
  I k = (I)shifted - (I)magic;
  F kf = shifted - magic;
  F r = x - kf * 0.693359375f;
  r = r + kf * 2.12194440e-4f;
  F p = r * 1.3888889e-3f + 8.3333338e-3f;
  p = p * r + 4.1666668e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  I half = k >> 1;
  F one = (F)((half + 127) << 23), two = (F)((k - half + 127) << 23);
  return p * one * two;
}

KS_INLINE F sigmoid(F x) { return 1.0f / (1.0f + exponential(-x)); }
