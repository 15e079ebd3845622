// Integer products: columns of W in lanes, so that a column's sum over a block is one integer, exact in any order, and
// the float sum over blocks has one order whatever the number of rows, threads or the instruction set.
#include "quant.h"

#include "quant_dot.h"
#include "vec.h"

namespace {

using qwen::QuantCall;
using qwen::QuantInput;
using qwen::QuantWeight;

#if defined(__AVX512F__)
constexpr int kMostRows = 8, kExactRows = 4;  // rows of x that share one walk over 16 columns
#else
constexpr int kMostRows = 4, kExactRows = 2;
#endif
// Codes are fetched far ahead into the second cache (the first has too few lines on the way at a time to keep memory
// busy), and from there a little ahead into the first.
constexpr int64_t kFar = 8192, kNear = 512, kFarScales = 512;  // bytes
INLINE void fetch_ahead(const uint8_t* codes) {
  __builtin_prefetch(codes + kFar, 0, 2);
  __builtin_prefetch(codes + kNear, 0, 3);
}

INLINE V as_float(VI v) { return __builtin_convertvector(v, V); }
INLINE VI bytes_wide(const uint8_t* p) {
  uint8_t VB4 __attribute__((vector_size(QWEN_LANES)));
  std::memcpy(&VB4, p, sizeof VB4);
  return __builtin_convertvector(VB4, VI);
}

// To integers, half to even.
INLINE VI nearest(V v) {
#if defined(__AVX512F__)
  return (VI)_mm512_cvtps_epi32((__m512)v);
#else
  const V magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds
  return __builtin_convertvector((v + magic) - magic, VI);
#endif
}
INLINE int32_t top_lane(VI v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)v);
#else
  int32_t top = v[0];
  for (int l = 1; l < kLanes; ++l) top = v[l] > top ? v[l] : top;
  return top;
#endif
}
INLINE int32_t sum_lanes_i(VI v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += v[l];
  return sum;
#endif
}

typedef int8_t VQ __attribute__((vector_size(QWEN_LANES)));
INLINE void store_bytes(int8_t* to, VI v) {
  const VQ narrow = __builtin_convertvector(v, VQ);
  std::memcpy(to, &narrow, sizeof narrow);
}

// What rounding v to n has lost, in units of 1/256; half a unit of n is one too many for a byte.
INLINE VI lost(V v, VI n) {
  const VI m = nearest((v - as_float(n)) * splat(256.f));
  const VI top = 127 - VI{};
  const VI below = m < top ? m : top;
  return below > -top ? below : -top;
}

// Scales, pieces and sums of one row; see quant.h.
static void quantize(const float* x, int64_t k, int64_t run, int64_t k_padded, qwen::QuantRow to) {
  for (int64_t i = 0; i < k_padded; i += run, to.q += run, ++to.scale, ++to.sum) {
    const int64_t len = smaller(run, k - i);
    VI top = {};  // magnitudes compared as integers, so that a NaN is the largest and is not lost
    int64_t j = 0;
    for (; j + kLanes <= len; j += kLanes) {
      const VI bits = (VI)load(x + i + j) & 0x7fffffff;
      top = bits > top ? bits : top;
    }
    if (j < len) {
      const VI bits = (VI)load_part(x + i + j, len - j) & 0x7fffffff;
      top = bits > top ? bits : top;
    }
    const int32_t most = top_lane(top);
    float largest;
    std::memcpy(&largest, &most, sizeof largest);
    const bool none = largest < 3.8e-37f;  // 127 / largest would not be finite
    const V inverse = splat(none ? 0.f : 127.f / largest);
    *to.scale = none ? 0.f : to.fine ? largest / 127.f / 256.f : largest / 127.f;
    VI total = {}, fine_total = {};
    for (j = 0; j < run; j += kLanes) {
      V v = {};
      if (len - j >= kLanes) v = load(x + i + j);
      else if (len > j) v = load_part(x + i + j, len - j);
      v = v * inverse;
      const VI n = nearest(v);
      total += n;
      store_bytes(to.q + j, n);
      if (!to.fine) continue;
      const VI m = lost(v, n);
      fine_total += m;
      store_bytes(to.fine + j, m);
    }
    *to.sum = sum_lanes_i(total);
    if (!to.fine) continue;
    *to.fine_sum++ = sum_lanes_i(fine_total);
    to.fine += run;
  }
}

// One matrix at 16 columns: where its parts lie.
struct Columns {
  const uint8_t* codes;
  const uint8_t* zeros;
  const char* scales;
};

INLINE Columns columns_at(const QuantWeight& w, int64_t b) {
  const int64_t blocks = w.blocks(), groups = w.group ? blocks : 1;
  return {w.codes + b * blocks * w.block() * 2 * w.bits, w.zeros ? w.zeros + b * groups * 16 : nullptr,
          static_cast<const char*>(w.scales) + b * groups * 16 * (w.group ? 2 : 4)};
}

INLINE V group_scale(const Columns& c, int64_t g, int p) {
  return F16::wide(reinterpret_cast<const uint16_t*>(c.scales) + g * 16 + p * kLanes);
}
INLINE V row_scale(const Columns& c, int p) { return load(reinterpret_cast<const float*>(c.scales) + p * kLanes); }

// A result of whole rows in two pieces, before the scale of the column.
INLINE V whole_value(VI first, VI second, float scale) {
  return fma(as_float(first), splat(256.f), as_float(second)) * splat(scale);
}

template <int BITS>
INLINE VI zero_of(const Columns& c, int64_t g, int p) {
  return c.zeros ? bytes_wide(c.zeros + g * 16 + p * kLanes) : (BITS == 4 ? 8 : 128) - VI{};
}

#if !defined(__aarch64__)
// Exact sums of one block: R rows x 16 columns.
template <int BITS, int R>
INLINE void block_dot(const uint8_t* codes, const int8_t* q, int64_t stride, int64_t block, VI (&dot)[R][kParts]) {
  constexpr int kChains = R == 1 ? 4 : R == 2 ? 2 : 1;  // independent sums hide the latency of a step
  constexpr int kInputs = 32 / BITS;                    // per 64 bytes of codes
  VI sum[kChains][R][kParts] = {};
  for (int64_t i = 0; i < block; i += 4 * kInputs) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      const uint8_t* from = codes + (i / kInputs + u) * 64;
      const int8_t* x = q + i + u * kInputs;
      fetch_ahead(from);
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        const VB v = load_codes(from + p * 4 * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          if constexpr (BITS == 8) {
            VI& to = sum[u % kChains][r][p];
            to = dot_step<8>(to, v, four_inputs(x + r * stride));
          } else {
            VI& low = sum[2 * u % kChains][r][p];
            low = dot_step<4>(low, low_nibbles(v), four_inputs(x + r * stride));
            VI& high = sum[(2 * u + 1) % kChains][r][p];
            high = dot_step<4>(high, high_nibbles(v), four_inputs(x + r * stride + 4));
          }
        }
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < kParts; ++p) {
      dot[r][p] = sum[0][r][p];
      for (int c = 1; c < kChains; ++c) dot[r][p] += sum[c][r][p];
    }
}
#endif  // else in quant_neon.h

// The integer that the pieces of a row make with a column, as float; at most 2^31 for a block of 256 inputs.
INLINE V joined(VI first, VI second) { return as_float((first << 8) + second); }

// Wide rows and weights with one scale a row: R rows x 16 columns, the integer sums of all of k.
template <int R>
INLINE void whole_product(const QuantInput& x, const QuantWeight& w, int64_t r0, int64_t b, V (&acc)[R][kParts]) {
  const Columns c = columns_at(w, b);
  VI dot[2 * R][kParts];
  block_dot<8, 2 * R>(c.codes, x.q + 2 * r0 * x.k_padded, x.k_padded, x.k_padded, dot);
  for (int p = 0; p < kParts; ++p) {
    const VI zero = zero_of<8>(c, 0, p) - kOffset<8>;
    for (int r = 0; r < R; ++r) {
      const int32_t* sum = x.sum + 2 * (r0 + r);
      const V v = whole_value(dot[2 * r][p] - zero * sum[0], dot[2 * r + 1][p] - zero * sum[1], x.scale[r0 + r]);
      acc[r][p] = v * row_scale(c, p);
    }
  }
}

// R rows x 16 columns over all of k.
template <int BITS, int R, bool WIDE>
INLINE void product(const QuantInput& x, const QuantWeight& w, int64_t r0, int64_t b, V (&acc)[R][kParts]) {
  if constexpr (WIDE && BITS == 8) {
    if (!w.group) return whole_product<R>(x, w, r0, b, acc);
  }
  constexpr int kPieces = 1 + WIDE;
  const Columns c = columns_at(w, b);
  const int64_t block = w.block(), bytes = block * 2 * BITS;
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < kParts; ++p) acc[r][p] = V{};
  for (int64_t g = 0; g < x.runs; ++g) {
    if (w.group) __builtin_prefetch(c.scales + g * 32 + kFarScales, 0, 2);
    VI dot[kPieces * R][kParts];
    const int8_t* q = x.q + kPieces * r0 * x.k_padded + g * block;
    block_dot<BITS, kPieces * R>(c.codes + g * bytes, q, x.k_padded, block, dot);
    for (int p = 0; p < kParts; ++p) {
      const VI zero = zero_of<BITS>(c, w.group ? g : 0, p) - kOffset<BITS>;
      const V scale = w.group ? group_scale(c, g, p) : splat(1.f);
      for (int r = 0; r < R; ++r) {
        const int32_t* sum = x.sum + (r0 + r) * kPieces * x.runs + g;
        const V factor = splat(x.scale[(r0 + r) * x.runs + g]) * scale;
        if constexpr (WIDE) {
          const VI first = dot[2 * r][p] - zero * sum[0], second = dot[2 * r + 1][p] - zero * sum[x.runs];
          acc[r][p] = fma(joined(first, second), factor, acc[r][p]);
        } else {
          acc[r][p] = fma(as_float(dot[r][p] - zero * sum[0]), factor, acc[r][p]);
        }
      }
    }
  }
  if (!w.group)
    for (int p = 0; p < kParts; ++p)
      for (int r = 0; r < R; ++r) acc[r][p] = acc[r][p] * row_scale(c, p);
}

INLINE V silu_times(V a, V b) {
  const V limit = splat(88.f);  // silu(b) below -88 is 0 in float; keeps exp finite
  const V minus = -b;
  return a * (b / (exp_v((V)(minus > limit ? (VI)limit : (VI)minus)) + splat(1.f)));
}

// Bias, residual, and no more than n columns.
INLINE void finish(const QuantCall& a, int64_t row, int64_t column, V v) {
  const int64_t n = a.w.n, count = n - column, at = row * n + column;
  if (count <= 0) return;
  if (count >= kLanes) {
    if (a.bias) v = v + load(a.bias + column);
    if (a.residual) v = v + load(a.residual + at);
    return store(a.y + at, v);
  }
  if (a.bias) v = v + load_part(a.bias + column, count);
  if (a.residual) v = v + load_part(a.residual + at, count);
  store_part(a.y + at, v, count);
}

}  // namespace

#if defined(__AMX_INT8__)
#include "quant_amx.h"
#endif

namespace {

template <int BITS, bool WIDE, int R>
static void tile(const QuantCall& a, int64_t r0, int64_t b) {
  V acc[R][kParts], gate[R][kParts];
  product<BITS, R, WIDE>(a.x, a.w, r0, b, acc);
  if (a.gate.codes) product<BITS, R, WIDE>(a.x, a.gate, r0, b, gate);
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < kParts; ++p)
      finish(a, r0 + r, b * 16 + p * kLanes, a.gate.codes ? silu_times(acc[r][p], gate[r][p]) : acc[r][p]);
}

template <int BITS, bool WIDE>
static void tiles(const QuantCall& a, int64_t b0, int64_t b1) {
  constexpr int kMost = kMostRows / (1 + WIDE);
  for (int64_t b = b0; b < b1; ++b) {
    int64_t r = 0;
    for (; r + kMost <= a.x.rows; r += kMost) tile<BITS, WIDE, kMost>(a, r, b);
    if constexpr (kMost > 4)
      for (; r + 4 <= a.x.rows; r += 4) tile<BITS, WIDE, 4>(a, r, b);
    switch (a.x.rows - r) {
      case 3: if constexpr (kMost > 3) tile<BITS, WIDE, 3>(a, r, b); break;
      case 2: if constexpr (kMost > 2) tile<BITS, WIDE, 2>(a, r, b); break;
      case 1: tile<BITS, WIDE, 1>(a, r, b); break;
      default: break;
    }
  }
}

template <bool WIDE>
static void tiles_of_width(const QuantCall& a, int64_t b0, int64_t b1) {
  a.w.bits == 4 ? tiles<4, WIDE>(a, b0, b1) : tiles<8, WIDE>(a, b0, b1);
}

#if defined(__AMX_INT8__)
constexpr int64_t kLeastTileRows = 5;  // fewer rows are as fast without tiles
static int64_t scratch(const QuantCall& a) {
  return a.x.rows * a.x.pieces() < kLeastTileRows ? 0 : sizeof(Workspace);
}
#else
static int64_t scratch(const QuantCall&) { return 0; }
#endif

static void integer(const QuantCall& a, int64_t b0, int64_t b1, void* work) {
#if defined(__AMX_INT8__)
  if (work) {
    auto& space = *static_cast<Workspace*>(work);
    return a.w.bits == 4 ? amx_columns<4>(a, b0, b1, space) : amx_columns<8>(a, b0, b1, space);
  }
#endif
  (void)work;
  a.x.wide ? tiles_of_width<true>(a, b0, b1) : tiles_of_width<false>(a, b0, b1);
}

// code - zero of one input, kLanes columns; v holds four (or eight) inputs of each.
template <int BITS>
INLINE V centred(VB v, int input, V zero) {
  const int shift = BITS == 8 ? 8 * input : input < 4 ? 8 * input : 8 * (input - 4) + 4;
  const VU moved = (VU)v >> shift;
#if defined(__AVX512F__)
  if constexpr (BITS == 4) {  // a look-up of 16 floats, which takes no notice of the bits above
    const __m512 levels = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (V)_mm512_permutexvar_ps((__m512i)moved, levels) - zero;
  }
#endif
  return as_float((VI)(moved & (BITS == 8 ? 255u : 15u))) - zero;
}

// Float activations: within a block four sums, of every fourth input, times the scale; blocks in order.
template <int BITS, int R>
static void exact_tile(const QuantCall& a, int64_t r0, int64_t b) {
  constexpr int kInputs = 32 / BITS;
  const Columns c = columns_at(a.w, b);
  const int64_t block = a.w.block(), bytes = block * 2 * BITS, stride = a.x.k_padded;
  V total[R][kParts] = {};
  for (int64_t g = 0; g < a.x.runs; ++g) {
    V sum[R][kParts][4] = {};
    V zero[kParts];
    for (int p = 0; p < kParts; ++p) zero[p] = as_float(zero_of<BITS>(c, a.w.group ? g : 0, p));
    for (int64_t i = 0; i < block; i += kInputs) {
      const uint8_t* from = c.codes + g * bytes + i / kInputs * 64;
      const float* x = a.rows_f + r0 * stride + g * block + i;
      fetch_ahead(from);
#pragma GCC unroll 8
      for (int p = 0; p < kParts; ++p) {
        const VB v = load_codes(from + p * 4 * kLanes);
#pragma GCC unroll 8
        for (int j = 0; j < kInputs; ++j) {
          const V weight = centred<BITS>(v, j, zero[p]);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sum[r][p][j % 4] = fma(splat(x[r * stride + j]), weight, sum[r][p][j % 4]);
        }
      }
    }
    for (int p = 0; p < kParts; ++p) {
      const V scale = a.w.group ? group_scale(c, g, p) : row_scale(c, p);
      for (int r = 0; r < R; ++r) {
        const V* s = sum[r][p];
        total[r][p] = fma((s[0] + s[1]) + (s[2] + s[3]), scale, total[r][p]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < kParts; ++p) finish(a, r0 + r, b * 16 + p * kLanes, total[r][p]);
}

template <int BITS>
static void exact_tiles(const QuantCall& a, int64_t b0, int64_t b1) {
  for (int64_t b = b0; b < b1; ++b) {
    int64_t r = 0;
    for (; r + kExactRows <= a.x.rows; r += kExactRows) exact_tile<BITS, kExactRows>(a, r, b);
    for (; r < a.x.rows; ++r) exact_tile<BITS, 1>(a, r, b);
  }
}

static void exact(const QuantCall& a, int64_t b0, int64_t b1) {
  a.w.bits == 4 ? exact_tiles<4>(a, b0, b1) : exact_tiles<8>(a, b0, b1);
}

static float half_to_float(const void* p) {
  uint16_t buffer[kLanes] = {};
  std::memcpy(buffer, p, 2);
  return F16::wide(buffer)[0];
}

static void widen_row(const QuantWeight& w, int64_t row, float* out) {
  const Columns c = columns_at(w, row / 16);
  const int64_t lane = row % 16, block = w.block();
  for (int64_t i = 0; i < w.k; ++i) {
    const int64_t g = w.group ? i / block : 0;
    const uint8_t byte = w.bits == 8 ? c.codes[i / 4 * 64 + lane * 4 + i % 4] : c.codes[i / 8 * 64 + lane * 4 + i % 4];
    const int code = w.bits == 8 ? byte : i % 8 < 4 ? byte & 15 : byte >> 4;
    const int zero = c.zeros ? c.zeros[g * 16 + lane] : w.bits == 8 ? 128 : 8;
    float scale;
    if (w.group) scale = half_to_float(c.scales + (g * 16 + lane) * 2);
    else std::memcpy(&scale, c.scales + lane * 4, 4);
    out[i] = scale * static_cast<float>(code - zero);
  }
}

}  // namespace

namespace qwen {

const QuantTable* QWEN_TABLE() {
#if defined(__AMX_INT8__)
  constexpr int64_t kAsTiles = kTile + 1;  // what square_product takes
#else
  constexpr int64_t kAsTiles = INT64_MAX;
#endif
  static const QuantTable table = {::quantize, ::scratch, ::integer, ::exact, ::widen_row, 256, kAsTiles};
  return &table;
}

}  // namespace qwen
