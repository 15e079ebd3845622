// The one step of integer products that depends on the instruction set: sums of four products of unsigned codes with
// signed activations, per column. Include after vec.h.
#pragma once
#include "vec.h"

namespace {

constexpr int kParts = 16 / kLanes;  // vectors per block of 16 columns
typedef uint8_t VB __attribute__((vector_size(4 * QWEN_LANES)));  // kLanes columns, four inputs each
typedef uint8_t VBUnaligned __attribute__((vector_size(4 * QWEN_LANES), aligned(1), may_alias));

INLINE VB load_codes(const uint8_t* p) { return *reinterpret_cast<const VBUnaligned*>(p); }

}  // namespace

#if defined(__aarch64__)
#include "quant_neon.h"
#else

namespace {

INLINE VB low_nibbles(VB v) { return v & 15; }
INLINE VB high_nibbles(VB v) { return (VB)((VU)v >> 4) & 15; }

// Four activations, the same for every column.
INLINE VI four_inputs(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
#if defined(__AVX512F__)
  return (VI)_mm512_set1_epi32(four);
#else
  return four - VI{};
#endif
}

// acc + (codes - kOffset<BITS>) . x; an instruction set with signed products only may move codes by an offset.
template <int BITS>
constexpr int kOffset = 0;

template <int BITS>
INLINE VI dot_step(VI acc, VB codes, VI x) {
#if defined(__AVX512VNNI__)
  return (VI)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, (__m512i)x);
#elif defined(__AVX512F__)
  if constexpr (BITS == 4)  // pairs are at most 2 * 15 * 128: no saturation
    return acc + (VI)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)codes, (__m512i)x), _mm512_set1_epi16(1));
  const __m512i even = _mm512_and_si512((__m512i)codes, _mm512_set1_epi16(255));
  const __m512i odd = _mm512_srli_epi16((__m512i)codes, 8);
  const __m512i x_even = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)x, 8), 8);
  const __m512i x_odd = _mm512_srai_epi16((__m512i)x, 8);
  return acc + (VI)_mm512_madd_epi16(even, x_even) + (VI)_mm512_madd_epi16(odd, x_odd);
#elif defined(__AVX2__)
  if constexpr (BITS == 4)
    return acc + (VI)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)codes, (__m256i)x), _mm256_set1_epi16(1));
  const __m256i even = _mm256_and_si256((__m256i)codes, _mm256_set1_epi16(255));
  const __m256i odd = _mm256_srli_epi16((__m256i)codes, 8);
  const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)x, 8), 8);
  const __m256i x_odd = _mm256_srai_epi16((__m256i)x, 8);
  return acc + (VI)_mm256_madd_epi16(even, x_even) + (VI)_mm256_madd_epi16(odd, x_odd);
#elif defined(__SSE2__)
  const __m128i even = _mm_and_si128((__m128i)codes, _mm_set1_epi16(255));
  const __m128i odd = _mm_srli_epi16((__m128i)codes, 8);
  const __m128i x_even = _mm_srai_epi16(_mm_slli_epi16((__m128i)x, 8), 8);
  const __m128i x_odd = _mm_srai_epi16((__m128i)x, 8);
  return acc + (VI)_mm_madd_epi16(even, x_even) + (VI)_mm_madd_epi16(odd, x_odd);
#else
  for (int j = 0; j < 4; ++j) acc += (VI)(((VU)codes >> (8 * j)) & 255u) * ((x << (24 - 8 * j)) >> 24);
  return acc;
#endif
}

}  // namespace

#endif
