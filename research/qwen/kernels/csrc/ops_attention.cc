// Attention as MindSpore calls it.
#include "attention.h"
#include "isa.h"
#include "ops.h"
#include "pool.h"

// inputs qkv, cos, sin, logn, slots, tables, q_lens, kv_lens, keys, values (see AttentionArgs); output (T, heads * d)
KERNEL(QwenAttention) {
  qwen::AttentionArgs a;
  a.qkv = static_cast<float*>(p[0]);
  a.cos = static_cast<float*>(p[1]);
  a.sin = static_cast<float*>(p[2]);
  a.logn = static_cast<float*>(p[3]);
  a.slots = static_cast<int32_t*>(p[4]);
  a.tables = static_cast<int32_t*>(p[5]);
  a.q_lens = static_cast<int32_t*>(p[6]);
  a.kv_lens = static_cast<int32_t*>(p[7]);
  a.keys = static_cast<float*>(p[8]);
  a.values = static_cast<float*>(p[9]);
  a.y = static_cast<float*>(p[10]);
  a.tokens = shapes[0][0], a.sequences = shapes[5][0], a.width = shapes[5][1];
  a.blocks = shapes[8][0], a.block_size = shapes[8][1], a.heads = shapes[8][2], a.d = shapes[8][3];
  const bool fits = shapes[0][1] == 3 * a.heads * a.d && shapes[1][0] == a.tokens && shapes[1][1] * 2 == a.d &&
                    shapes[2][0] == a.tokens && shapes[3][0] == a.tokens && shapes[4][0] == a.tokens &&
                    shapes[6][0] == a.sequences && shapes[7][0] == a.sequences;
  if (qwen::isa() == qwen::kNone || !fits) return 1;
  if (!qwen::attention_fits(a)) return 2;
  qwen::Turn turn;
  return qwen::attention(a);
}
INFER(QwenAttention) { return {shapes[0][0], shapes[0][1] / 3}; }
