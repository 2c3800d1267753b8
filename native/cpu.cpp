// Asks the processor and the operating system what they support.
#include "cpu.h"

#include <stdexcept>

namespace millis {
namespace {

// libgcc's checks read CPUID and, for the vector state that the system must save, XCR0.
bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names = {"scalar"};
  if (has_avx2()) names.push_back("avx2");
  if (has_avx512()) names.push_back("avx512");
  return names;
}

const Kernels& select_kernels(const std::string& isa) {
  const auto names = supported_isas();
  const std::string wanted = isa == "auto" ? names.back() : isa;
  for (const auto& name : names) {
    if (name != wanted) continue;
#if defined(__x86_64__)
    if (name == "avx512") return avx512_kernels();
    if (name == "avx2") return avx2_kernels();
#endif
    return scalar_kernels();
  }
  std::string list;
  for (const auto& name : names) list += (list.empty() ? "" : ", ") + name;
  throw std::invalid_argument("ISA " + wanted + " is not available here; this machine has " + list);
}

}  // namespace millis
