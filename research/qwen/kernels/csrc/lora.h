// Low-rank adapters beside the matrices of a layer: every token may have another one, or none.
#pragma once
#include <cstdint>

namespace qwen {

// One adapter at one matrix (n, k). rank 0: it leaves this matrix alone.
struct LowRank {
  const float* a;  // (rank, k)
  const float* b;  // (n, rank), times the adapter's factor
  int64_t rank;
};

// Which rows of a batch have which adapter.
struct AdapterRows {
  const int32_t* of;  // (rows,) number of the adapter, negative: none
  int64_t rows, adapters;
};

// y[row] += (x[row] A^T) B^T for every row whose adapter has a rank here; x (rows, k), y (rows, n), weights (adapters,).
// A row's numbers do not depend on its neighbours. On all threads, inside a Turn. 0, or 3 when memory runs out.
int add_low_rank(const AdapterRows& who, const LowRank* weights, const float* x, int64_t k, float* y, int64_t n);

}  // namespace qwen
