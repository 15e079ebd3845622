#include "product.h"

#include "isa.h"
#include "pool.h"

namespace qwen {
namespace {

const ProductTable* table() {
#if defined(__x86_64__)
  static constexpr Variant<ProductTable> kVariants[] = {
      {kBase, product_base}, {kAvx2, product_avx2}, {kAvx512, product_avx512}};
#else
  static constexpr Variant<ProductTable> kVariants[] = {{kBase, product_base}};
#endif
  static const ProductTable* const chosen = pick(kVariants);
  return chosen;
}

}  // namespace

// Every number of c is summed by one thread in the order of k, so its bits do not depend on how many there are.
int product(const ProductArgs& a) {
  float* panel = shared_scratch(table()->panel_size(a.n));
  if (!panel) return 3;
  const int64_t strips = table()->strips(a.n), tile = table()->tile_rows();
  for (int64_t k0 = 0; k0 < a.k; k0 += kDepth) {
    parallel(strips, 4, [&](int64_t t0, int64_t t1) { table()->pack(a, panel, k0, t0, t1); });
    parallel(a.m, 2 * tile, [&](int64_t r0, int64_t r1) { table()->rows(a, panel, k0, r0, r1); });
  }
  return 0;
}

}  // namespace qwen
