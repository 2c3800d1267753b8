// The Vec vocabulary on NEON with FEAT_BF16: that with FEAT_I8MM, and products of dwords of two bfloat16.
#pragma once

#include "vec_neon.h"

namespace millis::vec_neon_bf16 {

inline void store_bfloat(uint16_t* p, F32 x) {
  vst1q_u16(p, vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(x.a), x.b)));
  vst1q_u16(p + 8, vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(x.c), x.d)));
}
inline void store_bfloats(uint16_t* p, F32 first, F32 second) { store_bfloat(p, first), store_bfloat(p + kLanes, second); }
inline void store_pairs(uint32_t* p, float32x4_t even, float32x4_t odd) {
  const uint16x8_t low = vreinterpretq_u16_bf16(vcvtq_low_bf16_f32(even)), high = vreinterpretq_u16_bf16(vcvtq_low_bf16_f32(odd));
  vst1q_u32(p, vreinterpretq_u32_u16(vzip1q_u16(low, high)));
}
inline void store_pairs(uint32_t* p, F32 even, F32 odd) {
  store_pairs(p, even.a, odd.a), store_pairs(p + 4, even.b, odd.b), store_pairs(p + 8, even.c, odd.c), store_pairs(p + 12, even.d, odd.d);
}

inline bfloat16x8_t load_pairs(const uint32_t* p) { return vreinterpretq_bf16_u32(vld1q_u32(p)); }
inline F32 dot_wide(F32 acc, const uint32_t* w, const uint32_t* x) {
  const bfloat16x8_t value = vreinterpretq_bf16_u32(vld1q_dup_u32(x));
  return {vbfdotq_f32(acc.a, load_pairs(w), value), vbfdotq_f32(acc.b, load_pairs(w + 4), value), vbfdotq_f32(acc.c, load_pairs(w + 8), value),
          vbfdotq_f32(acc.d, load_pairs(w + 12), value)};
}

// BFMMLA multiplies [2 x 4] by [4 x 2]: two rows of x by two of weights, four columns of each. Its sums lie turned: a register has
// those of rows m and m + 1 with rows 4i and 4i + 1 of the weights, the next one those with 4i + 2 and 4i + 3. Turning twice is
// leaving as is.
inline void turn_sums(float32x4_t& x, float32x4_t& y) {
  const float64x2_t p = vreinterpretq_f64_f32(x), q = vreinterpretq_f64_f32(y);
  x = vreinterpretq_f32_f64(vzip1q_f64(p, q)), y = vreinterpretq_f32_f64(vzip2q_f64(p, q));
}
template <int M>
inline void turn_sums(F32 (&total)[M]) {
  for (int m = 0; m < M; m += 2) {
    F32 &x = total[m], &y = total[m + 1];
    turn_sums(x.a, y.a), turn_sums(x.b, y.b), turn_sums(x.c, y.c), turn_sums(x.d, y.d);
  }
}

// total[m] += two dwords of 16 rows of weights times those of M rows of x, in twos; for the rows of part i and on.
template <int i, int M>
[[gnu::always_inline]] inline void multiply_part(F32 (&total)[M], const uint32_t* w, const bfloat16x8_t (&x)[M / 2]) {
  const uint32x4_t left = vld1q_u32(w + 4 * i), right = vld1q_u32(w + kPanelRows + 4 * i);
  const bfloat16x8_t rows01 = vreinterpretq_bf16_u32(vzip1q_u32(left, right)), rows23 = vreinterpretq_bf16_u32(vzip2q_u32(left, right));
#pragma GCC unroll 8
  for (int m = 0; m < M; m += 2) {
    part<i>(total[m]) = vbfmmlaq_f32(part<i>(total[m]), x[m / 2], rows01);
    part<i>(total[m + 1]) = vbfmmlaq_f32(part<i>(total[m + 1]), x[m / 2], rows23);
  }
  if constexpr (i + 1 < kParts) multiply_part<i + 1>(total, w, x);
}

// The same of rows of x that lie `stride` dwords apart.
template <int M>
[[gnu::always_inline]] inline void dot_quads(F32 (&total)[M], const uint32_t* w, const uint32_t* x, int stride) {
  bfloat16x8_t two[M / 2];
#pragma GCC unroll 8
  for (int m = 0; m < M; m += 2) two[m / 2] = vreinterpretq_bf16_u32(vcombine_u32(vld1_u32(x + m * stride), vld1_u32(x + (m + 1) * stride)));
  multiply_part<0>(total, w, two);
}

}  // namespace millis::vec_neon_bf16
