// Products with activations of one byte, part of kernels_body.h: one pass over the weights where ActBlock takes two.

#include <bit>
#include <numeric>

#ifndef MILLIS_BYTE_ROWS
#define MILLIS_BYTE_ROWS 4  // rows of activations whose sums stay in registers together
#endif

namespace millis {
namespace {

template <const Format& f, int M>
void bytes_rows(const uint8_t* p, int cols, const ByteBlock* x, int group, float* tile) {
  constexpr bool super = f.scales != Scales::Block32, both = f.groups() == 2;  // the weights, too, have a scale for each half
  constexpr unsigned offset = f.offset - (f.wide() ? kWideOffset : 0);
  static_assert(offset == 0 || std::has_single_bit(offset));
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
    prefetch_weights<f.block_header() + f.quant_bytes(), M, true>(p);
    F32 halves[M];
    for (F32& h : halves) h = set1(0.0f);
    const auto half = [&]<int i>() __attribute__((always_inline)) {
      I32 sum[M];  // below 2^20
      for (int m = 0; m < M; ++m) {
        if constexpr (offset == 0) sum[m] = set1_i32(0);
        else sum[m] = shifted<std::countr_zero(offset)>(set1_i32(x[m].less[i]));
      }
      dot_high<4 * i, 4, M>(Block<f>{q}, x, 1, sum);
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
      if constexpr (f.mins && super) {
        const F32 least = mul(dmin, load_u8(p + 16 * (f.groups() + g)));
        for (int m = 0; m < M; ++m) total[m] = fnma(least, set1(of(x[m])), total[m]);
      }
    };
    half.template operator()<0>();
    if constexpr (both) add(0, [](const ByteBlock& block) { return block.s[0]; });
    half.template operator()<1>();
    if constexpr (both) add(1, [](const ByteBlock& block) { return block.s[1]; });
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

constexpr int32_t kInfinity = 0xff << 23;
inline int32_t bits_of(float x) { return __builtin_bit_cast(int32_t, x); }

#ifndef MILLIS_EACH
// The largest size of a number in each; infinity or NaN where one is.
inline void largest_of_each(const F32 (&x)[4], float* out) {
  for (int i = 0; i < 4; ++i) {
    float lanes[kLanes];
    store(lanes, x[i]);
    int32_t most = 0;
    for (const float lane : lanes) most = std::max(most, bits_of(lane) & 0x7fffffff);
    out[i] = __builtin_bit_cast(float, most);
  }
}
// Each rounded to bytes, side by side, and their sums. Numbers in [-127, 127]; what becomes of NaN is open.
inline void bytes_of_each(const F32 (&x)[4], int8_t* out, int32_t* sums) {
  for (int i = 0; i < 4; ++i) {
    store_i8(out + i * kLanes, round(max(set1(-127.0f), min(x[i], set1(127.0f)))));
    sums[i] = std::accumulate(out + i * kLanes, out + (i + 1) * kLanes, 0);
  }
}
#endif

// Some blocks at a time in three passes, of which none waits for itself: the halves' largest, their scales, the bytes.
void quantize_bytes(const float* x, int n, int step, ByteBlock* out) {
  constexpr int kBlocks = 16;
  constexpr float kMost = 127.0f, kLeast = 1e-30f;  // a half below counts as zero: its inverse could overflow
  alignas(64) float largest[2 * kBlocks] = {}, inverse[2 * kBlocks], d[2 * kBlocks];
  for (; n > 0; n -= kBlocks * kBlock, x += kBlocks * kBlock) {
    const int blocks = std::min(n / kBlock, kBlocks);
    // The halves of two blocks; the last one alone stands twice.
    const auto halves = [&](int b, F32(&to)[4]) __attribute__((always_inline)) {
      const float *first = x + b * kBlock, *second = b + 1 < blocks ? first + kBlock : first;
      to[0] = load(first), to[1] = load(first + kLanes), to[2] = load(second), to[3] = load(second + kLanes);
    };
    for (int b = 0; b < blocks; b += 2) {
      F32 given[4];
      halves(b, given);
      largest_of_each(given, largest + 2 * b);
    }
    for (int i = 0; i < 2 * kBlocks; ++i) {
      const float most = largest[i];
      inverse[i] = most >= kLeast ? kMost / most : 0.0f;
      d[i] = bits_of(most) < kInfinity ? most / kMost : NAN;  // let the product be NaN
    }
    for (int b = 0; b < blocks; b += 2) {
      F32 given[4];
      alignas(64) int8_t bytes[2 * kBlock];
      alignas(16) int32_t sums[4];
      alignas(16) float products[4];
      halves(b, given);
      for (int i = 0; i < 4; ++i) given[i] = mul(given[i], set1(inverse[2 * b + i]));
      bytes_of_each(given, bytes, sums);
      for (int i = 0; i < 4; ++i) products[i] = d[2 * b + i] * static_cast<float>(sums[i]), sums[i] = -sums[i];
      for (int o = 0; o < 2 && b + o < blocks; ++o, out += step) {
        __builtin_memcpy(out->high, bytes + o * kBlock, kBlock), __builtin_memcpy(out->less, sums + 2 * o, sizeof out->less);
        __builtin_memcpy(out->d, d + 2 * (b + o), sizeof out->d), __builtin_memcpy(out->s, products + 2 * o, sizeof out->s);
        out->all = products[2 * o] + products[2 * o + 1];
      }
    }
  }
}

}  // namespace
}  // namespace millis
