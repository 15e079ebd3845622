// Causal attention over the paged cache. Keys are taken in blocks at absolute positions 0, 64, 128, ..., softmax is made
// over parts of 512 keys, parts are merged in order, and every sum runs in one order: the result of a query depends
// neither on the batch, nor on how the prompt was cut into chunks, nor on the way (attend, attend_one) it was computed.
#if defined(__AMX_BF16__)
#include "attention_amx.h"
#endif
#include "attention_few.h"

namespace {

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
    add_products(left + i, left_step, b, sum);
  }
}

static void score_tile(const Scratch& s, int64_t d, int64_t tile, int64_t key) {
  V sum[kRows][kWide] = {};
  multiply(s.query + tile * kRows * d, d, s.keys + key * d, d, sum);
  store_tile(sum, s.scores + tile * kRows * kKeyBlock + key, kKeyBlock);
}

static void value_tile(const Scratch& s, int64_t tile, int64_t slab, int64_t keys) {
  float* place = s.sum + (tile * s.slabs + slab) * kRows * kSlab;
  V sum[kRows][kWide];
  load_tile(place, kSlab, s.factor + tile * kRows, sum);
  multiply(s.scores + tile * kRows * kKeyBlock, kKeyBlock, s.values + slab * kKeyBlock * kSlab, keys, sum);
  store_tile(sum, place, kSlab);
}

// One block of keys for all queries. Tiles skip what none of their queries sees.
template <class F>
static void wide_block(const AttentionArgs& a, const AttentionTask& t, const Scratch& s, int64_t first) {
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

// `attend_block(first)`: the keys from `first` on, for all queries, to s.sum, s.peak, s.mass.
template <class AttendBlock>
INLINE void attend_by_blocks(const AttentionArgs& a, const AttentionTask& t, const Scratch& s,
                             AttendBlock attend_block) {
  const int64_t width = a.heads * a.d, last = t.position + t.count - 1;
  const int64_t rows = round_up(t.count, kRows), tiled = rows * s.slabs * kSlab, step = kRows * kSlab;
  float* y = a.y + t.first_row * width + t.head * a.d;
  for (int64_t q = 0; q < t.count; ++q) std::memcpy(s.query + q * a.d, y + q * width, a.d * sizeof(float));
  std::memset(s.query + t.count * a.d, 0, (rows - t.count) * a.d * sizeof(float));
  clear(s.total, tiled, s.total_peak, s.total_mass, rows);
  for (int64_t part = 0; part <= last; part += kPart) {
    clear(s.sum, tiled, s.peak, s.mass, kQueryBlock);
    for (int64_t first = part; first < part + kPart && first <= last; first += kKeyBlock)
      attend_block(first);
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

template <class F>
static void attend_as(const AttentionArgs& a, const AttentionTask& t, float* scratch) {
  const Scratch s = carve(scratch, a.d);
  if (t.count <= kFew && qwen::kv_lanes(a.block_size) == kGroup)
    return attend_by_blocks(a, t, s, [&](int64_t first) { few_block<F>(a, t, s, first); });
  std::memset(s.keys, 0, a.d * kKeyBlock * sizeof(float));
  attend_by_blocks(a, t, s, [&](int64_t first) { wide_block<F>(a, t, s, first); });
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
#if defined(__AMX_BF16__)
  if (a.format == qwen::kKvBF16 && tiles_fit(a)) return attend_tiles(a, t, scratch);
#endif
  constexpr decltype(&attend_as<KvF32>) kBy[] = {attend_as<KvF32>, attend_as<KvBF16>, attend_as<KvI8>};
  kBy[a.format](a, t, scratch);
}

static void attend_one(const AttentionArgs& a, const AttentionTask& t, float* scratch) {
#if defined(__AMX_BF16__)
  if (a.format == qwen::kKvBF16 && tiles_fit(a)) return attend_one_tile(a, t, scratch);
#endif
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
