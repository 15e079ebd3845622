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
  int64_t k_padded, blocks, scale, sum, bytes;
  Parts(int64_t rows, int64_t k, int64_t block) {
    blocks = (k + block - 1) / block;
    k_padded = blocks * block;
    scale = round_to(round_to(rows, 16) * k_padded, kAlign);  // tiles of 16 rows are read whole
    sum = scale + round_to(rows * blocks * 4, kAlign);
    bytes = sum + round_to(rows * blocks * 4, kAlign) + kAlign;
  }
};

// Quantises rows; with norm, rows of rms_norm(x).
QuantInput quantize(const float* x, const float* norm, float eps, int64_t rows, int64_t k, int64_t block,
                    const int32_t* order, void* buffer) {
  const Parts parts(rows, k, block);
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
      table()->quantize(row, k, block, q + r * parts.k_padded, scale + r * parts.blocks, sum + r * parts.blocks);
    }
  });
  return {failed ? nullptr : q, scale, sum, rows, parts.k_padded, parts.blocks};
}

bool good(const QuantWeight& w) {
  return isa() != kNone && w.codes && w.scales && w.n > 0 && w.k > 0 && (w.bits == 4 || w.bits == 8) &&
         w.group >= 0 && w.group % 64 == 0 && w.group <= 256;
}

// Blocks of 16 columns in a piece of work; many rows take them in pairs.
int64_t piece_of(const QuantCall& a) {
  const int64_t blocks = (a.w.n + 15) / 16, share = blocks / (32 * threads());
  if (a.x.rows > 16) return share < 2 ? 2 : share / 2 * 2;
  return share < 1 ? 1 : share;
}

// Rows lie a power of two apart, where they push each other out of the cache; by blocks they are one stream.
bool lay_by_block(int64_t block, QuantInput* x) {
  constexpr int64_t kPast = 16;  // a tile reads whole rows of tiles
  const QuantInput from = *x;
  const int64_t rows = from.rows, pairs = rows * from.blocks;
  auto* const scale = shared_scratch(2 * pairs + (pairs + kPast) * block / 4);
  if (!scale) return false;
  auto* const sum = reinterpret_cast<int32_t*>(scale + pairs);
  auto* const q = reinterpret_cast<int8_t*>(sum + pairs);
  parallel(from.blocks, 1, [&](int64_t g0, int64_t g1) {
    for (int64_t g = g0; g < g1; ++g)
      for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(q + (g * rows + r) * block, from.q + r * from.k_padded + g * block, block);
        scale[g * rows + r] = from.scale[r * from.blocks + g];
        sum[g * rows + r] = from.sum[r * from.blocks + g];
      }
  });
  x->q = q, x->scale = scale, x->sum = sum;
  return true;
}

int run(QuantCall a) {
  const int64_t rows = a.x.rows, n = a.w.n, blocks = (n + 15) / 16;
  int failed = 0;
  for (int64_t r = 0; r < rows; r += table()->rows) {
    QuantCall part = a;
    part.x.rows = rows - r < table()->rows ? rows - r : table()->rows;
    part.y += r * n;
    if (a.residual) part.residual += r * n;
    if (a.rows_f) {
      part.rows_f += r * a.x.k_padded;
      parallel(blocks, piece_of(a), [&](int64_t b0, int64_t b1) { table()->exact(part, b0, b1); });
      continue;
    }
    part.x.q += r * a.x.k_padded;
    part.x.scale += r * a.x.blocks;
    part.x.sum += r * a.x.blocks;
    if (part.x.rows >= table()->rows_by_block && !lay_by_block(a.w.block(), &part.x)) return 3;
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
  return good(w) && x.blocks == w.blocks() && x.k_padded == w.blocks() * w.block();
}

}  // namespace

int64_t quant_input_bytes(int64_t rows, int64_t k, int64_t block) { return Parts(rows, k, block).bytes; }

QuantInput quantize_rows(const float* x, int64_t rows, int64_t k, int64_t block, const int32_t* order, void* buffer) {
  return quantize(x, nullptr, 0, rows, k, block, order, buffer);
}

QuantInput norm_quantize_rows(const float* x, const float* norm, float eps, int64_t rows, int64_t k, int64_t block,
                              const int32_t* order, void* buffer) {
  return quantize(x, norm, eps, rows, k, block, order, buffer);
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
  const int64_t padded = w.blocks() * w.block();
  QuantCall a = {{nullptr, nullptr, nullptr, rows, padded, w.blocks()}, x, w, {}, bias, residual, y};
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
