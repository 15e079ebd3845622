// A few queries of one sequence: register tiles of queries, keys and values widened straight from the cache as for a
// lone query. What is read of the cache is fetched meanwhile, as that takes as long as the sums do. Included by
// attention_isa.cc only.
#pragma once
#include "attention_one.h"

namespace {

constexpr int kHalf = kRows / 2;
constexpr int64_t kFew = 3 * kRows;  // beyond as many queries it pays to widen a block of keys once for all

// Scores of R queries from row `row` on, of the block's first `seen` keys and what lies beside them in the tile.
template <class F, int R>
INLINE void score_few(const Groups<F>& now, const Scratch& s, int64_t d, int64_t row, int64_t seen) {
  constexpr int W = kRows * kWide / R;  // vectors of keys
  const float* query = s.query + row * d;
  for (int64_t first = 0; first < seen; first += W * kLanes) {
    const typename F::T *keys[W], *values[W];
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) {
      const int64_t group = first / kGroup + w / kInGroup, offset = (first + w * kLanes) % kGroup;
      keys[w] = now.keys[group] + offset, values[w] = now.values[group];
    }
    V sum[R][W] = {};
    for (int64_t i = 0; i < d; ++i) {
      V key[W];
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w) {
        if (row == 0 && i % kLine<F> == 0 && w % kInGroup == 0) fetch(values[w] + i * kGroup);
        key[w] = F::wide(keys[w] + i * kGroup);
      }
      add_products(query + i, d, key, sum);
    }
    store_tile(sum, s.scores + row * kKeyBlock + first, kKeyBlock);
  }
}

// The sums of R queries over `seen` values, kSlab dimensions from i on; `whole` if all of these exist.
template <class F, int R>
INLINE void mix_few(const Groups<F>& now, const Groups<F>& next, const Scratch& s, int64_t d, int64_t row, int64_t seen,
                    int64_t i, bool whole) {
  constexpr int64_t kSize = sizeof(typename F::T), kBytes = kSlab * kSize;
  float* place = s.sum + (row / kRows * s.slabs + i / kSlab) * kRows * kSlab;
  const float* weights = s.scores + row * kKeyBlock;
  V sum[R][kWide];
  load_tile(place, kSlab, s.factor + row, sum);
  for (int64_t j = 0; j < seen; ++j) {
    const auto* value = now.values[j / kGroup] + j % kGroup * d + i;
    if (row == 0)  // the next block's keys, from all its groups in turn, in equal shares over slabs and keys
      for (int64_t from = i * kSize * kKeyBlock + j * kBytes, n = (from + 63) / 64; n * 64 < from + kBytes; ++n)
        fetch(reinterpret_cast<const char*>(next.keys[n % kBlockGroups]) + n / kBlockGroups * 64);
    V v[kWide];
#pragma GCC unroll 8
    for (int w = 0; w < kWide; ++w) {
      const int64_t left = d - i - w * kLanes;
      v[w] = whole || left >= kLanes ? F::wide(value + w * kLanes)
             : left > 0              ? F::wide_part(value + w * kLanes, left)
                                     : V{};
    }
    add_products(weights + j, kKeyBlock, v, sum);
  }
  store_tile(sum, place, kSlab);
}

// The values of all slabs for one tile.
template <class F, int R>
static void mix_tile(const Groups<F>& now, const Groups<F>& next, const Scratch& s, int64_t d, int64_t row,
                     int64_t seen) {
  int64_t i = 0;
  for (; i + kSlab <= d; i += kSlab) mix_few<F, R>(now, next, s, d, row, seen, i, true);
  if (i < d) mix_few<F, R>(now, next, s, d, row, seen, i, false);
}

// One block of keys for all queries; only where kv_lanes is kGroup.
template <class F>
static void few_block(const AttentionArgs& a, const AttentionTask& t, const Scratch& s, int64_t first) {
  const int64_t last = t.position + t.count - 1;
  const Groups<F> now = groups_at<F>(a, t, first), next = groups_at<F>(a, t, first + kKeyBlock);
  const auto seen = [&](int64_t q) { return smaller(t.position + q, last) + 1 - first; };
  const auto seen_by_tile = [&](int64_t row) { return smaller(seen(row + kRows - 1), kKeyBlock); };
  for (int64_t row = 0; row < t.count; row += kRows)
    if (seen_by_tile(row) > 0)
      t.count - row <= kHalf ? score_few<F, kHalf>(now, s, a.d, row, seen_by_tile(row))
                             : score_few<F, kRows>(now, s, a.d, row, seen_by_tile(row));
  if constexpr (kScaled<F>) read_scales(a, now, s);
  soften<F>(s, t.count, seen);
  for (int64_t row = 0; row < t.count; row += kRows)
    if (seen_by_tile(row) > 0)
      t.count - row <= kHalf ? mix_tile<F, kHalf>(now, next, s, a.d, row, seen_by_tile(row))
                             : mix_tile<F, kRows>(now, next, s, a.d, row, seen_by_tile(row));
}

}  // namespace
