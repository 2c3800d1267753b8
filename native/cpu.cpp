// Asks the processor and the operating system what they support.
#include "cpu.h"

#include <stdexcept>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace millis {
namespace {

struct Isa {
  const char* name;
  bool here;
  const Kernels& (*kernels)();
};

// Slowest first. One row an ISA.
std::vector<Isa> isas() {
  std::vector<Isa> rows = {{"scalar", true, scalar_kernels}};
#if defined(__x86_64__)
  // libgcc's checks read CPUID and, for the vector state that the system must save, XCR0.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  rows.push_back({"avx2", avx2, avx2_kernels});
  rows.push_back({"avxvnni", avx2 && __builtin_cpu_supports("avxvnni"), avxvnni_kernels});
  const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16");
  rows.push_back({"avx512", avx512, avx512_kernels});
  rows.push_back({"avx512bf16", pairs, avx512bf16_kernels});
  rows.push_back({"amx", pairs && amx_state() == "used", amx_kernels});
#elif defined(__aarch64__)
  // Bits of the auxiliary vector, from the kernel's "ARM64 ELF hwcaps"; older headers lack names for them.
  unsigned long capabilities = 0, more = 0;
#if defined(__linux__)
  capabilities = getauxval(AT_HWCAP), more = getauxval(AT_HWCAP2);
#endif
  const bool dot = capabilities >> 20 & 1;          // HWCAP_ASIMDDP
  const bool i8mm = dot && (more >> 13 & 1) != 0;   // HWCAP2_I8MM
  const bool bf16 = i8mm && (more >> 14 & 1) != 0;  // HWCAP2_BF16
  rows.push_back({"neon", true, neon_kernels});     // every AArch64 has it, and converts half precision
  rows.push_back({"neon-dot", dot, neon_dot_kernels});
  rows.push_back({"neon-i8mm", i8mm, neon_i8mm_kernels});
  rows.push_back({"neon-bf16", bf16, neon_bf16_kernels});
#endif
  return rows;
}

}  // namespace

#if !defined(__x86_64__)
std::string amx_state() { return "this processor has none"; }
#endif

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.here) names.emplace_back(isa.name);
  return names;
}

const Kernels& select_kernels(const std::string& isa) {
  const auto names = supported_isas();
  const std::string wanted = isa == "auto" ? names.back() : isa;
  for (const Isa& row : isas())
    if (row.here && row.name == wanted) return row.kernels();
#if defined(__x86_64__)
  if (wanted == "amx-in-software" && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) return soft_amx_kernels();
#endif
  std::string list;
  for (const auto& name : names) list += (list.empty() ? "" : ", ") + name;
  throw std::invalid_argument("ISA " + wanted + " is not available here; this machine has " + list);
}

}  // namespace millis
