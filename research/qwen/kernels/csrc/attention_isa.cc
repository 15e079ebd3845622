// Causal attention over the paged cache. Keys are taken in blocks at absolute positions 0, 64, 128, ... and every sum
// runs in one order, so the result of a query depends neither on the batch nor on how the prompt was cut into chunks.
#include "attention.h"

#include "vec.h"

namespace {

using qwen::AttentionArgs;
using qwen::AttentionTask;
using qwen::kKeyBlock;
using qwen::kQueryBlock;

constexpr int kGroup = 4;                         // vectors of keys (or of dimensions) per register tile
constexpr int kQueryTile = kLanes == 4 ? 2 : (kLanes == 8 ? 2 : 4);
static_assert(kKeyBlock % (kGroup * kLanes) == 0, "a key block is whole register tiles");

struct Scratch {
  float *query, *keys, *scores, *sum, *peak, *mass, *factor;
  const float **rows, **next;  // values of the keys of this block and of the block after it
  int64_t padded;
};

static int64_t attend_size(int64_t d) {
  const int64_t padded = round_up(d, kGroup * kLanes);
  return kQueryBlock * d + d * kKeyBlock + kQueryBlock * kKeyBlock + kQueryBlock * padded + 3 * kQueryBlock +
         4 * kKeyBlock;
}

static Scratch carve(float* p, int64_t d) {
  Scratch s;
  s.padded = round_up(d, kGroup * kLanes);
  s.rows = reinterpret_cast<const float**>(p), p += 2 * kKeyBlock;
  s.next = reinterpret_cast<const float**>(p), p += 2 * kKeyBlock;
  s.scores = p, p += kQueryBlock * kKeyBlock;
  s.keys = p, p += d * kKeyBlock;
  s.sum = p, p += kQueryBlock * s.padded;
  s.query = p, p += kQueryBlock * d;
  s.peak = p, p += kQueryBlock;
  s.mass = p, p += kQueryBlock;
  s.factor = p;
  return s;
}

// Rotates on halves: element i with i + d/2. Works in place.
INLINE void rotate_row(const float* x, const float* cos, const float* sin, float scale, int64_t half, float* y) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    y[i] = (a * cos[i] - b * sin[i]) * scale;
    y[i + half] = (b * cos[i] + a * sin[i]) * scale;
  }
}

static void rotate(const AttentionArgs& a, int64_t t0, int64_t t1) {
  const int64_t width = a.heads * a.d, half = a.d / 2;
  const float root = 1.f / __builtin_sqrtf(static_cast<float>(a.d));
  for (int64_t t = t0; t < t1; ++t) {
    const float *q = a.qkv + t * 3 * width, *k = q + width, *v = k + width;
    float* to = a.keys + a.slots[t] * width;
    for (int64_t h = 0; h < a.heads; ++h) {
      rotate_row(q + h * a.d, a.cos + t * half, a.sin + t * half, a.logn[t] * root, half, a.y + t * width + h * a.d);
      rotate_row(k + h * a.d, a.cos + t * half, a.sin + t * half, 1.f, half, to + h * a.d);
    }
    std::memcpy(a.values + a.slots[t] * width, v, width * sizeof(float));
  }
}

// Cache offset (in floats) of this head at a position of the sequence.
INLINE int64_t cache_offset(const AttentionArgs& a, const AttentionTask& t, int64_t position) {
  const int64_t block = a.tables[t.sequence * a.width + position / a.block_size];
  return ((block * a.block_size + position % a.block_size) * a.heads + t.head) * a.d;
}

// scores[q][key] for R queries and kGroup vectors of keys, summed over d in order.
template <int R>
INLINE void score_tile(const Scratch& s, int64_t d, int64_t q, int64_t key) {
  V sum[R][kGroup] = {};
  for (int64_t i = 0; i < d; ++i) {
    V b[kGroup];
#pragma GCC unroll 8
    for (int g = 0; g < kGroup; ++g) b[g] = load(s.keys + i * kKeyBlock + key + g * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V x = splat(s.query[(q + r) * d + i]);
#pragma GCC unroll 8
      for (int g = 0; g < kGroup; ++g) sum[r][g] = fma(x, b[g], sum[r][g]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int g = 0; g < kGroup; ++g) store(s.scores + (q + r) * kKeyBlock + key + g * kLanes, sum[r][g]);
}

// Turns the scores of one query into weights relative to the new maximum; keys from `seen` on get weight 0.
static void soften(const Scratch& s, int64_t q, int64_t seen) {
  float* p = s.scores + q * kKeyBlock;
  if (seen <= 0) {
    std::memset(p, 0, kKeyBlock * sizeof(float));
    s.factor[q] = 1;
    return;
  }
  for (int64_t j = seen; j < kKeyBlock; ++j) p[j] = -__builtin_inff();
  V best = splat(s.peak[q]);
  for (int64_t j = 0; j < kKeyBlock; j += kLanes) best = maximum(best, load(p + j));
  const float peak = max_lanes(best);
  V sum = {};
  for (int64_t j = 0; j < kKeyBlock; j += kLanes) {
    const V e = exp_v(load(p + j) - splat(peak));
    store(p + j, e);
    sum = sum + e;
  }
  s.factor[q] = exp_v(splat(s.peak[q] - peak))[0];
  s.mass[q] = s.mass[q] * s.factor[q] + sum_lanes(sum);
  s.peak[q] = peak;
}

INLINE void fetch(const float* p, int64_t floats) {
  for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(p + i, 0, 2);
}

// sum[q][i ..] = sum * factor + weights x values for R queries and G vectors of dimensions, keys in order.
template <int R, int G>
INLINE void value_tile(const Scratch& s, int64_t q, int64_t i, int64_t keys, int64_t last) {
  V sum[R][G];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g)
      sum[r][g] = load(s.sum + (q + r) * s.padded + i + g * kLanes) * splat(s.factor[q + r]);
  for (int64_t j = 0; j < keys; ++j) {
    if constexpr (R == 1) fetch(s.next[j] + i, G * kLanes);
    V b[G];
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) b[g] = last < kLanes ? load_part(s.rows[j] + i, last) : load(s.rows[j] + i + g * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V x = splat(s.scores[(q + r) * kKeyBlock + j]);
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) sum[r][g] = fma(x, b[g], sum[r][g]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) store(s.sum + (q + r) * s.padded + i + g * kLanes, sum[r][g]);
}

template <int R>
static void value_rows(const Scratch& s, int64_t d, int64_t q, int64_t keys) {
  int64_t i = 0;
  for (; i + kGroup * kLanes <= d; i += kGroup * kLanes) value_tile<R, kGroup>(s, q, i, keys, kLanes);
  for (; i < d; i += kLanes) value_tile<R, 1>(s, q, i, keys, smaller(kLanes, d - i));
}

// Columns j .. j + 3 of the (d, kKeyBlock) layout from four keys.
INLINE void lay_four(const float* const* key, int64_t d, float* out) {
  int64_t i = 0;
#if defined(__x86_64__)
  for (; i + 4 <= d; i += 4) {
    __m128 a = _mm_loadu_ps(key[0] + i), b = _mm_loadu_ps(key[1] + i);
    __m128 c = _mm_loadu_ps(key[2] + i), e = _mm_loadu_ps(key[3] + i);
    _MM_TRANSPOSE4_PS(a, b, c, e);
    _mm_storeu_ps(out + i * kKeyBlock, a);
    _mm_storeu_ps(out + (i + 1) * kKeyBlock, b);
    _mm_storeu_ps(out + (i + 2) * kKeyBlock, c);
    _mm_storeu_ps(out + (i + 3) * kKeyBlock, e);
  }
#endif
  for (; i < d; ++i)
    for (int j = 0; j < 4; ++j) out[i * kKeyBlock + j] = key[j][i];
}

// Finds the rows of one key block and lays its keys out as (d, kKeyBlock). The rows of a head lie far apart in the
// cache, so those of the next block are fetched meanwhile: keys here, values by the last step of a lone query.
static void gather_block(const AttentionArgs& a, const AttentionTask& t, const Scratch& s, int64_t first,
                         int64_t last) {
  const float* key[kKeyBlock];
  for (int64_t j = 0; j < kKeyBlock; ++j) {
    const int64_t offset = cache_offset(a, t, smaller(first + j, last));  // surplus columns repeat the last key
    key[j] = a.keys + offset;
    s.rows[j] = a.values + offset;
  }
  for (int64_t j = 0; j < kKeyBlock && first + j <= last; j += 4) {
    for (int64_t n = j; n < j + 4; ++n) {
      const int64_t offset = cache_offset(a, t, smaller(first + kKeyBlock + n, last));
      s.next[n] = a.values + offset;
      fetch(a.keys + offset, a.d);
    }
    lay_four(key + j, a.d, s.keys + j);
  }
}

static void attend(const AttentionArgs& a, const AttentionTask& t, float* scratch) {
  const Scratch s = carve(scratch, a.d);
  const int64_t width = a.heads * a.d, last = t.position + t.count - 1;
  float* rows = a.y + t.first_row * width + t.head * a.d;
  for (int64_t q = 0; q < t.count; ++q) {
    std::memcpy(s.query + q * a.d, rows + q * width, a.d * sizeof(float));
    s.peak[q] = -__builtin_inff();
    s.mass[q] = 0;
  }
  std::memset(s.sum, 0, t.count * s.padded * sizeof(float));
  std::memset(s.keys, 0, a.d * kKeyBlock * sizeof(float));
  for (int64_t first = 0; first <= last; first += kKeyBlock) {
    const int64_t keys = smaller(kKeyBlock, last + 1 - first);
    gather_block(a, t, s, first, last);
    int64_t q = 0;
    for (; q < t.count; q += kQueryTile) {
      const bool whole = q + kQueryTile <= t.count;
      const int64_t end = whole ? q + kQueryTile : t.count;
      for (int64_t key = 0; key < kKeyBlock; key += kGroup * kLanes) {
        if (whole) score_tile<kQueryTile>(s, a.d, q, key);
        else for (int64_t r = q; r < end; ++r) score_tile<1>(s, a.d, r, key);
      }
      for (int64_t r = q; r < end; ++r) soften(s, r, t.position + r + 1 - first);
      if (whole) value_rows<kQueryTile>(s, a.d, q, keys);
      else for (int64_t r = q; r < end; ++r) value_rows<1>(s, a.d, r, keys);
    }
  }
  for (int64_t q = 0; q < t.count; ++q) {
    const float inverse = 1.f / s.mass[q];
    for (int64_t i = 0; i < a.d; ++i) rows[q * width + i] = s.sum[q * s.padded + i] * inverse;
  }
}

}  // namespace

namespace qwen {

const AttentionTable* QWEN_TABLE() {
  static const AttentionTable table = {rotate, attend_size, attend};
  return &table;
}

}  // namespace qwen
