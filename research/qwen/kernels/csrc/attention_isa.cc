// Causal attention over the paged cache. Keys are taken in blocks at absolute positions 0, 64, 128, ..., softmax is made
// over parts of 512 keys, parts are merged in order, and every sum runs in one order: the result of a query depends
// neither on the batch, nor on how the prompt was cut into chunks, nor on the way (attend, attend_one) it was computed.
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
constexpr int kTiles = kQueryBlock / kRows;
constexpr int kInGroup = kGroup / kLanes;         // vectors of a group of keys
constexpr int kDirect = 4 / kInGroup < 1 ? 1 : 4 / kInGroup;  // groups whose scores a lone query sums at once
constexpr int kBlockGroups = kKeyBlock / kGroup;
static_assert(kKeyBlock % kSlab == 0 && kQueryBlock % kLanes == 0 && kBlockGroups % kDirect == 0, "whole tiles");

// Softmax state and operands of a block of queries. Tiled arrays: [tile of queries][slab][row][kSlab].
struct Scratch {
  float *query;                    // [query][d]
  float *keys;                     // [slab of keys][d][kSlab]
  float *values;                   // [slab of d][key][kSlab]
  float *scores;                   // [query][key]
  float *sum, *total;              // tiled
  float *peak, *mass, *factor;     // of the part
  float *total_peak, *total_mass;
  float *key_scale, *value_scale;  // of the key block
  float *row;                      // [d]
  int64_t slabs;                   // of d
};

static int64_t scratch_size(int64_t d) {
  const int64_t padded = round_up(d, kSlab);
  return round_up(kQueryBlock * d, 16) + kKeyBlock * d + kKeyBlock * padded + kQueryBlock * kKeyBlock +
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
  s.sum = p, p += tiled;
  s.total = p, p += tiled;
  float** const small[] = {&s.peak, &s.mass, &s.factor, &s.total_peak, &s.total_mass};
  for (float** one : small) *one = p, p += kQueryBlock;
  s.key_scale = p, p += kKeyBlock;
  s.value_scale = p, p += kKeyBlock;
  s.row = p;
  return s;
}

// ---- softmax ----

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

// ---- a block of queries: keys and values are widened once, then register tiles ----

// Keys first .. last (at most kKeyBlock of them) to s.keys, and all scales; surplus columns keep what was there.
template <class F>
static void widen_keys(const AttentionArgs& a, const AttentionTask& t, const Scratch& s, int64_t first, int64_t last) {
  const int64_t lanes = qwen::kv_lanes(a.block_size), count = smaller(kKeyBlock, last + 1 - first);
  for (int64_t j = 0; j < count; j += lanes) {
    const Place at = place_at(a, t, first + j);
    const auto* key = key_at<F>(a, at, lanes);
    if (lanes == kGroup) {
      for (int v = 0; v < kInGroup; ++v) {
        const int64_t column = j + v * kLanes;
        float* to = s.keys + column / kSlab * kSlab * a.d + column % kSlab;
        for (int64_t i = 0; i < a.d; ++i) store(to + i * kSlab, F::wide(key + i * kGroup + v * kLanes));
      }
    } else {
      for (int64_t n = j; n < j + lanes; ++n)
        for (int64_t i = 0; i < a.d; ++i)
          s.keys[(n / kSlab * a.d + i) * kSlab + n % kSlab] = F::wide_part(key + i * lanes + n - j, 1)[0];
    }
    if constexpr (kScaled<F>)
      for (int64_t n = j; n < j + lanes; ++n) {
        s.key_scale[n] = a.key_scales[scale_at(a, at) + n - j];
        s.value_scale[n] = a.value_scales[scale_at(a, at) + n - j];
      }
  }
}

template <class F>
static void widen_values(const AttentionArgs& a, const AttentionTask& t, const Scratch& s, int64_t first,
                         int64_t last) {
  const int64_t count = smaller(kKeyBlock, last + 1 - first);
  for (int64_t j = 0; j < count; ++j) {
    const auto* value = value_at<F>(a, place_at(a, t, first + j));
    for (int64_t i = 0; i < s.slabs * kSlab; i += kLanes) {
      const V v = i + kLanes <= a.d ? F::wide(value + i) : (i < a.d ? F::wide_part(value + i, a.d - i) : V{});
      store(s.values + (i / kSlab * kKeyBlock + j) * kSlab + i % kSlab, v);
    }
  }
}

// kRows x kSlab products of `left` [row][left_step] and `right` [k][kSlab], added to sum in the order of k.
INLINE void multiply(const float* left, int64_t left_step, const float* right, int64_t k, V (&sum)[kRows][kWide]) {
  for (int64_t i = 0; i < k; ++i) {
    V b[kWide];
#pragma GCC unroll 8
    for (int g = 0; g < kWide; ++g) b[g] = load(right + i * kSlab + g * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V x = splat(left[r * left_step + i]);
#pragma GCC unroll 8
      for (int g = 0; g < kWide; ++g) sum[r][g] = fma(x, b[g], sum[r][g]);
    }
  }
}

static void score_tile(const Scratch& s, int64_t d, int64_t tile, int64_t key) {
  V sum[kRows][kWide] = {};
  multiply(s.query + tile * kRows * d, d, s.keys + key * d, d, sum);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int g = 0; g < kWide; ++g) store(s.scores + (tile * kRows + r) * kKeyBlock + key + g * kLanes, sum[r][g]);
}

static void value_tile(const Scratch& s, int64_t tile, int64_t slab, int64_t keys) {
  float* place = s.sum + (tile * s.slabs + slab) * kRows * kSlab;
  V sum[kRows][kWide];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int g = 0; g < kWide; ++g)
      sum[r][g] = load(place + r * kSlab + g * kLanes) * splat(s.factor[tile * kRows + r]);
  multiply(s.scores + tile * kRows * kKeyBlock, kKeyBlock, s.values + slab * kKeyBlock * kSlab, keys, sum);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int g = 0; g < kWide; ++g) store(place + r * kSlab + g * kLanes, sum[r][g]);
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

// One block of keys for all queries. Tiles skip what none of their queries sees.
template <class F>
static void attend_block(const AttentionArgs& a, const AttentionTask& t, const Scratch& s, int64_t first) {
  const int64_t last = t.position + t.count - 1, tiles = (t.count + kRows - 1) / kRows;
  const auto seen = [&](int64_t q) { return smaller(t.position + q, last) + 1 - first; };
  const auto seen_by_tile = [&](int64_t tile) { return smaller(seen(tile * kRows + kRows - 1), kKeyBlock); };
  widen_keys<F>(a, t, s, first, last);
  for (int64_t key = 0; key < kKeyBlock; key += kSlab)
    for (int64_t tile = 0; tile < tiles; ++tile)
      if (key < seen_by_tile(tile)) score_tile(s, a.d, tile, key);
  soften<F>(s, tiles * kRows, seen);
  widen_values<F>(a, t, s, first, last);
  for (int64_t slab = 0; slab < s.slabs; ++slab)
    for (int64_t tile = 0; tile < tiles; ++tile)
      if (seen_by_tile(tile) > 0) value_tile(s, tile, slab, seen_by_tile(tile));
}

static void clear(float* sum, int64_t floats, float* peak, float* mass, int64_t rows) {
  std::memset(sum, 0, floats * sizeof(float));
  for (int64_t q = 0; q < rows; ++q) peak[q] = -__builtin_inff(), mass[q] = 0;
}

template <class F>
static void attend_as(const AttentionArgs& a, const AttentionTask& t, float* scratch) {
  const Scratch s = carve(scratch, a.d);
  const int64_t width = a.heads * a.d, last = t.position + t.count - 1;
  const int64_t rows = round_up(t.count, kRows), tiled = rows * s.slabs * kSlab, step = kRows * kSlab;
  float* y = a.y + t.first_row * width + t.head * a.d;
  for (int64_t q = 0; q < t.count; ++q) std::memcpy(s.query + q * a.d, y + q * width, a.d * sizeof(float));
  std::memset(s.query + t.count * a.d, 0, (rows - t.count) * a.d * sizeof(float));
  std::memset(s.keys, 0, a.d * kKeyBlock * sizeof(float));
  clear(s.total, tiled, s.total_peak, s.total_mass, rows);
  for (int64_t part = 0; part <= last; part += kPart) {
    clear(s.sum, tiled, s.peak, s.mass, kQueryBlock);
    for (int64_t first = part; first < part + kPart && first <= last; first += kKeyBlock)
      attend_block<F>(a, t, s, first);
    for (int64_t q = 0; q < rows; ++q) {
      const int64_t at = q / kRows * s.slabs * step + q % kRows * kSlab;
      merge_part(s.total + at, s.total_peak + q, s.total_mass + q, s.sum + at, s.peak[q], s.mass[q], s.slabs, kSlab,
                 step);
    }
  }
  for (int64_t q = 0; q < t.count; ++q) {
    const float inverse = 1.f / s.total_mass[q];
    const float* from = s.total + q / kRows * s.slabs * step + q % kRows * kSlab;
    for (int64_t i = 0; i < a.d; i += kLanes) {
      const V v = load(from + i / kSlab * step + i % kSlab) * splat(inverse);
      i + kLanes <= a.d ? store(y + q * width + i, v) : store_part(y + q * width + i, v, a.d - i);
    }
  }
}

// ---- a lone query: keys and values are widened in registers, straight from the cache ----

INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Cached keys and values of one block of keys, by groups; groups behind the last key repeat the last.
template <class F>
struct Groups {
  const typename F::T *keys[kBlockGroups], *values[kBlockGroups];
  int64_t scales[kBlockGroups];
};
template <class F>
INLINE Groups<F> groups_at(const AttentionArgs& a, const AttentionTask& t, int64_t first) {
  Groups<F> found;
  for (int g = 0; g < kBlockGroups; ++g) {
    const Place at = place_at(a, t, smaller(first + g * kGroup, t.position / kGroup * kGroup));
    found.keys[g] = key_at<F>(a, at, kGroup);
    found.values[g] = value_at<F>(a, at);
    found.scales[g] = scale_at(a, at);
  }
  return found;
}

// Scores of kDirect groups of keys from group g on; their values are fetched meanwhile, which lie in runs as long.
template <class F>
INLINE void score_one(const Groups<F>& now, int g, const float* query, int64_t d, float* scores) {
  constexpr int64_t kLine = 64 / (kGroup * static_cast<int64_t>(sizeof(typename F::T)));  // dimensions in a cache line
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
  for (; i + kLine <= d; i += kLine) {
#pragma GCC unroll 8
    for (int n = 0; n < kDirect; ++n) fetch(now.values[g + n] + i * kGroup);
#pragma GCC unroll 8
    for (int64_t n = 0; n < kLine; ++n) step(i + n);
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
    if constexpr (kScaled<F>)
      for (int64_t g = 0; g < kBlockGroups; ++g) {
        std::memcpy(s.key_scale + g * kGroup, a.key_scales + now.scales[g], kGroup * sizeof(float));
        std::memcpy(s.value_scale + g * kGroup, a.value_scales + now.scales[g], kGroup * sizeof(float));
      }
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

template <class F>
static void attend_one_as(const AttentionArgs& a, const AttentionTask& t, float* scratch) {
  const Scratch s = carve(scratch, a.d);
  rotate_query(a, t.first_row, t.head, s.query);
  if (t.part < 0 || t.part == t.position / kPart) write_token<F>(a, t.first_row, t.head, s.row);
  if (t.part >= 0) {
    part_one<F>(a, t, s, t.part * kPart);
    float* to = t.partial + t.part * qwen::partial_size(a.d);
    std::memcpy(to, s.sum, a.d * sizeof(float));
    to[a.d] = *s.peak, to[a.d + 1] = *s.mass;
    return;
  }
  const int64_t padded = s.slabs * kSlab;
  clear(s.total, padded, s.total_peak, s.total_mass, 1);
  for (int64_t part = 0; part <= t.position; part += kPart) {
    part_one<F>(a, t, s, part);
    merge_part(s.total, s.total_peak, s.total_mass, s.sum, *s.peak, *s.mass, 1, padded, 0);
  }
  float* y = a.y + (t.first_row * a.heads + t.head) * a.d;
  const float inverse = 1.f / *s.total_mass;
  for (int64_t i = 0; i < a.d; ++i) y[i] = s.total[i] * inverse;
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

// ---- formats ----

template <class F>
static void rotate_as(const AttentionArgs& a, int64_t token, int64_t head, float* row) {
  rotate_query(a, token, head, a.y + (token * a.heads + head) * a.d);
  write_token<F>(a, token, head, row);
}

static void rotate(const AttentionArgs& a, int64_t token, int64_t head, float* scratch) {
  constexpr decltype(&rotate_as<KvF32>) kBy[] = {rotate_as<KvF32>, rotate_as<KvBF16>, rotate_as<KvI8>};
  kBy[a.format](a, token, head, scratch);
}

static void attend(const AttentionArgs& a, const AttentionTask& t, float* scratch) {
  constexpr decltype(&attend_as<KvF32>) kBy[] = {attend_as<KvF32>, attend_as<KvBF16>, attend_as<KvI8>};
  kBy[a.format](a, t, scratch);
}

static void attend_one(const AttentionArgs& a, const AttentionTask& t, float* scratch) {
  constexpr decltype(&attend_as<KvF32>) kBy[] = {attend_one_as<KvF32>, attend_one_as<KvBF16>, attend_one_as<KvI8>};
  kBy[a.format](a, t, scratch);
}

}  // namespace

namespace qwen {

const AttentionTable* QWEN_TABLE() {
  static const AttentionTable table = {scratch_size, rotate, attend, attend_one, merge};
  return &table;
}

}  // namespace qwen
