// One head of one text. Scores of a run of queries against all keys up to the last of them lie in scratch at once.
#include "text_attention.h"

#include <cmath>

#include "vec.h"

namespace {

using qwen::kQueryRun;
using qwen::TextAttentionArgs;

constexpr int kTileRows = 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileVectors = 4;  // 16 sums in 32 registers
#else
constexpr int kTileVectors = 2;  // 8 in 16
#endif

// c (m, n) = or += a (m, k) b (k, n): n is a multiple of kLanes; a has any strides, so that it can lie transposed.
struct Product {
  const float* a;
  int64_t row, column;  // strides of a
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  int64_t m, n, k;
  bool add;
};

template <int R, int C>
INLINE void tile(const Product& p, int64_t i, int64_t j) {
  V sum[R][C] = {};
  const float *a = p.a + i * p.row, *b = p.b + j;
  for (int64_t l = 0; l < p.k; ++l, a += p.column, b += p.ldb) {
    V right[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) right[c] = load(b + c * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V left = splat(a[r * p.row]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] = fma(left, right[c], sum[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      float* to = p.c + (i + r) * p.ldc + j + c * kLanes;
      store(to, p.add ? load(to) + sum[r][c] : sum[r][c]);
    }
}

template <int C>
static void columns(const Product& p, int64_t j) {
  int64_t i = 0;
  for (; i + kTileRows <= p.m; i += kTileRows) tile<kTileRows, C>(p, i, j);
  for (; i < p.m; ++i) tile<1, C>(p, i, j);
}

static void product(const Product& p) {
  int64_t j = 0;
  for (; j + kTileVectors * kLanes <= p.n; j += kTileVectors * kLanes) columns<kTileVectors>(p, j);
  for (; j < p.n; j += kLanes) columns<1>(p, j);
}

// Which part of qkv, and where this head and text lie.
struct Place {
  int64_t first, length, heads, d, head;
  int64_t padded() const { return round_up(d, kLanes); }       // of a head
  int64_t wide() const { return round_up(length, kLanes); }    // of all keys
  int64_t qkv(int64_t t, int part) const { return ((first + t) * 3 + part) * heads * d + head * d; }
  int64_t flat(int64_t t) const { return (first + t) * heads * d + head * d; }
};

static Place place_of(const TextAttentionArgs& a, int64_t text, int64_t head) {
  return {a.bounds[text], a.bounds[text + 1] - a.bounds[text], a.heads, a.d, head};
}

// (length, padded) rows of q or k, rotated and scaled; zeros behind a head.
static void rotated(const TextAttentionArgs& a, const Place& p, int part, float scale, float* out) {
  const int64_t half = p.d / 2, padded = p.padded();
  for (int64_t t = 0; t < p.length; ++t) {
    const float *x = a.qkv + p.qkv(t, part), *cos = a.cos + (p.first + t) * half, *sin = a.sin + (p.first + t) * half;
    float* to = out + t * padded;
    for (int64_t i = 0; i < half; ++i) {
      to[i] = (x[i] * cos[i] - x[i + half] * sin[i]) * scale;
      to[i + half] = (x[i + half] * cos[i] + x[i] * sin[i]) * scale;
    }
    for (int64_t i = p.d; i < padded; ++i) to[i] = 0;
  }
}

// The way back of rotated: gradients of rotated rows to those of qkv.
static void unrotated(const TextAttentionArgs& a, const Place& p, int part, float scale, const float* rows) {
  const int64_t half = p.d / 2, padded = p.padded();
  for (int64_t t = 0; t < p.length; ++t) {
    const float *x = rows + t * padded, *cos = a.cos + (p.first + t) * half, *sin = a.sin + (p.first + t) * half;
    float* to = a.dqkv + p.qkv(t, part);
    for (int64_t i = 0; i < half; ++i) {
      to[i] = (x[i] * cos[i] + x[i + half] * sin[i]) * scale;
      to[i + half] = (x[i + half] * cos[i] - x[i] * sin[i]) * scale;
    }
  }
}

template <class From>
static void copied(const Place& p, From from, float* out) {
  const int64_t padded = p.padded();
  for (int64_t t = 0; t < p.length; ++t) {
    std::memcpy(out + t * padded, from(t), p.d * sizeof(float));
    for (int64_t i = p.d; i < padded; ++i) out[t * padded + i] = 0;
  }
}

// (length, padded) -> (d, wide), zeros behind the last key; in blocks that stay in the cache.
static void transposed(const Place& p, const float* rows, float* out) {
  const int64_t padded = p.padded(), wide = p.wide();
  for (int64_t t0 = 0; t0 < wide; t0 += 16)
    for (int64_t i = 0; i < p.d; ++i)
      for (int64_t t = t0; t < smaller(t0 + 16, wide); ++t) out[i * wide + t] = t < p.length ? rows[t * padded + i] : 0;
}

// Scores (n, width) of the queries i0 .. i0 + n, those of later keys far below all others.
static void scores(const Place& p, const float* q, const float* kt, int64_t i0, int64_t n, int64_t width, float* out) {
  const int64_t wide = p.wide(), padded = p.padded();
  product({q + i0 * padded, padded, 1, kt, wide, out, width, n, width, p.d, false});
  for (int64_t r = 0; r < n; ++r)
    for (int64_t j = i0 + r + 1; j < width; ++j) out[r * width + j] = -1e30f;
}

// Scores become exponentials; returns their sum, and through `log` the logarithm of the sum before the shift.
static float exponentials(float* row, int64_t width, float* log) {
  V best = load(row);
  for (int64_t j = kLanes; j < width; j += kLanes) best = maximum(load(row + j), best);
  const float top = max_lanes(best);
  V sum = {};
  for (int64_t j = 0; j < width; j += kLanes) {
    const V e = exp_v(load(row + j) - splat(top));
    store(row + j, e);
    sum = sum + e;
  }
  const float total = sum_lanes(sum);
  *log = top + std::log(total);
  return total;
}

static int64_t forward_scratch(int64_t length, int64_t d) {
  const int64_t padded = round_up(d, kLanes), wide = round_up(length, kLanes);
  return 3 * length * padded + d * wide + kQueryRun * (wide + padded);
}

static void forward(const TextAttentionArgs& a, float* scratch, int64_t text, int64_t head) {
  const Place p = place_of(a, text, head);
  const int64_t padded = p.padded(), wide = p.wide(), all = p.length * padded;
  float *q = scratch, *k = q + all, *v = k + all, *kt = v + all, *weights = kt + p.d * wide,
        *out = weights + kQueryRun * wide;
  rotated(a, p, 0, 1.f / std::sqrt(float(p.d)), q);
  rotated(a, p, 1, 1.f, k);
  transposed(p, k, kt);
  copied(p, [&](int64_t t) { return a.qkv + p.qkv(t, 2); }, v);
  for (int64_t i0 = 0; i0 < p.length; i0 += kQueryRun) {
    const int64_t n = smaller(kQueryRun, p.length - i0), width = round_up(i0 + n, kLanes);
    float sums[kQueryRun];
    scores(p, q, kt, i0, n, width, weights);
    for (int64_t r = 0; r < n; ++r)
      sums[r] = exponentials(weights + r * width, width, a.peak + head * a.tokens + p.first + i0 + r);
    product({weights, width, 1, v, padded, out, padded, n, padded, i0 + n, false});
    for (int64_t r = 0; r < n; ++r)
      for (int64_t i = 0; i < p.d; ++i) a.y[p.flat(i0 + r) + i] = out[r * padded + i] / sums[r];
  }
}

static int64_t backward_scratch(int64_t length, int64_t d) {
  const int64_t padded = round_up(d, kLanes), wide = round_up(length, kLanes);
  return 7 * length * padded + 2 * d * wide + 2 * kQueryRun * wide;
}

// Weights from scores and what flows into scores from what flows into weights, in place.
static void flow_back(float* weights, float* flow, int64_t width, float log, float inner) {
  for (int64_t j = 0; j < width; j += kLanes) {
    const V w = exp_v(load(weights + j) - splat(log));
    store(weights + j, w);
    store(flow + j, w * (load(flow + j) - splat(inner)));
  }
}

static float inner_product(const float* x, const float* y, int64_t n) {
  V sum = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum = fma(load(x + i), load(y + i), sum);
  if (i < n) sum = fma(load_part(x + i, n - i), load_part(y + i, n - i), sum);
  return sum_lanes(sum);
}

static void backward(const TextAttentionArgs& a, float* scratch, int64_t text, int64_t head) {
  const Place p = place_of(a, text, head);
  const int64_t padded = p.padded(), wide = p.wide(), all = p.length * padded;
  const float scale = 1.f / std::sqrt(float(p.d));
  float *q = scratch, *k = q + all, *v = k + all, *dy = v + all, *dq = dy + all, *dk = dq + all, *dv = dk + all,
        *kt = dv + all, *vt = kt + p.d * wide, *weights = vt + p.d * wide, *flow = weights + kQueryRun * wide;
  rotated(a, p, 0, scale, q);
  rotated(a, p, 1, 1.f, k);
  copied(p, [&](int64_t t) { return a.qkv + p.qkv(t, 2); }, v);
  copied(p, [&](int64_t t) { return a.dy + p.flat(t); }, dy);
  transposed(p, k, kt);
  transposed(p, v, vt);
  std::memset(dk, 0, 2 * all * sizeof(float));
  for (int64_t i0 = 0; i0 < p.length; i0 += kQueryRun) {
    const int64_t n = smaller(kQueryRun, p.length - i0), keys = i0 + n, width = round_up(keys, kLanes);
    scores(p, q, kt, i0, n, width, weights);
    product({dy + i0 * padded, padded, 1, vt, wide, flow, width, n, width, p.d, false});
    for (int64_t r = 0; r < n; ++r)
      flow_back(weights + r * width, flow + r * width, width, a.peak[head * a.tokens + p.first + i0 + r],
                inner_product(a.y + p.flat(i0 + r), dy + (i0 + r) * padded, p.d));
    product({flow, width, 1, k, padded, dq + i0 * padded, padded, n, padded, keys, false});
    product({weights, 1, width, dy + i0 * padded, padded, dv, padded, keys, padded, n, true});
    product({flow, 1, width, q + i0 * padded, padded, dk, padded, keys, padded, n, true});
  }
  unrotated(a, p, 0, scale, dq);
  unrotated(a, p, 1, 1.f, dk);
  for (int64_t t = 0; t < p.length; ++t) std::memcpy(a.dqkv + p.qkv(t, 2), dv + t * padded, p.d * sizeof(float));
}

}  // namespace

namespace qwen {

const TextAttentionTable* QWEN_TABLE() {
  static const TextAttentionTable table = {forward_scratch, backward_scratch, ::forward, ::backward};
  return &table;
}

}  // namespace qwen
