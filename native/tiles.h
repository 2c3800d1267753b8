// AMX tiles: eight registers of 16 rows of 64 bytes, as the instructions see them and as plain C++ that means the same.
// The instructions are written out, because the compiler's own forms do not tell it that a tile load reads memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "format.h"

namespace millis {

#if defined(__x86_64__)
// Loaded by each thread. Static, because a compiler may drop the stores of one on the stack.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline const TileConfig kTileConfig;

struct HardTiles {
  static void configure() { asm volatile("ldtilecfg %0" : : "m"(kTileConfig) : "memory"); }
  static void release() { asm volatile("tilerelease" : : : "memory"); }
  template <int t>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(t));
  }
  // 16 rows that lie 64 bytes apart.
  template <int t>
  static void load(const void* p) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(size_t{64}), "i"(t) : "memory");
  }
  template <int t>
  static void store(void* p) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(size_t{64}), "i"(t) : "memory");
  }
  // c[m][n] += a[m] . column n of b, in pairs of bfloat16.
  template <int c, int a, int b>
  static void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }
};
#endif

struct SoftTiles {
  static inline thread_local uint32_t tile[8][16][16];

  static void configure() { std::memset(tile, 0, sizeof tile); }
  static void release() { std::memset(tile, 0xff, sizeof tile); }  // NaN: nobody may rely on what was there
  template <int t>
  static void zero() {
    std::memset(tile[t], 0, sizeof tile[t]);
  }
  template <int t>
  static void load(const void* p) {
    std::memcpy(tile[t], p, sizeof tile[t]);
  }
  template <int t>
  static void store(void* p) {
    std::memcpy(p, tile[t], sizeof tile[t]);
  }
  template <int c, int a, int b>
  static void dot() {
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 16; ++n) {
        float total;
        std::memcpy(&total, &tile[c][m][n], 4);
        for (int k = 0; k < 16; ++k)
          for (int half = 0; half < 2; ++half) {
            const auto part = [&](uint32_t two) { return bfloat_to_float(static_cast<uint16_t>(two >> 16 * half)); };
            total += part(tile[a][m][k]) * part(tile[b][k][n]);
          }
        std::memcpy(&tile[c][m][n], &total, 4);
      }
  }
};

}  // namespace millis
