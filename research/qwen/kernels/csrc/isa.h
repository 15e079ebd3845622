// Which instruction sets this processor has. Every group of kernels (linear, attention, ...) is compiled for several
// of them and offers a table of plain functions on ranges: no allocation, no threads; arrays are row-major.
#pragma once
#include <cstdint>

namespace qwen {

// In rising order; the highest allowed one is used. kVnni: AVX-512 with VNNI and BF16. kAmx: the same with AMX tiles.
// kDot: aarch64 with dotprod.
enum Isa { kNone = -1, kBase = 0, kAvx2, kAvx512, kVnni, kAmx, kDot };

Isa isa();                // best of this processor, or what QWEN_ISA allows; kNone if QWEN_ISA cannot be had
const char* isa_name();   // "" for kNone

// The table for this processor: the last of those given whose instruction set is at most isa().
template <class Table>
struct Variant {
  Isa isa;
  const Table* (*table)();
};
template <class Table, int N>
const Table* pick(const Variant<Table> (&variants)[N]) {
  const Table* best = nullptr;
  for (const auto& v : variants)
    if (v.isa <= isa()) best = v.table();
  return best;
}

}  // namespace qwen
