#include "quantise.h"

#include "isa.h"
#include "pool.h"

namespace qwen {

static const QuantiseTable* table() {
#if defined(__x86_64__)
  static constexpr Variant<QuantiseTable> kVariants[] = {
      {kBase, quantise_base}, {kAvx2, quantise_avx2}, {kAvx512, quantise_avx512}};
#else
  static constexpr Variant<QuantiseTable> kVariants[] = {{kBase, quantise_base}};
#endif
  static const QuantiseTable* const chosen = pick(kVariants);
  return chosen;
}

int quantise(const QuantiseArgs& a) {
  int faults = 0;
  parallel((a.count + kPanel - 1) / kPanel, 2, [&](int64_t p0, int64_t p1) {
    if (const int found = table()->panels(a, p0, p1)) __atomic_fetch_or(&faults, found, __ATOMIC_RELAXED);
  });
  return faults;
}

}  // namespace qwen

// 0, or bits of QuantiseFault; -1 if no instruction set can be used.
extern "C" int QwenQuantise(const void* rows, int format, int64_t count, int64_t k, int bits, int64_t group, int zeros,
                            uint8_t* weight, void* scales, uint8_t* points) {
  if (qwen::isa() == qwen::kNone) return -1;
  qwen::Turn turn;
  return qwen::quantise({rows, format, count, k, bits, group, zeros != 0, weight, scales, points});
}
