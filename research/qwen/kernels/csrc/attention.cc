#include "attention.h"

#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "pointwise.h"
#include "pool.h"

namespace qwen {
namespace {

const AttentionTable* table() {
#if defined(__x86_64__)
  static constexpr Variant<AttentionTable> kVariants[] = {
      {kBase, attention_base}, {kAvx2, attention_avx2}, {kAvx512, attention_avx512}, {kAmx, attention_amx}};
#else
  static constexpr Variant<AttentionTable> kVariants[] = {{kBase, attention_base}};
#endif
  static const AttentionTable* const chosen = pick(kVariants);
  return chosen;
}

// Work of one call. Runs of several tokens are rotated first; a lone token's tasks do that themselves.
struct Plan {
  std::vector<int64_t> rows;          // tokens to rotate first
  std::vector<AttentionTask> blocks;  // of queries
  std::vector<AttentionTask> lone;    // one a sequence and head
};

Plan plan(const AttentionArgs& a) {
  Plan p;
  const bool direct = kv_lanes(a.block_size) == kGroup;
  int64_t row = 0;
  for (int64_t b = 0; b < a.sequences; ++b) {
    const int64_t start = a.kv_lens[b] - a.q_lens[b];
    const bool lone = direct && a.q_lens[b] == 1;
    for (int64_t h = 0; h < a.heads; ++h)  // neighbouring tasks share keys and values
      for (int64_t q = 0; q < a.q_lens[b]; q += kQueryBlock) {
        const int64_t count = a.q_lens[b] - q < kQueryBlock ? a.q_lens[b] - q : kQueryBlock;
        (lone ? p.lone : p.blocks).push_back({b, h, row + q, count, start + q, -1, nullptr});
      }
    for (int64_t q = 0; q < a.q_lens[b] && !lone; ++q) p.rows.push_back(row + q);
    row += a.q_lens[b];
  }
  return p;
}

// Room for the parts of lone queries, kept for the next call; only inside a Turn.
float* partials(int64_t floats) {
  static std::unique_ptr<float[]> room;
  static int64_t size = 0;
  if (floats > size) {
    room.reset(new (std::nothrow) float[floats]);
    size = room ? floats : 0;
  }
  return room.get();
}

}  // namespace

bool attention_fits(const AttentionArgs& a) {
  if (a.format < 0 || a.format >= kKvFormats) return false;
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
  const AttentionTable& kernels = *table();
  Plan p = plan(a);
  // Whole contexts are read in longer runs, parts spread better: cut where a thread would have few tasks.
  const int64_t cut = static_cast<int64_t>(p.lone.size() + p.blocks.size()) < 4 * threads() ? 2 : INT64_MAX;
  std::vector<AttentionTask> tasks;
  std::vector<int64_t> owner;
  int64_t room = 0, work = 0;
  for (const AttentionTask& t : p.lone)
    if (parts(t.position + 1) >= cut) room += parts(t.position + 1) * partial_size(a.d);
  float* free = room ? partials(room) : nullptr;
  if (room && !free) return 3;
  for (size_t i = 0; i < p.lone.size(); ++i) {
    AttentionTask& t = p.lone[i];
    work += (t.position + kKeyBlock) * a.d;
    const int64_t count = parts(t.position + 1);
    if (count >= cut) t.partial = free, free += count * partial_size(a.d);
    for (int64_t part = 0; part < count; ++part) {
      if (count >= cut) t.part = part;
      tasks.push_back(t), owner.push_back(i);
      if (count < cut) break;
    }
  }
  for (const AttentionTask& t : p.blocks) work += t.count * (t.position + t.count) * a.d, tasks.push_back(t);
  std::unique_ptr<std::atomic<int64_t>[]> left(new (std::nothrow) std::atomic<int64_t>[p.lone.size() + 1]);
  if (!left) return 3;
  for (size_t i = 0; i < p.lone.size(); ++i) left[i] = parts(p.lone[i].position + 1);

  const int64_t many = INT64_MAX / 4, items = static_cast<int64_t>(p.rows.size()) * a.heads;
  std::atomic<bool> failed{false};
  const auto scratch = [&] {
    float* room = thread_scratch(kernels.scratch_size(a.d));
    if (!room) failed = true;
    return room;
  };
  if (items)
    parallel(items, items * a.d < kSmall ? many : 8 * a.heads, [&](int64_t i0, int64_t i1) {
      float* room = scratch();
      for (int64_t i = i0; room && i < i1; ++i) kernels.rotate(a, p.rows[i / a.heads], i % a.heads, room);
    });
  parallel(static_cast<int64_t>(tasks.size()), work < kSmall ? many : 1, [&](int64_t i0, int64_t i1) {
    float* room = scratch();
    for (int64_t i = i0; room && i < i1; ++i) {
      const AttentionTask& t = tasks[i];
      if (i >= static_cast<int64_t>(owner.size())) {
        kernels.attend(a, t, room);
        continue;
      }
      kernels.attend_one(a, t, room);
      if (t.part >= 0 && left[owner[i]].fetch_sub(1, std::memory_order_acq_rel) == 1) kernels.merge(a, t, room);
    }
  });
  return failed ? 3 : 0;
}

}  // namespace qwen
