// Products of wide rows with AMX tiles: the second piece of a row goes where another row would. Included by quant_amx.h.
#pragma once

namespace {

// Up to 16 wide rows and weights with a scale for each block: two blocks at a time.
template <int BITS>
static void stream_wide(const QuantInput& x, const QuantWeight& w, int64_t b, Workspace& work, float* acc) {
  const Columns c = columns_at(w, b);
  const int64_t block = w.block(), bytes = block * 2 * BITS, stride = 2 * x.k_padded, per_block = block / kStep;
  constexpr int64_t kSums = kTile * kTile;
  for (int64_t g = 0; g < x.runs; g += 2) {
    const int64_t run = smaller(2, x.runs - g);
    const uint8_t* codes = tiles_of<BITS>(c, g, run, block, work.codes[0]);
    const int8_t *q = x.q + g * block, *fine = q + x.k_padded;
    const int64_t lines = run * bytes / 64, tiles = run * per_block;
    Ahead ahead = {c.codes + (g + run) * bytes, c.codes + (g + run) * bytes + kFar, lines / 4 / tiles,
                   (lines - lines / 2 + x.rows - 1) / x.rows};
    __builtin_prefetch(c.scales + g * 32 + kFarScales, 0, 2);
    pieces_sums<BITS, 0>(codes, q, fine, stride, per_block, work.sums, ahead);
    if (run > 1)
      pieces_sums<BITS, 2>(codes + per_block * kTileBytes, q + block, fine + block, stride, per_block, work.sums, ahead);
    Rescale<BITS> rescale[2];
    for (int64_t i = 0; i < run; ++i) rescale[i] = Rescale<BITS>(c, g + i, true);
    for (int64_t r = 0; r < x.rows; ++r) {
      V v = g ? load(acc + r * 2 * kTile) : V{};
      for (int64_t i = 0; i < run; ++i) {
        const int32_t* sums = work.sums + 2 * i * kSums + r * kTile;
        v = rescale[i].add_wide(v, sums, sums + kSums, x.sum + 2 * r * x.runs + g + i, x.runs,
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
    tile_dot<8, 0, 4, 6>(), tile_dot<8, 1, 5, 6>();
    fetch(ahead, ahead.per_tile);
    tile_load<7>(codes + kTileBytes, 64), tile_load<4>(q + kStep, stride);
    tile_load<5>(fine + kStep, stride);
    tile_dot<8, 2, 4, 7>(), tile_dot<8, 3, 5, 7>();
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
    const uint8_t* codes0 = tiles_of<BITS>(c0, g, 1, block, work.codes[0]);
    const uint8_t* codes1 = both ? tiles_of<BITS>(c1, g, 1, block, work.codes[1]) : codes0;
    Soon soon = next_codes(c0, c1, g + 1, 1, x.runs, bytes, stacks * per_block);
    const Rescale<BITS> left(c0, g, true), right(c1, g, true);
    const int32_t* x_sum = x.sum + g * 2 * rows;
    for (int64_t r0 = 0; r0 < rows; r0 += kTile) {
      const int8_t* q = x.q + 2 * (r0 * x.k_padded + g * per_block * kTileBytes);
      square_sums<BITS>(codes0, codes1, q, q + kTileBytes, 2 * kTileBytes, per_block, work.sums, soon);
      const int32_t *first = work.sums, *second = first + 2 * kTile * kTile;
      const int64_t end = smaller(r0 + kTile, rows);
      for (int64_t r = r0; r < end; ++r, first += 2 * kTile, second += 2 * kTile) {
        float* to = acc + r * 2 * kTile;
        const float scale = x.scale[g * rows + r];
        const V l = left.add_wide(g ? load(to) : V{}, first, second, x_sum + r, rows, scale);
        const V m = right.add_wide(g ? load(to + kTile) : V{}, first + kTile, second + kTile, x_sum + r, rows, scale);
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
      square_steps<8>(codes0, codes1, q, q + kTileBytes, 2 * kTileBytes, run * per_block, soon);
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

}  // namespace
