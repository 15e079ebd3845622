// Entry points of integer weights for training (QwenUnpack), tests and benchmarks, see quant.h. An array without elements
// stands for null.
// `about` is int64 (n, k, bits, group, wide) of the weights.
#include <cstring>
#include <vector>

#include "ops.h"
#include "pool.h"
#include "quant.h"

namespace qwen {
namespace {

struct Arrays {
  void** p;
  int64_t** shapes;

  template <class T>
  T* at(int i) const {
    return shapes[i][0] ? static_cast<T*>(p[i]) : nullptr;
  }
  int64_t rows(int i) const { return shapes[i][0]; }
};

// weight, scales, zeros at first ..; order and about anywhere.
QuantWeight weight(const Arrays& a, int first, int order, int about) {
  const auto* n = a.at<int64_t>(about);
  return {a.at<uint8_t>(first), a.at<void>(first + 1), a.at<uint8_t>(first + 2), a.at<int32_t>(order),
          n[0], n[1], static_cast<int>(n[2]), n[3], n[4] != 0};
}

void* input_buffer(int64_t rows, const QuantWeight& w) {
  static thread_local std::vector<char> buffer;
  buffer.resize(quant_input_bytes(rows, w));
  return buffer.data();
}

}  // namespace
}  // namespace qwen

using qwen::Arrays;

// inputs x (T, K), weight, scales, zeros, order, about, bias, residual; output (T, N)
KERNEL(QwenTestQuantLinear) {
  const Arrays a = {p, shapes};
  const qwen::QuantWeight w = qwen::weight(a, 1, 4, 5);
  if (shapes[0][1] != w.k) return 1;
  qwen::Turn turn;
  const qwen::QuantInput x =
      qwen::quantize_rows(a.at<float>(0), a.rows(0), w, qwen::input_buffer(a.rows(0), w));
  return qwen::quant_linear(x, w, a.at<float>(6), a.at<float>(7), a.at<float>(8));
}

// The same with float32 activations.
KERNEL(QwenTestFloatLinear) {
  const Arrays a = {p, shapes};
  const qwen::QuantWeight w = qwen::weight(a, 1, 4, 5);
  if (shapes[0][1] != w.k) return 1;
  qwen::Turn turn;
  return qwen::float_linear(a.at<float>(0), a.rows(0), w, a.at<float>(6), a.at<float>(7), a.at<float>(8));
}

// inputs x (T, K), weight, scales, zeros, order, about, weight 2, scales 2, zeros 2; output (T, N)
KERNEL(QwenTestQuantGated) {
  const Arrays a = {p, shapes};
  const qwen::QuantWeight w1 = qwen::weight(a, 1, 4, 5), w2 = qwen::weight(a, 6, 4, 5);
  if (shapes[0][1] != w1.k) return 1;
  qwen::Turn turn;
  const qwen::QuantInput x =
      qwen::quantize_rows(a.at<float>(0), a.rows(0), w1, qwen::input_buffer(a.rows(0), w1));
  return qwen::quant_gated(x, w1, w2, a.at<float>(9));
}

// inputs x (T, K), norm (K,), eps (1,), order (K,), about, q int8 (T, pieces, K padded), scale (T, runs), sum int32 (T,
// pieces, runs), of which the last three are written; the output is not.
KERNEL(QwenTestQuantize) {
  const Arrays a = {p, shapes};
  const int64_t rows = a.rows(0), *about = a.at<int64_t>(4);
  const qwen::QuantWeight w = {a.at<uint8_t>(0), p[0], nullptr, a.at<int32_t>(3), about[0], about[1],
                               static_cast<int>(about[2]), about[3], about[4] != 0};
  qwen::Turn turn;
  void* const buffer = qwen::input_buffer(rows, w);
  const qwen::QuantInput x = a.rows(1) ? qwen::norm_quantize_rows(a.at<float>(0), a.at<float>(1), *a.at<float>(2), rows,
                                                                  w, buffer)
                                       : qwen::quantize_rows(a.at<float>(0), rows, w, buffer);
  if (x.pieces() != shapes[5][1] || x.k_padded != shapes[5][2] || x.runs != shapes[6][1]) return 1;
  std::memcpy(p[5], x.q, rows * x.pieces() * x.k_padded);
  std::memcpy(p[6], x.scale, rows * x.runs * sizeof(float));
  std::memcpy(p[7], x.sum, rows * x.pieces() * x.runs * sizeof(int32_t));
  return 0;
}

// inputs weight, scales, zeros, order, about, rows int64 (R,); output (R, K)
KERNEL(QwenTestDequantizeRows) {
  const Arrays a = {p, shapes};
  const qwen::QuantWeight w = qwen::weight(a, 0, 3, 4);
  for (int64_t i = 0; i < a.rows(5); ++i)
    qwen::dequantize_row(w, a.at<int64_t>(5)[i], a.at<float>(6) + i * w.k);
  return 0;
}

// inputs weight, scales, zeros, order, about; output (N, K): the matrix in float32, inputs in the order of the model
KERNEL(QwenUnpack) {
  const Arrays a = {p, shapes};
  const qwen::QuantWeight w = qwen::weight(a, 0, 3, 4);
  if (shapes[5][0] != w.n || shapes[5][1] != w.k) return 1;
  float* const out = a.at<float>(5);
  qwen::Turn turn;
  qwen::parallel(w.n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) qwen::dequantize_row(w, row, out + row * w.k);
  });
  return 0;
}
