// Rotary embedding, log-n, the paged KV cache and causal attention over it.
#pragma once
#include <cstdint>

namespace qwen {

constexpr int64_t kKeyBlock = 64;    // keys per step of the online softmax, at absolute positions
constexpr int64_t kQueryBlock = 64;  // queries of one attention task

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

struct AttentionTable {
  void (*rotate)(const AttentionArgs&, int64_t t0, int64_t t1);          // q to y, k and v to the cache
  int64_t (*attend_size)(int64_t d);                                     // floats of scratch per thread
  void (*attend)(const AttentionArgs&, const AttentionTask&, float* scratch);
};

const AttentionTable* attention_base();
#if defined(__x86_64__)
const AttentionTable* attention_avx2();
const AttentionTable* attention_avx512();
#endif

// Whether every index lies inside its array.
bool attention_fits(const AttentionArgs&);
// On all threads; inside a Turn; the arguments were checked. 0, or 3 when memory runs out.
int attention(const AttentionArgs&);

}  // namespace qwen
