#include "layer.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "linear.h"
#include "pointwise.h"
#include "pool.h"

namespace qwen {
namespace {

// Intermediate values of the one layer that runs at a time; grown as needed and kept for the next one.
class Arena {
 public:
  bool reserve(int64_t bytes) {
    used_ = 0;
    if (bytes <= size_) return true;
    std::free(data_);
    data_ = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    size_ = data_ ? bytes : 0;
    return data_ != nullptr;
  }
  template <class T>
  T* take(int64_t count) {
    T* const at = reinterpret_cast<T*>(data_ + used_);
    used_ += bytes<T>(count);
    return at;
  }
  template <class T>
  static int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

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

  int mlp() {
    if (integer(a.w1) && integer(a.w2) && same_scheme(a.w1.packed, a.w2.packed)) {
      const QuantWeight& w = a.w1.packed;
      const QuantInput in = norm_quantize_rows(middle, a.ln_2, a.eps, rows, w, quant);
      if (const int error = quant_gated(in, w, a.w2.packed, gate)) return error;
    } else {
      rms_norm(middle, a.ln_2, a.eps, normed, rows, a.hidden);
      if (const int error = apply_rows(a.w1, normed, nullptr, gate)) return error;
      if (const int error = apply_rows(a.w2, normed, nullptr, up)) return error;
      swiglu(gate, up, gate, rows * a.w1.n);
    }
    return apply_rows(a.mlp_proj, gate, middle, a.y);
  }

  // The wanted rows of x.
  const float* pick(const float* x, float* to) const {
    for (int64_t i = 0; i < rows; ++i)
      std::memcpy(to + i * a.hidden, x + a.wanted[i] * a.hidden, a.hidden * sizeof(float));
    return to;
  }

  int run() {
    if (const int error = norm_apply(a.x, a.ln_1, a.c_attn, qkv)) return error;
    AttentionArgs attend = a.attention;
    attend.qkv = qkv;
    attend.y = mixed;
    if (const int error = attention(attend)) return error;
    const float *from = mixed, *residual = a.x;
    if (a.wanted) {
      rows = a.wanted_count;
      from = pick(mixed, normed);
      residual = pick(a.x, qkv);
    }
    if (const int error = apply_rows(a.attn_proj, from, residual, middle)) return error;
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
                       2 * Arena::bytes<float>(t * wide) + Arena::bytes<char>(packed);
  if (!arena().reserve(need)) return 3;
  Layer l{a, a.rows};
  l.qkv = arena().take<float>(t * 3 * a.hidden);
  l.mixed = arena().take<float>(t * a.hidden);
  l.normed = arena().take<float>(t * a.hidden);
  l.middle = arena().take<float>(t * a.hidden);
  l.gate = arena().take<float>(t * wide);
  l.up = arena().take<float>(t * wide);
  l.quant = arena().take<char>(packed);
  return l.run();
}

}  // namespace qwen
