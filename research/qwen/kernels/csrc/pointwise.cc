#include "pointwise.h"

#include "isa.h"
#include "pool.h"

namespace qwen {

const PointwiseTable* pointwise() {
#if defined(__x86_64__)
  static constexpr Variant<PointwiseTable> kVariants[] = {
      {kBase, pointwise_base}, {kAvx2, pointwise_avx2}, {kAvx512, pointwise_avx512}};
#else
  static constexpr Variant<PointwiseTable> kVariants[] = {{kBase, pointwise_base}};
#endif
  static const PointwiseTable* const chosen = pick(kVariants);
  return chosen;
}

void rms_norm(const float* x, const float* w, float eps, float* y, int64_t rows, int64_t k) {
  parallel(rows, rows * k < kSmall ? rows : 8,
           [&](int64_t r0, int64_t r1) { pointwise()->rms_norm(x, w, eps, y, k, r0, r1); });
}

void swiglu(const float* a, const float* b, float* y, int64_t size) {
  parallel(size, size < kSmall ? kSmall : 1 << 14,
           [&](int64_t i0, int64_t i1) { pointwise()->swiglu(a, b, y, i0, i1); });
}

}  // namespace qwen
