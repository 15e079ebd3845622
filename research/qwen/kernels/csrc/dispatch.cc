// The operators as MindSpore calls them: NAME does the work, NAMEInferShape gives the output shape from input shapes.
// Arguments are checked in Python; a non-zero return is the last defence against writing outside an array.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "pool.h"
#include "table.h"

namespace mindspore {
class AotExtra;
}

#define KERNEL(name) \
  extern "C" int name(int count, void** p, int*, int64_t** shapes, const char**, void*, void*)
#define INFER(name) \
  extern "C" std::vector<int64_t> name##InferShape(int* ndims, int64_t** shapes, mindspore::AotExtra*)

namespace qwen {
namespace {

constexpr int64_t kSmall = 1 << 15;        // elements below which a pointwise operator stays on one thread
constexpr int64_t kPackedColumns = 384;    // columns that share one sweep over packed x
constexpr int64_t kPieceBytes = 256 << 10; // weights per piece of work: long streams, yet enough pieces to balance

const Table* choose() {
  const char* wanted = std::getenv("QWEN_ISA");
  const auto allows = [&](const char* name) { return !wanted || !*wanted || !std::strcmp(wanted, name); };
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (allows("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return table_avx512();
  if (allows("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return table_avx2();
#endif
  return allows("base") ? table_base() : nullptr;
}

const Table* table() {
  static const Table* const chosen = choose();
  return chosen;
}

// Columns of a piece: whole register tiles of every instruction set, at most `most`, four pieces a thread or more.
int64_t columns_per_piece(int64_t n, int64_t most) {
  const int64_t share = n / (4 * threads());
  const int64_t piece = (share < most ? share : most) / 12 * 12;
  return piece < 12 ? 12 : piece;
}

int linear_block(LinearArgs a) {
  if (a.rows <= kDirectRows) {
    const int64_t piece = columns_per_piece(a.n, kPieceBytes / (a.k * (a.format == kF32 ? 4 : 2) + 1));
    parallel(a.n, piece, [&](int64_t n0, int64_t n1) { table()->linear_direct(a, n0, n1); });
    return 0;
  }
  float* packed = shared_scratch(table()->packed_size(a.rows, a.k));
  if (!packed) return 3;
  parallel(a.rows, 16, [&](int64_t r0, int64_t r1) { table()->pack_rows(a, packed, r0, r1); });
  a.x = packed;
  int64_t failed = 0;
  parallel(a.n, columns_per_piece(a.n, kPackedColumns), [&](int64_t n0, int64_t n1) {
    if (float* panel = thread_scratch(table()->panel_size())) {
      table()->linear_packed(a, panel, n0, n1);
    } else {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    }
  });
  return failed ? 3 : 0;
}

// inputs x (T, K), weight (N, K)[, bias (N,)]; output (T, N)
int linear(int count, void** p, int64_t** shapes, int format) {
  const int64_t rows = shapes[0][0], k = shapes[0][1], n = shapes[1][0];
  if (!table() || shapes[1][1] != k) return 1;
  Turn turn;
  for (int64_t r = 0; r < rows; r += kRowBlock) {
    LinearArgs a;
    a.x = static_cast<const float*>(p[0]) + r * k;
    a.w = p[1];
    a.bias = count == 4 ? static_cast<const float*>(p[2]) : nullptr;
    a.y = static_cast<float*>(p[count - 1]) + r * n;
    a.rows = rows - r < kRowBlock ? rows - r : kRowBlock;
    a.k = k, a.n = n, a.format = format;
    if (const int error = linear_block(a)) return error;
  }
  return 0;
}

// inputs ids (T,), weight (rows, dim); output (T, dim)
int embedding(void** p, int64_t** shapes, int format) {
  const auto* ids = static_cast<const int32_t*>(p[0]);
  const auto* weight = static_cast<const char*>(p[1]);
  auto* y = static_cast<float*>(p[2]);
  const int64_t tokens = shapes[0][0], rows = shapes[1][0], dim = shapes[1][1];
  const int64_t bytes = dim * (format == kF32 ? 4 : 2);
  if (!table()) return 1;
  for (int64_t t = 0; t < tokens; ++t) {
    if (ids[t] < 0 || ids[t] >= rows) return 2;
    table()->widen(weight + ids[t] * bytes, y + t * dim, dim, format);
  }
  return 0;
}

bool inside(const AttentionArgs& a) {
  int64_t total = 0;
  for (int64_t b = 0; b < a.sequences; ++b) {
    if (a.q_lens[b] < 1 || a.kv_lens[b] < a.q_lens[b] || a.kv_lens[b] > a.width * a.block_size) return false;
    total += a.q_lens[b];
    for (int64_t i = 0; i * a.block_size < a.kv_lens[b]; ++i) {
      const int32_t block = a.tables[b * a.width + i];
      if (block < 0 || block >= a.blocks) return false;
    }
  }
  if (total != a.tokens) return false;
  for (int64_t t = 0; t < a.tokens; ++t)
    if (a.slots[t] < 0 || a.slots[t] >= a.blocks * a.block_size) return false;
  return true;
}

int attention(const AttentionArgs& a) {
  std::vector<AttentionTask> tasks;
  int64_t row = 0, work = 0;
  for (int64_t b = 0; b < a.sequences; ++b) {
    const int64_t start = a.kv_lens[b] - a.q_lens[b];
    for (int64_t q = 0; q < a.q_lens[b]; q += kQueryBlock) {
      const int64_t size = a.q_lens[b] - q < kQueryBlock ? a.q_lens[b] - q : kQueryBlock;
      for (int64_t h = 0; h < a.heads; ++h) tasks.push_back({b, h, row + q, start, size, start + q});
    }
    row += a.q_lens[b];
    work += a.q_lens[b] * a.kv_lens[b] * a.heads * a.d;
  }
  Turn turn;
  const int64_t many = 1 << 30;
  parallel(a.tokens, a.tokens * a.heads * a.d < kSmall ? many : 8,
           [&](int64_t t0, int64_t t1) { table()->rotate(a, t0, t1); });
  int64_t failed = 0;
  parallel(static_cast<int64_t>(tasks.size()), work < kSmall ? many : 1, [&](int64_t i0, int64_t i1) {
    float* scratch = thread_scratch(table()->attend_size(a.d));
    if (!scratch) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    for (int64_t i = i0; scratch && i < i1; ++i) table()->attend(a, tasks[i], scratch);
  });
  return failed ? 3 : 0;
}

std::vector<int64_t> like(int ndim, const int64_t* shape) { return std::vector<int64_t>(shape, shape + ndim); }

}  // namespace
}  // namespace qwen

extern "C" void QwenSetThreads(int count) { qwen::set_threads(count); }
extern "C" int QwenThreads() { return qwen::threads(); }
extern "C" const char* QwenIsa() { return qwen::table() ? qwen::table()->name : ""; }

// Reads n floats with all threads and nothing else: the bandwidth that benchmarks are measured against.
extern "C" void QwenReadMemory(const float* x, int64_t n) {
  qwen::Turn turn;
  qwen::parallel(n, 1 << 20, [&](int64_t i0, int64_t i1) {
    volatile float sink = qwen::table()->read_sum(x + i0, i1 - i0);
    (void)sink;
  });
}

KERNEL(QwenLinearF32) { return qwen::linear(count, p, shapes, qwen::kF32); }
KERNEL(QwenLinearBF16) { return qwen::linear(count, p, shapes, qwen::kBF16); }
KERNEL(QwenLinearF16) { return qwen::linear(count, p, shapes, qwen::kF16); }
INFER(QwenLinearF32) { return {shapes[0][0], shapes[1][0]}; }
INFER(QwenLinearBF16) { return {shapes[0][0], shapes[1][0]}; }
INFER(QwenLinearF16) { return {shapes[0][0], shapes[1][0]}; }

// MindSpore keeps one registration a name, so the form with bias (three inputs) needs names of its own.
KERNEL(QwenLinearBiasF32) { return qwen::linear(count, p, shapes, qwen::kF32); }
KERNEL(QwenLinearBiasBF16) { return qwen::linear(count, p, shapes, qwen::kBF16); }
KERNEL(QwenLinearBiasF16) { return qwen::linear(count, p, shapes, qwen::kF16); }
INFER(QwenLinearBiasF32) { return {shapes[0][0], shapes[1][0]}; }
INFER(QwenLinearBiasBF16) { return {shapes[0][0], shapes[1][0]}; }
INFER(QwenLinearBiasF16) { return {shapes[0][0], shapes[1][0]}; }

KERNEL(QwenEmbeddingF32) { return qwen::embedding(p, shapes, qwen::kF32); }
KERNEL(QwenEmbeddingBF16) { return qwen::embedding(p, shapes, qwen::kBF16); }
KERNEL(QwenEmbeddingF16) { return qwen::embedding(p, shapes, qwen::kF16); }
INFER(QwenEmbeddingF32) { return {shapes[0][0], shapes[1][1]}; }
INFER(QwenEmbeddingBF16) { return {shapes[0][0], shapes[1][1]}; }
INFER(QwenEmbeddingF16) { return {shapes[0][0], shapes[1][1]}; }

// inputs x (T, K), weight (K,), eps (1,); output (T, K)
KERNEL(QwenRmsNorm) {
  const int64_t rows = shapes[0][0], k = shapes[0][1];
  if (!qwen::table() || shapes[1][0] != k) return 1;
  const auto *x = static_cast<float*>(p[0]), *w = static_cast<float*>(p[1]), *eps = static_cast<float*>(p[2]);
  auto* y = static_cast<float*>(p[3]);
  if (rows * k < qwen::kSmall) return qwen::table()->rms_norm(x, w, *eps, y, k, 0, rows), 0;
  qwen::Turn turn;
  qwen::parallel(rows, 8, [&](int64_t r0, int64_t r1) { qwen::table()->rms_norm(x, w, *eps, y, k, r0, r1); });
  return 0;
}
INFER(QwenRmsNorm) { return qwen::like(ndims[0], shapes[0]); }

// inputs a, b (T, K); output a * silu(b)
KERNEL(QwenSwiGlu) {
  const int64_t size = shapes[0][0] * shapes[0][1];
  if (!qwen::table() || shapes[1][0] * shapes[1][1] != size) return 1;
  const auto *a = static_cast<float*>(p[0]), *b = static_cast<float*>(p[1]);
  auto* y = static_cast<float*>(p[2]);
  if (size < qwen::kSmall) return qwen::table()->swiglu(a, b, y, 0, size), 0;
  qwen::Turn turn;
  qwen::parallel(size, 1 << 14, [&](int64_t i0, int64_t i1) { qwen::table()->swiglu(a, b, y, i0, i1); });
  return 0;
}
INFER(QwenSwiGlu) { return qwen::like(ndims[0], shapes[0]); }

// inputs qkv, cos, sin, logn, slots, tables, q_lens, kv_lens, keys, values (see AttentionArgs); output (T, heads * d)
KERNEL(QwenAttention) {
  qwen::AttentionArgs a;
  a.qkv = static_cast<float*>(p[0]);
  a.cos = static_cast<float*>(p[1]);
  a.sin = static_cast<float*>(p[2]);
  a.logn = static_cast<float*>(p[3]);
  a.slots = static_cast<int32_t*>(p[4]);
  a.tables = static_cast<int32_t*>(p[5]);
  a.q_lens = static_cast<int32_t*>(p[6]);
  a.kv_lens = static_cast<int32_t*>(p[7]);
  a.keys = static_cast<float*>(p[8]);
  a.values = static_cast<float*>(p[9]);
  a.y = static_cast<float*>(p[10]);
  a.tokens = shapes[0][0], a.sequences = shapes[5][0], a.width = shapes[5][1];
  a.blocks = shapes[8][0], a.block_size = shapes[8][1], a.heads = shapes[8][2], a.d = shapes[8][3];
  const bool fits = shapes[0][1] == 3 * a.heads * a.d && shapes[1][0] == a.tokens && shapes[1][1] * 2 == a.d &&
                    shapes[2][0] == a.tokens && shapes[3][0] == a.tokens && shapes[4][0] == a.tokens &&
                    shapes[6][0] == a.sequences && shapes[7][0] == a.sequences;
  if (!qwen::table() || !fits) return 1;
  if (!qwen::inside(a)) return 2;
  return qwen::attention(a);
}
INFER(QwenAttention) { return {shapes[0][0], shapes[0][1] / 3}; }
