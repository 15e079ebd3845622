// Float weights to packed integer codes, 16 rows at a time: the C++ twin of quant/rounding.py and quant/schemes.py, which
// say what is computed; every bit agrees with them.
#pragma once
#include <cstdint>

namespace qwen {

constexpr int64_t kPanel = 16;  // rows packed side by side

struct QuantiseArgs {
  const void* rows;  // (count, k), any alignment
  int format;        // kF32, kBF16, kF16 of linear.h
  int64_t count, k;
  int bits;          // 4 or 8
  int64_t group;     // inputs that share a scale: 64 or 128; 0: the whole row (8 bits only)
  bool zeros;        // own zero points
  uint8_t* weight;   // packed arrays from the panel of the first row on
  void* scales;
  uint8_t* points;   // null without zero points
};

enum QuantiseFault { kNotFinite = 1, kScaleTooLarge = 2 };  // bits of what quantise returns

struct QuantiseTable {
  int (*panels)(const QuantiseArgs&, int64_t p0, int64_t p1);
};

const QuantiseTable* quantise_base();
#if defined(__x86_64__)
const QuantiseTable* quantise_avx2();
const QuantiseTable* quantise_avx512();
#endif

int quantise(const QuantiseArgs& a);  // on all threads; inside a Turn

}  // namespace qwen
