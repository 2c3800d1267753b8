// Products with activations of one byte, part of kernels_body.h: one pass over the weights where ActBlock takes two.

#ifndef MILLIS_BYTE_ROWS
#define MILLIS_BYTE_ROWS 4  // rows of activations whose sums stay in registers together
#endif

namespace millis {
namespace {

// Offsets are taken away as minimums are: value = scale * q - least.
template <const Format& f, int M>
void bytes_rows(const uint8_t* p, int cols, const ByteBlock* x, int group, float* tile) {
  constexpr bool super = f.scales != Scales::Block32, both = f.groups() == 2;  // the weights, too, have a scale for each half
  constexpr float offset = f.offset - (f.bits == 8 ? kWideOffset : 0);
  F32 total[M];
  for (F32& t : total) t = set1(0.0f);
  F32 d = set1(0.0f), dmin = d;
  for (int b = 0; b < cols / kBlock; ++b, x += group) {
    if (!super || b % 8 == 0) {
      d = load_half(reinterpret_cast<const uint16_t*>(p));
      if constexpr (f.mins) dmin = load_half(reinterpret_cast<const uint16_t*>(p + 32));
      p += f.super_header();
    }
    const uint8_t* q = p + f.block_header();
    prefetch_weights<f.block_header() + f.quant_bytes(), M>(p);
    F32 halves[M];
    for (F32& h : halves) h = set1(0.0f);
    const auto half = [&]<int i>() __attribute__((always_inline)) {
      I32 sum[M];  // below 2^20
      for (I32& s : sum) s = set1_i32(0);
      dot_high<4 * i, 4, M>(Block<f.bits>{q}, x, 1, sum);
      for (int m = 0; m < M; ++m) {
        const F32 scaled = set1(x[m].d[i]);
        halves[m] = both || i == 0 ? mul(scaled, to_float(sum[m])) : fma(scaled, to_float(sum[m]), halves[m]);
      }
    };
    const auto add = [&](int g, const auto& of) __attribute__((always_inline)) {
      F32 scale = d;
      if constexpr (super) scale = mul(d, f.mins ? load_u8(p + 16 * g) : load_i8(p + 16 * g));
      for (int m = 0; m < M; ++m) total[m] = fma(scale, halves[m], total[m]);
      if constexpr (f.mins && !super)
        for (int m = 0; m < M; ++m) total[m] = fma(dmin, set1(of(x[m])), total[m]);
      if constexpr ((f.mins && super) || offset != 0) {
        const F32 least = f.mins ? mul(dmin, load_u8(p + 16 * (f.groups() + g))) : mul(scale, set1(offset));
        for (int m = 0; m < M; ++m) total[m] = fnma(least, set1(of(x[m])), total[m]);
      }
    };
    half.template operator()<0>();
    if constexpr (both) add(0, [](const ByteBlock& block) { return block.half[0]; });
    half.template operator()<1>();
    if constexpr (both) add(1, [](const ByteBlock& block) { return block.half[1]; });
    else add(0, [](const ByteBlock& block) { return block.all; });
    p = q + f.quant_bytes();
  }
  for (int m = 0; m < M; ++m) store(tile + m * kPanelRows, total[m]);
}

template <const Format& f, int M>
inline void bytes_some(const uint8_t* p, int cols, const ByteBlock* x, int group, int rows, float* tile) {
  if (rows == M) bytes_rows<f, M>(p, cols, x, group, tile);
  else if constexpr (M > 1) bytes_some<f, M - 1>(p, cols, x, group, rows, tile);
}

template <int id>
void bytes_panel(const uint8_t* panel, int cols, const ByteBlock* x, int group, int rows, float* tile) {
  bytes_some<kFormat[id], MILLIS_BYTE_ROWS>(panel, cols, x, group, rows, tile);
}

void quantize_bytes(const float* x, int n, int step, ByteBlock* out) {
  constexpr float kMost = 127.0f, kLeast = 1e-30f;  // a block below counts as zero: its inverse could overflow
  for (; n >= kBlock; n -= kBlock, x += kBlock, out += step) {
    const F32 given[2] = {load(x), load(x + kLanes)};
    const float largest[2] = {max(abs(given[0])), max(abs(given[1]))};
    F32 whole[2];
    for (int i = 0; i < 2; ++i) {
      whole[i] = round(mul(given[i], set1(largest[i] >= kLeast ? kMost / largest[i] : 0.0f)));
      out->half[i] = largest[i] / kMost * sum(whole[i]);
      out->d[i] = largest[i] / kMost;
    }
    out->all = out->half[0] + out->half[1];
    if (out->all != out->all) {  // x holds a NaN or an infinity: let the product be NaN
      for (float& d : out->d) d = out->all;
      whole[0] = whole[1] = set1(0.0f);
    }
    for (int i = 0; i < 2; ++i) store_i8(out->high + i * kLanes, whole[i]);
  }
}

}  // namespace
}  // namespace millis
