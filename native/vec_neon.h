// The Vec vocabulary on AArch64: sixteen lanes are four registers. Compiled for plain NEON, with the dot products of
// FEAT_DotProd (SDOT) and with those of FEAT_I8MM (USDOT), each in a namespace of its own: no two may share a symbol.
#pragma once

#include <arm_neon.h>

#include "format.h"

#if defined(__ARM_FEATURE_MATMUL_INT8)
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

// Dot products. NEON before Armv8.6 multiplies signed bytes only. Bytes of up to 6 bits are signed ones as they stand; wider
// ones become so by taking 128 off, and 128 * (x0 + x1 + x2 + x3), the same for every row, makes up for it.
#if defined(__ARM_FEATURE_MATMUL_INT8)
template <bool>
inline int32x4_t dot4(int32x4_t acc, uint8x16_t w, int8x16_t x) {
  return vusdotq_s32(acc, w, x);
}
#else
#if defined(__ARM_FEATURE_DOTPROD)
template <bool>
inline int32x4_t signed_dot4(int32x4_t acc, int8x16_t w, int8x16_t x) {
  return vdotq_s32(acc, w, x);
}
#else
// The sum of two products of 7 and 8 bits fits 16 bits, that of two full signed bytes may not.
template <bool wide>
inline int32x4_t signed_dot4(int32x4_t acc, int8x16_t w, int8x16_t x) {
  const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
  if constexpr (!wide) return vpadalq_s16(acc, vpaddq_s16(low, high));
  return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}
#endif
template <bool wide>
inline int32x4_t dot4(int32x4_t acc, uint8x16_t w, int8x16_t x) {
  if constexpr (!wide) return signed_dot4<false>(acc, vreinterpretq_s8_u8(w), x);
  const int32x4_t offset = vshlq_n_s32(signed_dot4<false>(vdupq_n_s32(0), vdupq_n_s8(1), x), 7);
  return signed_dot4<true>(vaddq_s32(acc, offset), vreinterpretq_s8_u8(veorq_u8(w, vdupq_n_u8(128))), x);
}
#endif
template <bool wide>
inline I32 dot4(I32 acc, U8 w, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  const int8x16_t broadcast = vreinterpretq_s8_s32(vdupq_n_s32(four));
  return each<I32>([&](auto p, auto q) { return dot4<wide>(p, q, broadcast); }, acc, w);
}

}  // namespace millis::MILLIS_NEON
