// Tile registers. Included by what is compiled for AMX.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "vec.h"

namespace {

constexpr int64_t kTile = 16;  // rows of a tile, of 64 bytes each

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

}  // namespace
