// Integer products of many rows with AMX tiles. A block of W is a tile as it lies in memory (16 columns x 64 inputs),
// 4 bits are unpacked to that first. Sums per block leave the tiles as exact integers, and what happens to them then is
// the same as elsewhere, so all results are too. Included by quant_isa.cc.
#pragma once
#include "amx.h"

namespace {

using qwen::kStep;
constexpr int64_t kTileBytes = kTile * kStep;
static_assert(kTile == qwen::kTileRows, "rows of a tile");
constexpr int64_t kRun = 4, kSquareRun = 2;  // blocks whose sums are formed before they are added up
constexpr int64_t kWholeRun = 4;             // blocks of a matrix that stay in the first cache while rows pass by
constexpr int64_t kMostTileRows = 256;

// sum += signed rows . codes: unsigned as they are stored (8 bits), signed when they were unpacked (4 bits)
template <int BITS, int SUM, int ROWS, int CODES>
INLINE void tile_dot() {
  if constexpr (BITS == 8) asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(ROWS), "i"(CODES));
  else asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(ROWS), "i"(CODES));
}

// What a thread works in.
struct Workspace {
  alignas(64) int32_t sums[kMostTileRows / kTile * 4 * kTile * kTile];
  alignas(64) uint8_t codes[2][kRun * 4 * kTileBytes];  // a block has at most 4 tiles (256 inputs)
  alignas(64) float acc[2][kMostTileRows * 2 * kTile];  // of the product and the gate: [row][2 * 16 columns]
};
static_assert(kMostTileRows / kTile >= kSquareRun, "sums of a run fit");

// Codes of the blocks g .. g + run as tiles: 8 bits where they are, 4 bits unpacked, with their zeros taken off.
template <int BITS>
INLINE const uint8_t* tiles_of(const Columns& c, int64_t g, int64_t run, int64_t block, uint8_t* buffer) {
  const int64_t lines = block * BITS / 32;
  const uint8_t* from = c.codes + g * lines * 64;
  if constexpr (BITS == 8) return from;
  uint8_t* to = buffer;
  for (int64_t i = 0; i < run; ++i) {
    const VB zero = (VB)(VU)(zero_of<BITS>(c, g + i, 0) * 0x01010101);
    for (int64_t l = 0; l < lines; ++l, from += 64, to += 128) {
      const VB v = load_codes(from), low = low_nibbles(v) - zero, high = high_nibbles(v) - zero;
      std::memcpy(to, &low, 64);
      std::memcpy(to + 64, &high, 64);
    }
  }
  return buffer;
}

// What makes a float of a sum: the zeros of 8 bits (4 bits have none left), and the scales of a group.
template <int BITS>
struct Rescale {
  __m512i minus_zero;  // in the lower half of every 32 bits
  V scale;
  bool grouped;

  Rescale() = default;
  Rescale(const Columns& c, int64_t g, bool by_group) : scale(by_group ? group_scale(c, g, 0) : V{}), grouped(by_group) {
    if constexpr (BITS == 8) minus_zero = (__m512i)((-zero_of<BITS>(c, by_group ? g : 0, 0)) & 0xffff);
  }
  // Sums less zero * sum of q; both factors fit 16 bits.
  VI centred(const int32_t* sums, int32_t x_sum) const {
    const __m512i v = _mm512_load_si512(sums);
    if constexpr (BITS == 4) return (VI)v;
    return (VI)_mm512_dpwssd_epi32(v, minus_zero, _mm512_set1_epi32(x_sum));
  }
  // acc + sums * scales, for one row, 16 columns and one block.
  V add(V acc, const int32_t* sums, int32_t x_sum, float x_scale) const {
    return fma(as_float(centred(sums, x_sum)), grouped ? splat(x_scale) * scale : splat(x_scale), acc);
  }
  // The same for wide rows: sums of the first and the second pieces.
  V add_wide(V acc, const int32_t* first, const int32_t* second, const int32_t* x_sum, int64_t next_sum,
             float x_scale) const {
    return fma(joined(centred(first, x_sum[0]), centred(second, x_sum[next_sum])), splat(x_scale) * scale, acc);
  }
};

// Codes to be fetched into the second cache, a few lines at a time: memory must be busy while the tiles are.
struct Ahead {
  const uint8_t *near, *far;
  int64_t per_tile, per_row;
};
INLINE void fetch(Ahead& ahead, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i) {
    __builtin_prefetch(ahead.far + i * 64, 0, 2);
    __builtin_prefetch(ahead.near + i * 64, 0, 3);
  }
  ahead.far += lines * 64;
  ahead.near += lines * 64;
}

// Sums of one block: rows q, 16 columns. I is the tile.
template <int BITS, int I>
INLINE void stream_sums(const uint8_t* codes, const int8_t* q, int64_t stride, int64_t tiles, int32_t* sums,
                        Ahead& ahead) {
  tile_zero<I>();
  for (int64_t t = I * tiles; t < (I + 1) * tiles; ++t) {
    tile_load<4>(q + t * kStep, stride);
    tile_load<6>(codes + t * kTileBytes, 64);
    tile_dot<BITS, I, 4, 6>();
    fetch(ahead, ahead.per_tile);
  }
  tile_store<I>(sums + I * kTile * kTile, 64);
}

// Sums of one block of rows in two pieces, in tiles I and I + 1.
template <int BITS, int I>
INLINE void pieces_sums(const uint8_t* codes, const int8_t* q, const int8_t* fine, int64_t stride, int64_t tiles,
                        int32_t* sums, Ahead& ahead) {
  tile_zero<I>(), tile_zero<I + 1>();
  for (int64_t t = 0; t < tiles; ++t) {
    tile_load<6>(codes + t * kTileBytes, 64);
    tile_load<4>(q + t * kStep, stride);
    tile_dot<BITS, I, 4, 6>();
    tile_load<5>(fine + t * kStep, stride);
    tile_dot<BITS, I + 1, 5, 6>();
    fetch(ahead, 2 * ahead.per_tile);
  }
  tile_store<I>(sums + I * kTile * kTile, 64);
  tile_store<I + 1>(sums + (I + 1) * kTile * kTile, 64);
}

// Tiles 0..3 from and to memory, `apart` numbers from one another.
INLINE void load_tiles(const int32_t* sums, int64_t apart) {
  tile_load<0>(sums, 64), tile_load<1>(sums + apart, 64);
  tile_load<2>(sums + 2 * apart, 64), tile_load<3>(sums + 3 * apart, 64);
}
INLINE void store_sums(int32_t* sums, int64_t apart) {
  tile_store<0>(sums, 64), tile_store<1>(sums + apart, 64);
  tile_store<2>(sums + 2 * apart, 64), tile_store<3>(sums + 3 * apart, 64);
}
INLINE VI load_sums(const int32_t* sums) { return (VI)_mm512_load_si512(sums); }

// Adds the sums of the blocks g .. g + run to acc.
template <int BITS>
INLINE void add_stream(const QuantInput& x, const Rescale<BITS>* rescale, int64_t g, int64_t run, const int32_t* sums,
                       float* acc, Ahead& ahead) {
  const int64_t rows = x.rows, blocks = x.runs;
  const float* scale = x.scale + g;
  const int32_t* x_sum = x.sum + g;
  for (int64_t r = 0; r < rows; ++r, scale += blocks, x_sum += blocks) {
    V v = g ? load(acc + r * 2 * kTile) : V{};
    for (int64_t i = 0; i < run; ++i)
      v = rescale[i].add(v, sums + (i * kTile + r) * kTile, x_sum[i], scale[i]);
    store(acc + r * 2 * kTile, v);
    fetch(ahead, ahead.per_row);
  }
}

// Up to 16 rows: one stream of codes, one tile of sums for each block of a run.
template <int BITS>
static void stream_product(const QuantInput& x, const QuantWeight& w, int64_t b, Workspace& work, float* acc) {
  const Columns c = columns_at(w, b);
  const int64_t block = w.block(), bytes = block * 2 * BITS, stride = x.k_padded, per_block = block / kStep;
  for (int64_t g = 0; g < x.runs; g += kRun) {
    const int64_t run = smaller(kRun, x.runs - g);
    const uint8_t* codes = tiles_of<BITS>(c, g, run, block, work.codes[0]);
    const int8_t* q = x.q + g * block;
    const int64_t lines = run * bytes / 64, tiles = run * per_block;
    Ahead ahead = {c.codes + (g + run) * bytes, c.codes + (g + run) * bytes + kFar, lines / 3 / tiles, (lines - lines / 3 + x.rows - 1) / x.rows};
    for (int64_t i = 0; w.group && i < 2; ++i) __builtin_prefetch(c.scales + g * 32 + kFarScales + i * 64, 0, 2);
    stream_sums<BITS, 0>(codes, q, stride, per_block, work.sums, ahead);
    if (run > 1) stream_sums<BITS, 1>(codes, q, stride, per_block, work.sums, ahead);
    if (run > 2) stream_sums<BITS, 2>(codes, q, stride, per_block, work.sums, ahead);
    if (run > 3) stream_sums<BITS, 3>(codes, q, stride, per_block, work.sums, ahead);
    Rescale<BITS> rescale[kRun];
    for (int64_t i = 0; i < run; ++i) rescale[i] = Rescale<BITS>(c, g + i, w.group);
    run == kRun ? add_stream(x, rescale, g, kRun, work.sums, acc, ahead) : add_stream(x, rescale, g, run, work.sums, acc, ahead);
  }
}

// Codes of two blocks of columns that are needed next, a few lines at a time between the products.
struct Soon {
  const uint8_t *left, *right;
  int64_t per_step;
  void fetch() {
    for (int64_t i = 0; i < per_step; ++i, left += 64, right += 64) {
      __builtin_prefetch(left, 0, 2);
      __builtin_prefetch(right, 0, 2);
    }
  }
};

// Adds to tiles 0..3: two tiles of rows by 32 columns; `apart`: from one step of rows to the next.
template <int BITS>
INLINE void square_steps(const uint8_t* codes0, const uint8_t* codes1, const int8_t* q0, const int8_t* q1,
                         int64_t apart, int64_t tiles, Soon& soon) {
  for (int64_t t = 0; t < tiles; ++t, q0 += apart, q1 += apart) {
    tile_load<6>(codes0 + t * kTileBytes, 64);
    tile_load<4>(q0, kStep);
    tile_dot<BITS, 0, 4, 6>();
    tile_load<7>(codes1 + t * kTileBytes, 64);
    tile_dot<BITS, 1, 4, 7>();
    tile_load<5>(q1, kStep);
    tile_dot<BITS, 2, 5, 6>();
    tile_dot<BITS, 3, 5, 7>();
    soon.fetch();
  }
}

// The `run` blocks of codes from block g on, or the first of the next columns if there are no more; `steps` calls of
// fetch ask for all of them. A block of 16 columns has `bytes`, a row of blocks `blocks` of them.
INLINE Soon next_codes(const Columns& c0, const Columns& c1, int64_t g, int64_t run, int64_t blocks, int64_t bytes,
                       int64_t steps) {
  const int64_t at = g < blocks ? g * bytes : 2 * blocks * bytes;
  return {c0.codes + at, c1.codes + at, (run * bytes / 64 + steps - 1) / steps};
}

// Sums of one block of 32 x 32 results; q1 are the second 16 rows.
template <int BITS>
INLINE void square_sums(const uint8_t* codes0, const uint8_t* codes1, const int8_t* q0, const int8_t* q1,
                        int64_t apart, int64_t tiles, int32_t* sums, Soon& soon) {
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  square_steps<BITS>(codes0, codes1, q0, q1, apart, tiles, soon);
  tile_store<0>(sums, 128);
  tile_store<1>(sums + kTile, 128);
  tile_store<2>(sums + 2 * kTile * kTile, 128);
  tile_store<3>(sums + 2 * kTile * kTile + kTile, 128);
}

// Adds the sums of `run` blocks from g on to acc, rows r0 .. r0 + 32.
template <int BITS>
INLINE void add_square(const QuantInput& x, const Rescale<BITS>* left, const Rescale<BITS>* right, int64_t r0, int64_t g,
                       int64_t run, const int32_t* sums, float* acc) {
  const int64_t rows = smaller(2 * kTile, x.rows - r0);
  const float* scale = x.scale + g * x.rows + r0;
  const int32_t* x_sum = x.sum + g * x.rows + r0;
  float* to = acc + r0 * 2 * kTile;
  for (int64_t r = 0; r < rows; ++r, to += 2 * kTile, sums += 2 * kTile, ++scale, ++x_sum) {
    V a = g ? load(to) : V{}, b = g ? load(to + kTile) : V{};
    for (int64_t i = 0; i < run; ++i) {
      const int64_t at = i * x.rows;
      a = left[i].add(a, sums + i * 4 * kTile * kTile, x_sum[at], scale[at]);
      b = right[i].add(b, sums + i * 4 * kTile * kTile + kTile, x_sum[at], scale[at]);
    }
    store(to, a);
    store(to + kTile, b);
  }
}

// More rows: 32 rows x 32 columns at a time over a run of blocks, which stays in the first cache for all rows.
template <int BITS>
static void square_product(const QuantInput& x, const QuantWeight& w, int64_t b, bool both, Workspace& work,
                           float* acc) {
  const Columns c0 = columns_at(w, b), c1 = columns_at(w, both ? b + 1 : b);
  const int64_t block = w.block(), bytes = block * 2 * BITS, per_block = block / kStep;
  const int64_t rows = x.rows, stacks = (rows + 2 * kTile - 1) / (2 * kTile) * 2;
  for (int64_t g0 = 0; g0 < x.runs; g0 += kSquareRun) {
    const int64_t run = smaller(kSquareRun, x.runs - g0);
    const uint8_t* codes0 = tiles_of<BITS>(c0, g0, run, block, work.codes[0]);
    const uint8_t* codes1 = both ? tiles_of<BITS>(c1, g0, run, block, work.codes[1]) : codes0;
    Soon soon = next_codes(c0, c1, g0 + run, run, x.runs, bytes, stacks / 2 * run * per_block);
    Rescale<BITS> left[kSquareRun], right[kSquareRun];
    for (int64_t i = 0; i < run; ++i) {
      left[i] = Rescale<BITS>(c0, g0 + i, w.group);
      right[i] = Rescale<BITS>(c1, g0 + i, w.group);
    }
    for (int64_t r0 = 0; r0 < rows; r0 += 2 * kTile) {
      for (int64_t i = 0; i < run; ++i) {
        const int64_t at = i * per_block;
        const int8_t* q0 = x.q + r0 * x.k_padded + (g0 + i) * per_block * kTileBytes;
        const int8_t* q1 = r0 + kTile < rows ? q0 + kTile * x.k_padded : q0;
        square_sums<BITS>(codes0 + at * kTileBytes, codes1 + at * kTileBytes, q0, q1, kTileBytes, per_block,
                    work.sums + i * 4 * kTile * kTile, soon);
      }
      add_square(x, left, right, r0, g0, run, work.sums, acc);
    }
  }
}

}  // namespace

#include "quant_amx_wide.h"

namespace {

// Scales of whole rows of W, the gate, bias and residual of `count` blocks of columns.
static void finish_tiles(const QuantCall& a, int64_t b, int64_t count, const Workspace& work) {
  const bool gated = a.gate.codes, whole = !a.w.group;
  V scale[2], gate_scale[2];
  for (int64_t p = 0; p < count; ++p) {
    scale[p] = whole ? row_scale(columns_at(a.w, b + p), 0) : V{};
    gate_scale[p] = whole && gated ? row_scale(columns_at(a.gate, b + p), 0) : V{};
  }
  for (int64_t r = 0; r < a.x.rows; ++r)
    for (int64_t p = 0; p < count; ++p) {
      const int64_t at = (r * 2 + p) * kTile;
      V v = load(work.acc[0] + at);
      if (whole) v = v * scale[p];
      if (gated) {
        const V gate = load(work.acc[1] + at);
        v = silu_times(v, whole ? gate * gate_scale[p] : gate);
      }
      finish(a, r, (b + p) * kTile, v);
    }
}

// Results lie a whole row apart; asking for their lines early takes the wait out of storing them.
INLINE void fetch_results(const QuantCall& a, int64_t b) {
  const int64_t rows = a.x.rows, n = a.w.n;
  const float* y = a.y + b * kTile;
  for (int64_t r = 0; r < rows; ++r, y += n) {
    __builtin_prefetch(y, 1, 2);
    __builtin_prefetch(y + kTile, 1, 2);
  }
}

template <int BITS>
INLINE void few_rows(const QuantInput& x, const QuantWeight& w, int64_t b, Workspace& work, float* acc) {
  if (!x.wide) return stream_product<BITS>(x, w, b, work, acc);
  w.group ? stream_wide<BITS>(x, w, b, work, acc) : stream_whole(x, w, b, work, acc);
}

template <int BITS>
INLINE void many_rows(const QuantInput& x, const QuantWeight& w, int64_t b, bool both, Workspace& work, float* acc) {
  if (!x.wide) return square_product<BITS>(x, w, b, both, work, acc);
  w.group ? square_wide<BITS>(x, w, b, both, work, acc) : square_whole(x, w, b, both, work, acc);
}

template <int BITS>
static void amx_columns(const QuantCall& a, int64_t b0, int64_t b1, Workspace& work) {
  const Tiles tiles(a.x.rows);
  if (a.x.rows <= kTile) {
    for (int64_t b = b0; b < b1; ++b) {
      few_rows<BITS>(a.x, a.w, b, work, work.acc[0]);
      if (a.gate.codes) few_rows<BITS>(a.x, a.gate, b, work, work.acc[1]);
      finish_tiles(a, b, 1, work);
    }
    return;
  }
  for (int64_t b = b0; b < b1; b += 2) {
    const bool both = b + 1 < b1;
    fetch_results(a, b);
    many_rows<BITS>(a.x, a.w, b, both, work, work.acc[0]);
    if (a.gate.codes) many_rows<BITS>(a.x, a.gate, b, both, work, work.acc[1]);
    finish_tiles(a, b, 1 + both, work);
  }
}

}  // namespace
