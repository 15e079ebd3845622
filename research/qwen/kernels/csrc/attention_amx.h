// Attention over a bfloat16 cache with AMX tiles. Keys and values are exact in a tile; queries and weights go there in
// two pieces of bfloat16 (16 bits of each number), so that the result is that of float32 but for 2^-16. A lone query
// takes the same way as many: what a tile makes of a row does not depend on the other rows. Included by
// attention_isa.cc.
#pragma once
#include "amx.h"
#include "attention_one.h"

namespace {

constexpr int64_t kPairs = 32;                  // numbers of a tile's row
constexpr int64_t kTileNumbers = kTile * kPairs;

INLINE bool tiles_fit(const AttentionArgs& a) { return a.d % kPairs == 0 && qwen::kv_lanes(a.block_size) == kGroup; }

// The operands as tiles, in the places that float operands have: queries [tile][step of d][piece], keys [group][step of
// d], values [step of keys][group of 16 dimensions], weights [tile][step of keys][piece].
struct Operands {
  uint16_t *query, *keys, *values, *weights;
  explicit Operands(const Scratch& s)
      : query(reinterpret_cast<uint16_t*>(s.query)), keys(reinterpret_cast<uint16_t*>(s.keys)),
        values(reinterpret_cast<uint16_t*>(s.values)), weights(reinterpret_cast<uint16_t*>(s.weights)) {}
};

// n numbers (a multiple of 32) of row `row` to tiles of two pieces; steps lie 2 * kTileNumbers apart.
INLINE void put_pieces(const float* x, int64_t n, int64_t row, uint16_t* tiles) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const __m512 v = (__m512)load(x + i);
    const __m256i first = (__m256i)_mm512_cvtneps_pbh(v);
    const __m512 back = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(first), 16));
    const __m256i second = (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(v, back));
    uint16_t* to = tiles + i / kPairs * 2 * kTileNumbers + row * kPairs + i % kPairs;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), first);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kTileNumbers), second);
  }
}

// Two rows of sixteen become one of sixteen pairs.
INLINE __m512i pair_up(__m512i both) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, both);
}

// What is needed next of all groups of a block, a few lines at a time: memory must be busy all the while.
struct Later {
  const uint16_t* const* from;
  int64_t left, line = 0;
  Later(const uint16_t* const (&groups)[kBlockGroups], int64_t d)
      : from(groups), left(kBlockGroups * d * kGroup / kPairs) {}
  void take(int64_t lines) {
    for (; lines > 0 && left > 0; --lines, --left, ++line)
      fetch(from[line % kBlockGroups] + line / kBlockGroups * kPairs);
  }
};
constexpr int64_t kPerTile = 5;  // lines that are fetched beside two products

// Keys of `groups` groups.
INLINE void take_keys(const Groups<KvBF16>& now, int64_t groups, int64_t d, uint16_t* to, Later& later) {
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = 0; i < d; i += 4, to += 2 * kPairs) {
      later.take(1);
      _mm512_store_si512(to, pair_up(_mm512_loadu_si512(now.keys[g] + i * kGroup)));
      _mm512_store_si512(to + kPairs, pair_up(_mm512_loadu_si512(now.keys[g] + (i + 2) * kGroup)));
    }
}

// Values of the first `count` keys, zeros behind them.
INLINE void take_values(const Groups<KvBF16>& now, int64_t count, int64_t d, uint16_t* to, Later& later) {
  const auto row = [&](int64_t j, int64_t i) {
    return j < count ? _mm512_loadu_si512(now.values[j / kGroup] + j % kGroup * d + i) : _mm512_setzero_si512();
  };
  const int64_t groups = d / kGroup;
  for (int64_t j = 0; j < kKeyBlock && j < round_up(count, kPairs); j += 2)
    for (int64_t i = 0; i < d; i += kPairs) {
      later.take(1);
      const __m512i even = row(j, i), odd = row(j + 1, i);
      const __m512i low = _mm512_inserti64x4(even, _mm512_castsi512_si256(odd), 1);
      const __m512i high = _mm512_shuffle_i64x2(even, odd, 0xee);
      uint16_t* at = to + (j / kPairs * groups + i / kGroup) * kTileNumbers + j % kPairs / 2 * kPairs;
      _mm512_store_si512(at, pair_up(low));
      _mm512_store_si512(at + kTileNumbers, pair_up(high));
    }
}

// sum of tile I += (first + second pieces in tiles 4, 5) x tile `from`
template <int I>
INLINE void tile_pieces(const uint16_t* from, Later& later) {
  tile_load<6>(from, 64);
  later.take(kPerTile);
  asm volatile("tdpbf16ps %%tmm6, %%tmm4, %%tmm%c0" ::"i"(I));
  asm volatile("tdpbf16ps %%tmm6, %%tmm5, %%tmm%c0" ::"i"(I));
}

// left [step][piece] x right (steps `next_step` apart, tiles `next_tile`): up to four tiles side by side in rows of
// `width`.
INLINE void product_tiles(const uint16_t* left, const uint16_t* right, int64_t steps, int64_t next_step,
                          int64_t next_tile, int64_t count, float* to, int64_t width, Later& later) {
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int64_t i = 0; i < steps; ++i, left += 2 * kTileNumbers, right += next_step) {
    tile_load<4>(left, 64), tile_load<5>(left + kTileNumbers, 64);
    tile_pieces<0>(right, later);
    if (count > 1) tile_pieces<1>(right + next_tile, later);
    if (count > 2) tile_pieces<2>(right + 2 * next_tile, later);
    if (count > 3) tile_pieces<3>(right + 3 * next_tile, later);
  }
  const int64_t bytes = width * 4;
  tile_store<0>(to, bytes);
  if (count > 1) tile_store<1>(to + kTile, bytes);
  if (count > 2) tile_store<2>(to + 2 * kTile, bytes);
  if (count > 3) tile_store<3>(to + 3 * kTile, bytes);
}

// The weighted values of one tile of queries join the sums.
INLINE void mix_tile(const Scratch& s, const Operands& o, int64_t d, int64_t tile, int64_t rows, int64_t seen,
                     Later& later) {
  alignas(64) float fresh[kTile * 4 * kTile];
  const int64_t groups = d / kGroup, steps = (seen + kPairs - 1) / kPairs;
  for (int64_t g = 0; g < groups; g += 4) {
    const int64_t count = smaller(4, groups - g);
    product_tiles(o.weights + tile * 4 * kTileNumbers, o.values + g * kTileNumbers, steps, groups * kTileNumbers,
                  kTileNumbers, count, fresh, 4 * kTile, later);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t q = tile * kTile + r;
      const V factor = splat(s.factor[q]);
      for (int64_t i = 0; i < count; ++i) {
        float* sum = s.sum + q * d + (g + i) * kTile;
        store(sum, fma(load(sum), factor, load(fresh + (r * 4 + i) * kTile)));
      }
    }
  }
}

// One block of keys for all queries.
static void block_of_tiles(const AttentionArgs& a, const AttentionTask& t, const Scratch& s, const Groups<KvBF16>& now,
                           const Groups<KvBF16>& next, int64_t first) {
  const Operands o(s);
  const int64_t last = t.position + t.count - 1, tiles = (t.count + kTile - 1) / kTile, steps = a.d / kPairs;
  const int64_t count = smaller(kKeyBlock, last + 1 - first), rows = smaller(kTile, t.count);
  const auto seen = [&](int64_t q) { return smaller(t.position + q, last) + 1 - first; };
  const auto seen_by_tile = [&](int64_t tile) { return smaller(seen(tile * kTile + kTile - 1), kKeyBlock); };
  Later values(now.values, a.d), keys(next.keys, a.d);
  take_keys(now, (count + kGroup - 1) / kGroup, a.d, o.keys, values);
  for (int64_t tile = 0; tile < tiles; ++tile)
    if (seen_by_tile(tile) > 0)
      product_tiles(o.query + tile * steps * 2 * kTileNumbers, o.keys, steps, kTileNumbers, steps * kTileNumbers,
                    (seen_by_tile(tile) + kGroup - 1) / kGroup, s.scores + tile * kTile * kKeyBlock, kKeyBlock,
                    values);
  soften<KvBF16>(s, t.count, seen);
  take_values(now, count, a.d, o.values, keys);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    if (seen_by_tile(tile) <= 0) continue;
    for (int64_t r = 0; r < rows && tile * kTile + r < t.count; ++r)
      put_pieces(s.scores + (tile * kTile + r) * kKeyBlock, kKeyBlock, r, o.weights + tile * 4 * kTileNumbers);
    mix_tile(s, o, a.d, tile, smaller(rows, t.count - tile * kTile), seen_by_tile(tile), keys);
  }
}

// Keys part .. part + kPart - 1 to s.sum ([query][d]), s.peak and s.mass; the tiles are configured.
static void part_of_tiles(const AttentionArgs& a, const AttentionTask& t, const Scratch& s, int64_t part) {
  AttentionTask whole = t;  // groups_at asks for the last key
  whole.position = t.position + t.count - 1;
  clear(s.sum, t.count * a.d, s.peak, s.mass, t.count);
  Groups<KvBF16> now = groups_at<KvBF16>(a, whole, part);
  for (int64_t first = part; first < part + kPart && first <= whole.position; first += kKeyBlock) {
    const Groups<KvBF16> next = groups_at<KvBF16>(a, whole, first + kKeyBlock);
    block_of_tiles(a, t, s, now, next, first);
    now = next;
  }
}

INLINE void take_queries(const float* from, int64_t width, int64_t count, int64_t d, uint16_t* tiles) {
  for (int64_t q = 0; q < count; ++q)
    put_pieces(from + q * width, d, q % kTile, tiles + q / kTile * (d / kPairs) * 2 * kTileNumbers);
}

static void attend_tiles(const AttentionArgs& a, const AttentionTask& t, float* scratch) {
  const Scratch s = carve(scratch, a.d);
  const Tiles use(t.count);
  const int64_t width = a.heads * a.d, last = t.position + t.count - 1;
  float* y = a.y + t.first_row * width + t.head * a.d;
  take_queries(y, width, t.count, a.d, Operands(s).query);
  clear(s.total, t.count * a.d, s.total_peak, s.total_mass, t.count);
  for (int64_t part = 0; part <= last; part += kPart) {
    part_of_tiles(a, t, s, part);
    for (int64_t q = 0; q < t.count; ++q)
      merge_part(s.total + q * a.d, s.total_peak + q, s.total_mass + q, s.sum + q * a.d, s.peak[q], s.mass[q], 1, a.d,
                 0);
  }
  for (int64_t q = 0; q < t.count; ++q) {
    const float inverse = 1.f / s.total_mass[q];
    for (int64_t i = 0; i < a.d; i += kLanes) store(y + q * width + i, load(s.total + q * a.d + i) * splat(inverse));
  }
}

static void attend_one_tile(const AttentionArgs& a, const AttentionTask& t, float* scratch) {
  const Scratch s = carve(scratch, a.d);
  const Tiles use(1);
  rotate_query(a, t.first_row, t.head, s.row);
  take_queries(s.row, a.d, 1, a.d, Operands(s).query);
  attend_by_parts<KvBF16>(a, t, s, [&](int64_t part) { part_of_tiles(a, t, s, part); });
}

}  // namespace
