// RMSNorm, SwiGLU and widening: one pass over memory each.
#include "pointwise.h"

#include "linear.h"
#include "vec.h"

namespace {

// x * rsqrt(mean(x^2) + eps) * w; squares are summed in float over short runs, the runs in double.
static void rms_norm(const float* x, const float* w, float eps, float* y, int64_t k, int64_t r0, int64_t r1) {
  constexpr int64_t kRun = 16 * kLanes;
  for (int64_t r = r0; r < r1; ++r) {
    const float* row = x + r * k;
    float* out = y + r * k;
    double total = 0;
    for (int64_t i = 0; i < k; i += kRun) {
      const int64_t end = i + kRun < k ? i + kRun : k;
      V sum = {};
      int64_t j = i;
      for (; j + kLanes <= end; j += kLanes) sum = fma(load(row + j), load(row + j), sum);
      if (j < end) {
        const V part = load_part(row + j, end - j);
        sum = fma(part, part, sum);
      }
      total += sum_lanes(sum);
    }
    const V scale = splat(static_cast<float>(1.0 / __builtin_sqrt(total / static_cast<double>(k) + eps)));
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes) store(out + i, load(row + i) * scale * load(w + i));
    if (i < k) store_part(out + i, load_part(row + i, k - i) * scale * load_part(w + i, k - i), k - i);
  }
}

INLINE V gated(V a, V b) {
  const V limit = splat(88.f);  // silu(b) below -88 is 0 in float; keeps exp finite
  const V minus = -b;
  return a * (b / (exp_v((V)(minus > limit ? (VI)limit : (VI)minus)) + splat(1.f)));
}

// a * silu(b), elements i0 .. i1.
static void swiglu(const float* a, const float* b, float* y, int64_t i0, int64_t i1) {
  int64_t i = i0;
  for (; i + kLanes <= i1; i += kLanes) store(y + i, gated(load(a + i), load(b + i)));
  if (i < i1) store_part(y + i, gated(load_part(a + i, i1 - i), load_part(b + i, i1 - i)), i1 - i);
}

static float read_sum(const float* x, int64_t n) {
  V sum[4] = {};
  for (int64_t i = 0; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) sum[j] = sum[j] + load(x + i + j * kLanes);
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class W>
INLINE void widen_format(const void* from, float* to, int64_t n) {
  const auto* p = static_cast<const typename W::T*>(from);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, W::wide(p + i));
  if (i < n) store_part(to + i, W::wide_part(p + i, n - i), n - i);
}

static void widen(const void* from, float* to, int64_t n, int format) {
  if (format == qwen::kF32) return widen_format<F32>(from, to, n);
  if (format == qwen::kBF16) return widen_format<BF16>(from, to, n);
  widen_format<F16>(from, to, n);
}

}  // namespace

namespace qwen {

const PointwiseTable* QWEN_TABLE() {
  static const PointwiseTable table = {::rms_norm, ::swiglu, ::read_sum, ::widen};
  return &table;
}

}  // namespace qwen
