// Training as MindSpore calls it, and what the optimizer calls directly.
#include "isa.h"
#include "ops.h"
#include "pointwise.h"
#include "pool.h"
#include "product.h"
#include "text_attention.h"
#include "training.h"

namespace qwen {
namespace {

using Shapes = std::vector<std::vector<int64_t>>;

template <class T = float>
T* at(void** p, int i) {
  return static_cast<T*>(p[i]);
}
std::vector<int64_t> copy(int* ndims, int64_t** shapes, int i) { return like(ndims[i], shapes[i]); }
int64_t size_of(int ndim, const int64_t* shape) {
  int64_t size = 1;
  for (int i = 0; i < ndim; ++i) size *= shape[i];
  return size;
}

// inputs qkv (T, 3 heads d), cos, sin (T, d / 2), bounds (texts + 1,), y (T, heads d), peak (heads, T) and on the way
// back dy (T, heads d), dqkv
int text_attention_op(void** p, int64_t** shapes, bool backward) {
  TextAttentionArgs a = {};
  a.qkv = at(p, 0), a.cos = at(p, 1), a.sin = at(p, 2), a.bounds = at<int32_t>(p, 3);
  a.y = at(p, 4), a.peak = at(p, 5);
  if (backward) a.dy = at(p, 6), a.dqkv = at(p, 7);
  a.tokens = shapes[0][0], a.texts = shapes[3][0] - 1, a.heads = shapes[5][0], a.d = 2 * shapes[1][1];
  bool fits = a.texts > 0 && shapes[0][1] == 3 * a.heads * a.d && shapes[1][0] == a.tokens &&
              shapes[2][0] == a.tokens && shapes[2][1] * 2 == a.d && shapes[5][1] == a.tokens &&
              shapes[4][0] == a.tokens && shapes[4][1] == a.heads * a.d;
  if (backward) fits = fits && shapes[6][0] == a.tokens && shapes[6][1] == a.heads * a.d;
  if (isa() == kNone || !fits) return 1;
  for (int64_t i = 0; i < a.texts; ++i)
    if (a.bounds[i] < 0 || a.bounds[i + 1] <= a.bounds[i]) return 2;
  if (a.bounds[0] != 0 || a.bounds[a.texts] != a.tokens) return 2;
  Turn turn;
  return text_attention(a, backward);
}

// inputs dy, x (T, K), weight (K,), eps (1,)[, residual (T, K)]; outputs dx = residual + gradient (T, K), dweight (K,)
int norm_grad_op(void** p, int64_t** shapes, bool plus) {
  const int64_t rows = shapes[1][0], k = shapes[1][1];
  bool fits = shapes[0][0] == rows && shapes[0][1] == k && shapes[2][0] == k;
  if (plus) fits = fits && shapes[4][0] == rows && shapes[4][1] == k;
  if (isa() == kNone || !fits) return 1;
  const int out = plus ? 5 : 4;
  const NormGradArgs a = {at(p, 0), at(p, 1), at(p, 2), plus ? at(p, 4) : nullptr, at(p, out), *at(p, 3), k};
  Turn turn;
  return norm_grad(a, at(p, out + 1), rows);
}

}  // namespace
}  // namespace qwen

// inputs as above; outputs y (T, heads d), peak (heads, T). The number of heads is in the shape of the fifth input.
KERNEL(QwenTextAttention) {
  int64_t* own[] = {shapes[0], shapes[1], shapes[2], shapes[3], shapes[5], shapes[6]};
  void* pointers[] = {p[0], p[1], p[2], p[3], p[5], p[6]};
  return qwen::text_attention_op(pointers, own, false);
}
INFER2(QwenTextAttention) {
  return {{shapes[0][0], shapes[0][1] / 3}, {shapes[4][0], shapes[0][0]}};
}

// output dqkv (T, 3 heads d)
KERNEL(QwenTextAttentionGrad) { return qwen::text_attention_op(p, shapes, true); }
INFER(QwenTextAttentionGrad) { return qwen::like(ndims[0], shapes[0]); }

KERNEL(QwenRmsNormGrad) { return qwen::norm_grad_op(p, shapes, false); }
INFER2(QwenRmsNormGrad) { return {qwen::copy(ndims, shapes, 1), qwen::copy(ndims, shapes, 2)}; }
KERNEL(QwenRmsNormGradPlus) { return qwen::norm_grad_op(p, shapes, true); }
INFER2(QwenRmsNormGradPlus) { return {qwen::copy(ndims, shapes, 1), qwen::copy(ndims, shapes, 2)}; }

// inputs a, b, dy (T, K) of y = a silu(b); outputs da, db
KERNEL(QwenSwiGluGrad) {
  const int64_t size = shapes[0][0] * shapes[0][1];
  const bool fits = shapes[1][0] * shapes[1][1] == size && shapes[2][0] * shapes[2][1] == size;
  if (qwen::isa() == qwen::kNone || !fits) return 1;
  const float *a = qwen::at(p, 0), *b = qwen::at(p, 1), *dy = qwen::at(p, 2);
  float *da = qwen::at(p, 3), *db = qwen::at(p, 4);
  qwen::Turn turn;
  qwen::parallel(size, size < qwen::kSmall ? qwen::kSmall : 1 << 14, [&](int64_t i0, int64_t i1) {
    qwen::training()->swiglu_grad(a, b, dy, da, db, i0, i1);
  });
  return 0;
}
INFER2(QwenSwiGluGrad) { return {qwen::copy(ndims, shapes, 0), qwen::copy(ndims, shapes, 0)}; }

// inputs logits (R, V), targets (R,) int32 (below 0: none), scale (1,); output losses (R,).
// The logits become the gradient of scale times the sum of the losses.
KERNEL(QwenCrossEntropy) {
  const int64_t rows = shapes[0][0], n = shapes[0][1];
  if (qwen::isa() == qwen::kNone || shapes[1][0] != rows) return 1;
  const auto* targets = qwen::at<int32_t>(p, 1);
  for (int64_t r = 0; r < rows; ++r)
    if (targets[r] >= n) return 2;
  qwen::Turn turn;
  qwen::cross_entropy(qwen::at(p, 0), targets, *qwen::at(p, 2), qwen::at(p, 3), rows, n);
  return 0;
}
INFER(QwenCrossEntropy) { return {shapes[0][0]}; }

// inputs x (T, K), bias (K,); output their sum
KERNEL(QwenAddBias) {
  if (shapes[1][0] != shapes[0][1]) return 1;
  qwen::Turn turn;
  qwen::add_columns(qwen::at(p, 0), qwen::at(p, 1), qwen::at(p, 2), shapes[0][0], shapes[0][1]);
  return 0;
}
INFER(QwenAddBias) { return qwen::like(ndims[0], shapes[0]); }

// input x (T, K); output the sum of its rows (K,)
KERNEL(QwenSumRows) {
  if (qwen::isa() == qwen::kNone) return 1;
  qwen::Turn turn;
  qwen::sum_rows(qwen::at(p, 0), qwen::at(p, 1), shapes[0][0], shapes[0][1]);
  return 0;
}
INFER(QwenSumRows) { return {shapes[0][1]}; }

// inputs x (T, K), keep (T, K) bool, grow (1,); output x * grow where it is kept, else 0
KERNEL(QwenDropout) {
  const int64_t size = shapes[0][0] * shapes[0][1];
  if (qwen::isa() == qwen::kNone || shapes[1][0] * shapes[1][1] != size) return 1;
  const float *x = qwen::at(p, 0), grow = *qwen::at(p, 2);
  const auto* keep = qwen::at<uint8_t>(p, 1);
  float* y = qwen::at(p, 3);
  qwen::Turn turn;
  qwen::parallel(size, 1 << 14, [&](int64_t i0, int64_t i1) { qwen::training()->masked(x, keep, grow, y, i0, i1); });
  return 0;
}
INFER(QwenDropout) { return qwen::like(ndims[0], shapes[0]); }

// inputs weight, gradient, first and second moment of one size, hyper (9,) in the order of AdamWArgs from beta1 on; the
// output is nothing: all is changed in place but the gradient.
KERNEL(QwenAdamW) {
  const int64_t size = qwen::size_of(ndims[0], shapes[0]);
  for (int i = 1; i < 4; ++i)
    if (qwen::size_of(ndims[i], shapes[i]) != size) return 1;
  if (qwen::isa() == qwen::kNone || shapes[4][0] != 9) return 1;
  const float* h = qwen::at(p, 4);
  qwen::AdamWArgs a = {qwen::at(p, 0), qwen::at(p, 2), qwen::at(p, 3), qwen::at(p, 1), h[0], h[1],
                       h[2], h[3], h[4], h[5], h[6], h[7], h[8]};
  qwen::Turn turn;
  qwen::adamw(a, size);
  return 0;
}

// input x; output (1,) float64, the sum of squares
KERNEL(QwenSquareSum) {
  if (qwen::isa() == qwen::kNone) return 1;
  qwen::Turn turn;
  *qwen::at<double>(p, 1) = qwen::square_sum(qwen::at(p, 0), qwen::size_of(ndims[0], shapes[0]));
  return 0;
}

// inputs x, y of one size: x += y
KERNEL(QwenAddInto) {
  const int64_t size = qwen::size_of(ndims[0], shapes[0]);
  if (qwen::isa() == qwen::kNone || qwen::size_of(ndims[1], shapes[1]) != size) return 1;
  float* x = qwen::at(p, 0);
  const float* y = qwen::at(p, 1);
  qwen::Turn turn;
  qwen::parallel(size, 1 << 16, [&](int64_t i0, int64_t i1) { qwen::training()->add(x + i0, y + i0, i1 - i0); });
  return 0;
}

// inputs a (m, k), b (k, n); output their product (m, n)
KERNEL(QwenProduct) {
  const int64_t m = shapes[0][0], n = shapes[1][1], k = shapes[0][1];
  const qwen::ProductArgs a = {qwen::at(p, 0), qwen::at(p, 1), qwen::at(p, 2), m, n, k};
  if (qwen::isa() == qwen::kNone || shapes[1][0] != a.k || a.k < 1) return 1;
  qwen::Turn turn;
  return qwen::product(a);
}
INFER(QwenProduct) { return {shapes[0][0], shapes[1][1]}; }
