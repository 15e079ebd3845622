// y = x W^T + b with float32 activations and weights as a checkpoint stores them (row-major float32, bfloat16, float16).
#pragma once
#include <cstdint>

namespace qwen {

enum Format { kF32 = 0, kBF16 = 1, kF16 = 2 };

constexpr int64_t kSlice = 1024;     // K is summed in slices of this many products; y = (s0 + s1) + s2 ... + bias
constexpr int64_t kRowBlock = 128;   // rows of x that one sweep over the weights serves
constexpr int64_t kDirectRows = 8;   // up to this many rows the weights are used where they lie

struct LinearArgs {
  const float* x;       // (rows, k); packed form: see pack_rows
  const void* w;        // (n, k) in the given format, any alignment
  const float* bias;    // (n,) or null
  float* y;             // (rows, n)
  int64_t rows, k, n;   // rows <= kRowBlock
  int format;
};

struct LinearTable {
  int64_t (*packed_size)(int64_t rows, int64_t k);                       // floats needed by pack_rows
  void (*pack_rows)(const LinearArgs&, float* out, int64_t r0, int64_t r1);
  int64_t (*panel_size)();                                              // floats of scratch per thread, packed form
  void (*linear_direct)(const LinearArgs&, int64_t n0, int64_t n1);      // rows <= kDirectRows
  void (*linear_packed)(const LinearArgs&, float* scratch, int64_t n0, int64_t n1);
};

const LinearTable* linear_base();
#if defined(__x86_64__)
const LinearTable* linear_avx2();
const LinearTable* linear_avx512();
#endif

// Any number of rows, on all threads; inside a Turn. 0, or 3 when memory runs out.
int linear(LinearArgs a);

}  // namespace qwen
