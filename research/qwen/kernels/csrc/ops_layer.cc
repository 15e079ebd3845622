// The fused layers and packed matrices as MindSpore calls them. MindSpore keeps one registration a name, with the number
// and types of the inputs, so a packed matrix has several names: Python takes one for every set of types.
#include <initializer_list>

#include "isa.h"
#include "layer.h"
#include "linear.h"
#include "ops.h"
#include "pool.h"

namespace qwen {
namespace {

// `plan` (int32): what the inputs behind it are. Written by kernels/cpu_layer.py.
enum MatrixPlan { kFormat, kBits, kGroup, kZeros, kOrder, kWide, kBias, kN, kK, kMatrixPlan };
enum LayerPlan { kEps, kExact, kCacheFormat, kHeads, kHeadDim, kBlockSize, kBlocks, kLayers, kMatrices };
constexpr int32_t kPacked = 3;  // kFormat of packed integers, after kF32, kBF16, kF16

// Takes the inputs of one matrix, in the order weight, scales, zeros, order, bias.
Matrix read_matrix(const int32_t* plan, void**& p) {
  Matrix m;
  m.n = plan[kN], m.k = plan[kK];
  const void* weight = *p++;
  m.quantised = plan[kFormat] == kPacked;
  if (m.quantised) {
    m.packed.codes = static_cast<const uint8_t*>(weight);
    m.packed.scales = *p++;
    m.packed.zeros = plan[kZeros] ? static_cast<const uint8_t*>(*p++) : nullptr;
    m.packed.order = plan[kOrder] ? static_cast<const int32_t*>(*p++) : nullptr;
    m.packed.n = m.n, m.packed.k = m.k, m.packed.bits = plan[kBits], m.packed.group = plan[kGroup];
    m.packed.wide = plan[kWide];
  } else {
    m.data = weight;
    m.format = plan[kFormat];
  }
  m.bias = plan[kBias] ? static_cast<const float*>(*p++) : nullptr;
  return m;
}

// Takes the inputs of the cache: keys, values and, for integers, their scales.
void** read_cache(int format, void** p, AttentionArgs* a) {
  a->format = format;
  a->keys = *p++;
  a->values = *p++;
  if (format == kKvI8) {
    a->key_scales = static_cast<float*>(*p++);
    a->value_scales = static_cast<float*>(*p++);
  }
  return p;
}

// What all layers of a pass share. p and shapes: cos, sin, logn, slots, tables, q_lens, kv_lens.
bool read_step(const int32_t* plan, void** p, int64_t** shapes, LayerArgs* a) {
  __builtin_memcpy(&a->eps, plan + kEps, sizeof a->eps);
  a->exact = plan[kExact];
  AttentionArgs& at = a->attention;
  at.cos = static_cast<const float*>(p[0]), at.sin = static_cast<const float*>(p[1]);
  at.logn = static_cast<const float*>(p[2]);
  at.slots = static_cast<const int32_t*>(p[3]), at.tables = static_cast<const int32_t*>(p[4]);
  at.q_lens = static_cast<const int32_t*>(p[5]), at.kv_lens = static_cast<const int32_t*>(p[6]);
  at.tokens = a->rows, at.sequences = shapes[4][0], at.width = shapes[4][1];
  at.format = plan[kCacheFormat];
  at.blocks = plan[kBlocks], at.block_size = plan[kBlockSize], at.heads = plan[kHeads], at.d = plan[kHeadDim];
  return at.heads * at.d == a->hidden && shapes[0][0] == a->rows && shapes[0][1] * 2 == at.d &&
         shapes[1][0] == a->rows && shapes[2][0] == a->rows && shapes[3][0] == a->rows &&
         shapes[5][0] == at.sequences && shapes[6][0] == at.sequences;
}

// One layer's own: cache, ln_1, ln_2, then c_attn, attn.c_proj, w1, w2, mlp.c_proj. Moves plan and p behind them.
void read_layer(int cache_format, const int32_t*& plan, void**& p, LayerArgs* a) {
  p = read_cache(cache_format, p, &a->attention);
  a->ln_1 = static_cast<const float*>(*p++);
  a->ln_2 = static_cast<const float*>(*p++);
  for (Matrix* m : {&a->c_attn, &a->attn_proj, &a->w1, &a->w2, &a->mlp_proj}) {
    *m = read_matrix(plan, p);
    plan += kMatrixPlan;
  }
}

// What the first address of a stack's table points to, if it is not null: who has which adapter in this pass.
struct Adapted {
  const int32_t* of;  // (tokens,)
  int64_t tokens, adapters;
  LowRank weights[1];  // (layers, 5, adapters)
};
static_assert(sizeof(Adapted) == 6 * sizeof(int64_t), "kernels/cpu_lora.py writes it as int64");

// All layers one after another. inputs x, plan, table, rows (R,), then as for read_step; output (R, hidden): those rows
// of the last layer. `table` (int64) holds the address of an Adapted or null, then the addresses of what read_layer
// takes, layer after layer: as inputs they would cost MindSpore 0.1 ms a layer and token.
int stack_op(void** p, int64_t** shapes) {
  if (isa() == kNone) return 1;
  const auto* plan = static_cast<const int32_t*>(p[1]);
  LayerArgs a = {};
  a.x = static_cast<const float*>(p[0]);
  a.rows = shapes[0][0], a.hidden = shapes[0][1];
  if (!read_step(plan, p + 4, shapes + 4, &a)) return 1;
  const auto* wanted = static_cast<const int32_t*>(p[3]);
  for (int64_t i = 0; i < shapes[3][0]; ++i)
    if (wanted[i] < 0 || wanted[i] >= a.rows) return 2;
  if (!attention_fits(a.attention)) return 2;
  static_assert(sizeof(void*) == sizeof(int64_t), "addresses travel as int64");
  void** own = static_cast<void**>(p[2]);
  void** const end = own + shapes[2][0];
  const auto* adapted = static_cast<const Adapted*>(*own++);
  if (adapted) {
    if (adapted->tokens != a.rows) return 1;
    a.adapted = {adapted->of, a.rows, adapted->adapters};
  }
  const int32_t* matrices = plan + kMatrices;
  Turn turn;
  a.y = between_layers(a.rows * a.hidden);
  if (!a.y) return 3;
  for (int i = 0; i < plan[kLayers]; ++i, a.x = a.y) {
    if (own >= end) return 1;
    if (i + 1 == plan[kLayers]) {
      a.y = static_cast<float*>(p[11]);
      a.wanted = wanted, a.wanted_count = shapes[3][0];
    }
    read_layer(plan[kCacheFormat], matrices, own, &a);
    if (adapted) a.low_rank = adapted->weights + i * 5 * adapted->adapters;
    if (const int error = layer(a)) return error;
  }
  return own == end ? 0 : 1;
}

// The same for one layer with everything as inputs, for tests: x, plan, then as for read_step and read_layer.
int layer_op(int count, void** p, int64_t** shapes) {
  if (isa() == kNone) return 1;
  const auto* plan = static_cast<const int32_t*>(p[1]);
  LayerArgs a = {};
  a.x = static_cast<const float*>(p[0]);
  a.y = static_cast<float*>(p[count - 1]);
  a.rows = shapes[0][0], a.hidden = shapes[0][1];
  if (!read_step(plan, p + 2, shapes + 2, &a)) return 1;
  if (!attention_fits(a.attention)) return 2;
  const int32_t* matrices = plan + kMatrices;
  void** own = p + 9;
  read_layer(plan[kCacheFormat], matrices, own, &a);
  if (own != p + count - 1) return 1;
  Turn turn;
  return layer(a);
}

// inputs x (T, K), plan [exact, matrix plan], then one matrix; output (T, rows of the packed matrix)
int packed_op(int count, void** p, int64_t** shapes) {
  const auto* plan = static_cast<const int32_t*>(p[1]);
  void** rest = p + 2;
  const Matrix m = read_matrix(plan + 1, rest);
  if (isa() == kNone || shapes[0][1] != m.k || rest != p + count - 1) return 1;
  Turn turn;
  return apply(m, static_cast<const float*>(p[0]), shapes[0][0], plan[0], nullptr, static_cast<float*>(p[count - 1]));
}

// inputs ids (T,), plan (1, dim) that begins with the matrix plan, then one packed matrix; output (T, dim)
int packed_embedding_op(int count, void** p, int64_t** shapes) {
  const auto* plan = static_cast<const int32_t*>(p[1]);
  void** rest = p + 2;
  const Matrix m = read_matrix(plan, rest);
  const auto* ids = static_cast<const int32_t*>(p[0]);
  auto* y = static_cast<float*>(p[count - 1]);
  if (isa() == kNone || rest != p + count - 1) return 1;
  for (int64_t t = 0; t < shapes[0][0]; ++t) {
    if (ids[t] < 0 || ids[t] >= m.n) return 2;
    dequantize_row(m.packed, ids[t], y + t * m.k);
  }
  return 0;
}

}  // namespace
}  // namespace qwen

#define EACH_NAME(define) define(0) define(1) define(2) define(3) define(4) define(5) define(6) define(7) \
  define(8) define(9) define(10) define(11) define(12) define(13) define(14) define(15)

// Rows of a packed matrix are a multiple of 16; the cell cuts surplus columns off.
#define PACKED(i) \
  KERNEL(QwenPacked##i) { return qwen::packed_op(count, p, shapes); } \
  INFER(QwenPacked##i) { return {shapes[0][0], shapes[2][0] * 16}; }
EACH_NAME(PACKED)

// An output shape is made from input shapes only, so the plan is as wide as a row.
#define PACKED_EMBEDDING(i) \
  KERNEL(QwenPackedEmbedding##i) { return qwen::packed_embedding_op(count, p, shapes); } \
  INFER(QwenPackedEmbedding##i) { return {shapes[0][0], shapes[1][1]}; }
EACH_NAME(PACKED_EMBEDDING)

KERNEL(QwenStack) { return qwen::stack_op(p, shapes); }
INFER(QwenStack) { return {shapes[3][0], shapes[0][1]}; }

KERNEL(QwenTestLayer) { return qwen::layer_op(count, p, shapes); }
