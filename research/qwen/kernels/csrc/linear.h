// y = x W^T + b. Every output is one dot product summed in one order, whatever the number of rows or threads: lanes
// along K, slices of kSlice products, a fixed tree over the lanes. So a row of a batch equals the same row alone.
#pragma once
#include "table.h"
#include "vec.h"

namespace {

using qwen::kSlice;
using qwen::LinearArgs;

constexpr int kTileRows = 4;  // rows of x per register tile
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileCols = 6;  // rows of W per register tile: 24 sums in 32 registers
#elif defined(__AVX2__)
constexpr int kTileCols = 3;
#else
constexpr int kTileCols = 2;
#endif
static_assert(kTileRows == qwen::kDirectRows, "the direct form has one tile of rows");

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// R x C dot products of length len over rows of x (stride xs) and of w (stride ws).
template <int R, int C, class W>
INLINE void dot_tile(const float* x, int64_t xs, const typename W::T* w, int64_t ws, int64_t len, float* out) {
  V sum[R][C] = {};
  int64_t i = 0;
  for (; i + kLanes <= len; i += kLanes) {
    V b[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) b[c] = W::wide(w + c * ws + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V a = load(x + r * xs + i);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[r][c] = fma(a, b[c], sum[r][c]);
    }
  }
  if (i < len) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V a = load_part(x + r * xs + i, len - i);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[r][c] = fma(a, W::wide_part(w + c * ws + i, len - i), sum[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) out[r * C + c] = sum_lanes(sum[r][c]);
}

// The direct form: weights are read where they lie, once.
template <int R, int C, class W>
static void direct_columns(const LinearArgs& a, int64_t n0, int64_t n1) {
  const auto* w = static_cast<const typename W::T*>(a.w);
  for (int64_t j = n0; j + C <= n1; j += C) {
    float total[R * C], part[R * C];
    for (int64_t k = 0; k < a.k; k += kSlice) {
      dot_tile<R, C, W>(a.x + k, a.k, w + j * a.k + k, a.k, smaller(kSlice, a.k - k), k ? part : total);
      if (k)
        for (int i = 0; i < R * C; ++i) total[i] += part[i];
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) a.y[r * a.n + j + c] = a.bias ? total[r * C + c] + a.bias[j + c] : total[r * C + c];
  }
}

template <int R, class W>
static void direct_rows(const LinearArgs& a, int64_t n0, int64_t n1) {
  const int64_t middle = n0 + (n1 - n0) / kTileCols * kTileCols;
  direct_columns<R, kTileCols, W>(a, n0, middle);
  direct_columns<R, 1, W>(a, middle, n1);
}

template <class W>
static void direct_format(const LinearArgs& a, int64_t n0, int64_t n1) {
  switch (a.rows) {
    case 1: return direct_rows<1, W>(a, n0, n1);
    case 2: return direct_rows<2, W>(a, n0, n1);
    case 3: return direct_rows<3, W>(a, n0, n1);
    default: return direct_rows<4, W>(a, n0, n1);
  }
}

static void linear_direct(const LinearArgs& a, int64_t n0, int64_t n1) {
  if (a.format == qwen::kF32) return direct_format<F32>(a, n0, n1);
  if (a.format == qwen::kBF16) return direct_format<BF16>(a, n0, n1);
  return direct_format<F16>(a, n0, n1);
}

// Packed x: slice after slice, in a slice row after row, each row padded with zeros to whole vectors.
static int64_t packed_size(int64_t rows, int64_t k) { return rows * round_up(k, kLanes); }

static void pack_rows(const LinearArgs& a, float* out, int64_t r0, int64_t r1) {
  for (int64_t k = 0; k < a.k; k += kSlice) {
    const int64_t len = smaller(kSlice, a.k - k), padded = round_up(len, kLanes);
    for (int64_t r = r0; r < r1; ++r) {
      float* to = out + a.rows * k + r * padded;
      std::memcpy(to, a.x + r * a.k + k, len * sizeof(float));
      for (int64_t i = len; i < padded; ++i) to[i] = 0;
    }
  }
}

static int64_t panel_size() { return kTileCols * kSlice; }

// One slice of some rows of W, widened and padded with zeros.
template <class W>
INLINE void pack_panel(const typename W::T* w, int64_t stride, int64_t rows, int64_t len, int64_t padded, float* out) {
  for (int64_t c = 0; c < rows; ++c) {
    int64_t i = 0;
    for (; i + kLanes <= len; i += kLanes) store(out + c * padded + i, W::wide(w + c * stride + i));
    if (i < len) store(out + c * padded + i, W::wide_part(w + c * stride + i, len - i));
  }
}

template <int R, int C>
INLINE void packed_tile(const LinearArgs& a, const float* x, const float* panel, int64_t padded, int64_t r, int64_t j,
                        bool first, const float* bias) {
  float part[R * C];
  dot_tile<R, C, F32>(x + r * padded, padded, panel, padded, padded, part);
  for (int i = 0; i < R; ++i)
    for (int c = 0; c < C; ++c) {
      float* to = a.y + (r + i) * a.n + j + c;
      const float sum = first ? part[i * C + c] : *to + part[i * C + c];
      *to = bias ? sum + bias[j + c] : sum;
    }
}

template <int C>
static void packed_rows(const LinearArgs& a, const float* x, const float* panel, int64_t padded, int64_t j, bool first,
                        const float* bias) {
  int64_t r = 0;
  for (; r + kTileRows <= a.rows; r += kTileRows) packed_tile<kTileRows, C>(a, x, panel, padded, r, j, first, bias);
  for (; r < a.rows; ++r) packed_tile<1, C>(a, x, panel, padded, r, j, first, bias);
}

// a.x is packed. For each slice of K: widen a few rows of W into the cache, then sweep over all rows of x.
template <class W>
static void packed_format(const LinearArgs& a, float* panel, int64_t n0, int64_t n1) {
  const auto* w = static_cast<const typename W::T*>(a.w);
  for (int64_t k = 0; k < a.k; k += kSlice) {
    const int64_t len = smaller(kSlice, a.k - k), padded = round_up(len, kLanes);
    const float* x = a.x + a.rows * k;
    const float* bias = k + kSlice >= a.k ? a.bias : nullptr;
    int64_t j = n0;
    for (; j + kTileCols <= n1; j += kTileCols) {
      pack_panel<W>(w + j * a.k + k, a.k, kTileCols, len, padded, panel);
      packed_rows<kTileCols>(a, x, panel, padded, j, k == 0, bias);
    }
    for (; j < n1; ++j) {
      pack_panel<W>(w + j * a.k + k, a.k, 1, len, padded, panel);
      packed_rows<1>(a, x, panel, padded, j, k == 0, bias);
    }
  }
}

static void linear_packed(const LinearArgs& a, float* scratch, int64_t n0, int64_t n1) {
  if (a.format == qwen::kF32) return packed_format<F32>(a, scratch, n0, n1);
  if (a.format == qwen::kBF16) return packed_format<BF16>(a, scratch, n0, n1);
  return packed_format<F16>(a, scratch, n0, n1);
}

}  // namespace
