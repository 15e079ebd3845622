// y = x W^T with W stored as unsigned 4 or 8 bit codes, packed as research/qwen/quant/schemes.py says: 16 rows of W side
// by side, four (8 bits) or eight (4 bits, low nibbles first) inputs of each in 64 bytes, so that a matrix is one stream.
#pragma once
#include <cstdint>

namespace qwen {

struct QuantWeight {
  const uint8_t* codes;   // 8 bits: (n/16, k/4, 16, 4); 4 bits: (n/16, k/8, 16, 4); n and k padded; any alignment,
                          // but 10 to 20 % faster at a multiple of 64 bytes
  const void* scales;     // float16 (n/16, groups, 16); group 0: float32 (n/16, 1, 16)
  const uint8_t* zeros;   // (n/16, groups, 16), or null: 8 (4 bits) or 128 (8 bits) everywhere
  const int32_t* order;   // (k,) or null: the stored input i is x[order[i]]
  int64_t n, k;           // before padding
  int bits;               // 4 or 8
  int64_t group;          // inputs that share a scale, a multiple of 64; 0: one scale per row of W
  bool wide;              // what it is multiplied with has 16 bits
  int64_t block() const { return group ? group : 128; }
  int64_t blocks() const { return (k + block() - 1) / block(); }
  int64_t padded() const { return blocks() * block(); }
  int64_t run() const { return wide && !group ? padded() : block(); }  // inputs of a row of x that share a scale
};

// Rows of x as signed bytes: per run s = max|x| / 127, v = x * (127 / max|x|), q = rint(v). Wide rows have a second piece,
// what the first has rounded away: rint(256 (v - q)), at most 127; then x is s / 256 * (256 first + second).
struct QuantInput {
  const int8_t* q;       // (rows, pieces, k_padded), zeros behind k
  const float* scale;    // (rows, runs): s, or s / 256
  const int32_t* sum;    // (rows, pieces, runs): sums of q
  int64_t rows, k_padded, runs;
  bool wide;
  int64_t pieces() const { return wide ? 2 : 1; }
};

int64_t quant_input_bytes(int64_t rows, const QuantWeight& w);  // of the buffer below

// All that follows works on all threads, inside a Turn, and uses thread_scratch; float_linear also shared_scratch.
// Rows for products with w, or with a matrix of the same k, run, width and order.
QuantInput quantize_rows(const float* x, int64_t rows, const QuantWeight& w, void* buffer);
// The same of qwen::rms_norm(x, norm, eps), bit for bit. q has no rows (null) when memory runs out.
QuantInput norm_quantize_rows(const float* x, const float* norm, float eps, int64_t rows, const QuantWeight& w,
                              void* buffer);

// Results: 0; 1 when x and w do not fit each other or a number is out of range; 3 when memory runs out.

// y (rows, n) = x W^T + bias + residual; bias (n,) and residual (rows, n) may be null, y may be residual.
int quant_linear(const QuantInput& x, const QuantWeight& w, const float* bias, const float* residual, float* y);
// y = (x W1^T) * silu(x W2^T); bits, group, k, n and order of both are the same.
int quant_gated(const QuantInput& x, const QuantWeight& w1, const QuantWeight& w2, float* y);
// The same product as quant_linear, with float32 activations: x (rows, k).
int float_linear(const float* x, int64_t rows, const QuantWeight& w, const float* bias, const float* residual, float* y);
// Row `row` of W, order undone: out (k,). For embeddings; one thread, no Turn needed.
void dequantize_row(const QuantWeight& w, int64_t row, float* out);

// ---- what quant_isa.cc offers for each instruction set ----

constexpr int64_t kTileRows = 16, kStep = 64;  // of x in a tile

struct QuantCall {
  QuantInput x;          // of integer products; many rows on AMX: q (rows / kTileRows, k_padded / kStep, pieces,
                         // kTileRows, kStep), scale (runs, rows), sum (runs, pieces, rows)
  const float* rows_f;   // (rows, k_padded), of float products, already in the stored order
  QuantWeight w, gate;   // gate.codes is null unless y = (x w) * silu(x gate)
  const float* bias;
  const float* residual;
  float* y;
};

struct QuantRow {        // one row of a QuantInput; fine and fine_sum, of the second piece, are null without
  int8_t *q, *fine;
  float* scale;
  int32_t *sum, *fine_sum;
};

struct QuantTable {
  // One row of x, already in the stored order.
  void (*quantize)(const float* x, int64_t k, int64_t run, int64_t k_padded, QuantRow to);
  int64_t (*scratch)(const QuantCall&);  // bytes each thread needs for `integer`
  // Columns 16 * b0 .. 16 * b1 of y.
  void (*integer)(const QuantCall&, int64_t b0, int64_t b1, void* scratch);
  void (*exact)(const QuantCall&, int64_t b0, int64_t b1);
  void (*widen_row)(const QuantWeight&, int64_t row, float* out);  // in the stored order
  int64_t rows;                          // rows of x that share one sweep over the weights, at most
  int64_t rows_as_tiles;                 // from as many rows on x is laid out as tiles (see QuantCall)
};

const QuantTable* quant_base();
#if defined(__x86_64__)
const QuantTable* quant_avx2();
const QuantTable* quant_avx512();
const QuantTable* quant_vnni();
const QuantTable* quant_amx();
#elif defined(__aarch64__)
const QuantTable* quant_dot();
#endif

}  // namespace qwen
