// The Vec vocabulary on AVX-512 (F, BW, DQ, VL) with VNNI: sixteen lanes are one register.
#pragma once

#include <immintrin.h>

#include "format.h"

namespace millis::vec_avx512 {

constexpr int kLanes = 16;
constexpr int kParts = 1;       // dot products take all lanes at once
constexpr int kWideOffset = 0;  // and bytes of 8 bits as they are

struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};
struct U8 {
  __m512i v;
};

inline F32 set1(float x) { return {_mm512_set1_ps(x)}; }
inline F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F32 load_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline F32 load_bfloat(const uint16_t* p) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16))};
}
inline __m128i load_16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline F32 load_u8(const uint8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_16(p)))}; }
inline F32 load_i8(const uint8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_16(p)))}; }
inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
inline void store_half(uint16_t* p, F32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT)); }
inline F32 add(F32 x, F32 y) { return {_mm512_add_ps(x.v, y.v)}; }
inline F32 sub(F32 x, F32 y) { return {_mm512_sub_ps(x.v, y.v)}; }
inline F32 mul(F32 x, F32 y) { return {_mm512_mul_ps(x.v, y.v)}; }
inline F32 div(F32 x, F32 y) { return {_mm512_div_ps(x.v, y.v)}; }
inline F32 fma(F32 x, F32 y, F32 z) { return {_mm512_fmadd_ps(x.v, y.v, z.v)}; }
inline F32 fnma(F32 x, F32 y, F32 z) { return {_mm512_fnmadd_ps(x.v, y.v, z.v)}; }
inline F32 max(F32 x, F32 y) { return {_mm512_max_ps(x.v, y.v)}; }
inline F32 min(F32 x, F32 y) { return {_mm512_min_ps(x.v, y.v)}; }
inline F32 sqrt(F32 x) { return {_mm512_sqrt_ps(x.v)}; }
inline F32 abs(F32 x) { return {_mm512_abs_ps(x.v)}; }
inline F32 round(F32 x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32 exp2_whole(F32 n) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
#define MILLIS_SCALE
inline F32 above_floor(F32 x) { return {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
inline F32 times_exp2_floor(F32 x, F32 n) { return {_mm512_scalef_ps(x.v, n.v)}; }
inline float sum(F32 x) { return _mm512_reduce_add_ps(x.v); }
inline float max(F32 x) { return _mm512_reduce_max_ps(x.v); }

inline I32 set1_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
template <int bits>
inline I32 shifted(I32 x) {
  return {_mm512_slli_epi32(x.v, bits)};
}
inline I32 times_256_plus(I32 x, I32 y) { return {_mm512_add_epi32(_mm512_slli_epi32(x.v, 8), y.v)}; }
inline F32 to_float(I32 x) { return {_mm512_cvtepi32_ps(x.v)}; }
inline void store_i8(int8_t* p, F32 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x.v))); }

// See bytes_body.h. Four at once: their lanes are folded together.
#define MILLIS_EACH
inline void largest_of_each(const F32 (&x)[4], float* out) {
  const auto bits = [&](int i) { return _mm512_and_si512(_mm512_castps_si512(x[i].v), _mm512_set1_epi32(0x7fffffff)); };
  const auto of_two = [&](__m512i a, __m512i b) { return _mm512_max_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)); };
  const __m512i ab = of_two(bits(0), bits(1)), cd = of_two(bits(2), bits(3));
  const __m512i abcd = _mm512_max_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_max_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
  _mm_storeu_ps(out, _mm_castsi128_ps(_mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1))));
}
inline void bytes_of_each(const F32 (&x)[4], int8_t* out, int32_t* sums) {
  const auto words = [&](int i) { return _mm512_packs_epi32(_mm512_cvtps_epi32(x[i].v), _mm512_cvtps_epi32(x[i + 1].v)); };
  const __m512i mixed = _mm512_packs_epi16(words(0), words(2));  // in each 128 bits four bytes of each
  const __m512i four = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), mixed);
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(four), _mm512_extracti64x4_epi64(four, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(out, _mm512_permutexvar_epi32(order, mixed));
}

inline U8 load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline U8 low_nibbles(U8 x) { return {_mm512_and_si512(x.v, _mm512_set1_epi8(15))}; }
inline U8 high_nibbles(U8 x) { return low_nibbles({_mm512_srli_epi16(x.v, 4)}); }
// table[x], of x below 16.
inline U8 looked_up(const uint8_t* table, U8 x) { return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(load_16(table)), x.v)}; }
template <int from, int mask>
inline U8 with_high_bits(U8 x, U8 plane) {
  const __m512i moved = from <= 4 ? _mm512_slli_epi16(plane.v, static_cast<unsigned>(from <= 4 ? 4 - from : 0))
                                  : _mm512_srli_epi16(plane.v, static_cast<unsigned>(from > 4 ? from - 4 : 0));
  constexpr int a_or_b_and_c = 0xf8;  // truth table of x | (moved & mask)
  return {_mm512_ternarylogic_epi32(x.v, moved, _mm512_set1_epi8(static_cast<char>(mask << 4)), a_or_b_and_c)};
}
// 1 + byte c of each lane / 256: the byte is put into the mantissa of 1.
template <int c>
inline F32 one_plus(U8 x) {
  constexpr int masked_or = 0xea;  // truth table of moved & mask | one
  const __m512i moved = _mm512_rol_epi32(x.v, (47 - 8 * c) % 32);
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(moved, _mm512_set1_epi32(0xff << 15), _mm512_set1_epi32(0x3f800000), masked_or))};
}
template <bool wide>
inline I32 dot4(I32 acc, U8 w, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return {_mm512_dpbusd_epi32(acc.v, w.v, _mm512_set1_epi32(four))};
}

}  // namespace millis::vec_avx512
