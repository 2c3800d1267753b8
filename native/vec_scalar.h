// The Vec vocabulary in plain C++: sixteen lanes, and the meaning that the other ISAs are tested against.
//   F32, I32: 16 lanes.  U8: 64 lanes, four to a lane of I32 (byte 4i + c belongs to lane i).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "format.h"

namespace millis::vec_scalar {

constexpr int kLanes = 16;
constexpr int kParts = 1;       // dot products take all lanes at once
constexpr int kWideOffset = 0;  // and bytes of 8 bits as they are

struct F32 {
  float v[kLanes];
};
struct I32 {
  int32_t v[kLanes];
};
struct U8 {
  uint8_t v[4 * kLanes];
};

template <class F>
inline F32 map(F f) {
  F32 out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = f(i);
  return out;
}

// clang-format off: a primitive a line
inline F32 set1(float x) { return map([&](int) { return x; }); }
inline F32 load(const float* p) { return map([&](int i) { return p[i]; }); }
inline F32 load_half(const uint16_t* p) { return map([&](int i) { return half_to_float(p[i]); }); }
inline F32 load_bfloat(const uint16_t* p) { return map([&](int i) { return bfloat_to_float(p[i]); }); }
inline F32 load_u8(const uint8_t* p) { return map([&](int i) { return static_cast<float>(p[i]); }); }
inline F32 load_i8(const uint8_t* p) { return map([&](int i) { return static_cast<float>(static_cast<int8_t>(p[i])); }); }
inline void store(float* p, F32 a) { std::memcpy(p, a.v, sizeof a.v); }
inline void store_half(uint16_t* p, F32 a) { for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(a.v[i]); }
inline F32 add(F32 a, F32 b) { return map([&](int i) { return a.v[i] + b.v[i]; }); }
inline F32 sub(F32 a, F32 b) { return map([&](int i) { return a.v[i] - b.v[i]; }); }
inline F32 mul(F32 a, F32 b) { return map([&](int i) { return a.v[i] * b.v[i]; }); }
inline F32 div(F32 a, F32 b) { return map([&](int i) { return a.v[i] / b.v[i]; }); }
inline F32 fma(F32 a, F32 b, F32 c) { return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline F32 fnma(F32 a, F32 b, F32 c) { return map([&](int i) { return c.v[i] - a.v[i] * b.v[i]; }); }
inline F32 max(F32 a, F32 b) { return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline F32 min(F32 a, F32 b) { return map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline F32 sqrt(F32 a) { return map([&](int i) { return std::sqrt(a.v[i]); }); }
inline F32 abs(F32 a) { return map([&](int i) { return std::fabs(a.v[i]); }); }
inline F32 round(F32 a) { return map([&](int i) { return std::nearbyint(a.v[i]); }); }
// clang-format on
// 2^n of whole numbers n in [-126, 127].
inline F32 exp2_whole(F32 n) {
  return map([&](int i) { return __builtin_bit_cast(float, (static_cast<int32_t>(n.v[i]) + 127) << 23); });
}
inline float sum(F32 a) {
  float total = 0;
  for (float x : a.v) total += x;
  return total;
}
inline float max(F32 a) { return *std::max_element(a.v, a.v + kLanes); }

inline I32 set1_i32(int32_t x) {
  I32 out;
  for (int32_t& lane : out.v) lane = x;
  return out;
}
template <int bits>
inline I32 shifted(I32 a) {
  for (int32_t& lane : a.v) lane *= 1 << bits;
  return a;
}
inline I32 times_256_plus(I32 a, I32 b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = a.v[i] * 256 + b.v[i];
  return a;
}
inline F32 to_float(I32 a) {
  return map([&](int i) { return static_cast<float>(a.v[i]); });
}
// Whole numbers in [-128, 127].
inline void store_i8(int8_t* p, F32 a) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}

inline U8 load_bytes(const uint8_t* p) {
  U8 out;
  std::memcpy(out.v, p, sizeof out.v);
  return out;
}
template <class F>
inline U8 map_bytes(F f) {
  U8 out;
  for (int i = 0; i < 4 * kLanes; ++i) out.v[i] = static_cast<uint8_t>(f(i));
  return out;
}
inline U8 low_nibbles(U8 a) {
  return map_bytes([&](int i) { return a.v[i] & 15; });
}
inline U8 high_nibbles(U8 a) {
  return map_bytes([&](int i) { return a.v[i] >> 4; });
}
// table[x], of x below 16.
inline U8 looked_up(const uint8_t* table, U8 a) {
  return map_bytes([&](int i) { return table[a.v[i]]; });
}
// a | the bits of `plane` under `mask`, moved from bit `from` to bit 4 upwards.
template <int from, int mask>
inline U8 with_high_bits(U8 a, U8 plane) {
  return map_bytes([&](int i) { return a.v[i] | ((plane.v[i] >> from & mask) << 4); });
}
// 1 + byte c of each lane / 256.
template <int c>
inline F32 one_plus(U8 x) {
  return map([&](int i) { return 1.0f + static_cast<float>(x.v[4 * i + c]) / 256.0f; });
}
// acc[i] += sum of w[4i + c] * x[c]; x: 4 signed bytes. `wide` marks w above 6 bits.
template <bool wide>
inline I32 dot4(I32 acc, U8 w, const int8_t* x) {
  for (int i = 0; i < kLanes; ++i)
    for (int c = 0; c < 4; ++c) acc.v[i] += w.v[4 * i + c] * x[c];
  return acc;
}

}  // namespace millis::vec_scalar
