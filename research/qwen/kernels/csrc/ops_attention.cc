// Attention as MindSpore calls it.
#include "attention.h"
#include "isa.h"
#include "ops.h"
#include "pool.h"

namespace qwen {
namespace {

// inputs qkv, cos, sin, logn, slots, tables, q_lens, kv_lens, keys, values[, key_scales, value_scales] (see
// AttentionArgs); output (T, heads * d)
int attention_op(int count, void** p, int64_t** shapes, int format) {
  AttentionArgs a;
  a.qkv = static_cast<float*>(p[0]);
  a.cos = static_cast<float*>(p[1]);
  a.sin = static_cast<float*>(p[2]);
  a.logn = static_cast<float*>(p[3]);
  a.slots = static_cast<int32_t*>(p[4]);
  a.tables = static_cast<int32_t*>(p[5]);
  a.q_lens = static_cast<int32_t*>(p[6]);
  a.kv_lens = static_cast<int32_t*>(p[7]);
  a.keys = p[8];
  a.values = p[9];
  a.key_scales = format == kKvI8 ? static_cast<float*>(p[10]) : nullptr;
  a.value_scales = format == kKvI8 ? static_cast<float*>(p[11]) : nullptr;
  a.y = static_cast<float*>(p[count - 1]);
  a.format = format;
  a.tokens = shapes[0][0], a.sequences = shapes[5][0], a.width = shapes[5][1];
  a.blocks = shapes[9][0], a.heads = shapes[9][1], a.block_size = shapes[9][2], a.d = shapes[9][3];
  const int64_t lanes = kv_lanes(a.block_size), *keys = shapes[8];
  bool fits = shapes[0][1] == 3 * a.heads * a.d && shapes[1][0] == a.tokens && shapes[1][1] * 2 == a.d &&
              shapes[2][0] == a.tokens && shapes[3][0] == a.tokens && shapes[4][0] == a.tokens &&
              shapes[6][0] == a.sequences && shapes[7][0] == a.sequences;
  fits = fits && keys[0] == a.blocks && keys[1] == a.heads && keys[2] * lanes == a.block_size && keys[3] == a.d &&
         keys[4] == lanes;
  for (int i = 10; fits && format == kKvI8 && i < 12; ++i)
    fits = shapes[i][0] == a.blocks && shapes[i][1] == a.heads && shapes[i][2] == a.block_size;
  if (isa() == kNone || !fits) return 1;
  if (!attention_fits(a)) return 2;
  Turn turn;
  return attention(a);
}

}  // namespace
}  // namespace qwen

KERNEL(QwenAttentionF32) { return qwen::attention_op(count, p, shapes, qwen::kKvF32); }
KERNEL(QwenAttentionBF16) { return qwen::attention_op(count, p, shapes, qwen::kKvBF16); }
KERNEL(QwenAttentionI8) { return qwen::attention_op(count, p, shapes, qwen::kKvI8); }
INFER(QwenAttentionF32) { return {shapes[0][0], shapes[0][1] / 3}; }
INFER(QwenAttentionBF16) { return {shapes[0][0], shapes[0][1] / 3}; }
INFER(QwenAttentionI8) { return {shapes[0][0], shapes[0][1] / 3}; }
