// c = a b for row-major float32 matrices with many more columns in a than in c: the way back through a wide head.
#pragma once
#include <cstdint>

namespace qwen {

constexpr int64_t kDepth = 192;  // products summed in registers; runs of so many follow one another in c

struct ProductArgs {
  const float* a;  // (m, k)
  const float* b;  // (k, n)
  float* c;        // (m, n)
  int64_t m, n, k;
};

struct ProductTable {
  int64_t (*panel_size)(int64_t n);  // floats of a packed run of rows of b
  int64_t (*strips)(int64_t n);      // of columns
  void (*pack)(const ProductArgs&, float* panel, int64_t k0, int64_t t0, int64_t t1);  // strips t0 .. t1
  int64_t (*tile_rows)();
  void (*rows)(const ProductArgs&, const float* panel, int64_t k0, int64_t r0, int64_t r1);
};

const ProductTable* product_base();
#if defined(__x86_64__)
const ProductTable* product_avx2();
const ProductTable* product_avx512();
#endif

// On all threads; inside a Turn. 0, or 3 when memory runs out.
int product(const ProductArgs& a);

}  // namespace qwen
