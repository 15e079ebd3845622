// Quantisation of one panel of 16 rows. Sums run over 16 lanes in order and then over halves of the lanes, whatever the
// width of a vector, and nothing is fused: so all instruction sets and NumPy agree.
#include "quantise.h"

#include "linear.h"
#include "vec.h"

namespace {

using qwen::kPanel;
using qwen::QuantiseArgs;

constexpr int kSums = 16 / kLanes;  // vectors that hold 16 lanes
constexpr int kMaxGroup = 128;
constexpr int kCandidates = 8;
constexpr int kTogether = 4;  // candidates tried in one sweep over a group
constexpr float kHalfMax = 65504.f, kTiny = 1e-30f;
typedef uint8_t VB __attribute__((vector_size(QWEN_LANES)));

INLINE V minimum(V a, V b) { return (V)(a < b ? (VI)a : (VI)b); }
INLINE V absolute(V a) { return (V)((VI)a & 0x7fffffff); }
// To the nearest integer, ties to even, for |x| below 2^22; what is larger is clamped afterwards.
INLINE V nearest(V x) {
  const V magic = splat(12582912.f);  // 1.5 * 2^23
  return (x + magic) - magic;
}
INLINE float nearest_scalar(float x) { return (x + 12582912.f) - 12582912.f; }

INLINE float sum16(V* sums) {
  for (int half = kSums / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
  return sum_lanes(sums[0]);
}

// Bits of the half-precision number nearest to x (ties to even) for |x| <= 65504.
INLINE uint16_t to_half(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, 0);
#else
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint32_t sign = u >> 16 & 0x8000;
  u &= 0x7fffffff;
  if (u < 0x38800000) {  // below 2^-14: adding 0.5 leaves the multiple of 2^-24 in the low bits
    float f;
    std::memcpy(&f, &u, 4);
    f += 0.5f;
    std::memcpy(&u, &f, 4);
    return sign | (u - 0x3f000000);
  }
  return sign | (((u + 0xfff + (u >> 13 & 1)) >> 13) - (112 << 10));
#endif
}
INLINE float from_half(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  VH bits = {};
  bits[0] = h;
  return F16::wide_bits(bits)[0];
#endif
}

// A scale as it is stored, and as the number that is.
struct Scale {
  uint16_t bits;
  float value, inverse;
};
INLINE Scale stored(float x, int* faults) {
  if (!(x <= kHalfMax && x >= -kHalfMax)) {
    *faults |= qwen::kScaleTooLarge;
    x = 0;
  }
  Scale s;
  s.bits = to_half(x);
  s.value = from_half(s.bits);
  s.inverse = s.value != 0 ? 1.f / s.value : 0.f;
  return s;
}

struct Try {
  Scale scale;
  float zero;
};

// Squared errors of a group x of n inputs for C scales: levels are within [-zero, top - zero].
template <int C>
INLINE void errors(const float* x, int64_t n, const Try* tries, float top, float* out) {
  V sums[C][kSums] = {};
  V scale[C], inverse[C], low[C], high[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    scale[c] = splat(tries[c].scale.value);
    inverse[c] = splat(tries[c].scale.inverse);
    low[c] = splat(-tries[c].zero);
    high[c] = splat(top - tries[c].zero);
  }
  for (int64_t i = 0; i < n; i += 16)
#pragma GCC unroll 4
    for (int j = 0; j < kSums; ++j) {
      const V v = load(x + i + j * kLanes);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const V level = minimum(maximum(nearest(v * inverse[c]), low[c]), high[c]);
        const V off = v - scale[c] * level;
        sums[c][j] = sums[c][j] + off * off;
      }
    }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) out[c] = sum16(sums[c]);
}

// One step of least squares: the scale that fits the levels of a scale best.
INLINE float refit(const float* x, int64_t n, const Try& best, float top) {
  V power[kSums] = {}, product[kSums] = {};
  const V inverse = splat(best.scale.inverse), low = splat(-best.zero), high = splat(top - best.zero);
  for (int64_t i = 0; i < n; i += 16)
#pragma GCC unroll 4
    for (int j = 0; j < kSums; ++j) {
      const V v = load(x + i + j * kLanes);
      const V level = minimum(maximum(nearest(v * inverse), low), high);
      power[j] = power[j] + level * level;
      product[j] = product[j] + v * level;
    }
  const float p = sum16(power), q = sum16(product);
  return p > 0 ? q / p : 0.f;
}

struct Range {
  float low, high;
};
INLINE Range range(const float* x, int64_t n, int* faults) {
  V low = load(x), high = low, wrong = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const V v = load(x + i);
    low = minimum(low, v);
    high = maximum(high, v);
    wrong = (V)((VI)wrong | ~(VI)(absolute(v) <= splat(3.4028234663852886e38f)));
  }
  Range r = {low[0], high[0]};
  int bad = 0;
  for (int i = 0; i < kLanes; ++i) {
    r.low = low[i] < r.low ? low[i] : r.low;
    r.high = high[i] > r.high ? high[i] : r.high;
    bad |= ((VI)wrong)[i];
  }
  if (bad) *faults |= qwen::kNotFinite;
  return r;
}

INLINE float zero_point(float low, const Scale& scale, float top) {
  const float zero = nearest_scalar(-low * scale.inverse);
  return zero < top ? zero : top;
}

// The scale and zero point of a group.
static Try choose(const float* x, int64_t n, int bits, bool zeros, int* faults) {
  const float top = static_cast<float>((1 << bits) - 1), middle = static_cast<float>(1 << (bits - 1));
  Range r = range(x, n, faults);
  if (*faults & qwen::kNotFinite) return {{0, 0, 0}, middle};
  if (zeros) {
    r.low = r.low < 0 ? r.low : 0;
    r.high = r.high > 0 ? r.high : 0;
  }
  const float width = r.high / top - r.low / top;
  const float extreme = -r.low > r.high ? r.low : r.high;
  if (bits == 8) {
    const Scale s = stored(zeros ? width : (extreme < 0 ? -extreme : extreme) / 127.f, faults);
    return {s, zeros ? zero_point(r.low, s, top) : middle};
  }
  Try tries[kCandidates + 1];
  float error[kCandidates + 1];
  for (int c = 0; c < kCandidates; ++c) {
    const float shrink = static_cast<float>(1.0 - 0.05 * c), level = static_cast<float>(7.0 + 0.5 * c);
    tries[c].scale = stored(zeros ? width * shrink : extreme / -level, faults);
    tries[c].zero = zeros ? zero_point(r.low, tries[c].scale, top) : middle;
  }
  for (int c = 0; c < kCandidates; c += kTogether) errors<kTogether>(x, n, tries + c, top, error + c);
  int best = 0;
  for (int c = 1; c < kCandidates; ++c)
    if (error[c] < error[best]) best = c;
  tries[kCandidates] = {stored(refit(x, n, tries[best], top), faults), tries[best].zero};
  errors<1>(x, n, tries + kCandidates, top, error + kCandidates);
  return tries[error[kCandidates] < error[best] ? kCandidates : best];
}

INLINE void to_codes(const float* x, int64_t n, float inverse, float zero, float top, uint8_t* out) {
  const V scale = splat(inverse), point = splat(zero), low = splat(-zero), high = splat(top - zero);
  for (int64_t i = 0; i < n; i += kLanes) {
    const V level = minimum(maximum(nearest(load(x + i) * scale), low), high);
    const VB codes = __builtin_convertvector(__builtin_convertvector(level + point, VI), VB);
    std::memcpy(out + i, &codes, sizeof codes);
  }
}

// Codes of 16 rows and n inputs into the packed weight: four inputs (int4: eight) of every row, and so on.
INLINE void pack(const uint8_t (*codes)[kMaxGroup], int64_t n, int bits, uint8_t* out) {
  for (int64_t i = 0; i < n; i += bits == 4 ? 8 : 4)
    for (int c = 0; c < kPanel; ++c, out += 4) {
      uint32_t low, high;
      std::memcpy(&low, codes[c] + i, 4);
      if (bits == 4) {
        std::memcpy(&high, codes[c] + i + 4, 4);
        low |= high << 4;
      }
      std::memcpy(out, &low, 4);
    }
}

template <class W>
INLINE void fetch(const typename W::T* from, int64_t have, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= have; i += kLanes) store(to + i, W::wide(from + i));
  if (i < have) {
    store(to + i, W::wide_part(from + i, have - i));
    i += kLanes;
  }
  for (; i < n; i += kLanes) store(to + i, V{});
}

template <class W>
INLINE float row_scale(const typename W::T* row, int64_t k, int* faults) {
  V most = {}, wrong = {};
  const V limit = splat(3.4028234663852886e38f);
  for (int64_t i = 0; i < k; i += kLanes) {
    const V v = absolute(i + kLanes <= k ? W::wide(row + i) : W::wide_part(row + i, k - i));
    most = maximum(most, v);
    wrong = (V)((VI)wrong | ~(VI)(v <= limit));
  }
  for (int i = 0; i < kLanes; ++i)
    if (((VI)wrong)[i]) *faults |= qwen::kNotFinite;
  const float scale = max_lanes(most) / 127.f;
  return scale < kTiny ? 0.f : scale;
}

template <class W>
static int panel(const QuantiseArgs& a, int64_t p) {
  const int64_t block = a.group ? a.group : kMaxGroup, blocks = (a.k + block - 1) / block;
  const int64_t groups = a.group ? blocks : 1, rows = smaller(kPanel, a.count - p * kPanel);
  const auto* from = static_cast<const typename W::T*>(a.rows) + p * kPanel * a.k;
  const float top = static_cast<float>((1 << a.bits) - 1), middle = static_cast<float>(1 << (a.bits - 1));
  uint8_t* weight = a.weight + p * blocks * block * kPanel * a.bits / 8;
  float x[kMaxGroup], wide[kPanel] = {};
  uint8_t codes[kPanel][kMaxGroup];
  int faults = 0;
  if (!a.group)
    for (int64_t c = 0; c < rows; ++c) wide[c] = row_scale<W>(from + c * a.k, a.k, &faults);
  for (int64_t g = 0; g < blocks; ++g) {
    Try chosen[kPanel];
    for (int64_t c = 0; c < kPanel; ++c) {
      if (c >= rows) {
        chosen[c] = {{0, 0, 0}, middle};
        std::memset(codes[c], 1 << (a.bits - 1), block);
        continue;
      }
      fetch<W>(from + c * a.k + g * block, smaller(block, a.k - g * block), block, x);
      if (a.group) {
        chosen[c] = choose(x, block, a.bits, a.zeros, &faults);
      } else {
        chosen[c] = {{0, wide[c], wide[c] != 0 ? 1.f / wide[c] : 0.f}, middle};
      }
      to_codes(x, block, chosen[c].scale.inverse, chosen[c].zero, top, codes[c]);
    }
    pack(codes, block, a.bits, weight + g * block * kPanel * a.bits / 8);
    for (int64_t c = 0; c < kPanel && a.group; ++c) {
      static_cast<uint16_t*>(a.scales)[(p * groups + g) * kPanel + c] = chosen[c].scale.bits;
      if (a.zeros) a.points[(p * groups + g) * kPanel + c] = static_cast<uint8_t>(chosen[c].zero);
    }
  }
  if (!a.group) std::memcpy(static_cast<float*>(a.scales) + p * kPanel, wide, sizeof wide);
  return faults;
}

static int panels(const QuantiseArgs& a, int64_t p0, int64_t p1) {
  int faults = 0;
  for (int64_t p = p0; p < p1; ++p)
    faults |= a.format == qwen::kF32    ? panel<F32>(a, p)
              : a.format == qwen::kBF16 ? panel<BF16>(a, p)
                                        : panel<F16>(a, p);
  return faults;
}

}  // namespace

namespace qwen {

const QuantiseTable* QWEN_TABLE() {
  static const QuantiseTable table = {panels};
  return &table;
}

}  // namespace qwen
