#include "training.h"

#include <vector>

#include "isa.h"
#include "pool.h"

namespace qwen {

const TrainingTable* training() {
#if defined(__x86_64__)
  static constexpr Variant<TrainingTable> kVariants[] = {
      {kBase, training_base}, {kAvx2, training_avx2}, {kAvx512, training_avx512}};
#else
  static constexpr Variant<TrainingTable> kVariants[] = {{kBase, training_base}};
#endif
  static const TrainingTable* const chosen = pick(kVariants);
  return chosen;
}

int norm_grad(const NormGradArgs& a, float* dw, int64_t rows) {
  const int64_t runs = (rows + kNormRun - 1) / kNormRun;
  float* parts = shared_scratch(runs * a.k);
  if (!parts) return 3;
  parallel(runs, 1, [&](int64_t b, int64_t e) {
    for (; b < e; ++b)
      training()->norm_grad(a, parts + b * a.k, b * kNormRun, b + 1 < runs ? (b + 1) * kNormRun : rows);
  });
  for (int64_t i = 0; i < a.k; ++i) dw[i] = 0;
  for (int64_t b = 0; b < runs; ++b) training()->add(dw, parts + b * a.k, a.k);
  return 0;
}

void cross_entropy(float* logits, const int32_t* targets, float scale, float* losses, int64_t rows, int64_t n) {
  parallel(rows, 1, [&](int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; ++r) losses[r] = training()->cross_entropy(logits + r * n, n, targets[r], scale);
  });
}

void adamw(const AdamWArgs& a, int64_t size) {
  parallel(size, 1 << 16, [&](int64_t i0, int64_t i1) { training()->adamw(a, i0, i1); });
}

double square_sum(const float* x, int64_t size) {
  const int64_t runs = (size + kSquareRun - 1) / kSquareRun;
  std::vector<double> parts(runs);
  parallel(runs, 4, [&](int64_t b, int64_t e) {
    for (; b < e; ++b)
      parts[b] = training()->square_sum(x + b * kSquareRun, b + 1 < runs ? kSquareRun : size - b * kSquareRun);
  });
  double sum = 0;
  for (const double part : parts) sum += part;
  return sum;
}

// Each thread owns columns, so the order of a sum is that of the rows.
void sum_rows(const float* x, float* y, int64_t rows, int64_t n) {
  parallel(n, 256, [&](int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; ++c) y[c] = 0;
    for (int64_t r = 0; r < rows; ++r) training()->add(y + c0, x + r * n + c0, c1 - c0);
  });
}

void add_columns(const float* x, const float* bias, float* y, int64_t rows, int64_t n) {
  parallel(rows, 8, [&](int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; ++r)
      for (int64_t c = 0; c < n; ++c) y[r * n + c] = x[r * n + c] + bias[c];
  });
}

}  // namespace qwen
