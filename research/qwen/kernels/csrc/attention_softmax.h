// Sizes of register tiles, the state of an attention task, and its softmax. Included by attention_isa.cc only.
#pragma once
#include "attention_cache.h"

namespace {

using qwen::kGroup;
using qwen::kKeyBlock;
using qwen::kPart;
using qwen::kQueryBlock;

#if defined(__aarch64__)
constexpr int kWide = 4;                          // vectors side by side in a register tile
#else
constexpr int kWide = 2;
#endif
constexpr int kSlab = kWide * kLanes;             // floats of a tile's row
constexpr int kRows = kLanes == 16 ? 8 : 4;       // queries of a register tile
constexpr int kInGroup = kGroup / kLanes;         // vectors of a group of keys
constexpr int kDirect = 4 / kInGroup < 1 ? 1 : 4 / kInGroup;  // groups whose scores a lone query sums at once
constexpr int kBlockGroups = kKeyBlock / kGroup;
static_assert(kKeyBlock % kSlab == 0 && kQueryBlock % kLanes == 0 && kBlockGroups % kDirect == 0, "whole tiles");

// Softmax state and operands of a block of queries. Tiled arrays: [tile of queries][slab][row][kSlab].
struct Scratch {
  float *query;                    // [query][d]
  float *keys;                     // [slab of keys][d][kSlab]
  float *values;                   // [slab of d][key][kSlab]
  float *scores, *weights;         // [query][key]; weights: of tiles only
  float *sum, *total;              // tiled
  float *peak, *mass, *factor;     // of the part
  float *total_peak, *total_mass;
  float *key_scale, *value_scale;  // of the key block
  float *row;                      // [d]
  int64_t slabs;                   // of d
};

static int64_t scratch_size(int64_t d) {
  const int64_t padded = round_up(d, kSlab);
  return round_up(kQueryBlock * d, 16) + kKeyBlock * d + kKeyBlock * padded + 2 * kQueryBlock * kKeyBlock +
         2 * kQueryBlock * padded + 5 * kQueryBlock + 2 * kKeyBlock + padded;
}

static Scratch carve(float* p, int64_t d) {
  Scratch s;
  s.slabs = round_up(d, kSlab) / kSlab;
  const int64_t tiled = kQueryBlock * s.slabs * kSlab;
  s.query = p, p += round_up(kQueryBlock * d, 16);
  s.keys = p, p += kKeyBlock * d;
  s.values = p, p += kKeyBlock * s.slabs * kSlab;
  s.scores = p, p += kQueryBlock * kKeyBlock;
  s.weights = p, p += kQueryBlock * kKeyBlock;
  s.sum = p, p += tiled;
  s.total = p, p += tiled;
  float** const small[] = {&s.peak, &s.mass, &s.factor, &s.total_peak, &s.total_mass};
  for (float** one : small) *one = p, p += kQueryBlock;
  s.key_scale = p, p += kKeyBlock;
  s.value_scale = p, p += kKeyBlock;
  s.row = p;
  return s;
}

// sum[r] += left[r * step] * right, for the rows of a register tile.
template <int R, int W>
INLINE void add_products(const float* left, int64_t step, const V (&right)[W], V (&sum)[R][W]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const V x = splat(left[r * step]);
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) sum[r][w] = fma(x, right[w], sum[r][w]);
  }
}
// A tile to rows of `step` floats, and back with a factor for each row.
template <int R, int W>
INLINE void store_tile(const V (&sum)[R][W], float* to, int64_t step) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) store(to + r * step + w * kLanes, sum[r][w]);
}
template <int R, int W>
INLINE void load_tile(const float* from, int64_t step, const float* factor, V (&sum)[R][W]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) sum[r][w] = load(from + r * step + w * kLanes) * splat(factor[r]);
}

// Highest score of the first `seen` keys of a row (and `peak`); surplus scores become -inf.
template <class F>
INLINE float highest(float* p, const float* key_scale, float peak, int64_t seen) {
  V best = splat(peak);
  if constexpr (kScaled<F>)
    for (int64_t j = 0; j < kKeyBlock; j += kLanes) store(p + j, load(p + j) * load(key_scale + j));
  for (int64_t j = seen; j < kKeyBlock; ++j) p[j] = -__builtin_inff();
  for (int64_t j = 0; j < kKeyBlock; j += kLanes) best = maximum(best, load(p + j));
  return max_all(best);
}

// Scores to weights relative to the peak; returns their sum.
template <class F>
INLINE float weigh(float* p, const float* value_scale, float peak) {
  V sum = {};
  for (int64_t j = 0; j < kKeyBlock; j += kLanes) {
    const V e = exp_v(load(p + j) - splat(peak));
    sum = sum + e;
    if constexpr (kScaled<F>) {
      const V scaled = e * load(value_scale + j);
      store(p + j, (V)(e == V{} ? (VI)V{} : (VI)scaled));  // a scale nobody wrote must not make 0 a NaN
    } else {
      store(p + j, e);
    }
  }
  return sum_lanes(sum);
}

// total = total and part, both relative to their peaks; n floats in runs of `run`, `stride` apart.
INLINE void merge_part(float* total, float* total_peak, float* total_mass, const float* part, float peak, float mass,
                       int64_t runs, int64_t run, int64_t stride) {
  if (peak == -__builtin_inff()) return;
  const float next = peak > *total_peak ? peak : *total_peak;
  const V old = exp_v(splat(*total_peak - next)), add = exp_v(splat(peak - next));
  *total_mass = *total_mass * old[0] + mass * add[0];
  *total_peak = next;
  for (int64_t r = 0; r < runs; ++r)
    for (int64_t i = 0; i < run; i += kLanes) {
      float* to = total + r * stride + i;
      store(to, fma(load(part + r * stride + i), add, load(to) * old));
    }
}

static void clear(float* sum, int64_t floats, float* peak, float* mass, int64_t rows) {
  std::memset(sum, 0, floats * sizeof(float));
  for (int64_t q = 0; q < rows; ++q) peak[q] = -__builtin_inff(), mass[q] = 0;
}

// seen(q): how many keys from `first` on query q sees.
template <class F, class Seen>
INLINE void soften(const Scratch& s, int64_t rows, Seen seen) {
  float next[kQueryBlock];
  for (int64_t q = 0; q < rows; ++q) {
    const bool sees = seen(q) > 0;
    next[q] = sees ? highest<F>(s.scores + q * kKeyBlock, s.key_scale, s.peak[q], seen(q)) : s.peak[q];
    s.factor[q] = sees ? s.peak[q] - next[q] : 0.f;
  }
  for (int64_t q = 0; q < rows; q += kLanes) store(s.factor + q, exp_v(load(s.factor + q)));
  for (int64_t q = 0; q < rows; ++q) {
    if (seen(q) > 0) {
      s.mass[q] = s.mass[q] * s.factor[q] + weigh<F>(s.scores + q * kKeyBlock, s.value_scale, next[q]);
      s.peak[q] = next[q];
    } else {
      std::memset(s.scores + q * kKeyBlock, 0, kKeyBlock * sizeof(float));
    }
  }
}

}  // namespace
