// Storage formats of the KV cache, where a token lies in it, and how it is written. Included by attention_isa.cc only.
#pragma once
#include "attention.h"
#include "vec.h"

namespace {

using qwen::AttentionArgs;
using qwen::AttentionTask;

INLINE float max_all(V v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  return max_lanes(v);
#endif
}

INLINE float largest_magnitude(const float* x, int64_t n) {
  V most = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const V v = i + kLanes <= n ? load(x + i) : load_part(x + i, n - i);
    most = maximum(most, maximum(v, -v));
  }
  return max_all(most);
}

// write(x, to, step): d floats as stored numbers, `step` apart. Returns the scale.
struct KvF32 : F32 {
  INLINE float write(const float* x, int64_t d, T* to, int64_t step) {
    for (int64_t i = 0; i < d; ++i) to[i * step] = x[i];
    return 1;
  }
};

struct KvBF16 : BF16 {
  INLINE float write(const float* x, int64_t d, T* to, int64_t step) {
    for (int64_t i = 0; i < d; i += kLanes) {
      const int64_t n = smaller(kLanes, d - i);
      const VU u = (VU)(n == kLanes ? load(x + i) : load_part(x + i, n));
      const VU even = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
      const VU bits = (VU)((u & 0x7fffffffu) > 0x7f800000u) & 0x7fc0u;  // a NaN stays one
      const VH h = __builtin_convertvector((VU)(bits != 0u ? bits : even), VH);
      if (step == 1) std::memcpy(to + i, &h, n * sizeof(T));
      else for (int64_t j = 0; j < n; ++j) to[(i + j) * step] = h[j];
    }
    return 1;
  }
};

struct KvI8 {
  typedef int8_t T;
  typedef int8_t VB __attribute__((vector_size(QWEN_LANES)));
  INLINE V wide(const T* p) {
#if defined(__AVX512F__)
    return (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    return (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
    int32_t four;
    std::memcpy(&four, p, sizeof four);
    return (V)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
#else
    VB b;
    std::memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(b, VI), V);
#endif
  }
  INLINE V wide_part(const T* p, int64_t n) {
    T full[kLanes] = {};
    std::memcpy(full, p, n);
    return wide(full);
  }
  INLINE float write(const float* x, int64_t d, T* to, int64_t step) {
    const float most = largest_magnitude(x, d);
    const bool nothing = !(most >= 1e-30f);  // also where 127 / most would overflow
    const float inverse = nothing ? 0.f : 127.f / most, magic = 12582912.f;  // adding 1.5 * 2^23 rounds to even
    for (int64_t i = 0; i < d; ++i)
      to[i * step] = static_cast<int8_t>(static_cast<int32_t>((x[i] * inverse + magic) - magic));
    return nothing ? 0.f : most / 127.f;
  }
};

template <class F>
constexpr bool kScaled = sizeof(typename F::T) == 1;

// Place of one head's part of a block, and of a token in it.
struct Place {
  int64_t block;  // (block, head) as one index
  int64_t offset;
};
INLINE Place place(const AttentionArgs& a, int64_t slot, int64_t head) {
  return {slot / a.block_size * a.heads + head, slot % a.block_size};
}
INLINE Place place_at(const AttentionArgs& a, const AttentionTask& t, int64_t position) {
  const int64_t block = a.tables[t.sequence * a.width + position / a.block_size];
  return {block * a.heads + t.head, position % a.block_size};
}
// The first dimension of a key; its others follow at distance `lanes`.
template <class F>
INLINE typename F::T* key_at(const AttentionArgs& a, Place p, int64_t lanes) {
  const int64_t group = p.offset / lanes * lanes;
  return static_cast<typename F::T*>(a.keys) + (p.block * a.block_size + group) * a.d + p.offset % lanes;
}
template <class F>
INLINE typename F::T* value_at(const AttentionArgs& a, Place p) {
  return static_cast<typename F::T*>(a.values) + (p.block * a.block_size + p.offset) * a.d;
}
INLINE int64_t scale_at(const AttentionArgs& a, Place p) { return p.block * a.block_size + p.offset; }

// Rotates on halves: element i with i + d/2.
INLINE void rotate_row(const float* x, const float* cos, const float* sin, float scale, int64_t half, float* y) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    y[i] = (a * cos[i] - b * sin[i]) * scale;
    y[i + half] = (b * cos[i] + a * sin[i]) * scale;
  }
}

INLINE void rotate_query(const AttentionArgs& a, int64_t token, int64_t head, float* to) {
  const int64_t half = a.d / 2;
  const float root = 1.f / __builtin_sqrtf(static_cast<float>(a.d));
  const float* q = a.qkv + (token * 3 * a.heads + head) * a.d;
  rotate_row(q, a.cos + token * half, a.sin + token * half, a.logn[token] * root, half, to);
}

// `row` is room for d floats.
template <class F>
INLINE void write_token(const AttentionArgs& a, int64_t token, int64_t head, float* row) {
  const int64_t half = a.d / 2, lanes = qwen::kv_lanes(a.block_size);
  const float *k = a.qkv + ((token * 3 + 1) * a.heads + head) * a.d, *v = k + a.heads * a.d;
  const Place to = place(a, a.slots[token], head);
  rotate_row(k, a.cos + token * half, a.sin + token * half, 1.f, half, row);
  const float key_scale = F::write(row, a.d, key_at<F>(a, to, lanes), lanes);
  const float value_scale = F::write(v, a.d, value_at<F>(a, to), 1);
  if constexpr (kScaled<F>) {
    a.key_scales[scale_at(a, to)] = key_scale;
    a.value_scales[scale_at(a, to)] = value_scale;
  }
}

}  // namespace
