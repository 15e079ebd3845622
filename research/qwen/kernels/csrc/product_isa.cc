// A tile of c stays in registers while a run of kDepth products is summed. The run's rows of b are packed in strips as
// wide as a tile; a is read where it lies, its part of a tile stays in the first cache for all strips.
#include "product.h"

#include "vec.h"

namespace {

using qwen::kDepth;
using qwen::ProductArgs;

constexpr int kVectors = 2;  // columns of a tile, in vectors
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 14;  // 28 sums in 32 registers
#else
constexpr int kRows = 6;  // 12 in 16
#endif
constexpr int64_t kWidth = kVectors * kLanes;

static int64_t strips(int64_t n) { return (n + kWidth - 1) / kWidth; }
static int64_t panel_size(int64_t n) { return strips(n) * kWidth * kDepth; }
static int64_t tile_rows() { return kRows; }

static void pack(const ProductArgs& p, float* panel, int64_t k0, int64_t t0, int64_t t1) {
  const int64_t depth = smaller(kDepth, p.k - k0);
  for (int64_t l = 0; l < depth; ++l)
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t left = smaller(kWidth, p.n - t * kWidth);
      const float* from = p.b + (k0 + l) * p.n + t * kWidth;
      float* to = panel + (t * kDepth + l) * kWidth;
      if (left == kWidth) {
        for (int v = 0; v < kVectors; ++v) store(to + v * kLanes, load(from + v * kLanes));
      } else {
        for (int64_t i = 0; i < kWidth; ++i) to[i] = i < left ? from[i] : 0;
      }
    }
}

template <int R>
static void tile(const ProductArgs& p, const float* strip, int64_t k0, int64_t r, int64_t column) {
  const int64_t depth = smaller(kDepth, p.k - k0), left = smaller(kWidth, p.n - column);
  const float* a = p.a + r * p.k + k0;
  V sum[R][kVectors] = {};
  for (int64_t l = 0; l < depth; ++l) {
    const V b0 = load(strip + l * kWidth), b1 = load(strip + l * kWidth + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const V x = splat(a[i * p.k + l]);
      sum[i][0] = fma(x, b0, sum[i][0]);
      sum[i][1] = fma(x, b1, sum[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    float* to = p.c + (r + i) * p.n + column;
    if (left == kWidth) {
      store(to, k0 ? load(to) + sum[i][0] : sum[i][0]);
      store(to + kLanes, k0 ? load(to + kLanes) + sum[i][1] : sum[i][1]);
    } else {
      float part[kWidth];
      store(part, sum[i][0]);
      store(part + kLanes, sum[i][1]);
      for (int64_t j = 0; j < left; ++j) to[j] = k0 ? to[j] + part[j] : part[j];
    }
  }
}

static void rows(const ProductArgs& p, const float* panel, int64_t k0, int64_t r0, int64_t r1) {
  const int64_t count = strips(p.n);
  int64_t r = r0;
  for (; r + kRows <= r1; r += kRows)
    for (int64_t t = 0; t < count; ++t) tile<kRows>(p, panel + t * kDepth * kWidth, k0, r, t * kWidth);
  for (; r < r1; ++r)
    for (int64_t t = 0; t < count; ++t) tile<1>(p, panel + t * kDepth * kWidth, k0, r, t * kWidth);
}

}  // namespace

namespace qwen {

const ProductTable* QWEN_TABLE() {
  static const ProductTable table = {panel_size, strips, pack, tile_rows, rows};
  return &table;
}

}  // namespace qwen
