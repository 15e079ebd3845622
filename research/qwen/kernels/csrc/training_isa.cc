// Gradients of RMSNorm and SwiGLU, cross entropy, AdamW: as few passes over memory as there can be.
#include "training.h"

#include <cmath>

#include "vec.h"

namespace {

using qwen::AdamWArgs;
using qwen::NormGradArgs;

constexpr int64_t kRun = 64 * kLanes;  // numbers summed in float; the runs are summed in double

INLINE V root_of(V x) {
#if defined(__AVX512F__)
  return (V)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (V)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (V)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
  return (V)vsqrtq_f32((float32x4_t)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}
INLINE V minimum(V a, V b) { return (V)(a > b ? (VI)b : (VI)a); }

// Sum of f(i, n) over vectors of n numbers from i on; n is kLanes but for the last. Four sums side by side.
template <class F>
INLINE double total(int64_t size, F f) {
  double sum = 0;
  for (int64_t i = 0; i < size; i += kRun) {
    const int64_t end = smaller(size, i + kRun);
    V part[4] = {};
    int64_t j = i;
    for (; j + 4 * kLanes <= end; j += 4 * kLanes)
      for (int l = 0; l < 4; ++l) part[l] = part[l] + f(j + l * kLanes, kLanes);
    for (; j < end; j += kLanes) part[0] = part[0] + f(j, smaller(kLanes, end - j));
    sum += sum_lanes((part[0] + part[1]) + (part[2] + part[3]));
  }
  return sum;
}
INLINE V some(const float* p, int64_t n) { return n == kLanes ? load(p) : load_part(p, n); }
INLINE void put(float* p, V v, int64_t n) {
  if (n == kLanes) return store(p, v);
  store_part(p, v, n);
}

// y = x r w with r = rsqrt(mean(x^2) + eps): dx = r (w dy - x r^2 mean(w dy x)), dw = sum of dy x r.
static void norm_grad(const NormGradArgs& a, float* dw, int64_t r0, int64_t r1) {
  for (int64_t i = 0; i < a.k; ++i) dw[i] = 0;
  for (int64_t r = r0; r < r1; ++r) {
    const float *x = a.x + r * a.k, *dy = a.dy + r * a.k;
    const float* residual = a.residual ? a.residual + r * a.k : nullptr;
    float* dx = a.dx + r * a.k;
    const double squares = total(a.k, [&](int64_t i, int64_t n) {
      const V v = some(x + i, n);
      return v * v;
    });
    const double inner = total(a.k, [&](int64_t i, int64_t n) {
      return some(x + i, n) * (some(dy + i, n) * some(a.w + i, n));
    });
    const double inverse = 1.0 / std::sqrt(squares / double(a.k) + a.eps);
    const V scale = splat(float(inverse)), back = splat(float(inner / double(a.k) * inverse * inverse * inverse));
    for (int64_t i = 0; i < a.k; i += kLanes) {
      const int64_t n = smaller(kLanes, a.k - i);
      const V vx = some(x + i, n), vy = some(dy + i, n);
      const V d = vy * some(a.w + i, n) * scale - vx * back;
      put(dx + i, residual ? some(residual + i, n) + d : d, n);
      put(dw + i, fma(vy * scale, vx, some(dw + i, n)), n);
    }
  }
}

// y = a silu(b): da = dy silu(b), db = dy a (s + silu(b) (1 - s)) with s = sigmoid(b).
INLINE void swiglu_grad_of(V a, V b, V dy, V* da, V* db) {
  const V one = splat(1.f);
  const V s = one / (exp_v(minimum(-b, splat(88.f))) + one), silu = b * s;
  *da = dy * silu;
  *db = dy * a * (s + silu * (one - s));
}

static void swiglu_grad(const float* a, const float* b, const float* dy, float* da, float* db, int64_t i0, int64_t i1) {
  for (int64_t i = i0; i < i1; i += kLanes) {
    const int64_t n = smaller(kLanes, i1 - i);
    V va, vb;
    swiglu_grad_of(some(a + i, n), some(b + i, n), some(dy + i, n), &va, &vb);
    put(da + i, va, n);
    put(db + i, vb, n);
  }
}

INLINE float maximum_of(const float* x, int64_t n) {
  const V lowest = splat(-3.4e38f);
  V best[4] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int l = 0; l < 4; ++l) best[l] = maximum(load(x + i + l * kLanes), best[l]);
  float top = max_lanes(maximum(maximum(best[0], best[1]), maximum(best[2], best[3])));
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

static double cross_entropy(float* row, int64_t n, int32_t target, float scale) {
  if (target < 0) {
    std::memset(row, 0, n * sizeof(float));
    return 0;
  }
  const float top = maximum_of(row, n), own = row[target];
  const V shift = splat(top);
  const double sum = total(n, [&](int64_t i, int64_t count) {
    const V x = some(row + i, count) - shift;
    V e = exp_v(x) + x * splat(0.0f);  // exp_v(NaN) is 0, and a loss must not hide a NaN
    put(row + i, e, count);
    if (count < kLanes) e = some(row + i, count);  // what lies behind the row counts nothing
    return e;
  });
  const V share = splat(float(scale / sum));
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = smaller(kLanes, n - i);
    put(row + i, some(row + i, count) * share, count);
  }
  row[target] -= scale;
  return std::log(sum) + (double(top) - double(own));
}

// Every product and sum is rounded by itself, in the order of model/optimizer.py, so that both give the same bits.
static void adamw(const AdamWArgs& a, int64_t i0, int64_t i1) {
  const V factor = splat(a.factor), beta1 = splat(a.beta1), beta2 = splat(a.beta2), rest1 = splat(a.rest1),
          rest2 = splat(a.rest2), size = splat(a.size), root = splat(a.root), eps = splat(a.eps),
          shrink = splat(a.shrink);
  for (int64_t i = i0; i < i1; i += kLanes) {
    const int64_t n = smaller(kLanes, i1 - i);
    const V g = some(a.g + i, n) * factor;
    const V m = some(a.m + i, n) * beta1 + g * rest1;
    const V v = some(a.v + i, n) * beta2 + g * g * rest2;
    put(a.m + i, m, n);
    put(a.v + i, v, n);
    put(a.w + i, some(a.w + i, n) * shrink - m / (root_of(v) * root + eps) * size, n);
  }
}

static double square_sum(const float* x, int64_t size) {
  return total(size, [&](int64_t i, int64_t n) {
    const V v = some(x + i, n);
    return v * v;
  });
}

static void add(float* to, const float* x, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t n = smaller(kLanes, size - i);
    put(to + i, some(to + i, n) + some(x + i, n), n);
  }
}

static void masked(const float* x, const uint8_t* keep, float grow, float* y, int64_t i0, int64_t i1) {
  for (int64_t i = i0; i < i1; ++i) y[i] = x[i] * (keep[i] ? grow : 0.f);
}

}  // namespace

namespace qwen {

const TrainingTable* QWEN_TABLE() {
  static const TrainingTable table = {::norm_grad, ::swiglu_grad, ::cross_entropy, ::adamw,
                                      ::square_sum, ::add, ::masked};
  return &table;
}

}  // namespace qwen
