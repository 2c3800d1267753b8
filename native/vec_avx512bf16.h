// The Vec vocabulary on AVX-512 with BF16: AVX-512's, and products of dwords of two bfloat16.
#pragma once

#include "vec_avx512.h"

namespace millis::vec_avx512bf16 {

using namespace vec_avx512;

inline void store_bfloats(uint16_t* p, F32 first, F32 second) {
  _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second.v, first.v)));
}
inline void store_bfloat(uint16_t* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v)));
}
inline void store_pairs(uint32_t* p, F32 even, F32 odd) {
  const __m512i order =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.v, even.v))));
}
// The same, cut off instead of rounded: half the instructions.
inline void store_cut_pairs(uint32_t* p, F32 even, F32 odd) {
  constexpr int a_or_b_and_c = 0xf8;
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even.v), 16);
  _mm512_storeu_si512(p, _mm512_ternarylogic_epi32(low, _mm512_castps_si512(odd.v), _mm512_set1_epi32(static_cast<int>(0xffff0000)), a_or_b_and_c));
}

inline F32 dot_wide(F32 acc, const uint32_t* w, const uint32_t* x) {
  int two;
  __builtin_memcpy(&two, x, 4);
  const auto pairs = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w)), value = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
  return {_mm512_dpbf16_ps(acc.v, pairs, value)};
}

}  // namespace millis::vec_avx512bf16
