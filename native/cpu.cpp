// Asks the processor and the operating system what they support.
#include "cpu.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <stdexcept>
#include <vector>

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

bool has_avx512bf16() {
#if defined(__x86_64__)
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

#if defined(__x86_64__)

// Small whole numbers, so that sums are exact in any order: tiles and plain C++ must agree to the bit. Many short holds,
// because on some virtual machines tiles were seen to lose their contents when a thread is interrupted.
bool tiles_compute() {
  constexpr int kSteps = 4, kRows = 2 * kGroupRows, kHolds = 500;
  constexpr size_t kPanel = static_cast<size_t>(kSteps) * kPanelRows * kStepDwords;
  std::vector<uint32_t> w(2 * kPanel), x(2 * kPanel);
  uint32_t seed = 1;
  for (auto* side : {&w, &x})
    for (uint32_t& pair : *side) {
      seed = seed * 1664525u + 1013904223u;
      const auto whole = [&](int shift) { return __builtin_bit_cast(uint32_t, static_cast<float>(static_cast<int>(seed >> shift & 15) - 8)); };
      pair = (whole(12) & 0xffff0000u) | whole(20) >> 16;
    }
  std::vector<float> tiles(2 * kRows * kPanelRows), plain(tiles.size());
  WideTask task{w.data(), kPanel, 2, kSteps, x.data(), kPanel, kRows, plain.data(), kRows * kPanelRows, false};
  soft_amx_kernels().wide.product(task);
  task.tile = tiles.data();
  for (int i = 0; i < kHolds; ++i) {
    tiles.assign(tiles.size(), -1.0f);
    amx_kernels().wide.product(task);
    if (tiles != plain) return false;
  }
  return true;
}

std::string try_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (!has_avx512bf16() || !__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-bf16")) return "this processor has none";
  if (::syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return "the operating system refuses them";
  return tiles_compute() ? "used" : "not used: they computed wrongly in a test";
}

#endif

}  // namespace

std::string amx_state() {
#if defined(__x86_64__)
  static const std::string state = try_amx();
  return state;
#else
  return "this processor has none";
#endif
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names = {"scalar"};
  if (has_avx2()) names.push_back("avx2");
  if (has_avx512()) names.push_back("avx512");
  if (has_avx512bf16()) names.push_back("avx512bf16");
  if (amx_state() == "used") names.push_back("amx");
  return names;
}

const Kernels& select_kernels(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "amx-in-software" && has_avx512bf16()) return soft_amx_kernels();
#endif
  const auto names = supported_isas();
  const std::string wanted = isa == "auto" ? names.back() : isa;
  for (const auto& name : names) {
    if (name != wanted) continue;
#if defined(__x86_64__)
    if (name == "amx") return amx_kernels();
    if (name == "avx512bf16") return avx512bf16_kernels();
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
