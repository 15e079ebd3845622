#include "text_attention.h"

#include "isa.h"
#include "pool.h"

namespace qwen {
namespace {

const TextAttentionTable* table() {
#if defined(__x86_64__)
  static constexpr Variant<TextAttentionTable> kVariants[] = {
      {kBase, text_attention_base}, {kAvx2, text_attention_avx2}, {kAvx512, text_attention_avx512}};
#else
  static constexpr Variant<TextAttentionTable> kVariants[] = {{kBase, text_attention_base}};
#endif
  static const TextAttentionTable* const chosen = pick(kVariants);
  return chosen;
}

}  // namespace

// A head of a text is one piece of work and writes what no other piece writes.
int text_attention(const TextAttentionArgs& a, bool backward) {
  int64_t longest = 0;
  for (int64_t i = 0; i < a.texts; ++i) {
    const int64_t length = a.bounds[i + 1] - a.bounds[i];
    longest = length > longest ? length : longest;
  }
  const int64_t size = (backward ? table()->backward_scratch : table()->forward_scratch)(longest, a.d);
  int64_t failed = 0;
  parallel(a.texts * a.heads, 1, [&](int64_t i0, int64_t i1) {
    float* scratch = thread_scratch(size);
    if (!scratch) return __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    const auto run = backward ? table()->backward : table()->forward;
    for (int64_t i = i0; i < i1; ++i) run(a, scratch, i / a.heads, i % a.heads);
  });
  return failed ? 3 : 0;
}

}  // namespace qwen
