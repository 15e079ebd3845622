// What training needs beside matrix products: gradients of RMSNorm and SwiGLU, cross entropy with its gradient, AdamW.
// Results do not depend on the number of threads: whatever is summed over rows is summed in runs of a fixed size.
#pragma once
#include <cstdint>

namespace qwen {

constexpr int64_t kNormRun = 64;         // rows whose part of a norm weight's gradient is summed at once
constexpr int64_t kSquareRun = 1 << 16;  // numbers whose squares are summed at once

// The numbers of one update; correction1/2 are 1 - beta^step, factor multiplies the gradient first.
struct AdamWArgs {
  float *w, *m, *v;
  const float* g;
  float beta1, beta2, rest1, rest2;  // rest: 1 - beta
  float size, root, eps;             // size: lr / correction1, root: 1 / sqrt(correction2)
  float shrink, factor;              // shrink: 1 - lr * decay
};

struct NormGradArgs {
  const float *dy, *x, *w, *residual;  // no residual: null
  float* dx;
  float eps;
  int64_t k;
};

struct TrainingTable {
  // Rows r0 .. r1: dx = residual + gradient; dw (k,) is overwritten with the sum over these rows.
  void (*norm_grad)(const NormGradArgs&, float* dw, int64_t r0, int64_t r1);
  void (*swiglu_grad)(const float* a, const float* b, const float* dy, float* da, float* db, int64_t i0, int64_t i1);
  // One row of n logits becomes scale * (softmax - one at the target); returns its loss. A target < 0: zeros, no loss.
  double (*cross_entropy)(float* row, int64_t n, int32_t target, float scale);
  void (*adamw)(const AdamWArgs&, int64_t i0, int64_t i1);
  double (*square_sum)(const float* x, int64_t n);
  void (*add)(float* to, const float* x, int64_t n);
  void (*masked)(const float* x, const uint8_t* keep, float grow, float* y, int64_t i0, int64_t i1);
};

const TrainingTable* training_base();
#if defined(__x86_64__)
const TrainingTable* training_avx2();
const TrainingTable* training_avx512();
#endif

const TrainingTable* training();  // of this processor; null if QWEN_ISA cannot be had

// On all threads; inside a Turn. An int is 0, or 3 when memory runs out.
int norm_grad(const NormGradArgs& a, float* dw, int64_t rows);
void cross_entropy(float* logits, const int32_t* targets, float scale, float* losses, int64_t rows, int64_t n);
void adamw(const AdamWArgs& a, int64_t size);
double square_sum(const float* x, int64_t size);
void add_columns(const float* x, const float* bias, float* y, int64_t rows, int64_t n);
void sum_rows(const float* x, float* y, int64_t rows, int64_t n);

}  // namespace qwen
