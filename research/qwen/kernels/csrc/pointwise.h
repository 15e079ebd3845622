// RMSNorm, SwiGLU, widening of stored numbers, and the plain read that benchmarks are measured against.
#pragma once
#include <cstdint>

namespace qwen {

constexpr int64_t kSmall = 1 << 15;  // elements below which a pointwise operator stays on one thread

struct PointwiseTable {
  void (*rms_norm)(const float* x, const float* w, float eps, float* y, int64_t k, int64_t r0, int64_t r1);
  void (*swiglu)(const float* a, const float* b, float* y, int64_t i0, int64_t i1);
  float (*read_sum)(const float* x, int64_t n);
  void (*widen)(const void* from, float* to, int64_t n, int format);
};

const PointwiseTable* pointwise_base();
#if defined(__x86_64__)
const PointwiseTable* pointwise_avx2();
const PointwiseTable* pointwise_avx512();
#endif

const PointwiseTable* pointwise();  // of this processor; null if QWEN_ISA cannot be had

// On all threads; inside a Turn.
void rms_norm(const float* x, const float* w, float eps, float* y, int64_t rows, int64_t k);
void swiglu(const float* a, const float* b, float* y, int64_t size);

}  // namespace qwen
