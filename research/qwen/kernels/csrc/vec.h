// One vector of floats for the instruction set a file is compiled for. Included inside no namespace; everything is
// static, so that code built with wide instructions can never be merged by the linker with portable code.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define QWEN_LANES 16
#elif defined(__AVX2__)
#define QWEN_LANES 8
#else
#define QWEN_LANES 4
#endif

namespace {

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

constexpr int kLanes = QWEN_LANES;
typedef float V __attribute__((vector_size(4 * QWEN_LANES)));
typedef int32_t VI __attribute__((vector_size(4 * QWEN_LANES)));
typedef uint32_t VU __attribute__((vector_size(4 * QWEN_LANES)));
typedef uint16_t VH __attribute__((vector_size(2 * QWEN_LANES)));
typedef float VUnaligned __attribute__((vector_size(4 * QWEN_LANES), aligned(1), may_alias));
typedef uint16_t VHUnaligned __attribute__((vector_size(2 * QWEN_LANES), aligned(1), may_alias));

INLINE V splat(float x) { return x - V{}; }
INLINE V load(const float* p) { return *reinterpret_cast<const VUnaligned*>(p); }
INLINE void store(float* p, V v) { *reinterpret_cast<VUnaligned*>(p) = v; }

// The first n lanes from memory, zeros behind them; never reads past p + n.
INLINE V load_part(const float* p, int64_t n) {
  V v = {};
  std::memcpy(&v, p, n * sizeof(float));
  return v;
}
INLINE void store_part(float* p, V v, int64_t n) { std::memcpy(p, &v, n * sizeof(float)); }

// a * b + acc; one rounding where the machine has it (contraction by the compiler is off, so all paths agree).
INLINE V fma(V a, V b, V acc) {
#if defined(__AVX512F__)
  return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)acc);
#elif defined(__AVX2__)
  return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)acc);
#elif defined(__aarch64__)
  return (V)vfmaq_f32((float32x4_t)acc, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + acc;
#endif
}

// Sum and maximum over lanes, always paired as (i, i + half), so that a sum never depends on who asks for it.
INLINE float sum_lanes(V v) {
#if defined(__AVX512F__)
  __m256 y = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#elif defined(__AVX2__)
  __m256 y = (__m256)v;
#endif
#if defined(__AVX2__) || defined(__AVX512F__)
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
#elif defined(__aarch64__)
  return vpadds_f32(vadd_f32(vget_low_f32((float32x4_t)v), vget_high_f32((float32x4_t)v)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}
// The same sums of n <= kLanes vectors at once: out[j] = sum_lanes(v[j]), bit for bit.
template <int N>
INLINE void sum_each(const V* v, float* out) {
#if defined(__AVX512F__)
  if constexpr (N == 8 || N == 16) {
    __m512 a[16], b[8], c[4], d[2];
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) a[j] = (__m512)v[j];
#pragma GCC unroll 16
    for (int j = 0; j < N / 2; ++j)  // two vectors a register: lanes (i, i + 8)
      b[j] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * j], a[2 * j + 1], 0x44),
                           _mm512_shuffle_f32x4(a[2 * j], a[2 * j + 1], 0xee));
#pragma GCC unroll 16
    for (int j = 0; j < N / 4; ++j)  // four: (i, i + 4)
      c[j] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * j], b[2 * j + 1], 0x88),
                           _mm512_shuffle_f32x4(b[2 * j], b[2 * j + 1], 0xdd));
#pragma GCC unroll 16
    for (int j = 0; j < N / 8; ++j)  // eight: (i, i + 2)
      d[j] = _mm512_add_ps(_mm512_shuffle_ps(c[2 * j], c[2 * j + 1], 0x44),
                           _mm512_shuffle_ps(c[2 * j], c[2 * j + 1], 0xee));
    const __m512 last = N == 16 ? d[1] : d[0];
    float sums[16];
    _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_shuffle_ps(d[0], last, 0x88), _mm512_shuffle_ps(d[0], last, 0xdd)));
    // 128-bit group g holds vectors g, g + 4, then the same of the upper eight.
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) out[j] = sums[(j % 4) * 4 + j / 4];
    return;
  }
#elif defined(__aarch64__)
  if constexpr (N % 4 == 0) {
    float32x4_t half[N / 2];
#pragma GCC unroll 8
    for (int j = 0; j < N / 2; ++j) {  // two vectors a register: lanes (i, i + 2)
      const auto a = (float64x2_t)v[2 * j], b = (float64x2_t)v[2 * j + 1];
      half[j] = vaddq_f32((float32x4_t)vzip1q_f64(a, b), (float32x4_t)vzip2q_f64(a, b));
    }
#pragma GCC unroll 8
    for (int j = 0; j < N / 4; ++j) vst1q_f32(out + 4 * j, vpaddq_f32(half[2 * j], half[2 * j + 1]));
    return;
  }
#endif
#pragma GCC unroll 16
  for (int j = 0; j < N; ++j) out[j] = sum_lanes(v[j]);
}

INLINE V maximum(V a, V b) { return (V)(a > b ? (VI)a : (VI)b); }
INLINE float max_lanes(V v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// exp(x) for x <= 88, relative error below 2e-7; exactly 0 below -87.
INLINE V exp_v(V x) {
  const V low = splat(-87.f);
  const V magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const V z = maximum(x, low);
  const V n = fma(z, splat(1.44269504088896341f), magic) - magic;
  V r = fma(n, splat(-0.693359375f), z);      // ln 2 in two parts; the first is exact in 9 bits
  r = fma(n, splat(2.12194440054690583e-4f), r);
  V p = splat(1.f / 5040);
  p = fma(p, r, splat(1.f / 720));
  p = fma(p, r, splat(1.f / 120));
  p = fma(p, r, splat(1.f / 24));
  p = fma(p, r, splat(1.f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.f));
  p = fma(p, r, splat(1.f));
  const VI scale = (__builtin_convertvector(n, VI) + 127) << 23;
  return (V)(x < low ? (VI)V{} : (VI)(p * (V)scale));
}

// How weights are stored. wide(p): kLanes of them as floats, exactly; wide_part: the first n, zeros behind.
struct F32 {
  typedef float T;
  INLINE V wide(const T* p) { return load(p); }
  INLINE V wide_part(const T* p, int64_t n) { return load_part(p, n); }
};

struct BF16 {
  typedef uint16_t T;
  INLINE V wide_bits(VH h) {
#if defined(__aarch64__)
    return (V)vshll_n_u16((uint16x4_t)h, 16);  // compilers take the conversion below apart, lane by lane
#else
    return (V)(__builtin_convertvector(h, VU) << 16);
#endif
  }
  INLINE V wide(const T* p) { return wide_bits(*reinterpret_cast<const VHUnaligned*>(p)); }
  INLINE V wide_part(const T* p, int64_t n) {
    VH h = {};
    std::memcpy(&h, p, n * sizeof(T));
    return wide_bits(h);
  }
};

struct F16 {
  typedef uint16_t T;
  INLINE V wide_bits(VH h) {
#if defined(__AVX512F__)
    return (V)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
    return (V)_mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
    return (V)vcvt_f32_f16((float16x4_t)h);
#else
    // Move the 15 bits under the float exponent and multiply by 2^112: exact, subnormals included; then mend inf/nan.
    const VU u = __builtin_convertvector(h, VU);
    const V scaled = (V)((u & 0x7fffu) << 13) * splat(5.192296858534828e33f);
    const VU special = (VU)(scaled >= splat(65536.f)) & 0x7f800000u;
    return (V)((VU)scaled | special | ((u & 0x8000u) << 16));
#endif
  }
  INLINE V wide(const T* p) { return wide_bits(*reinterpret_cast<const VHUnaligned*>(p)); }
  INLINE V wide_part(const T* p, int64_t n) {
    VH h = {};
    std::memcpy(&h, p, n * sizeof(T));
    return wide_bits(h);
  }
};

}  // namespace
