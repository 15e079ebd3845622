#include "quant.h"

#include <cstring>

#include "isa.h"
#include "pointwise.h"
#include "pool.h"

namespace qwen {
namespace {

constexpr int64_t kAlign = 64;

const QuantTable* table() {
#if defined(__x86_64__)
  static constexpr Variant<QuantTable> kVariants[] = {
      {kBase, quant_base}, {kAvx2, quant_avx2}, {kAvx512, quant_avx512}, {kVnni, quant_vnni}, {kAmx, quant_amx}};
#elif defined(__aarch64__)
  static constexpr Variant<QuantTable> kVariants[] = {{kBase, quant_base}, {kDot, quant_dot}};
#else
  static constexpr Variant<QuantTable> kVariants[] = {{kBase, quant_base}};
#endif
  static const QuantTable* const chosen = pick(kVariants);
  return chosen;
}

int64_t round_to(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

char* aligned(void* p) {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + kAlign - 1) / kAlign * kAlign);
}

// Where the parts of a quantised input lie in its buffer.
struct Parts {
  int64_t k_padded, runs, pieces, scale, sum, bytes;
  Parts(int64_t rows, const QuantWeight& w) {
    k_padded = w.padded();
    runs = k_padded / w.run();
    pieces = w.wide ? 2 : 1;
    scale = round_to(round_to(rows, 16) * pieces * k_padded, kAlign);  // tiles of 16 rows are read whole
    sum = scale + round_to(rows * runs * 4, kAlign);
    bytes = sum + round_to(rows * pieces * runs * 4, kAlign) + kAlign;
  }
  QuantRow row(int64_t r, int8_t* q, float* scales, int32_t* sums) const {
    QuantRow to = {q + r * pieces * k_padded, nullptr, scales + r * runs, sums + r * pieces * runs, nullptr};
    if (pieces == 2) to.fine = to.q + k_padded, to.fine_sum = to.sum + runs;
    return to;
  }
};

// Quantises rows; with norm, rows of rms_norm(x).
QuantInput quantize(const float* x, const float* norm, float eps, int64_t rows, const QuantWeight& w, void* buffer) {
  const Parts parts(rows, w);
  const int64_t k = w.k;
  const int32_t* const order = w.order;
  char* const base = aligned(buffer);
  auto* q = reinterpret_cast<int8_t*>(base);
  auto* scale = reinterpret_cast<float*>(base + parts.scale);
  auto* sum = reinterpret_cast<int32_t*>(base + parts.sum);
  int failed = 0;
  parallel(rows, rows * k < kSmall ? rows : 8, [&](int64_t r0, int64_t r1) {
    float* const scratch = norm || order ? thread_scratch(2 * k) : nullptr;
    if ((norm || order) && !scratch) return __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    for (int64_t r = r0; r < r1; ++r) {
      const float* row = x + r * k;
      if (norm) {
        pointwise()->rms_norm(row, norm, eps, scratch, k, 0, 1);
        row = scratch;
      }
      if (order) {
        for (int64_t i = 0; i < k; ++i) scratch[k + i] = row[order[i]];
        row = scratch + k;
      }
      table()->quantize(row, k, w.run(), parts.k_padded, parts.row(r, q, scale, sum));
    }
  });
  return {failed ? nullptr : q, scale, sum, rows, parts.k_padded, parts.runs, w.wide};
}

bool good(const QuantWeight& w) {
  return isa() != kNone && w.codes && w.scales && w.n > 0 && w.k > 0 && (w.bits == 4 || w.bits == 8) &&
         w.group >= 0 && w.group % 64 == 0 && w.group <= 256 && w.k <= 1 << 16;  // a longer sum overflows
}

// Blocks of 16 columns in a piece of work; many rows take them in pairs.
int64_t piece_of(const QuantCall& a) {
  const int64_t blocks = (a.w.n + 15) / 16, share = blocks / (32 * threads());
  if (a.x.rows > 16) return share < 2 ? 2 : share / 2 * 2;
  return share < 1 ? 1 : share;
}

// Rows lie a power of two apart, where they push each other out of the cache; as tiles they are one stream.
bool lay_as_tiles(QuantInput* x) {
  const QuantInput from = *x;
  const int64_t rows = from.rows, runs = from.runs, pieces = from.pieces(), lines = rows * pieces;
  const int64_t stacks = (rows + kTileRows - 1) / kTileRows, steps = from.k_padded / kStep;
  auto* const scale = shared_scratch((rows + lines) * runs + stacks * kTileRows * pieces * from.k_padded / 4);
  if (!scale) return false;
  auto* const sum = reinterpret_cast<int32_t*>(scale + rows * runs);
  auto* const q = reinterpret_cast<int8_t*>(sum + lines * runs);
  parallel(lines, 8, [&](int64_t l0, int64_t l1) {
    for (int64_t l = l0; l < l1; ++l) {
      const int64_t r = l / pieces, piece = l % pieces;
      const int8_t* row = from.q + l * from.k_padded;
      int8_t* to = q + ((r / kTileRows * steps * pieces + piece) * kTileRows + r % kTileRows) * kStep;
      for (int64_t i = 0; i < steps; ++i, row += kStep, to += pieces * kTileRows * kStep) std::memcpy(to, row, kStep);
      for (int64_t g = 0; g < runs; ++g) sum[(g * pieces + piece) * rows + r] = from.sum[l * runs + g];
      for (int64_t g = 0; g < runs && !piece; ++g) scale[g * rows + r] = from.scale[r * runs + g];
    }
  });
  x->q = q, x->scale = scale, x->sum = sum;
  return true;
}

// Rows of x that meet all of W before the next ones do: no more than the second cache holds beside the codes.
int64_t rows_of_sweep(const QuantCall& a) {
  constexpr int64_t kHeld = 768 << 10;
  const int64_t held = kHeld / (a.x.pieces() * a.x.k_padded) / (2 * kTileRows) * 2 * kTileRows, most = table()->rows;
  return a.rows_f || held >= most ? most : held < 2 * kTileRows ? 2 * kTileRows : held;
}

int run(QuantCall a) {
  const int64_t rows = a.x.rows, n = a.w.n, blocks = (n + 15) / 16, sweep = rows_of_sweep(a);
  int failed = 0;
  for (int64_t r = 0; r < rows; r += sweep) {
    QuantCall part = a;
    part.x.rows = rows - r < sweep ? rows - r : sweep;
    part.y += r * n;
    if (a.residual) part.residual += r * n;
    if (a.rows_f) {
      part.rows_f += r * a.x.k_padded;
      parallel(blocks, piece_of(a), [&](int64_t b0, int64_t b1) { table()->exact(part, b0, b1); });
      continue;
    }
    part.x.q += r * a.x.pieces() * a.x.k_padded;
    part.x.scale += r * a.x.runs;
    part.x.sum += r * a.x.pieces() * a.x.runs;
    if (part.x.rows >= table()->rows_as_tiles && !lay_as_tiles(&part.x)) return 3;
    const int64_t bytes = table()->scratch(part);
    parallel(blocks, piece_of(a), [&](int64_t b0, int64_t b1) {
      float* const scratch = bytes ? thread_scratch((bytes + 3) / 4) : nullptr;
      if (bytes && !scratch) return __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      table()->integer(part, b0, b1, scratch);
    });
  }
  return failed ? 3 : 0;
}

bool fits(const QuantInput& x, const QuantWeight& w) {
  return good(w) && x.wide == w.wide && x.k_padded == w.padded() && x.runs * w.run() == x.k_padded;
}

}  // namespace

int64_t quant_input_bytes(int64_t rows, const QuantWeight& w) { return good(w) ? Parts(rows, w).bytes : 0; }

QuantInput quantize_rows(const float* x, int64_t rows, const QuantWeight& w, void* buffer) {
  return norm_quantize_rows(x, nullptr, 0, rows, w, buffer);
}

QuantInput norm_quantize_rows(const float* x, const float* norm, float eps, int64_t rows, const QuantWeight& w,
                              void* buffer) {
  return good(w) ? quantize(x, norm, eps, rows, w, buffer) : QuantInput{};
}

int quant_linear(const QuantInput& x, const QuantWeight& w, const float* bias, const float* residual, float* y) {
  if (!fits(x, w)) return 1;
  if (!x.q) return 3;
  return run({x, nullptr, w, {}, bias, residual, y});
}

int quant_gated(const QuantInput& x, const QuantWeight& w1, const QuantWeight& w2, float* y) {
  if (!fits(x, w1) || !fits(x, w2) || w1.n != w2.n || w1.bits != w2.bits || w1.group != w2.group) return 1;
  if (!x.q) return 3;
  return run({x, nullptr, w1, w2, nullptr, nullptr, y});
}

int float_linear(const float* x, int64_t rows, const QuantWeight& w, const float* bias, const float* residual,
                 float* y) {
  if (!good(w)) return 1;
  const int64_t padded = w.padded();
  QuantCall a = {{nullptr, nullptr, nullptr, rows, padded, w.blocks(), false}, x, w, {}, bias, residual, y};
  if (w.order || padded != w.k) {
    float* const copy = shared_scratch(rows * padded);
    if (!copy) return 3;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < w.k; ++i) copy[r * padded + i] = x[r * w.k + (w.order ? w.order[i] : i)];
      std::memset(copy + r * padded + w.k, 0, (padded - w.k) * sizeof(float));
    }
    a.rows_f = copy;
  }
  return run(a);
}

void dequantize_row(const QuantWeight& w, int64_t row, float* out) {
  if (!w.order) return table()->widen_row(w, row, out);
  float* const stored = thread_scratch(w.k);
  if (!stored) return;
  table()->widen_row(w, row, stored);
  for (int64_t i = 0; i < w.k; ++i) out[w.order[i]] = stored[i];
}

}  // namespace qwen
