// The steps of integer products on aarch64, with dotprod where a file is compiled for it. Included by quant_dot.h.
#pragma once
#include "vec.h"

namespace {

INLINE VB low_nibbles(VB v) { return (VB)vandq_u8((uint8x16_t)v, vdupq_n_u8(15)); }
INLINE VB high_nibbles(VB v) { return (VB)vshrq_n_u8((uint8x16_t)v, 4); }

// There are products of signed bytes only, so eight-bit codes are moved down by 128 and their zeros with them.
template <int BITS>
constexpr int kOffset = BITS == 8 ? 128 : 0;

template <int BITS>
INLINE int8x16_t signed_codes(VB codes) {
  return (int8x16_t)(BITS == 8 ? (VB)veorq_u8((uint8x16_t)codes, vdupq_n_u8(128)) : codes);
}

// acc + codes . x, with the four activations number LANE of the sixteen in x for every column.
template <int LANE>
INLINE int32x4_t dot_lane(int32x4_t acc, int8x16_t codes, int8x16_t x) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_laneq_s32(acc, codes, x, LANE);
#else
  // Pairs of products fit 16 bits: activations are at least -127, so a pair is at most 2 * 128 * 127.
  const int8x16_t four = vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(x), LANE));
  const int16x8_t low = vmull_s8(vget_low_s8(codes), vget_low_s8(four)), high = vmull_high_s8(codes, four);
  return vpadalq_s16(acc, vpaddq_s16(low, high));
#endif
}

// 64 bytes of codes, four inputs (eight of four bits) of 16 columns each, with activations from number LANE on.
template <int BITS, int R, int LANE>
INLINE void dot_codes(const uint8_t* codes, const int8x16_t (&x)[R], int32x4_t (&first)[R][4],
                      int32x4_t (&second)[R][4]) {
#pragma GCC unroll 4
  for (int p = 0; p < 4; ++p) {
    const VB v = load_codes(codes + 16 * p);
    const int8x16_t low = signed_codes<BITS>(BITS == 8 ? v : low_nibbles(v)), high = (int8x16_t)high_nibbles(v);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      first[r][p] = dot_lane<LANE>(first[r][p], low, x[r]);
      if constexpr (BITS == 4) second[r][p] = dot_lane<LANE + 1>(second[r][p], high, x[r]);
    }
  }
}

// Exact sums of one block: R <= 4 rows x 16 columns. Activations are loaded sixteen at a time and taken by lane, so
// that 16 sums, the activations of four rows and the codes fit the registers.
template <int BITS, int R>
INLINE void block_dot(const uint8_t* codes, const int8_t* q, int64_t stride, int64_t block, VI (&dot)[R][kParts]) {
#if defined(__ARM_FEATURE_DOTPROD)
  constexpr int kChains = R == 1 ? 4 : R == 2 ? 2 : 1;  // independent sums hide the latency of a step
#else
  constexpr int kChains = R == 1 ? 2 : 1;  // a step takes more registers
#endif
  constexpr int64_t kAheadBytes = 1024;
  int32x4_t sum[kChains][R][4] = {};
  for (int64_t i = 0; i < block; i += 16, codes += 32 * BITS) {
    int8x16_t x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = vld1q_s8(q + r * stride + i);
#pragma GCC unroll 4
    for (int line = 0; line < BITS / 2; ++line) __builtin_prefetch(codes + kAheadBytes + line * 64);
    if constexpr (BITS == 8) {
      dot_codes<8, R, 0>(codes, x, sum[0], sum[0]);
      dot_codes<8, R, 1>(codes + 64, x, sum[1 % kChains], sum[0]);
      dot_codes<8, R, 2>(codes + 128, x, sum[2 % kChains], sum[0]);
      dot_codes<8, R, 3>(codes + 192, x, sum[3 % kChains], sum[0]);
    } else {
      dot_codes<4, R, 0>(codes, x, sum[0], sum[1 % kChains]);
      dot_codes<4, R, 2>(codes + 64, x, sum[2 % kChains], sum[3 % kChains]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      dot[r][p] = (VI)sum[0][r][p];
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) dot[r][p] += (VI)sum[c][r][p];
    }
}

}  // namespace
