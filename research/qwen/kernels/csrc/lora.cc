#include "lora.h"

#include <cstring>

#include "arena.h"
#include "linear.h"
#include "pointwise.h"
#include "pool.h"

namespace qwen {
namespace {

Arena& arena() {
  static Arena* const one = new Arena;  // never destroyed: see the pool
  return *one;
}

int product(const float* x, int64_t rows, int64_t k, const float* w, int64_t n, float* y) {
  LinearArgs a;
  a.x = x, a.w = w, a.bias = nullptr, a.y = y;
  a.rows = rows, a.k = k, a.n = n, a.format = kF32;
  return linear(a);
}

// y[at[i]] += update[i]
void scatter_add(const float* update, const int32_t* at, int64_t rows, int64_t n, float* y) {
  parallel(rows, rows * n < kSmall ? rows : 8, [&](int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; ++r) {
      const float* from = update + r * n;
      float* to = y + at[r] * n;
      for (int64_t i = 0; i < n; ++i) to[i] += from[i];
    }
  });
}

}  // namespace

int add_low_rank(const AdapterRows& who, const LowRank* weights, const float* x, int64_t k, float* y, int64_t n) {
  for (int64_t g = 0; g < who.adapters; ++g) {
    const LowRank& w = weights[g];
    int64_t count = 0;
    for (int64_t r = 0; r < who.rows; ++r) count += who.of[r] == g;
    if (!count || !w.rank) continue;
    const bool all = count == who.rows;
    const int64_t need = Arena::bytes<int32_t>(count) + Arena::bytes<float>(all ? 0 : count * k) +
                         Arena::bytes<float>(count * w.rank) + Arena::bytes<float>(count * n);
    if (!arena().reserve(need)) return 3;
    auto* at = arena().take<int32_t>(count);
    auto* mine = arena().take<float>(all ? 0 : count * k);
    auto* low = arena().take<float>(count * w.rank);
    auto* update = arena().take<float>(count * n);
    for (int64_t r = 0, i = 0; r < who.rows; ++r)
      if (who.of[r] == g) at[i++] = static_cast<int32_t>(r);
    for (int64_t i = 0; i < count && !all; ++i) std::memcpy(mine + i * k, x + at[i] * k, k * sizeof(float));
    if (const int error = product(all ? x : mine, count, k, w.a, w.rank, low)) return error;
    if (const int error = product(low, count, w.rank, w.b, n, update)) return error;
    scatter_add(update, at, count, n, y);
  }
  return 0;
}

}  // namespace qwen
