// The operators as MindSpore calls them: NAME does the work, NAMEInferShape gives the output shape from input shapes.
// Arguments are checked in Python; a non-zero return is the last defence against writing outside an array.
#include "ops.h"

#include "isa.h"
#include "linear.h"
#include "pointwise.h"
#include "pool.h"

namespace qwen {
namespace {

// inputs x (T, K), weight (N, K)[, bias (N,)]; output (T, N)
int linear_op(int count, void** p, int64_t** shapes, int format) {
  if (isa() == kNone || shapes[1][1] != shapes[0][1]) return 1;
  LinearArgs a;
  a.x = static_cast<const float*>(p[0]);
  a.w = p[1];
  a.bias = count == 4 ? static_cast<const float*>(p[2]) : nullptr;
  a.y = static_cast<float*>(p[count - 1]);
  a.rows = shapes[0][0], a.k = shapes[0][1], a.n = shapes[1][0], a.format = format;
  Turn turn;
  return linear(a);
}

// inputs ids (T,), weight (rows, dim); output (T, dim)
int embedding(void** p, int64_t** shapes, int format) {
  const auto* ids = static_cast<const int32_t*>(p[0]);
  const auto* weight = static_cast<const char*>(p[1]);
  auto* y = static_cast<float*>(p[2]);
  const int64_t tokens = shapes[0][0], rows = shapes[1][0], dim = shapes[1][1];
  const int64_t bytes = dim * (format == kF32 ? 4 : 2);
  if (isa() == kNone) return 1;
  for (int64_t t = 0; t < tokens; ++t) {
    if (ids[t] < 0 || ids[t] >= rows) return 2;
    pointwise()->widen(weight + ids[t] * bytes, y + t * dim, dim, format);
  }
  return 0;
}

}  // namespace
}  // namespace qwen

extern "C" void QwenSetThreads(int count) { qwen::set_threads(count); }
extern "C" int QwenThreads() { return qwen::threads(); }
extern "C" const char* QwenIsa() { return qwen::isa_name(); }

// Reads n floats with all threads and nothing else: the bandwidth that benchmarks are measured against.
extern "C" void QwenReadMemory(const float* x, int64_t n) {
  qwen::Turn turn;
  qwen::parallel(n, 1 << 20, [&](int64_t i0, int64_t i1) {
    volatile float sink = qwen::pointwise()->read_sum(x + i0, i1 - i0);
    (void)sink;
  });
}

KERNEL(QwenLinearF32) { return qwen::linear_op(count, p, shapes, qwen::kF32); }
KERNEL(QwenLinearBF16) { return qwen::linear_op(count, p, shapes, qwen::kBF16); }
KERNEL(QwenLinearF16) { return qwen::linear_op(count, p, shapes, qwen::kF16); }
INFER(QwenLinearF32) { return {shapes[0][0], shapes[1][0]}; }
INFER(QwenLinearBF16) { return {shapes[0][0], shapes[1][0]}; }
INFER(QwenLinearF16) { return {shapes[0][0], shapes[1][0]}; }

// MindSpore keeps one registration a name, so the form with bias (three inputs) needs names of its own.
KERNEL(QwenLinearBiasF32) { return qwen::linear_op(count, p, shapes, qwen::kF32); }
KERNEL(QwenLinearBiasBF16) { return qwen::linear_op(count, p, shapes, qwen::kBF16); }
KERNEL(QwenLinearBiasF16) { return qwen::linear_op(count, p, shapes, qwen::kF16); }
INFER(QwenLinearBiasF32) { return {shapes[0][0], shapes[1][0]}; }
INFER(QwenLinearBiasBF16) { return {shapes[0][0], shapes[1][0]}; }
INFER(QwenLinearBiasF16) { return {shapes[0][0], shapes[1][0]}; }

KERNEL(QwenEmbeddingF32) { return qwen::embedding(p, shapes, qwen::kF32); }
KERNEL(QwenEmbeddingBF16) { return qwen::embedding(p, shapes, qwen::kBF16); }
KERNEL(QwenEmbeddingF16) { return qwen::embedding(p, shapes, qwen::kF16); }
INFER(QwenEmbeddingF32) { return {shapes[0][0], shapes[1][1]}; }
INFER(QwenEmbeddingBF16) { return {shapes[0][0], shapes[1][1]}; }
INFER(QwenEmbeddingF16) { return {shapes[0][0], shapes[1][1]}; }

// inputs x (T, K), weight (K,), eps (1,); output (T, K)
KERNEL(QwenRmsNorm) {
  const int64_t rows = shapes[0][0], k = shapes[0][1];
  if (qwen::isa() == qwen::kNone || shapes[1][0] != k) return 1;
  const auto *x = static_cast<float*>(p[0]), *w = static_cast<float*>(p[1]), *eps = static_cast<float*>(p[2]);
  auto* y = static_cast<float*>(p[3]);
  qwen::Turn turn;
  qwen::rms_norm(x, w, *eps, y, rows, k);
  return 0;
}
INFER(QwenRmsNorm) { return qwen::like(ndims[0], shapes[0]); }

// inputs a, b (T, K); output a * silu(b)
KERNEL(QwenSwiGlu) {
  const int64_t size = shapes[0][0] * shapes[0][1];
  if (qwen::isa() == qwen::kNone || shapes[1][0] * shapes[1][1] != size) return 1;
  const auto *a = static_cast<float*>(p[0]), *b = static_cast<float*>(p[1]);
  auto* y = static_cast<float*>(p[2]);
  qwen::Turn turn;
  qwen::swiglu(a, b, y, size);
  return 0;
}
INFER(QwenSwiGlu) { return qwen::like(ndims[0], shapes[0]); }
