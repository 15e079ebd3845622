#include "isa.h"

#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace qwen {
namespace {

constexpr const char* kNames[] = {"base", "avx2", "avx512", "vnni", "amx", "dot"};

#if defined(__x86_64__)
// The kernel grants tile registers on request: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
bool tiles_granted() {
  constexpr unsigned kNeeded = 1u << 24 | 1u << 25 | 1u << 22;  // tiles, int8, bf16
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  if ((edx & kNeeded) != kNeeded) return false;
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
#endif

bool has(Isa isa) {
  if (isa == kBase) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == kAvx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == kAvx512)
    return has(kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == kVnni)
    return has(kAvx512) && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  if (isa == kAmx) return has(kVnni) && tiles_granted();
#elif defined(__aarch64__)
  if (isa == kDot) return getauxval(AT_HWCAP) & (1ul << 20);  // HWCAP_ASIMDDP
#endif
  return false;
}

Isa choose() {
  const char* wanted = std::getenv("QWEN_ISA");
  for (int i = kDot; i >= kBase; --i)
    if ((!wanted || !*wanted || !std::strcmp(wanted, kNames[i])) && has(static_cast<Isa>(i)))
      return static_cast<Isa>(i);
  return kNone;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() { return isa() == kNone ? "" : kNames[isa()]; }

}  // namespace qwen
