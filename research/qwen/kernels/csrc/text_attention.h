// Causal attention over whole texts, as training wants it: forward from fused q, k, v, and backward to their gradient.
// Memory grows with the length of a text, not with its square; the weights are computed again on the way back.
#pragma once
#include <cstdint>

namespace qwen {

constexpr int64_t kQueryRun = 32;  // queries of a text that are worked on at once

// Texts follow one another: text i has the tokens bounds[i] .. bounds[i + 1]. Rotary embedding on halves of d.
struct TextAttentionArgs {
  const float* qkv;       // (tokens, 3 heads d), not rotated
  const float *cos, *sin; // (tokens, d / 2)
  const int32_t* bounds;  // (texts + 1)
  float* y;               // (tokens, heads d); backward: read
  float* peak;            // (heads, tokens) log of the sum of exponentials; backward: read
  const float* dy;        // backward: (tokens, heads d)
  float* dqkv;            // backward: (tokens, 3 heads d)
  int64_t tokens, texts, heads, d;
};

struct TextAttentionTable {
  int64_t (*forward_scratch)(int64_t length, int64_t d);  // floats
  int64_t (*backward_scratch)(int64_t length, int64_t d);
  void (*forward)(const TextAttentionArgs&, float* scratch, int64_t text, int64_t head);
  void (*backward)(const TextAttentionArgs&, float* scratch, int64_t text, int64_t head);
};

const TextAttentionTable* text_attention_base();
#if defined(__x86_64__)
const TextAttentionTable* text_attention_avx2();
const TextAttentionTable* text_attention_avx512();
#endif

// On all threads; inside a Turn. 0, or 3 when memory runs out.
int text_attention(const TextAttentionArgs& a, bool backward);

}  // namespace qwen
