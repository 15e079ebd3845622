// A lone query: keys and values are widened in registers, straight from the cache. Included by attention_isa.cc only.
#pragma once
#include "attention_softmax.h"

namespace {

INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Dimensions of a group of keys in a cache line.
template <class F>
constexpr int64_t kLine = 64 / (kGroup * static_cast<int64_t>(sizeof(typename F::T)));

// Cached keys and values of one block of keys, by groups; groups behind the last key repeat the last.
template <class F>
struct Groups {
  const typename F::T *keys[kBlockGroups], *values[kBlockGroups];
  int64_t scales[kBlockGroups];
};
template <class F>
INLINE Groups<F> groups_at(const AttentionArgs& a, const AttentionTask& t, int64_t first) {
  const int64_t last = (t.position + t.count - 1) / kGroup * kGroup;
  Groups<F> found;
  for (int g = 0; g < kBlockGroups; ++g) {
    const Place at = place_at(a, t, smaller(first + g * kGroup, last));
    found.keys[g] = key_at<F>(a, at, kGroup);
    found.values[g] = value_at<F>(a, at);
    found.scales[g] = scale_at(a, at);
  }
  return found;
}

template <class F>
INLINE void read_scales(const AttentionArgs& a, const Groups<F>& now, const Scratch& s) {
  for (int64_t g = 0; g < kBlockGroups; ++g) {
    std::memcpy(s.key_scale + g * kGroup, a.key_scales + now.scales[g], kGroup * sizeof(float));
    std::memcpy(s.value_scale + g * kGroup, a.value_scales + now.scales[g], kGroup * sizeof(float));
  }
}

// Scores of kDirect groups of keys from group g on; their values are fetched meanwhile, which lie in runs as long.
template <class F>
INLINE void score_one(const Groups<F>& now, int g, const float* query, int64_t d, float* scores) {
  V sum[kDirect][kInGroup] = {};
  const auto step = [&](int64_t i) {
    const V x = splat(query[i]);
#pragma GCC unroll 8
    for (int n = 0; n < kDirect; ++n)
#pragma GCC unroll 8
      for (int v = 0; v < kInGroup; ++v)
        sum[n][v] = fma(x, F::wide(now.keys[g + n] + i * kGroup + v * kLanes), sum[n][v]);
  };
  int64_t i = 0;
  for (; i + kLine<F> <= d; i += kLine<F>) {
#pragma GCC unroll 8
    for (int n = 0; n < kDirect; ++n) fetch(now.values[g + n] + i * kGroup);
#pragma GCC unroll 8
    for (int64_t n = 0; n < kLine<F>; ++n) step(i + n);
  }
  for (; i < d; ++i) step(i);
#pragma GCC unroll 8
  for (int n = 0; n < kDirect; ++n)
#pragma GCC unroll 8
    for (int v = 0; v < kInGroup; ++v) store(scores + (g + n) * kGroup + v * kLanes, sum[n][v]);
}

// sum[i ..] = sum * factor + weights x values for G vectors of dimensions, keys in order. As many bytes of the next
// block's keys are fetched meanwhile, from all its groups in turn: several streams are read faster than one.
template <class F, int G>
INLINE void mix_one(const Groups<F>& now, const Groups<F>& next, const float* weights, int64_t keys, int64_t d, int64_t i,
                    float factor, float* out) {
  constexpr int64_t kSize = sizeof(typename F::T), kLines = G * kLanes * kSize / 64;
  V sum[G];
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) sum[g] = load(out + i + g * kLanes) * splat(factor);
  for (int64_t j = 0; j < keys; ++j) {
    const auto* value = now.values[j / kGroup] + j % kGroup * d + i;
    for (int64_t n = i * kSize + j * kLines; n < i * kSize + (j + 1) * kLines; ++n)
      fetch(reinterpret_cast<const char*>(next.keys[n % kBlockGroups]) + n / kBlockGroups * 64);
    const V x = splat(weights[j]);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g)
      sum[g] = fma(x, G == 1 && i + kLanes > d ? F::wide_part(value, d - i) : F::wide(value + g * kLanes), sum[g]);
  }
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) store(out + i + g * kLanes, sum[g]);
}

// Keys part .. part + kPart - 1 to s.sum, s.peak[0], s.mass[0].
template <class F>
static void part_one(const AttentionArgs& a, const AttentionTask& t, const Scratch& s, int64_t part) {
  clear(s.sum, s.slabs * kSlab, s.peak, s.mass, 1);
  Groups<F> now = groups_at<F>(a, t, part);
  for (int64_t first = part; first < part + kPart && first <= t.position; first += kKeyBlock) {
    const Groups<F> next = groups_at<F>(a, t, first + kKeyBlock);
    const int64_t seen = smaller(t.position + 1 - first, kKeyBlock);
    for (int g = 0; g < kBlockGroups && g * kGroup < seen; g += kDirect)
      score_one<F>(now, g, s.query, a.d, s.scores);
    if constexpr (kScaled<F>) read_scales(a, now, s);
    const float peak = highest<F>(s.scores, s.key_scale, *s.peak, seen);
    const float factor = exp_v(splat(*s.peak - peak))[0];
    *s.mass = *s.mass * factor + weigh<F>(s.scores, s.value_scale, peak);
    *s.peak = peak;
    int64_t i = 0;
    for (; i + 8 * kLanes <= a.d; i += 8 * kLanes) mix_one<F, 8>(now, next, s.scores, seen, a.d, i, factor, s.sum);
    for (; i + 2 * kLanes <= a.d; i += 2 * kLanes) mix_one<F, 2>(now, next, s.scores, seen, a.d, i, factor, s.sum);
    for (; i < a.d; i += kLanes) mix_one<F, 1>(now, next, s.scores, seen, a.d, i, factor, s.sum);
    now = next;
  }
}

// `make_part(part)`: keys part .. part + kPart - 1 to s.sum, s.peak[0], s.mass[0].
template <class F, class MakePart>
INLINE void attend_by_parts(const AttentionArgs& a, const AttentionTask& t, const Scratch& s, MakePart make_part) {
  if (t.part < 0 || t.part == t.position / kPart) write_token<F>(a, t.first_row, t.head, s.row);
  if (t.part >= 0) {
    make_part(t.part * kPart);
    float* to = t.partial + t.part * qwen::partial_size(a.d);
    std::memcpy(to, s.sum, a.d * sizeof(float));
    to[a.d] = *s.peak, to[a.d + 1] = *s.mass;
    return;
  }
  const int64_t padded = s.slabs * kSlab;
  clear(s.total, padded, s.total_peak, s.total_mass, 1);
  for (int64_t part = 0; part <= t.position; part += kPart) {
    make_part(part);
    merge_part(s.total, s.total_peak, s.total_mass, s.sum, *s.peak, *s.mass, 1, padded, 0);
  }
  float* y = a.y + (t.first_row * a.heads + t.head) * a.d;
  const float inverse = 1.f / *s.total_mass;
  for (int64_t i = 0; i < a.d; ++i) y[i] = s.total[i] * inverse;
}

template <class F>
static void attend_one_as(const AttentionArgs& a, const AttentionTask& t, float* scratch) {
  const Scratch s = carve(scratch, a.d);
  rotate_query(a, t.first_row, t.head, s.query);
  attend_by_parts<F>(a, t, s, [&](int64_t part) { part_one<F>(a, t, s, part); });
}

static void merge(const AttentionArgs& a, const AttentionTask& t, float* scratch) {
  const Scratch s = carve(scratch, a.d);
  const int64_t padded = s.slabs * kSlab;
  clear(s.total, padded, s.total_peak, s.total_mass, 1);
  std::memset(s.sum, 0, padded * sizeof(float));
  for (int64_t part = 0; part < qwen::parts(t.position + 1); ++part) {
    const float* from = t.partial + part * qwen::partial_size(a.d);
    std::memcpy(s.sum, from, a.d * sizeof(float));
    merge_part(s.total, s.total_peak, s.total_mass, s.sum, from[a.d], from[a.d + 1], 1, padded, 0);
  }
  float* y = a.y + (t.first_row * a.heads + t.head) * a.d;
  const float inverse = 1.f / *s.total_mass;
  for (int64_t i = 0; i < a.d; ++i) y[i] = s.total[i] * inverse;
}

}  // namespace
