#include "attention.h"

#include <vector>

#include "isa.h"
#include "pointwise.h"
#include "pool.h"

namespace qwen {
namespace {

const AttentionTable* table() {
#if defined(__x86_64__)
  static constexpr Variant<AttentionTable> kVariants[] = {
      {kBase, attention_base}, {kAvx2, attention_avx2}, {kAvx512, attention_avx512}};
#else
  static constexpr Variant<AttentionTable> kVariants[] = {{kBase, attention_base}};
#endif
  static const AttentionTable* const chosen = pick(kVariants);
  return chosen;
}

}  // namespace

bool attention_fits(const AttentionArgs& a) {
  int64_t total = 0;
  for (int64_t b = 0; b < a.sequences; ++b) {
    if (a.q_lens[b] < 1 || a.kv_lens[b] < a.q_lens[b] || a.kv_lens[b] > a.width * a.block_size) return false;
    total += a.q_lens[b];
    for (int64_t i = 0; i * a.block_size < a.kv_lens[b]; ++i) {
      const int32_t block = a.tables[b * a.width + i];
      if (block < 0 || block >= a.blocks) return false;
    }
  }
  if (total != a.tokens) return false;
  for (int64_t t = 0; t < a.tokens; ++t)
    if (a.slots[t] < 0 || a.slots[t] >= a.blocks * a.block_size) return false;
  return true;
}

int attention(const AttentionArgs& a) {
  std::vector<AttentionTask> tasks;
  int64_t row = 0, work = 0;
  for (int64_t b = 0; b < a.sequences; ++b) {
    const int64_t start = a.kv_lens[b] - a.q_lens[b];
    for (int64_t q = 0; q < a.q_lens[b]; q += kQueryBlock) {
      const int64_t size = a.q_lens[b] - q < kQueryBlock ? a.q_lens[b] - q : kQueryBlock;
      for (int64_t h = 0; h < a.heads; ++h) tasks.push_back({b, h, row + q, start, size, start + q});
    }
    row += a.q_lens[b];
    work += a.q_lens[b] * a.kv_lens[b] * a.heads * a.d;
  }
  const int64_t many = 1 << 30;
  parallel(a.tokens, a.tokens * a.heads * a.d < kSmall ? many : 8,
           [&](int64_t t0, int64_t t1) { table()->rotate(a, t0, t1); });
  int64_t failed = 0;
  parallel(static_cast<int64_t>(tasks.size()), work < kSmall ? many : 1, [&](int64_t i0, int64_t i1) {
    float* scratch = thread_scratch(table()->attend_size(a.d));
    if (!scratch) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    for (int64_t i = i0; scratch && i < i1; ++i) table()->attend(a, tasks[i], scratch);
  });
  return failed ? 3 : 0;
}

}  // namespace qwen
