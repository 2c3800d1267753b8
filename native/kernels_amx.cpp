// The kernels of a machine with AMX: AVX-512's, and wide products on tiles.
#include "tiles.h"
#include "vec_avx512bf16.h"

#define MILLIS_VEC vec_avx512bf16
#define MILLIS_BYTE_ROWS 14
#define MILLIS_PAIRS
#define MILLIS_CUT
#define MILLIS_WIDE_ROWS 16
#define MILLIS_WIDE_LEAST 9

#include "kernels_body.h"

namespace millis {
namespace {

// Spreads the blocks to unpack over the steps of a product.
struct Pace {
  Unpacking* next;
  int blocks, steps, due = 0;
  void tick() {
    for (due += blocks; due >= steps; due -= steps) next->one();
  }
};

// G groups of rows times P panels: C in tiles 0 to 3, x in 4 and 5, weights in 6 and 7.
template <class T, int G, int P>
void tile_block(const WideTask& t, const uint32_t* w, const uint32_t* x, float* tile, Pace& pace) {
  constexpr size_t c = kGroupRows * kPanelRows, step = kGroupRows * kStepDwords;
  if (t.add) {
    T::template load<0>(tile);
    if constexpr (P == 2) T::template load<1>(tile + t.tile_stride);
    if constexpr (G == 2) T::template load<2>(tile + c);
    if constexpr (G == 2 && P == 2) T::template load<3>(tile + c + t.tile_stride);
  } else {
    T::template zero<0>(), T::template zero<1>(), T::template zero<2>(), T::template zero<3>();
  }
  for (int s = 0; s < t.steps; ++s, w += step, x += step) {
    T::template load<4>(x), T::template load<6>(w);
    T::template dot<0, 4, 6>();
    if constexpr (P == 2) T::template load<7>(w + t.panel_stride), T::template dot<1, 4, 7>();
    if constexpr (G == 2) T::template load<5>(x + t.group_stride), T::template dot<2, 5, 6>();
    if constexpr (G == 2 && P == 2) T::template dot<3, 5, 7>();
    pace.tick();
  }
  T::template store<0>(tile);
  if constexpr (P == 2) T::template store<1>(tile + t.tile_stride);
  if constexpr (G == 2) T::template store<2>(tile + c);
  if constexpr (G == 2 && P == 2) T::template store<3>(tile + c + t.tile_stride);
}

template <class T>
void tile_product(const WideTask& t) {
  T::configure();
  constexpr int two = 2 * kGroupRows;
  Pace pace{t.next, t.next ? t.next->blocks() : 0, (t.panels + 1) / 2 * ((t.rows + two - 1) / two) * t.steps};
  for (int p = 0; p < t.panels; p += 2)
    for (int r = 0; r < t.rows; r += two) {
      const uint32_t* w = t.weights + static_cast<size_t>(p) * t.panel_stride;
      const uint32_t* x = t.x + static_cast<size_t>(r / kGroupRows) * t.group_stride;
      float* tile = t.tile + static_cast<size_t>(p) * t.tile_stride + static_cast<size_t>(r) * kPanelRows;
      const bool rows = t.rows - r > kGroupRows, panels = t.panels - p > 1;
      if (rows && panels) tile_block<T, 2, 2>(t, w, x, tile, pace);
      else if (rows) tile_block<T, 2, 1>(t, w, x, tile, pace);
      else if (panels) tile_block<T, 1, 2>(t, w, x, tile, pace);
      else tile_block<T, 1, 1>(t, w, x, tile, pace);
    }
  T::release();
}

template <class T>
Kernels make_tiled(const char* isa) {
  Kernels k = make_table(isa);
  k.wide.panels = 2, k.wide.columns = kWideColumns, k.wide.unpacks = true;
  k.wide.product = tile_product<T>;
  return k;
}

}  // namespace

const Kernels& amx_kernels() {
  static const Kernels table = make_tiled<HardTiles>("amx");
  return table;
}

const Kernels& soft_amx_kernels() {
  static const Kernels table = make_tiled<SoftTiles>("amx-in-software");
  return table;
}

}  // namespace millis
