// The Vec vocabulary on AArch64: sixteen lanes are four registers. Compiled for plain NEON, with the dot products of
// FEAT_DotProd, with the matrix products of FEAT_I8MM and with those of FEAT_BF16 beside them (vec_neon_bf16.h), each in a
// namespace of its own: no two may share a symbol.
#pragma once

#include <arm_neon.h>

#include "format.h"

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define MILLIS_NEON vec_neon_bf16
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#define MILLIS_NEON vec_neon_i8mm
#elif defined(__ARM_FEATURE_DOTPROD)
#define MILLIS_NEON vec_neon_dot
#else
#define MILLIS_NEON vec_neon
#endif

namespace millis::MILLIS_NEON {

constexpr int kLanes = 16;

struct F32 {
  float32x4_t a, b, c, d;
};
struct I32 {
  int32x4_t a, b, c, d;
};
struct U8 {
  uint8x16_t a, b, c, d;
};

// f of each register: V{f(x.a, y.a ...), f(x.b, y.b ...) ...}.
template <class V, class F, class... X>
inline V each(const F& f, X... x) {
  return {f(x.a...), f(x.b...), f(x.c...), f(x.d...)};
}

inline F32 set1(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}; }
inline F32 load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
inline float32x4_t widen_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline F32 load_half(const uint16_t* p) { return {widen_half(p), widen_half(p + 4), widen_half(p + 8), widen_half(p + 12)}; }
inline float32x4_t widen_bfloat(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline F32 load_bfloat(const uint16_t* p) { return {widen_bfloat(p), widen_bfloat(p + 4), widen_bfloat(p + 8), widen_bfloat(p + 12)}; }
inline float32x4_t to_float(uint16x4_t x) { return vcvtq_f32_u32(vmovl_u16(x)); }
inline float32x4_t to_float(int16x4_t x) { return vcvtq_f32_s32(vmovl_s16(x)); }
inline F32 load_u8(const uint8_t* p) {
  const uint16x8_t low = vmovl_u8(vld1_u8(p)), high = vmovl_u8(vld1_u8(p + 8));
  return {to_float(vget_low_u16(low)), to_float(vget_high_u16(low)), to_float(vget_low_u16(high)), to_float(vget_high_u16(high))};
}
inline F32 load_i8(const uint8_t* p) {
  const int16x8_t low = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p))), high = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p + 8)));
  return {to_float(vget_low_s16(low)), to_float(vget_high_s16(low)), to_float(vget_low_s16(high)), to_float(vget_high_s16(high))};
}
inline void store(float* p, F32 x) { vst1q_f32(p, x.a), vst1q_f32(p + 4, x.b), vst1q_f32(p + 8, x.c), vst1q_f32(p + 12, x.d); }
inline uint16x4_t narrow_half(float32x4_t x) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }
inline void store_half(uint16_t* p, F32 x) {
  vst1q_u16(p, vcombine_u16(narrow_half(x.a), narrow_half(x.b)));
  vst1q_u16(p + 8, vcombine_u16(narrow_half(x.c), narrow_half(x.d)));
}

// clang-format off: a primitive a line
inline F32 add(F32 x, F32 y) { return each<F32>([](auto p, auto q) { return vaddq_f32(p, q); }, x, y); }
inline F32 sub(F32 x, F32 y) { return each<F32>([](auto p, auto q) { return vsubq_f32(p, q); }, x, y); }
inline F32 mul(F32 x, F32 y) { return each<F32>([](auto p, auto q) { return vmulq_f32(p, q); }, x, y); }
inline F32 div(F32 x, F32 y) { return each<F32>([](auto p, auto q) { return vdivq_f32(p, q); }, x, y); }
inline F32 fma(F32 x, F32 y, F32 z) { return each<F32>([](auto p, auto q, auto r) { return vfmaq_f32(r, p, q); }, x, y, z); }
inline F32 fnma(F32 x, F32 y, F32 z) { return each<F32>([](auto p, auto q, auto r) { return vfmsq_f32(r, p, q); }, x, y, z); }
inline F32 max(F32 x, F32 y) { return each<F32>([](auto p, auto q) { return vmaxq_f32(p, q); }, x, y); }
inline F32 min(F32 x, F32 y) { return each<F32>([](auto p, auto q) { return vminq_f32(p, q); }, x, y); }
inline F32 sqrt(F32 x) { return each<F32>([](auto p) { return vsqrtq_f32(p); }, x); }
inline F32 abs(F32 x) { return each<F32>([](auto p) { return vabsq_f32(p); }, x); }
inline F32 round(F32 x) { return each<F32>([](auto p) { return vrndnq_f32(p); }, x); }
// clang-format on
inline F32 exp2_whole(F32 n) {
  return each<F32>([](auto p) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(p), vdupq_n_s32(127)), 23)); }, n);
}
inline float sum(F32 x) { return vaddvq_f32(vaddq_f32(vaddq_f32(x.a, x.b), vaddq_f32(x.c, x.d))); }
inline float max(F32 x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.a, x.b), vmaxq_f32(x.c, x.d))); }

inline I32 set1_i32(int32_t x) { return {vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x)}; }
inline I32 times_256_plus(I32 x, I32 y) {
  return each<I32>([](auto p, auto q) { return vaddq_s32(vshlq_n_s32(p, 8), q); }, x, y);
}
inline F32 to_float(I32 x) {
  return each<F32>([](auto p) { return vcvtq_f32_s32(p); }, x);
}
inline int16x8_t narrow(float32x4_t x, float32x4_t y) { return vcombine_s16(vmovn_s32(vcvtq_s32_f32(x)), vmovn_s32(vcvtq_s32_f32(y))); }
inline void store_i8(int8_t* p, F32 x) { vst1q_s8(p, vcombine_s8(vmovn_s16(narrow(x.a, x.b)), vmovn_s16(narrow(x.c, x.d)))); }

inline U8 load_bytes(const uint8_t* p) { return {vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}; }
inline U8 low_nibbles(U8 x) {
  return each<U8>([](auto p) { return vandq_u8(p, vdupq_n_u8(15)); }, x);
}
inline U8 high_nibbles(U8 x) {
  return each<U8>([](auto p) { return vshrq_n_u8(p, 4); }, x);
}
// table[x], of x below 16.
inline U8 looked_up(const uint8_t* table, U8 x) {
  return each<U8>([places = vld1q_u8(table)](auto p) { return vqtbl1q_u8(places, p); }, x);
}
template <int from, int mask>
inline uint8x16_t with_high_bits(uint8x16_t a, uint8x16_t plane) {
  uint8x16_t moved;
  if constexpr (from < 4) moved = vshlq_n_u8(plane, 4 - from);
  else if constexpr (from > 4) moved = vshrq_n_u8(plane, from - 4);
  else moved = plane;
  return vorrq_u8(a, vandq_u8(moved, vdupq_n_u8(mask << 4)));
}
template <int from, int mask>
inline U8 with_high_bits(U8 x, U8 plane) {
  return each<U8>([](auto p, auto q) { return with_high_bits<from, mask>(p, q); }, x, plane);
}

// 1 + byte c of each lane / 256: the byte is put into the mantissa of 1.
template <int c>
inline float32x4_t one_plus(uint8x16_t x) {
  const uint32x4_t lanes = vreinterpretq_u32_u8(x);
  uint32x4_t moved;
  if constexpr (c < 2) moved = vshlq_n_u32(lanes, 15 - 8 * c);
  else moved = vshrq_n_u32(lanes, 8 * c - 15);
  return vreinterpretq_f32_u32(vorrq_u32(vandq_u32(moved, vdupq_n_u32(0xffu << 15)), vdupq_n_u32(0x3f800000)));
}
template <int c>
inline F32 one_plus(U8 x) {
  return each<F32>([](auto p) { return one_plus<c>(p); }, x);
}

// Dot products. All three kinds multiply signed bytes: bytes of up to 6 bits are such as they stand, wider
// ones become so by taking kWideOffset off, and the caller adds that times the sum of x. Sums are kept a register
// of four rows at a time, so that those of eight activations stay in registers over all columns.
constexpr int kParts = 4;
constexpr int kWideOffset = 128;

template <int i, class V>
inline auto& part(V& x) {
  if constexpr (i == 0) return x.a;
  else if constexpr (i == 1) return x.b;
  else if constexpr (i == 2) return x.c;
  else return x.d;
}

template <bool wide>
inline int8x16_t as_signed(uint8x16_t w) {
  return vreinterpretq_s8_u8(wide ? veorq_u8(w, vdupq_n_u8(kWideOffset)) : w);
}

// acc[r] += sum of w[4r + c] * x[4 lane + c].
template <bool wide, int lane>
[[gnu::always_inline]] inline int32x4_t dot4(int32x4_t acc, int8x16_t w, int8x16_t x) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_laneq_s32(acc, w, x, lane);
#else
  const int8x16_t four = vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(x), lane));
  const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(four)), high = vmull_high_s8(w, four);
  // The sum of two products of 7 and 8 bits fits 16 bits, that of two full signed bytes may not.
  if constexpr (!wide) return vpadalq_s16(acc, vpaddq_s16(low, high));
  return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}

// acc[r] += vectors [0, 4) of weights times 16 columns of x.
template <bool wide>
[[gnu::always_inline]] inline int32x4_t dot16(int32x4_t acc, const int8x16_t (&w)[4], const int8_t* columns) {
  const int8x16_t x = vld1q_s8(columns);
  acc = dot4<wide, 0>(acc, w[0], x), acc = dot4<wide, 1>(acc, w[1], x);
  return dot4<wide, 3>(dot4<wide, 2>(acc, w[2], x), w[3], x);
}

// high[m], low[m] += `count` vectors of weights times columns of both bytes of M activations, for the rows of part i and on.
// weights<i, j>() is part i of vector j.
template <bool wide, int count, int M, int i, class Weights>
[[gnu::always_inline]] inline void dot_rows(const Weights& weights, const int8_t* const (&x)[M], I32 (&high)[M], I32 (&low)[M]) {
  int32x4_t h[M], l[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) h[m] = part<i>(high[m]), l[m] = part<i>(low[m]);
  const auto sixteen = [&]<int j>() __attribute__((always_inline)) {
    const int8x16_t w[4] = {
      as_signed<wide>(weights.template operator()<i, j>()),
      as_signed<wide>(weights.template operator()<i, j + 1>()),
      as_signed<wide>(weights.template operator()<i, j + 2>()),
      as_signed<wide>(weights.template operator()<i, j + 3>())
    };
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      h[m] = dot16<wide>(h[m], w, x[m] + 4 * j), l[m] = dot16<wide>(l[m], w, x[m] + kBlock + 4 * j);
      asm volatile("" ::: "memory");  // keeps the next activation's loads, and so its registers, behind this one
    }
  };
  sixteen.template operator()<0>();
  if constexpr (count == 8) sixteen.template operator()<4>();
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) part<i>(high[m]) = h[m], part<i>(low[m]) = l[m];
  asm volatile("" ::: "memory");  // keeps the next part's loads, and so its registers, behind this one
  if constexpr (i + 1 < kParts) dot_rows<wide, count, M, i + 1>(weights, x, high, low);
}

#if defined(__ARM_FEATURE_MATMUL_INT8)
// The same with SMMLA, [2 x 8] times [8 x 2]: two rows of weights times the high and the low byte of one activation.
template <bool wide, int count, int M, int i, class Weights>
[[gnu::always_inline]] inline void multiply_rows(const Weights& weights, const int8x16_t (&x)[M][4], I32 (&high)[M], I32 (&low)[M]) {
  int32x4_t upper[M], lower[M];  // [row 0 high, row 0 low, row 1 high, row 1 low], and of rows 2 and 3
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) upper[m] = lower[m] = vdupq_n_s32(0);
  const auto eight = [&]<int j>(const auto& next) __attribute__((always_inline)) {
    const int32x4_t left = vreinterpretq_s32_s8(as_signed<wide>(weights.template operator()<i, j>()));
    const int32x4_t right = vreinterpretq_s32_s8(as_signed<wide>(weights.template operator()<i, j + 1>()));
    const int8x16_t rows01 = vreinterpretq_s8_s32(vzip1q_s32(left, right)), rows23 = vreinterpretq_s8_s32(vzip2q_s32(left, right));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) upper[m] = vmmlaq_s32(upper[m], rows01, x[m][j / 2]), lower[m] = vmmlaq_s32(lower[m], rows23, x[m][j / 2]);
    if constexpr (j + 2 < count) next.template operator()<j + 2>(next);
  };
  eight.template operator()<0>(eight);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    part<i>(high[m]) = vaddq_s32(part<i>(high[m]), vuzp1q_s32(upper[m], lower[m]));
    part<i>(low[m]) = vaddq_s32(part<i>(low[m]), vuzp2q_s32(upper[m], lower[m]));
  }
  asm volatile("" ::: "memory");
  if constexpr (i + 1 < kParts) multiply_rows<wide, count, M, i + 1>(weights, x, high, low);
}
#endif

// high[m], low[m] += `count` vectors of weights (8 or 4) times the columns at x[m] of both bytes of M activations, the low ones
// kBlock bytes behind the high ones.
template <bool wide, int count, int M, class Weights>
[[gnu::always_inline]] inline void dot_columns(const Weights& weights, const int8_t* const (&x)[M], I32 (&high)[M], I32 (&low)[M]) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  if constexpr (M > 1) {
    int8x16_t both[M][4];  // eight high bytes, then eight low ones
    for (int m = 0; m < M; ++m)
      for (int c = 0; c < count / 4; ++c) {
        const int64x2_t h = vreinterpretq_s64_s8(vld1q_s8(x[m] + 16 * c)), l = vreinterpretq_s64_s8(vld1q_s8(x[m] + kBlock + 16 * c));
        both[m][2 * c] = vreinterpretq_s8_s64(vzip1q_s64(h, l)), both[m][2 * c + 1] = vreinterpretq_s8_s64(vzip2q_s64(h, l));
      }
    multiply_rows<wide, count, M, 0>(weights, both, high, low);
    return;
  }
#endif
  dot_rows<wide, count, M, 0>(weights, x, high, low);
}

}  // namespace millis::MILLIS_NEON
