// Compiled once for every instruction set, with QWEN_TABLE naming the function that hands the kernels out.
#include "attention.h"
#include "linear.h"
#include "pointwise.h"
#include "table.h"

namespace qwen {

const Table* QWEN_TABLE() {
  static const Table table = {QWEN_NAME,     packed_size, pack_rows, panel_size, linear_direct, linear_packed,
                              rms_norm,      swiglu,      read_sum,  widen,      rotate,        attend_size, attend};
  return &table;
}

}  // namespace qwen
