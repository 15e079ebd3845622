// y = x W^T + b. Every output is one dot product summed in one order, whatever the number of rows or threads: lanes
// along K, slices of kSlice products, a fixed tree over the lanes. So a row of a batch equals the same row alone.
#include "linear.h"

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
constexpr int kAheadRows = 2;  // rows of the next panel fetched during one tile of the packed form
// Columns of a tile of the direct form, which takes all rows at once.
constexpr int direct_tile(int rows) { return rows <= kTileRows ? kTileCols : kTileCols / 2; }


// Weights that will be needed next: some rows of a matrix, fetched while the current tile is computed. Hardware
// prefetch stops at every page, and a slice of a row is about one page.
struct Ahead {
  const char* first;
  int64_t stride;
  int64_t bytes;  // of one weight
};

// R x C dot products of length len over rows of x (stride xs) and of w (stride ws); fetches P rows ahead.
template <int R, int C, class W, int P>
INLINE void dot_tile(const float* x, int64_t xs, const typename W::T* w, int64_t ws, int64_t len, const Ahead& ahead,
                     float* out) {
  V sum[R][C] = {};
  int64_t i = 0;
  for (; i + kLanes <= len; i += kLanes) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) __builtin_prefetch(ahead.first + p * ahead.stride + i * ahead.bytes, 0, 2);
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
  constexpr int kWhole = R * C / 16 * 16;
#pragma GCC unroll 8
  for (int i = 0; i < kWhole; i += 16) sum_each<16>(sum[0] + i, out + i);
  if constexpr (R * C > kWhole) sum_each<R * C - kWhole>(sum[0] + kWhole, out + kWhole);
}

// The direct form: weights are read where they lie, once.
template <int R, int C, class W>
static void direct_columns(const LinearArgs& a, int64_t n0, int64_t n1) {
  const auto* w = static_cast<const typename W::T*>(a.w);
  for (int64_t j = n0; j + C <= n1; j += C) {
    float total[R * C], part[R * C];
    for (int64_t k = 0; k < a.k; k += kSlice) {
      const int64_t here = j * a.k + k;
      const auto* next = w + (k + kSlice < a.k ? here + kSlice : (j + 2 * C <= n1 ? (j + C) * a.k : here));
      const Ahead ahead = {reinterpret_cast<const char*>(next), a.k * int64_t(sizeof *w), sizeof *w};
      dot_tile<R, C, W, C>(a.x + k, a.k, w + here, a.k, smaller(kSlice, a.k - k), ahead, k ? part : total);
      if (k)
        for (int i = 0; i < R * C; ++i) total[i] += part[i];
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) a.y[r * a.n + j + c] = a.bias ? total[r * C + c] + a.bias[j + c] : total[r * C + c];
  }
}

template <int R, class W>
static void direct_rows(const LinearArgs& a, int64_t n0, int64_t n1) {
  const int64_t middle = n0 + (n1 - n0) / direct_tile(R) * direct_tile(R);
  direct_columns<R, direct_tile(R), W>(a, n0, middle);
  direct_columns<R, 1, W>(a, middle, n1);
}

template <class W>
static void direct_format(const LinearArgs& a, int64_t n0, int64_t n1) {
  switch (a.rows) {
    case 1: return direct_rows<1, W>(a, n0, n1);
    case 2: return direct_rows<2, W>(a, n0, n1);
    case 3: return direct_rows<3, W>(a, n0, n1);
    case 4: return direct_rows<4, W>(a, n0, n1);
    case 5: return direct_rows<5, W>(a, n0, n1);
    case 6: return direct_rows<6, W>(a, n0, n1);
    case 7: return direct_rows<7, W>(a, n0, n1);
    default: return direct_rows<8, W>(a, n0, n1);
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
                        bool first, const float* bias, const Ahead& ahead) {
  float part[R * C];
  dot_tile<R, C, F32, kAheadRows>(x + r * padded, padded, panel, padded, padded, ahead, part);
  for (int i = 0; i < R; ++i)
    for (int c = 0; c < C; ++c) {
      float* to = a.y + (r + i) * a.n + j + c;
      const float sum = first ? part[i * C + c] : *to + part[i * C + c];
      *to = bias ? sum + bias[j + c] : sum;
    }
}

template <int C>
static void packed_rows(const LinearArgs& a, const float* x, const float* panel, int64_t padded, int64_t j, bool first,
                        const float* bias, Ahead ahead) {
  const char* const start = ahead.first;
  int64_t r = 0, fetched = 0;
  for (; r + kTileRows <= a.rows; r += kTileRows) {
    packed_tile<kTileRows, C>(a, x, panel, padded, r, j, first, bias, ahead);
    fetched = smaller(fetched + kAheadRows, kTileCols - kAheadRows);
    ahead.first = start + fetched * ahead.stride;
  }
  for (; r < a.rows; ++r) packed_tile<1, C>(a, x, panel, padded, r, j, first, bias, ahead);
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
    Ahead ahead = {nullptr, a.k * int64_t(sizeof *w), sizeof *w};
    for (; j + kTileCols <= n1; j += kTileCols) {
      pack_panel<W>(w + j * a.k + k, a.k, kTileCols, len, padded, panel);
      const int64_t next = j + 2 * kTileCols <= n1 ? (j + kTileCols) * a.k + k : n0 * a.k + smaller(k + kSlice, a.k - 1);
      ahead.first = reinterpret_cast<const char*>(w + next);
      packed_rows<kTileCols>(a, x, panel, padded, j, k == 0, bias, ahead);
    }
    for (; j < n1; ++j) {
      pack_panel<W>(w + j * a.k + k, a.k, 1, len, padded, panel);
      packed_rows<1>(a, x, panel, padded, j, k == 0, bias, ahead);
    }
  }
}

static void linear_packed(const LinearArgs& a, float* scratch, int64_t n0, int64_t n1) {
  if (a.format == qwen::kF32) return packed_format<F32>(a, scratch, n0, n1);
  if (a.format == qwen::kBF16) return packed_format<BF16>(a, scratch, n0, n1);
  return packed_format<F16>(a, scratch, n0, n1);
}

}  // namespace

namespace qwen {

const LinearTable* QWEN_TABLE() {
  static const LinearTable table = {packed_size, pack_rows, panel_size, linear_direct, linear_packed};
  return &table;
}

}  // namespace qwen
