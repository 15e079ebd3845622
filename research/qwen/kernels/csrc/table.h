// What one instruction set offers: plain functions on ranges, no allocation, no threads. Shapes are row-major.
#pragma once
#include <cstdint>

namespace qwen {

enum Format { kF32 = 0, kBF16 = 1, kF16 = 2 };

constexpr int64_t kSlice = 1024;     // K is summed in slices of this many products; y = (s0 + s1) + s2 ... + bias
constexpr int64_t kRowBlock = 128;   // rows of x that one sweep over the weights serves
constexpr int64_t kDirectRows = 8;   // up to this many rows the weights are used where they lie
constexpr int64_t kKeyBlock = 64;    // keys per step of the online softmax, at absolute positions
constexpr int64_t kQueryBlock = 64;  // queries of one attention task

struct LinearArgs {
  const float* x;       // (rows, k); packed form: see pack_rows
  const void* w;        // (n, k) in the given format, any alignment
  const float* bias;    // (n,) or null
  float* y;             // (rows, n)
  int64_t rows, k, n;   // rows <= kRowBlock
  int format;
};

struct AttentionArgs {
  const float *qkv, *cos, *sin, *logn;            // (T, 3 * heads * d), (T, d / 2), (T, d / 2), (T,)
  const int32_t *slots, *tables, *q_lens, *kv_lens;  // (T,), (B, width), (B,), (B,)
  float *keys, *values;                           // (blocks, block_size, heads, d)
  float* y;                                       // (T, heads * d)
  int64_t tokens, sequences, width, blocks, block_size, heads, d;
};

struct AttentionTask {
  int64_t sequence, head, first_row, start, count, position;  // rows of y, first and how many; position of the first
};

struct Table {
  const char* name;
  int64_t (*packed_size)(int64_t rows, int64_t k);                       // floats needed by pack_rows
  void (*pack_rows)(const LinearArgs&, float* out, int64_t r0, int64_t r1);
  int64_t (*panel_size)();                                              // floats of scratch per thread, packed form
  void (*linear_direct)(const LinearArgs&, int64_t n0, int64_t n1);      // rows <= kDirectRows
  void (*linear_packed)(const LinearArgs&, float* scratch, int64_t n0, int64_t n1);
  void (*rms_norm)(const float* x, const float* w, float eps, float* y, int64_t k, int64_t r0, int64_t r1);
  void (*swiglu)(const float* a, const float* b, float* y, int64_t i0, int64_t i1);
  float (*read_sum)(const float* x, int64_t n);                          // plain read, to measure memory
  void (*widen)(const void* from, float* to, int64_t n, int format);
  void (*rotate)(const AttentionArgs&, int64_t t0, int64_t t1);          // q to y, k and v to the cache
  int64_t (*attend_size)(int64_t d);                                     // floats of scratch per thread
  void (*attend)(const AttentionArgs&, const AttentionTask&, float* scratch);
};

const Table* table_base();
#if defined(__x86_64__)
const Table* table_avx2();
const Table* table_avx512();
#endif

}  // namespace qwen
