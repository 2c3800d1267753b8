// Whether AMX tiles may be used: the processor has them, the system lets this process, and they compute rightly.
#include <sys/syscall.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "cpu.h"

namespace millis {
namespace {

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
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-bf16"))
    return "this processor has none";
  if (::syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return "the operating system refuses them";
  return tiles_compute() ? "used" : "not used: they computed wrongly in a test";
}

}  // namespace

std::string amx_state() {
  static const std::string state = try_amx();
  return state;
}

}  // namespace millis
