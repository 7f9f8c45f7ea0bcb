// Vectors of KS_WIDTH floats in the compiler's own extension (GCC, Clang): one source for SSE2, NEON, AVX2 and AVX-512.
//
// Everything is computed in float32; bfloat16 exists in loads and stores alone. Included inside an ISA's own namespace.
// Functions take and return vectors, so all of them are inlined: no vector crosses a call.

constexpr int W = KS_WIDTH;
#define KS_INLINE static inline __attribute__((always_inline))
#define KS_EACH [&](int64_t i, int64_t k) __attribute__((always_inline))          // k elements from i on: a body for sweep
#define KS_ADD [&](int64_t i, int64_t k, F * sum) __attribute__((always_inline))  // the same for row_sums

typedef float F __attribute__((vector_size(W * 4)));
typedef int32_t I __attribute__((vector_size(W * 4)));
typedef uint32_t U __attribute__((vector_size(W * 4)));
typedef uint16_t H __attribute__((vector_size(W * 2)));
typedef float FMem __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t HMem __attribute__((vector_size(W * 2), aligned(2), may_alias));

KS_INLINE F all(float v) { return F{} + v; }

// What the extension has no word for. A NaN in x passes through min and max: they give their second operand then.
#if KS_WIDTH == 16
KS_INLINE F min(F bound, F x) { return _mm512_min_ps(bound, x); }
KS_INLINE F max(F bound, F x) { return _mm512_max_ps(bound, x); }
KS_INLINE F round(F x) { return _mm512_roundscale_ps(x, 8); }
KS_INLINE F scale(F x, F k) { return _mm512_scalef_ps(x, k); }  // x * 2^k for whole k
KS_INLINE U widen(const uint16_t* p) { return (U)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
KS_INLINE void narrow(uint16_t* p, U v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)v)); }
KS_INLINE F inverse(F d) {  // of 1 <= d < 2^126: 14 bits, doubled once; a division takes three times as long
  F r = _mm512_rcp14_ps(d);
  return r * (2.0f - d * r);
}
#else
#if KS_WIDTH == 8
KS_INLINE F min(F bound, F x) { return _mm256_min_ps(bound, x); }
KS_INLINE F max(F bound, F x) { return _mm256_max_ps(bound, x); }
KS_INLINE F round(F x) { return _mm256_round_ps(x, 8); }
KS_INLINE U widen(const uint16_t* p) { return (U)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
KS_INLINE void narrow(uint16_t* p, U v) {
  __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);  // per half
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
#else
KS_INLINE F min(F bound, F x) { return x > bound ? bound : x; }
KS_INLINE F max(F bound, F x) { return x < bound ? bound : x; }
KS_INLINE F round(F x) { return (x + 12582912.0f) - 12582912.0f; }  // 1.5 * 2^23: no mantissa bits are left for a fraction
KS_INLINE U widen(const uint16_t* p) { return __builtin_convertvector((H) * (const HMem*)p, U); }
KS_INLINE void narrow(uint16_t* p, U v) { *(HMem*)p = __builtin_convertvector(v, H); }
#endif
KS_INLINE F scale(F x, F k) {  // in two halves, so that subnormal results and infinity come out right
  I whole = __builtin_convertvector(k, I), half = whole >> 1;
  return x * (F)((half + 127) << 23) * (F)((whole - half + 127) << 23);
}
KS_INLINE F inverse(F d) { return 1.0f / d; }
#endif

struct Float32 {
  using T = float;
  KS_INLINE F load(const T* p) { return *(const FMem*)p; }
  KS_INLINE void store(T* p, F v) { *(FMem*)p = v; }
};

struct BFloat16 {
  using T = uint16_t;
  KS_INLINE F load(const T* p) { return (F)(widen(p) << 16); }
  // To nearest, ties to even. A NaN stays one: it came out of bfloat16 data or out of the processor, so the low half of its
  // bits is zero and rounding cannot carry.
  KS_INLINE void store(T* p, F v) {
    U bits = (U)v;
    narrow(p, (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16);
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

// e^-x for -89 < x < 104: Cody-Waite reduction by ln 2 in two parts, then a polynomial of degree 6 on [-ln2/2, ln2/2].
KS_INLINE F exp_minus(F x) {
  F k = round(x * -1.44269504f);
  F r = k * -0.693359375f - x;
  r = r + k * 2.12194440e-4f;
  F p = r * 1.3888889e-3f + 8.3333338e-3f;
  p = p * r + 4.1666668e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return scale(p, k);
}

// 1 / (1 + e^-x); below x = -87 it stays at 1.6e-38, so that the denominator has an inverse.
KS_INLINE F sigmoid(F x) { return inverse(1.0f + exp_minus(min(all(100.0f), max(all(-87.0f), x)))); }
