// Integer products of many rows with AMX tiles. A block of W is a tile as it lies in memory (16 columns x 64 inputs),
// 4 bits are unpacked to that first. Sums per block leave the tiles as exact integers, and what happens to them then is
// the same as elsewhere, so all results are too. Included by quant_isa.cc.
#pragma once
#include <immintrin.h>

namespace {

using qwen::kStep;
constexpr int64_t kTile = qwen::kTileRows, kTileBytes = kTile * kStep;
constexpr int64_t kRun = 4, kSquareRun = 2;  // blocks whose sums are formed before they are added up
constexpr int64_t kWholeRun = 4;             // blocks of a matrix that stay in the first cache while rows pass by
constexpr int64_t kMostTileRows = 256;

// Instructions with the number of a tile as a template argument; the intrinsics want a literal, and do not tell the
// compiler that they use memory.
template <int I>
INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(I));
}
template <int I>
INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(I) : "memory");
}
template <int I>
INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(I) : "memory");
}
template <int SUM, int ROWS, int CODES>  // sum += signed rows . unsigned codes
INLINE void tile_dot() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(ROWS), "i"(CODES));
}

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
  alignas(64) int32_t sums[kMostTileRows / kTile * 4 * kTile * kTile];
  alignas(64) uint8_t codes[2][kRun * 4 * kTileBytes];  // a block has at most 4 tiles (256 inputs)
  alignas(64) float acc[2][kMostTileRows * 2 * kTile];  // of the product and the gate: [row][2 * 16 columns]
};
static_assert(kMostTileRows / kTile >= kSquareRun, "sums of a run fit");

// Codes of `blocks` blocks as tiles: where they are, or unpacked.
template <int BITS>
INLINE const uint8_t* tiles_of(const uint8_t* from, int64_t blocks, int64_t block, uint8_t* buffer) {
  if constexpr (BITS == 8) return from;
  const int64_t lines = blocks * block * BITS / 32;
  for (int64_t i = 0; i < lines; ++i) {
    const VB v = load_codes(from + i * 64), low = low_nibbles(v), high = high_nibbles(v);
    std::memcpy(buffer + i * 128, &low, 64);
    std::memcpy(buffer + i * 128 + 64, &high, 64);
  }
  return buffer;
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
template <int I>
INLINE void stream_sums(const uint8_t* codes, const int8_t* q, int64_t stride, int64_t tiles, int32_t* sums,
                        Ahead& ahead) {
  tile_zero<I>();
  for (int64_t t = I * tiles; t < (I + 1) * tiles; ++t) {
    tile_load<4>(q + t * kStep, stride);
    tile_load<6>(codes + t * kTileBytes, 64);
    tile_dot<I, 4, 6>();
    fetch(ahead, ahead.per_tile);
  }
  tile_store<I>(sums + I * kTile * kTile, 64);
}

// Sums of one block of rows in two pieces, in tiles I and I + 1.
template <int I>
INLINE void pieces_sums(const uint8_t* codes, const int8_t* q, const int8_t* fine, int64_t stride, int64_t tiles,
                        int32_t* sums, Ahead& ahead) {
  tile_zero<I>(), tile_zero<I + 1>();
  for (int64_t t = 0; t < tiles; ++t) {
    tile_load<6>(codes + t * kTileBytes, 64);
    tile_load<4>(q + t * kStep, stride);
    tile_dot<I, 4, 6>();
    tile_load<5>(fine + t * kStep, stride);
    tile_dot<I + 1, 5, 6>();
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
INLINE void add_stream(const QuantInput& x, const Rescale* rescale, int64_t g, int64_t run, const int32_t* sums,
                       float* acc, Ahead& ahead) {
  const int64_t rows = x.rows, blocks = x.runs;
  const float* scale = x.scale + g;
  const int32_t* x_sum = x.sum + g;
  for (int64_t r = 0; r < rows; ++r, scale += blocks, x_sum += blocks) {
    V v = g ? load(acc + r * 2 * kTile) : V{};
    for (int64_t i = 0; i < run; ++i)
      v = add_block(rescale[i], v, sums + (i * kTile + r) * kTile, x_sum[i], scale[i]);
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
    const uint8_t* codes = tiles_of<BITS>(c.codes + g * bytes, run, block, work.codes[0]);
    const int8_t* q = x.q + g * block;
    const int64_t lines = run * bytes / 64, tiles = run * per_block;
    Ahead ahead = {c.codes + (g + run) * bytes, c.codes + (g + run) * bytes + kFar, lines / 3 / tiles, (lines - lines / 3 + x.rows - 1) / x.rows};
    for (int64_t i = 0; w.group && i < 2; ++i) __builtin_prefetch(c.scales + g * 32 + kFarScales + i * 64, 0, 2);
    stream_sums<0>(codes, q, stride, per_block, work.sums, ahead);
    if (run > 1) stream_sums<1>(codes, q, stride, per_block, work.sums, ahead);
    if (run > 2) stream_sums<2>(codes, q, stride, per_block, work.sums, ahead);
    if (run > 3) stream_sums<3>(codes, q, stride, per_block, work.sums, ahead);
    Rescale rescale[kRun];
    for (int64_t i = 0; i < run; ++i) rescale[i] = rescale_at<BITS>(c, g + i, w.group);
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
INLINE void square_steps(const uint8_t* codes0, const uint8_t* codes1, const int8_t* q0, const int8_t* q1,
                         int64_t apart, int64_t tiles, Soon& soon) {
  for (int64_t t = 0; t < tiles; ++t, q0 += apart, q1 += apart) {
    tile_load<6>(codes0 + t * kTileBytes, 64);
    tile_load<4>(q0, kStep);
    tile_dot<0, 4, 6>();
    tile_load<7>(codes1 + t * kTileBytes, 64);
    tile_dot<1, 4, 7>();
    tile_load<5>(q1, kStep);
    tile_dot<2, 5, 6>();
    tile_dot<3, 5, 7>();
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
INLINE void square_sums(const uint8_t* codes0, const uint8_t* codes1, const int8_t* q0, const int8_t* q1,
                        int64_t apart, int64_t tiles, int32_t* sums, Soon& soon) {
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  square_steps(codes0, codes1, q0, q1, apart, tiles, soon);
  tile_store<0>(sums, 128);
  tile_store<1>(sums + kTile, 128);
  tile_store<2>(sums + 2 * kTile * kTile, 128);
  tile_store<3>(sums + 2 * kTile * kTile + kTile, 128);
}

// Adds the sums of `run` blocks from g on to acc, rows r0 .. r0 + 32.
INLINE void add_square(const QuantInput& x, const Rescale* left, const Rescale* right, int64_t r0, int64_t g,
                       int64_t run, const int32_t* sums, float* acc) {
  const int64_t rows = smaller(2 * kTile, x.rows - r0);
  const float* scale = x.scale + g * x.rows + r0;
  const int32_t* x_sum = x.sum + g * x.rows + r0;
  float* to = acc + r0 * 2 * kTile;
  for (int64_t r = 0; r < rows; ++r, to += 2 * kTile, sums += 2 * kTile, ++scale, ++x_sum) {
    V a = g ? load(to) : V{}, b = g ? load(to + kTile) : V{};
    for (int64_t i = 0; i < run; ++i) {
      const int64_t at = i * x.rows;
      a = add_block(left[i], a, sums + i * 4 * kTile * kTile, x_sum[at], scale[at]);
      b = add_block(right[i], b, sums + i * 4 * kTile * kTile + kTile, x_sum[at], scale[at]);
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
    const uint8_t* codes0 = tiles_of<BITS>(c0.codes + g0 * bytes, run, block, work.codes[0]);
    const uint8_t* codes1 = both ? tiles_of<BITS>(c1.codes + g0 * bytes, run, block, work.codes[1]) : codes0;
    Soon soon = next_codes(c0, c1, g0 + run, run, x.runs, bytes, stacks / 2 * run * per_block);
    Rescale left[kSquareRun], right[kSquareRun];
    for (int64_t i = 0; i < run; ++i) {
      left[i] = rescale_at<BITS>(c0, g0 + i, w.group);
      right[i] = rescale_at<BITS>(c1, g0 + i, w.group);
    }
    for (int64_t r0 = 0; r0 < rows; r0 += 2 * kTile) {
      for (int64_t i = 0; i < run; ++i) {
        const int64_t at = i * per_block;
        const int8_t* q0 = x.q + r0 * x.k_padded + (g0 + i) * per_block * kTileBytes;
        const int8_t* q1 = r0 + kTile < rows ? q0 + kTile * x.k_padded : q0;
        square_sums(codes0 + at * kTileBytes, codes1 + at * kTileBytes, q0, q1, kTileBytes, per_block,
                    work.sums + i * 4 * kTile * kTile, soon);
      }
      add_square(x, left, right, r0, g0, run, work.sums, acc);
    }
  }
}

// The same for wide rows: sums of the first and the second pieces.
INLINE V add_wide(const Rescale& s, V acc, const int32_t* first, const int32_t* second, const int32_t* x_sum,
                  int64_t next_sum, float x_scale) {
  const __m512i one = _mm512_dpwssd_epi32(_mm512_load_si512(first), s.minus_zero, _mm512_set1_epi32(x_sum[0]));
  const __m512i two = _mm512_dpwssd_epi32(_mm512_load_si512(second), s.minus_zero, _mm512_set1_epi32(x_sum[next_sum]));
  return fma(joined((VI)one, (VI)two), splat(x_scale) * s.scale, acc);
}

// Up to 16 wide rows and weights with a scale for each block: two blocks at a time.
template <int BITS>
static void stream_wide(const QuantInput& x, const QuantWeight& w, int64_t b, Workspace& work, float* acc) {
  const Columns c = columns_at(w, b);
  const int64_t block = w.block(), bytes = block * 2 * BITS, stride = 2 * x.k_padded, per_block = block / kStep;
  constexpr int64_t kSums = kTile * kTile;
  for (int64_t g = 0; g < x.runs; g += 2) {
    const int64_t run = smaller(2, x.runs - g);
    const uint8_t* codes = tiles_of<BITS>(c.codes + g * bytes, run, block, work.codes[0]);
    const int8_t *q = x.q + g * block, *fine = q + x.k_padded;
    const int64_t lines = run * bytes / 64, tiles = run * per_block;
    Ahead ahead = {c.codes + (g + run) * bytes, c.codes + (g + run) * bytes + kFar, lines / 4 / tiles,
                   (lines - lines / 2 + x.rows - 1) / x.rows};
    __builtin_prefetch(c.scales + g * 32 + kFarScales, 0, 2);
    pieces_sums<0>(codes, q, fine, stride, per_block, work.sums, ahead);
    if (run > 1)
      pieces_sums<2>(codes + per_block * kTileBytes, q + block, fine + block, stride, per_block, work.sums, ahead);
    Rescale rescale[2];
    for (int64_t i = 0; i < run; ++i) rescale[i] = rescale_at<BITS>(c, g + i, true);
    for (int64_t r = 0; r < x.rows; ++r) {
      V v = g ? load(acc + r * 2 * kTile) : V{};
      for (int64_t i = 0; i < run; ++i) {
        const int32_t* sums = work.sums + 2 * i * kSums + r * kTile;
        v = add_wide(rescale[i], v, sums, sums + kSums, x.sum + 2 * r * x.runs + g + i, x.runs,
                     x.scale[r * x.runs + g + i]);
      }
      store(acc + r * 2 * kTile, v);
      fetch(ahead, ahead.per_row);
    }
  }
}

// Up to 16 wide rows and one scale a row of W: sums over all of k stay in the tiles, of even and of odd steps.
static void stream_whole(const QuantInput& x, const QuantWeight& w, int64_t b, Workspace& work, float* acc) {
  const Columns c = columns_at(w, b);
  const int64_t stride = 2 * x.k_padded;
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  Ahead ahead = {c.codes + kNear, c.codes + kFar, kTileBytes / 64, 0};
  for (int64_t i = 0; i < x.k_padded; i += 2 * kStep) {
    const uint8_t* codes = c.codes + i * kTile;
    const int8_t *q = x.q + i, *fine = q + x.k_padded;
    tile_load<6>(codes, 64), tile_load<4>(q, stride), tile_load<5>(fine, stride);
    tile_dot<0, 4, 6>(), tile_dot<1, 5, 6>();
    fetch(ahead, ahead.per_tile);
    tile_load<7>(codes + kTileBytes, 64), tile_load<4>(q + kStep, stride);
    tile_load<5>(fine + kStep, stride);
    tile_dot<2, 4, 7>(), tile_dot<3, 5, 7>();
    fetch(ahead, ahead.per_tile);
  }
  constexpr int64_t kSums = kTile * kTile;
  store_sums(work.sums, kSums);
  const VI zero = zero_of<8>(c, 0, 0);
  for (int64_t r = 0; r < x.rows; ++r) {
    const int32_t* s = work.sums + r * kTile;
    const VI first = load_sums(s) + load_sums(s + 2 * kSums), second = load_sums(s + kSums) + load_sums(s + 3 * kSums);
    store(acc + r * 2 * kTile,
          whole_value(first - zero * x.sum[2 * r], second - zero * x.sum[2 * r + 1], x.scale[r]));
  }
}

// Many wide rows, weights with a scale for each block: 16 rows in two pieces, 32 columns.
template <int BITS>
static void square_wide(const QuantInput& x, const QuantWeight& w, int64_t b, bool both, Workspace& work, float* acc) {
  const Columns c0 = columns_at(w, b), c1 = columns_at(w, both ? b + 1 : b);
  const int64_t block = w.block(), bytes = block * 2 * BITS, per_block = block / kStep, rows = x.rows;
  const int64_t stacks = (rows + kTile - 1) / kTile;
  for (int64_t g = 0; g < x.runs; ++g) {
    const uint8_t* codes0 = tiles_of<BITS>(c0.codes + g * bytes, 1, block, work.codes[0]);
    const uint8_t* codes1 = both ? tiles_of<BITS>(c1.codes + g * bytes, 1, block, work.codes[1]) : codes0;
    Soon soon = next_codes(c0, c1, g + 1, 1, x.runs, bytes, stacks * per_block);
    const Rescale left = rescale_at<BITS>(c0, g, true), right = rescale_at<BITS>(c1, g, true);
    const int32_t* x_sum = x.sum + g * 2 * rows;
    for (int64_t r0 = 0; r0 < rows; r0 += kTile) {
      const int8_t* q = x.q + 2 * (r0 * x.k_padded + g * per_block * kTileBytes);
      square_sums(codes0, codes1, q, q + kTileBytes, 2 * kTileBytes, per_block, work.sums, soon);
      const int32_t *first = work.sums, *second = first + 2 * kTile * kTile;
      const int64_t end = smaller(r0 + kTile, rows);
      for (int64_t r = r0; r < end; ++r, first += 2 * kTile, second += 2 * kTile) {
        float* to = acc + r * 2 * kTile;
        const float scale = x.scale[g * rows + r];
        const V l = add_wide(left, g ? load(to) : V{}, first, second, x_sum + r, rows, scale);
        const V m = add_wide(right, g ? load(to + kTile) : V{}, first + kTile, second + kTile, x_sum + r, rows, scale);
        store(to, l);
        store(to + kTile, m);
      }
    }
  }
}

// Many wide rows, one scale a row of W: the sums of 16 rows in two pieces and 32 columns wait in memory while other rows
// meet the same run of codes.
static void square_whole(const QuantInput& x, const QuantWeight& w, int64_t b, bool both, Workspace& work, float* acc) {
  const Columns c0 = columns_at(w, b), c1 = columns_at(w, both ? b + 1 : b);
  const int64_t block = w.block(), bytes = block * 16, blocks = w.blocks(), rows = x.rows, per_block = block / kStep;
  const int64_t stacks = (rows + kTile - 1) / kTile;
  constexpr int64_t kSums = kTile * kTile;
  for (int64_t g0 = 0; g0 < blocks; g0 += kWholeRun) {
    const int64_t run = smaller(kWholeRun, blocks - g0);
    const uint8_t *codes0 = c0.codes + g0 * bytes, *codes1 = c1.codes + g0 * bytes;
    Soon soon = next_codes(c0, c1, g0 + run, run, blocks, bytes, stacks * run * per_block);
    for (int64_t r0 = 0; r0 < rows; r0 += kTile) {
      int32_t* sums = work.sums + r0 / kTile * 4 * kSums;
      if (g0) load_tiles(sums, kSums);
      else tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      const int8_t* q = x.q + 2 * (r0 * x.k_padded + g0 * per_block * kTileBytes);
      square_steps(codes0, codes1, q, q + kTileBytes, 2 * kTileBytes, run * per_block, soon);
      store_sums(sums, kSums);
    }
  }
  const VI zero0 = zero_of<8>(c0, 0, 0), zero1 = zero_of<8>(c1, 0, 0);
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t* s = work.sums + r / kTile * 4 * kSums + r % kTile * kTile;
    const int32_t first = x.sum[r], second = x.sum[rows + r];
    float* to = acc + r * 2 * kTile;
    store(to, whole_value(load_sums(s) - zero0 * first, load_sums(s + 2 * kSums) - zero0 * second, x.scale[r]));
    store(to + kTile, whole_value(load_sums(s + kSums) - zero1 * first, load_sums(s + 3 * kSums) - zero1 * second,
                                  x.scale[r]));
  }
}

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
