// One whole transformer layer as a single operator: a graph of five operators a layer costs a tenth of the time of a
// token, and between them the activations of one token would travel through MindSpore's allocator.
#pragma once
#include <cstdint>

#include "attention.h"
#include "lora.h"
#include "quant.h"

namespace qwen {

// A matrix W (n, k): row-major numbers of a float format, or packed integers.
struct Matrix {
  bool quantised = false;
  const void* data = nullptr;   // float formats
  int format = 0;               // kF32, kBF16, kF16
  QuantWeight packed = {};
  const float* bias = nullptr;  // (n,) or null
  int64_t n = 0, k = 0;
};

struct LayerArgs {
  const float* x;               // (T, hidden)
  float* y;                     // (T, hidden), or the wanted rows of it, may be x
  const int32_t* wanted;        // (count,) tokens whose results are needed, or null: all. Of the others only keys and
  int64_t wanted_count;         // values are made
  int64_t rows, hidden;
  float eps;
  bool exact;                   // float32 activations also for packed weights
  const float *ln_1, *ln_2;     // (hidden,)
  AttentionArgs attention;      // all but qkv and y
  Matrix c_attn, attn_proj, w1, w2, mlp_proj;
  AdapterRows adapted;          // of the T tokens; of is null: none has an adapter
  const LowRank* low_rank;      // (5, adapters), of the matrices in the order above
};

// y = x W^T + b + residual on all threads; inside a Turn. residual: (rows, n) or null, may be y.
int apply(const Matrix& w, const float* x, int64_t rows, bool exact, const float* residual, float* y);

// What goes from layer to layer; kept for the next call, null when memory runs out. Inside a Turn.
float* between_layers(int64_t floats);
// Inside a Turn. 0, or the error of the part that failed.
int layer(const LayerArgs& a);

}  // namespace qwen
