// Force-included when llama.cpp is built with GCC for the benchmark (see docs/benchmarks.md). Two intrinsics of GCC 12
// do not say which memory they read: the stores that fill the tile configuration are dropped as dead, and llama.cpp's
// AMX code ends with a segmentation fault. Here they say it.
#pragma once
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#undef _tile_loadd
#define QWEN_TILE_LOADD(dst, base, stride)                                                                   \
  __asm__ volatile("tileloadd\t(%0,%1,1), %%tmm" #dst ::"r"((const void*)(base)), "r"((long)(stride)) : "memory")
#define _tile_loadd(dst, base, stride) QWEN_TILE_LOADD(dst, base, stride)
#define _tile_loadconfig(p) __asm__ volatile("ldtilecfg\t%0" ::"m"(*(const char(*)[64])(p)) : "memory")
#endif
