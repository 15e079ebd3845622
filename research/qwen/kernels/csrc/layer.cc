#include "layer.h"

#include <cstring>
#include <initializer_list>

#include "arena.h"
#include "linear.h"
#include "pointwise.h"
#include "pool.h"

namespace qwen {
namespace {

Arena& arena() {
  static Arena* const one = new Arena;  // never destroyed: see the pool
  return *one;
}

void add(const float* from, float* y, int64_t size) {
  parallel(size, size < kSmall ? kSmall : 1 << 14, [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i) y[i] += from[i];
  });
}

int apply_float(const Matrix& w, const float* x, int64_t rows, const float* residual, float* y) {
  LinearArgs a;
  a.x = x, a.w = w.data, a.bias = w.bias, a.y = y;
  a.rows = rows, a.k = w.k, a.n = w.n, a.format = w.format;
  const int error = linear(a);
  if (!error && residual) add(residual, y, rows * w.n);
  return error;
}

bool same_inputs(const QuantWeight& a, const QuantWeight& b) {
  if (a.run() != b.run() || a.wide != b.wide || a.k != b.k || !a.order != !b.order) return false;
  return !a.order || a.order == b.order || !std::memcmp(a.order, b.order, a.k * sizeof(int32_t));
}

bool same_scheme(const QuantWeight& a, const QuantWeight& b) {
  return same_inputs(a, b) && a.bits == b.bits && a.group == b.group && !a.zeros == !b.zeros;
}

struct Layer {
  const LayerArgs& a;
  int64_t rows;  // of the current step
  float *qkv, *mixed, *normed, *gate, *up, *middle;
  void* quant;
  int32_t* picked;      // adapters of the wanted rows
  AdapterRows adapted;  // of the rows of the current step

  bool integer(const Matrix& w) const { return w.quantised && !a.exact; }

  int norm_apply(const float* x, const float* norm, const Matrix& w, float* y) {
    if (integer(w)) {
      const QuantInput in = norm_quantize_rows(x, norm, a.eps, rows, w.packed, quant);
      return quant_linear(in, w.packed, w.bias, nullptr, y);
    }
    rms_norm(x, norm, a.eps, normed, rows, a.hidden);
    return apply(w, normed, rows, a.exact, nullptr, y);
  }

  int apply_rows(const Matrix& w, const float* x, const float* residual, float* y) {
    if (integer(w)) {
      const QuantInput in = quantize_rows(x, rows, w.packed, quant);
      return quant_linear(in, w.packed, w.bias, residual, y);
    }
    return apply(w, x, rows, a.exact, residual, y);
  }

  // Adds what the adapters say of matrix `i` in the order of LayerArgs.
  int adapt(int i, const Matrix& w, const float* x, float* y) {
    if (!adapted.of) return 0;
    return add_low_rank(adapted, a.low_rank + i * adapted.adapters, x, w.k, y, w.n);
  }

  // c_attn of ln_1(x).
  int project() {
    if (const int error = norm_apply(a.x, a.ln_1, a.c_attn, qkv)) return error;
    if (!adapted.of) return 0;
    if (integer(a.c_attn)) rms_norm(a.x, a.ln_1, a.eps, normed, rows, a.hidden);
    return adapt(0, a.c_attn, normed, qkv);
  }

  // gate = w1(x) * silu(w2(x)) of x = ln_2(middle), with the adapters' part before the product: the same bits where
  // there is none.
  int adapted_gate() {
    rms_norm(middle, a.ln_2, a.eps, normed, rows, a.hidden);
    if (integer(a.w1) && integer(a.w2) && same_inputs(a.w1.packed, a.w2.packed)) {
      const QuantInput in = quantize_rows(normed, rows, a.w1.packed, quant);
      if (const int error = quant_linear(in, a.w1.packed, nullptr, nullptr, gate)) return error;
      if (const int error = quant_linear(in, a.w2.packed, nullptr, nullptr, up)) return error;
    } else {
      if (const int error = apply_rows(a.w1, normed, nullptr, gate)) return error;
      if (const int error = apply_rows(a.w2, normed, nullptr, up)) return error;
    }
    if (const int error = adapt(2, a.w1, normed, gate)) return error;
    if (const int error = adapt(3, a.w2, normed, up)) return error;
    swiglu(gate, up, gate, rows * a.w1.n);
    return 0;
  }

  int mlp() {
    if (adapted.of) {
      if (const int error = adapted_gate()) return error;
    } else if (integer(a.w1) && integer(a.w2) && same_scheme(a.w1.packed, a.w2.packed)) {
      const QuantWeight& w = a.w1.packed;
      const QuantInput in = norm_quantize_rows(middle, a.ln_2, a.eps, rows, w, quant);
      if (const int error = quant_gated(in, w, a.w2.packed, gate)) return error;
    } else {
      rms_norm(middle, a.ln_2, a.eps, normed, rows, a.hidden);
      if (const int error = apply_rows(a.w1, normed, nullptr, gate)) return error;
      if (const int error = apply_rows(a.w2, normed, nullptr, up)) return error;
      swiglu(gate, up, gate, rows * a.w1.n);
    }
    if (const int error = apply_rows(a.mlp_proj, gate, middle, a.y)) return error;
    return adapt(4, a.mlp_proj, gate, a.y);
  }

  // The wanted rows of x.
  const float* pick(const float* x, float* to) const {
    for (int64_t i = 0; i < rows; ++i)
      std::memcpy(to + i * a.hidden, x + a.wanted[i] * a.hidden, a.hidden * sizeof(float));
    return to;
  }

  void pick_adapters() {
    if (!adapted.of) return;
    for (int64_t i = 0; i < rows; ++i) picked[i] = a.adapted.of[a.wanted[i]];
    adapted.of = picked, adapted.rows = rows;
  }

  int run() {
    if (const int error = project()) return error;
    AttentionArgs attend = a.attention;
    attend.qkv = qkv;
    attend.y = mixed;
    if (const int error = attention(attend)) return error;
    const float *from = mixed, *residual = a.x;
    if (a.wanted) {
      rows = a.wanted_count;
      from = pick(mixed, normed);
      residual = pick(a.x, qkv);
      pick_adapters();
    }
    if (const int error = apply_rows(a.attn_proj, from, residual, middle)) return error;
    if (const int error = adapt(1, a.attn_proj, from, middle)) return error;
    return mlp();
  }
};

int64_t quant_bytes(const LayerArgs& a, int64_t rows) {
  int64_t most = 0;
  for (const Matrix* w : {&a.c_attn, &a.attn_proj, &a.w1, &a.w2, &a.mlp_proj})
    if (w->quantised) {
      const int64_t bytes = quant_input_bytes(rows, w->packed);
      most = bytes > most ? bytes : most;
    }
  return most;
}

}  // namespace

int apply(const Matrix& w, const float* x, int64_t rows, bool exact, const float* residual, float* y) {
  if (!w.quantised) return apply_float(w, x, rows, residual, y);
  if (exact) return float_linear(x, rows, w.packed, w.bias, residual, y);
  if (!arena().reserve(quant_input_bytes(rows, w.packed))) return 3;
  const QuantInput in = quantize_rows(x, rows, w.packed, arena().take<char>(0));
  return quant_linear(in, w.packed, w.bias, residual, y);
}

float* between_layers(int64_t floats) {
  static Arena* const one = new Arena;
  return one->reserve(floats * sizeof(float)) ? one->take<float>(floats) : nullptr;
}

int layer(const LayerArgs& a) {
  // More results than tokens may be asked for: the same token twice.
  const int64_t t = a.wanted && a.wanted_count > a.rows ? a.wanted_count : a.rows, wide = a.w1.n;
  const int64_t packed = quant_bytes(a, t);
  const int64_t need = Arena::bytes<float>(t * 3 * a.hidden) + 3 * Arena::bytes<float>(t * a.hidden) +
                       2 * Arena::bytes<float>(t * wide) + Arena::bytes<char>(packed) + Arena::bytes<int32_t>(t);
  if (!arena().reserve(need)) return 3;
  Layer l{a, a.rows};
  l.qkv = arena().take<float>(t * 3 * a.hidden);
  l.mixed = arena().take<float>(t * a.hidden);
  l.normed = arena().take<float>(t * a.hidden);
  l.middle = arena().take<float>(t * a.hidden);
  l.gate = arena().take<float>(t * wide);
  l.up = arena().take<float>(t * wide);
  l.quant = arena().take<char>(packed);
  l.picked = arena().take<int32_t>(t);
  l.adapted = a.adapted;
  return l.run();
}

}  // namespace qwen
