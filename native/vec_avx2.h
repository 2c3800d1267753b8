// The Vec vocabulary on AVX2, FMA and F16C: sixteen lanes are two registers. Compiled without and with AVX-VNNI, each in a
// namespace of its own: no two may share a symbol.
#pragma once

#include <immintrin.h>

#include "format.h"

#if defined(__AVXVNNI__)
#define MILLIS_AVX2 vec_avxvnni
#else
#define MILLIS_AVX2 vec_avx2
#endif

namespace millis::MILLIS_AVX2 {

constexpr int kLanes = 16;
constexpr int kParts = 1;       // dot products take all lanes at once
constexpr int kWideOffset = 0;  // and bytes of 8 bits as they are

struct F32 {
  __m256 a, b;
};
struct I32 {
  __m256i a, b;
};
struct U8 {
  __m256i a, b;
};

inline F32 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m128i load_16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline F32 load_half(const uint16_t* p) { return {_mm256_cvtph_ps(load_16(p)), _mm256_cvtph_ps(load_16(p + 8))}; }
inline __m256 widen_bfloat(const uint16_t* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16(p)), 16)); }
inline F32 load_bfloat(const uint16_t* p) { return {widen_bfloat(p), widen_bfloat(p + 8)}; }
inline F32 load_u8(const uint8_t* p) {
  const __m128i bytes = load_16(p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline F32 load_i8(const uint8_t* p) {
  const __m128i bytes = load_16(p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline void store(float* p, F32 x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline void store_half(uint16_t* p, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
inline F32 add(F32 x, F32 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F32 sub(F32 x, F32 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F32 mul(F32 x, F32 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F32 div(F32 x, F32 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F32 fma(F32 x, F32 y, F32 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F32 fnma(F32 x, F32 y, F32 z) { return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)}; }
inline F32 max(F32 x, F32 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F32 min(F32 x, F32 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F32 sqrt(F32 x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
inline F32 abs(F32 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline F32 round(F32 x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline __m256 exp2_whole(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline F32 exp2_whole(F32 n) { return {exp2_whole(n.a), exp2_whole(n.b)}; }
inline float sum(F32 x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float max(F32 x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

inline I32 set1_i32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
template <int bits>
inline I32 shifted(I32 x) {
  return {_mm256_slli_epi32(x.a, bits), _mm256_slli_epi32(x.b, bits)};
}
inline I32 times_256_plus(I32 x, I32 y) {
  return {_mm256_add_epi32(_mm256_slli_epi32(x.a, 8), y.a), _mm256_add_epi32(_mm256_slli_epi32(x.b, 8), y.b)};
}
inline F32 to_float(I32 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline void store_i8(int8_t* p, F32 x) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));  // a0-3 b0-3 a4-7 b4-7
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

inline U8 load_bytes(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline U8 low_nibbles(U8 x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline U8 high_nibbles(U8 x) { return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
// table[x], of x below 16.
inline U8 looked_up(const uint8_t* table, U8 x) {
  const __m256i both = _mm256_broadcastsi128_si256(load_16(table));
  return {_mm256_shuffle_epi8(both, x.a), _mm256_shuffle_epi8(both, x.b)};
}
template <int from, int mask>
inline __m256i with_high_bits(__m256i a, __m256i plane) {
  const __m256i moved = from <= 4 ? _mm256_slli_epi16(plane, 4 - from) : _mm256_srli_epi16(plane, from - 4);
  return _mm256_or_si256(a, _mm256_and_si256(moved, _mm256_set1_epi8(static_cast<char>(mask << 4))));
}
template <int from, int mask>
inline U8 with_high_bits(U8 x, U8 plane) {
  return {with_high_bits<from, mask>(x.a, plane.a), with_high_bits<from, mask>(x.b, plane.b)};
}
// 1 + byte c of each lane / 256: the byte is put into the mantissa of 1.
template <int c>
inline __m256 one_plus(__m256i x) {
  const __m256i moved = c < 2 ? _mm256_slli_epi32(x, c < 2 ? 15 - 8 * c : 0) : _mm256_srli_epi32(x, c < 2 ? 0 : 8 * c - 15);
  return _mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(moved, _mm256_set1_epi32(0xff << 15)), _mm256_set1_epi32(0x3f800000)));
}
template <int c>
inline F32 one_plus(U8 x) {
  return {one_plus<c>(x.a), one_plus<c>(x.b)};
}
#if defined(__AVXVNNI__)
template <bool>
inline __m256i dot4(__m256i acc, __m256i w, __m256i x) {
  return _mm256_dpbusd_avx_epi32(acc, w, x);
}
#else
// VPMADDUBSW saturates at 16 bits, so bytes above 6 bits take their sign off and the offset of 128 back first.
template <bool wide>
inline __m256i dot4(__m256i acc, __m256i w, __m256i x) {
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (!wide) return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones));
  const __m256i low = _mm256_and_si256(w, _mm256_set1_epi8(127));  // w = low + 128 * top
  const __m256i top = _mm256_and_si256(_mm256_srli_epi16(w, 7), _mm256_set1_epi8(1));
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), ones));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(top, x), _mm256_set1_epi16(128)));
}
#endif
template <bool wide>
inline I32 dot4(I32 acc, U8 w, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  const __m256i broadcast = _mm256_set1_epi32(four);
  return {dot4<wide>(acc.a, w.a, broadcast), dot4<wide>(acc.b, w.b, broadcast)};
}

}  // namespace millis::MILLIS_AVX2
