// Integer products of many rows with AMX tiles. A block of W is a tile as it lies in memory (16 columns x 64 inputs),
// 4 bits are unpacked to that first. Sums per block leave the tiles as exact integers, and what happens to them then is
// the same as elsewhere, so all results are too. Included by quant_isa.cc.
#pragma once
#include <immintrin.h>

namespace {

constexpr int64_t kTile = 16, kTileBytes = 1024, kTileInputs = 64;
constexpr int64_t kRun = 4;  // blocks whose sums are formed before they are added up
constexpr int64_t kMostTileRows = 256;

// The compiler does not know that tile instructions use memory.
INLINE void memory_barrier() { asm volatile("" ::: "memory"); }

// Tiles 0..3 are sums, 4 and 5 rows of x, 6 and 7 codes. While a Tiles lives they are in use; released afterwards, so
// that neither a context switch nor other code on this thread pays for them.
struct Tiles {
  explicit Tiles(int64_t rows) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = i < 6 && rows < kTile ? rows : kTile;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// What a thread works in.
struct Workspace {
  alignas(64) int32_t sums[kRun * kTile * kTile];
  alignas(64) uint8_t codes[2][kRun * 4 * kTileBytes];  // a block has at most 4 tiles (256 inputs)
  alignas(64) float acc[2][kMostTileRows * 2 * kTile];  // of the product and the gate: [row][2 * 16 columns]
};

// Codes of `blocks` blocks as tiles: where they are, or unpacked.
template <int BITS>
INLINE const uint8_t* tiles_of(const uint8_t* from, int64_t blocks, int64_t block, uint8_t* buffer) {
  const int64_t lines = blocks * block * BITS / 32;
  for (int64_t i = 0; i < lines; ++i) {
    fetch_ahead(from + i * 64);
    if constexpr (BITS == 4) {
      const VB v = load_codes(from + i * 64), low = low_nibbles(v), high = high_nibbles(v);
      std::memcpy(buffer + i * 128, &low, 64);
      std::memcpy(buffer + i * 128 + 64, &high, 64);
    }
  }
  memory_barrier();
  return BITS == 4 ? buffer : from;
}

struct Rescale {
  __m512i minus_zero;  // in the lower half of every 32 bits
  V scale;
  bool grouped;
};

template <int BITS>
INLINE Rescale rescale_at(const Columns& c, int64_t g, bool grouped) {
  const VI zero = zero_of<BITS>(c, grouped ? g : 0, 0);
  return {(__m512i)((-zero) & 0xffff), grouped ? group_scale(c, g, 0) : V{}, grouped};
}

// acc + (sum - zero * sum of q) * scales, for one row, 16 columns and one block. Both factors of the zero fit 16 bits.
INLINE V add_block(const Rescale& s, V acc, const int32_t* sums, int32_t x_sum, float x_scale) {
  const __m512i sum = _mm512_dpwssd_epi32(_mm512_load_si512(sums), s.minus_zero, _mm512_set1_epi32(x_sum));
  return fma((V)_mm512_cvtepi32_ps(sum), s.grouped ? splat(x_scale) * s.scale : splat(x_scale), acc);
}

// Up to 16 rows: one stream of codes, one tile of sums for each block of a run.
template <int BITS>
static void stream_product(const QuantInput& x, const QuantWeight& w, int64_t b, Workspace& work, float* acc) {
  const Columns c = columns_at(w, b);
  const int64_t block = w.block(), bytes = block * 2 * BITS, stride = x.k_padded, per_block = block / kTileInputs;
  for (int64_t g = 0; g < x.blocks; g += kRun) {
    const int64_t run = smaller(kRun, x.blocks - g);
    const uint8_t* codes = tiles_of<BITS>(c.codes + g * bytes, run, block, work.codes[0]);
    const int8_t* q = x.q + g * block;
    for (int64_t i = 0; w.group && i < 2; ++i) __builtin_prefetch(c.scales + g * 32 + kFarScales + i * 64, 0, 2);
#define QWEN_SUM(i)                                                            \
  if (i < run) {                                                               \
    _tile_zero(i);                                                             \
    for (int64_t t = i * per_block; t < (i + 1) * per_block; ++t) {            \
      _tile_loadd(4, q + t * kTileInputs, stride);                             \
      _tile_loadd(6, codes + t * kTileBytes, 64);                              \
      _tile_dpbsud(i, 4, 6);                                                   \
    }                                                                          \
    _tile_stored(i, work.sums + i * kTile * kTile, 64);                        \
  }
    QWEN_SUM(0) QWEN_SUM(1) QWEN_SUM(2) QWEN_SUM(3)
#undef QWEN_SUM
    memory_barrier();
    Rescale rescale[kRun];
    for (int64_t i = 0; i < run; ++i) rescale[i] = rescale_at<BITS>(c, g + i, w.group);
    for (int64_t r = 0; r < x.rows; ++r) {
      const int64_t at = r * x.blocks + g;
      V v = g ? load(acc + r * 2 * kTile) : V{};
      for (int64_t i = 0; i < run; ++i)
        v = add_block(rescale[i], v, work.sums + (i * kTile + r) * kTile, x.sum[at + i], x.scale[at + i]);
      store(acc + r * 2 * kTile, v);
    }
  }
}

// More rows: 32 rows x 32 columns at a time over a run of blocks, which stays in the first cache for all rows.
template <int BITS>
static void square_product(const QuantInput& x, const QuantWeight& w, int64_t b, bool both, Workspace& work,
                           float* acc) {
  const Columns c0 = columns_at(w, b), c1 = columns_at(w, both ? b + 1 : b);
  const int64_t block = w.block(), bytes = block * 2 * BITS, stride = x.k_padded, per_block = block / kTileInputs;
  for (int64_t g0 = 0; g0 < x.blocks; g0 += kRun) {
    const int64_t run = smaller(kRun, x.blocks - g0);
    const uint8_t* codes0 = tiles_of<BITS>(c0.codes + g0 * bytes, run, block, work.codes[0]);
    const uint8_t* codes1 = both ? tiles_of<BITS>(c1.codes + g0 * bytes, run, block, work.codes[1]) : codes0;
    Rescale left[kRun], right[kRun];
    for (int64_t i = 0; i < run; ++i) {
      left[i] = rescale_at<BITS>(c0, g0 + i, w.group);
      right[i] = rescale_at<BITS>(c1, g0 + i, w.group);
    }
    for (int64_t r0 = 0; r0 < x.rows; r0 += 2 * kTile) {
      const int8_t* q0 = x.q + r0 * stride + g0 * block;
      const int8_t* q1 = r0 + kTile < x.rows ? q0 + kTile * stride : q0;
      const int64_t rows = smaller(2 * kTile, x.rows - r0);
      for (int64_t i = 0; i < run; ++i) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t t = i * per_block; t < (i + 1) * per_block; ++t) {
          _tile_loadd(6, codes0 + t * kTileBytes, 64);
          _tile_loadd(4, q0 + t * kTileInputs, stride);
          _tile_dpbsud(0, 4, 6);
          _tile_loadd(7, codes1 + t * kTileBytes, 64);
          _tile_dpbsud(1, 4, 7);
          _tile_loadd(5, q1 + t * kTileInputs, stride);
          _tile_dpbsud(2, 5, 6);
          _tile_dpbsud(3, 5, 7);
        }
        _tile_stored(0, work.sums, 128);
        _tile_stored(1, work.sums + kTile, 128);
        _tile_stored(2, work.sums + 2 * kTile * kTile, 128);
        _tile_stored(3, work.sums + 2 * kTile * kTile + kTile, 128);
        memory_barrier();
        const bool first = g0 + i == 0;
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t at = (r0 + r) * x.blocks + g0 + i;
          float* to = acc + (r0 + r) * 2 * kTile;
          const int32_t* sums = work.sums + r * 2 * kTile;
          store(to, add_block(left[i], first ? V{} : load(to), sums, x.sum[at], x.scale[at]));
          store(to + kTile, add_block(right[i], first ? V{} : load(to + kTile), sums + kTile, x.sum[at], x.scale[at]));
        }
      }
    }
  }
}

// Scales of whole rows of W, the gate, bias and residual.
static void finish_tiles(const QuantCall& a, int64_t b, const Workspace& work, int p) {
  for (int64_t r = 0; r < a.x.rows; ++r) {
    const int64_t at = r * 2 * kTile + p * kTile;
    V v = load(work.acc[0] + at);
    if (!a.w.group) v = v * row_scale(columns_at(a.w, b), 0);
    if (a.gate.codes) {
      V gate = load(work.acc[1] + at);
      if (!a.gate.group) gate = gate * row_scale(columns_at(a.gate, b), 0);
      v = silu_times(v, gate);
    }
    finish(a, r, b * kTile, v);
  }
}

template <int BITS>
static void amx_columns(const QuantCall& a, int64_t b0, int64_t b1, Workspace& work) {
  const Tiles tiles(a.x.rows);
  if (a.x.rows <= kTile) {
    for (int64_t b = b0; b < b1; ++b) {
      stream_product<BITS>(a.x, a.w, b, work, work.acc[0]);
      if (a.gate.codes) stream_product<BITS>(a.x, a.gate, b, work, work.acc[1]);
      finish_tiles(a, b, work, 0);
    }
    return;
  }
  for (int64_t b = b0; b < b1; b += 2) {
    const bool both = b + 1 < b1;
    square_product<BITS>(a.x, a.w, b, both, work, work.acc[0]);
    if (a.gate.codes) square_product<BITS>(a.x, a.gate, b, both, work, work.acc[1]);
    finish_tiles(a, b, work, 0);
    if (both) finish_tiles(a, b + 1, work, 1);
  }
}

}  // namespace
