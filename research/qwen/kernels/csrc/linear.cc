#include "linear.h"

#include "isa.h"
#include "pool.h"

namespace qwen {
namespace {

constexpr int64_t kPackedColumns = 384;    // columns that share one sweep over packed x
constexpr int64_t kPieceBytes = 256 << 10; // weights per piece of work: long streams, yet enough pieces to balance

const LinearTable* table() {
#if defined(__x86_64__)
  static constexpr Variant<LinearTable> kVariants[] = {
      {kBase, linear_base}, {kAvx2, linear_avx2}, {kAvx512, linear_avx512}};
#else
  static constexpr Variant<LinearTable> kVariants[] = {{kBase, linear_base}};
#endif
  static const LinearTable* const chosen = pick(kVariants);
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

}  // namespace

int linear(LinearArgs a) {
  const int64_t rows = a.rows;
  for (int64_t r = 0; r < rows; r += kRowBlock) {
    LinearArgs part = a;
    part.x += r * a.k;
    part.y += r * a.n;
    part.rows = rows - r < kRowBlock ? rows - r : kRowBlock;
    if (const int error = linear_block(part)) return error;
  }
  return 0;
}

}  // namespace qwen
