// Rotary embedding, log-n, the paged KV cache and causal attention over it.
//
// The cache: one head's tokens of a block lie together. Keys are (blocks, heads, block_size / L, d, L): L neighbouring
// tokens share a run for each dimension, so that a vector holds one dimension of L keys; L = kv_lanes(block_size).
// Values are (blocks, heads, block_size, d). Scales of int8 are (blocks, heads, block_size).
#pragma once
#include <cstdint>

namespace qwen {

constexpr int64_t kKeyBlock = 64;    // keys per step of the online softmax, at absolute positions
constexpr int64_t kQueryBlock = 128;  // queries of one attention task
constexpr int64_t kPart = 512;       // keys whose softmax is made apart from other parts and then merged in order
constexpr int64_t kGroup = 16;       // keys side by side in the cache

// float32; bfloat16 bits, rounded to nearest even; int8 with one float32 scale = max|x| / 127 per token and head.
enum KvFormat { kKvF32 = 0, kKvBF16 = 1, kKvI8 = 2, kKvFormats = 3 };

struct AttentionArgs {
  const float *qkv, *cos, *sin, *logn;               // (T, 3 * heads * d), (T, d / 2), (T, d / 2), (T,)
  const int32_t *slots, *tables, *q_lens, *kv_lens;  // (T,), (B, width), (B,), (B,)
  void *keys, *values;                               // the cache as above, in `format`
  float *key_scales, *value_scales;                  // int8 only, else null
  float* y;                                          // (T, heads * d), apart from qkv
  int64_t tokens, sequences, width, blocks, block_size, heads, d;
  int format;                                        // KvFormat
};

// Largest power of two, at most kGroup, that divides the size of a block.
inline int64_t kv_lanes(int64_t block_size) {
  int64_t lanes = 1;
  while (lanes < kGroup && block_size % (2 * lanes) == 0) lanes *= 2;
  return lanes;
}

// Some queries of one sequence and head. Lone queries may be cut into parts of the context: then this task makes the
// part `part` and puts it into `partial` (parts, partial_size(d)); else part is -1.
struct AttentionTask {
  int64_t sequence, head, first_row, count, position;  // rows of y, first and how many; position of the first
  int64_t part;
  float* partial;
};

struct AttentionTable {
  int64_t (*scratch_size)(int64_t d);  // floats of scratch per thread, 64-byte aligned
  // One token and head: the rotated query goes to y, key and value to the cache.
  void (*rotate)(const AttentionArgs&, int64_t token, int64_t head, float* scratch);
  // Queries that rotate() has put into y, over the whole context.
  void (*attend)(const AttentionArgs&, const AttentionTask&, float* scratch);
  // A lone query straight from qkv (only where kv_lanes is kGroup). The last part also writes key and value.
  void (*attend_one)(const AttentionArgs&, const AttentionTask&, float* scratch);
  void (*merge)(const AttentionArgs&, const AttentionTask&, float* scratch);  // all parts of a task to y, in order
};

inline int64_t parts(int64_t context) { return (context + kPart - 1) / kPart; }
inline int64_t partial_size(int64_t d) { return (d + 2 + 15) / 16 * 16; }  // sum (d), peak, mass

const AttentionTable* attention_base();
#if defined(__x86_64__)
const AttentionTable* attention_avx2();
const AttentionTable* attention_avx512();
const AttentionTable* attention_amx();
#endif

// Whether every index lies inside its array.
bool attention_fits(const AttentionArgs&);
// On all threads; inside a Turn; the arguments were checked. 0, or 3 when memory runs out. Uses thread_scratch, but
// not shared_scratch: qkv and y may lie in the latter.
int attention(const AttentionArgs&);

}  // namespace qwen
