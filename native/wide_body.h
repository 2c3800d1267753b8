// Products of many rows, part of kernels_body.h: panels are unpacked a few hundred columns at a time to the ISA's widest
// operands and stay in the cache while all rows pass over them. An operand is a dword: a float, or with MILLIS_PAIRS
// two bfloat16 of neighbouring columns; with MILLIS_QUADS two rows multiply two such dwords at a time. Layouts are in
// kernels.h, at Wide.

#ifndef MILLIS_WIDE_ROWS
#define MILLIS_WIDE_ROWS 4
#endif
#ifndef MILLIS_WIDE_LEAST
#define MILLIS_WIDE_LEAST (1 << 30)  // never: integer products of two passes are faster than floats
#endif

namespace millis {
namespace {

#ifdef MILLIS_PAIRS
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
inline F32 dot_wide(F32 acc, const uint32_t* w, const uint32_t* x) {
  float value;
  __builtin_memcpy(&value, x, 4);
  return fma(load(reinterpret_cast<const float*>(w)), set1(value), acc);
}
#endif
constexpr int kStepColumns = kPairs ? 2 * kStepDwords : kStepDwords;
constexpr int kUnpackAhead = 16;  // blocks asked for ahead: there is little to compute on each

// Columns k and k + 1 of 16 rows, rounded; `out` moves on.
inline void put_columns(uint32_t*& out, F32 even, F32 odd) {
#ifdef MILLIS_PAIRS
  store_pairs(out, even, odd);
  out += kPanelRows;
#else
  store(reinterpret_cast<float*>(out), even), store(reinterpret_cast<float*>(out + kPanelRows), odd);
  out += 2 * kPanelRows;
#endif
}

// The same of weights kGrown times as large. Where products leave most of the time to unpacking, pairs are cut off instead of rounded,
// by half the instructions. That takes half a unit of the last place on the average, 2^-8 of numbers in [1, 2), whose own average is
// 1 / ln 2: so grown by 2^-8 ln 2 before, they have no bias, and an error whose root mean square is 1.06 times that of rounding.
#ifdef MILLIS_CUT
constexpr float kGrown = 1.0f + 0.693147f / 256.0f;
inline void put_grown(uint32_t*& out, F32 even, F32 odd) {
  store_cut_pairs(out, even, odd);
  out += kPanelRows;
}
#else
constexpr float kGrown = 1.0f;
inline void put_grown(uint32_t*& out, F32 even, F32 odd) { put_columns(out, even, odd); }
#endif

// Vectors [first, first + count) of a block: value = scale * (1 + q / 256) + base.
template <const Format& f, int first, int count>
inline void unpack_vectors(const uint8_t* p, F32 scale, F32 base, uint32_t*& out) {
  const U8 q = weights<f, first>(p);
  put_grown(out, fma(scale, one_plus<0>(q), base), fma(scale, one_plus<1>(q), base));
  put_grown(out, fma(scale, one_plus<2>(q), base), fma(scale, one_plus<3>(q), base));
  if constexpr (count > 1) unpack_vectors<f, first + 1, count - 1>(p, scale, base, out);
}

template <int id>
void unpack_quants(const uint8_t* panel, int first, int cols, uint32_t* out) {
  constexpr Format f = kFormat[id];
  constexpr int groups = f.groups(), vectors = 8 / groups;
  constexpr bool super = f.scales != Scales::Block32;
  const uint8_t* p = panel + f.panel_bytes(first);
  if (super && first % kSuperBlock != 0) p += f.super_header();
  F32 d = set1(0.0f), dmin = d;
  for (int b = first / kBlock; b < (first + cols) / kBlock; ++b) {
    const bool begins = !super || b % 8 == 0;
    if (begins || b == first / kBlock) {
      const uint8_t* header = begins ? p : panel + f.panel_bytes(first / kSuperBlock * kSuperBlock);
      d = mul(load_half(reinterpret_cast<const uint16_t*>(header)), set1(256.0f * kGrown));
      if constexpr (f.mins) dmin = mul(load_half(reinterpret_cast<const uint16_t*>(header + 32)), set1(kGrown));
      if (begins) p += f.super_header();
    }
    const uint8_t* q = p + f.block_header();
    prefetch<f.block_header() + f.quant_bytes(), 1>(p + kUnpackAhead * (f.block_header() + f.quant_bytes()));
    const auto group = [&]<int g>() {
      F32 scale = d, base = f.mins && !super ? dmin : set1(0.0f);
      if constexpr (super) scale = mul(d, f.mins ? load_u8(p + 16 * g) : load_i8(p + 16 * g));
      if constexpr (super && f.mins) base = mul(dmin, sub(base, load_u8(p + 16 * (groups + g))));
      base = fnma(scale, set1(1.0f + static_cast<float>(f.offset) / 256.0f), base);
      unpack_vectors<kFormat[id], g * vectors, vectors>(q, scale, base, out);
    };
    group.template operator()<0>();
    if constexpr (groups == 2) group.template operator()<1>();
    p = q + f.quant_bytes();
  }
}

// Only where a pair holds them exactly; other float weights take float_panel.
void unpack_bfloats(const uint8_t* panel, int first, int cols, uint32_t* out) {
  const auto* w = reinterpret_cast<const uint16_t*>(panel) + static_cast<size_t>(first) * kPanelRows;
  int k = 0;
  for (; k + 1 < cols; k += 2, w += 2 * kPanelRows) put_columns(out, load_bfloat(w), load_bfloat(w + kPanelRows));
  if (k < cols) put_columns(out, load_bfloat(w), set1(0.0f)), k += 2;
  for (; k % kStepColumns != 0; k += 2) put_columns(out, set1(0.0f), set1(0.0f));
}

// All rows of some columns, and then of the next: lines that lie together are written together.
void pack_wide_rows(const float* x, size_t stride, int rows, int cols, uint32_t* out) {
  for (int k = 0; k < cols; k += kStepColumns, out += kGroupRows * kStepDwords)
    for (int m = 0; m < rows; ++m) {
      const float* from = x + static_cast<size_t>(m) * stride + k;
      float rest[kStepColumns] = {};
      if (k + kStepColumns > cols) {
        for (int i = 0; i < cols - k; ++i) rest[i] = from[i];
        from = rest;
      }
#ifdef MILLIS_PAIRS
      store_bfloats(reinterpret_cast<uint16_t*>(out + m * kStepDwords), load(from), load(from + kLanes));
#else
      store(reinterpret_cast<float*>(out + m * kStepDwords), load(from));
#endif
    }
}

void finish_packed(const float* tile, const Epilogue& e, int rows, int column, uint32_t* x, size_t group) {
  x += static_cast<size_t>(column / kStepColumns) * kGroupRows * kStepDwords;
  for (int m = 0; m < rows; ++m) {
    uint32_t* line = x + packed_row(m, group);
#ifdef MILLIS_PAIRS
    store_bfloat(reinterpret_cast<uint16_t*>(line) + column % kStepColumns, finished(tile, e, m));
#else
    store(reinterpret_cast<float*>(line), finished(tile, e, m));
#endif
  }
}

template <int M>
inline void dot_steps(F32 (&total)[M], const uint32_t* w, int steps, const uint32_t* x) {
  for (int s = 0; s < steps; ++s, x += kGroupRows * kStepDwords)
    for (int k = 0; k < kStepDwords; ++k, w += kPanelRows)
      for (int m = 0; m < M; ++m) total[m] = dot_wide(total[m], w, x + m * kStepDwords + k);
}

#ifdef MILLIS_QUADS
// The same of rows in twos, and of two dwords at a time.
template <int M>
  requires(M % 2 == 0)
inline void dot_steps(F32 (&total)[M], const uint32_t* w, int steps, const uint32_t* x) {
  turn_sums(total);
  for (int s = 0; s < steps; ++s, x += kGroupRows * kStepDwords)
    for (int k = 0; k < kStepDwords; k += 2, w += 2 * kPanelRows) dot_quads(total, w, x + k, kStepDwords);
  turn_sums(total);
}
#endif

template <int M>
inline void wide_rows(const uint32_t* w, int steps, const uint32_t* x, float* tile, bool add) {
  F32 total[M];
  for (int m = 0; m < M; ++m) total[m] = add ? load(tile + m * kPanelRows) : set1(0.0f);
  dot_steps(total, w, steps, x);
  for (int m = 0; m < M; ++m) store(tile + m * kPanelRows, total[m]);
}

// The rows of a group in passes. Few rows wait for their own sums: a pass of four takes as long as a pass of one. So where there
// are registers for 16, a group takes one pass that may be a little too wide; what it computes beyond its rows is never read.
template <class Pass>
inline void in_passes(int left, const Pass& pass) {
  if constexpr (MILLIS_WIDE_ROWS == kGroupRows) {
    if (left > 12) pass.template operator()<16>(0);
    else if (left > 8) pass.template operator()<12>(0);
    else if (left > 4) pass.template operator()<8>(0);
    else pass.template operator()<4>(0);
  } else {
    const int end = left < kGroupRows ? left : kGroupRows;
    int m = 0;
    for (; end - m >= MILLIS_WIDE_ROWS; m += MILLIS_WIDE_ROWS) pass.template operator()<MILLIS_WIDE_ROWS>(m);
    if (end - m >= 4) pass.template operator()<4>(m), m += 4;
    if (end - m >= 2) pass.template operator()<2>(m), m += 2;
    if (end - m == 1) pass.template operator()<1>(m);
  }
}

void wide_product(const WideTask& t) {
  for (int p = 0; p < t.panels; ++p) {
    const uint32_t* w = t.weights + static_cast<size_t>(p) * t.panel_stride;
    float* tile = t.tile + static_cast<size_t>(p) * t.tile_stride;
    for (int r = 0; r < t.rows; r += kGroupRows, tile += kGroupRows * kPanelRows) {
      const uint32_t* x = t.x + static_cast<size_t>(r / kGroupRows) * t.group_stride;
      in_passes(t.rows - r, [&]<int M>(int m) { wide_rows<M>(w, t.steps, x + m * kStepDwords, tile + m * kPanelRows, t.add); });
    }
  }
}

Wide make_wide() {
  Wide w = {};
  w.step_columns = kStepColumns, w.panels = 1, w.columns = 512, w.least_rows = MILLIS_WIDE_LEAST;
  const auto fill = [&]<int id>(const auto& next) {
    if constexpr (!kFormat[id].is_float() && static_cast<FormatId>(id) != FormatId::Q8_0Planes) w.unpack[id] = unpack_quants<id>;
    if constexpr (id + 1 < kFormats) next.template operator()<id + 1>(next);
  };
  fill.template operator()<0>(fill);
  if (kPairs) w.unpack[static_cast<int>(FormatId::BF16)] = unpack_bfloats;
  w.pack_rows = pack_wide_rows, w.product = wide_product, w.finish = finish_packed;
  return w;
}

}  // namespace
}  // namespace millis
