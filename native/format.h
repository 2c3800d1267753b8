// How weights are stored: GGML's types as they lie in a file, and the packed formats that the kernels stream.
//
// Packed layout. A matrix [rows, cols] is cut into panels of 16 rows. A panel holds, one block of 32 columns after the
// other, everything one thread reads, in the order in which it reads it:
//
//   Block32 scales:   d f16[16] | m f16[16] where mins | quants of 16 x 32 values          (Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 IQ4_NL)
//   Super scales:     each 256 columns: d f16[16] | dmin f16[16] where mins, then each 32 columns:
//                     sc 8-bit[groups][16] | m 8-bit[groups][16] where mins | quants       (Q2_K .. Q6_K, IQ4_XS)
//                     with one group of 32 columns (Super32) or two groups of 16 (Super16)
//
// Quants are unsigned bytes q = value + offset in eight vectors of 64: byte 4r + c of vector j is row r, column 4j + c,
// the operand order of VPDPBUSD. 4-bit planes: byte vector v holds vector v in its low and v + 4 in its high nibbles.
// Four bits of IQ4_NL and IQ4_XS are a place in kLevels, where the unsigned byte stands.
// A fifth bit is one more vector whose bit j belongs to vector j; bits five and six are two more, vectors 0-3 and 4-7.
// The output matrix of a vocabulary in Q8_0 is kept in two planes: first of all panels, block after block, scales |
// the high nibbles in the order of a 4-bit plane, then of all panels the low nibbles. The first plane alone screens (screen_body.h).
// Every value stays that of the file.
#pragma once

#include <cstddef>
#include <cstdint>

namespace millis {

constexpr uint32_t kPackVersion = 3;  // raise it with any change to what follows, or to what readers make of a file: it
                                      // tells old packed files from new ones
constexpr int kPanelRows = 16;
constexpr int kBlock = 32;          // columns that share an activation scale
constexpr int kSuperBlock = 256;    // columns of a K-quant's super-block
constexpr int kMostSide = 1 << 24;  // rows or columns of a matrix, floats of a buffer's row: 16 times it is still an int

// clang-format off: a table
// Numbers of the GGUF specification.
enum class GgmlType : int32_t {
  F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8,
  Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ4_NL = 20, IQ4_XS = 23, BF16 = 30,
};
// clang-format on

enum class Scales { None, Block32, Super32, Super16 };

enum class FormatId : int { F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_0Planes, IQ4_NL, IQ4_XS, Count };
constexpr int kFormats = static_cast<int>(FormatId::Count);

struct Format {
  GgmlType type;
  int file_values;      // values in one block of the file
  int file_bytes;       // bytes of one block of the file
  Scales scales;        // None: floats, panels are [cols][16]
  int bits;             // of a packed quant: 4, 5, 6 or 8; of a float otherwise
  int offset;           // subtracted from the unsigned quant
  bool mins;            // value = scale * q + min (Block32) or scale * q - min (Super)
  bool levels = false;  // what is packed are places in kLevels

  constexpr bool is_float() const { return scales == Scales::None; }
  constexpr bool wide() const { return bits == 8 || levels; }  // unsigned quants of more than 6 bits
  constexpr int groups() const { return scales == Scales::Super16 ? 2 : 1; }
  constexpr size_t quant_bytes() const { return static_cast<size_t>(bits) * kPanelRows * kBlock / 8; }
  // Bytes of scales that precede the quants of each 32 columns, and of each 256.
  constexpr size_t block_header() const {
    const size_t each = scales == Scales::Block32 ? 32 : scales == Scales::None ? 0 : 16u * static_cast<size_t>(groups());
    return each * (mins ? 2 : 1);
  }
  constexpr size_t super_header() const { return scales == Scales::Super32 || scales == Scales::Super16 ? (mins ? 64 : 32) : 0; }
  constexpr size_t panel_bytes(int cols) const {
    if (is_float()) return static_cast<size_t>(cols) * kPanelRows * static_cast<size_t>(bits) / 8;
    const size_t blocks = static_cast<size_t>(cols / kBlock), supers = static_cast<size_t>(cols / kSuperBlock);
    return blocks * (block_header() + quant_bytes()) + supers * super_header();
  }
};

// clang-format off: a table
constexpr Format kFormat[kFormats] = {
    {GgmlType::F32, 1, 4, Scales::None, 32, 0, false},
    {GgmlType::F16, 1, 2, Scales::None, 16, 0, false},
    {GgmlType::BF16, 1, 2, Scales::None, 16, 0, false},
    {GgmlType::Q4_0, 32, 18, Scales::Block32, 4, 8, false},
    {GgmlType::Q4_1, 32, 20, Scales::Block32, 4, 0, true},
    {GgmlType::Q5_0, 32, 22, Scales::Block32, 5, 16, false},
    {GgmlType::Q5_1, 32, 24, Scales::Block32, 5, 0, true},
    {GgmlType::Q8_0, 32, 34, Scales::Block32, 8, 128, false},
    {GgmlType::Q2_K, 256, 84, Scales::Super16, 4, 0, true},
    {GgmlType::Q3_K, 256, 110, Scales::Super16, 4, 4, false},
    {GgmlType::Q4_K, 256, 144, Scales::Super32, 4, 0, true},
    {GgmlType::Q5_K, 256, 176, Scales::Super32, 5, 0, true},
    {GgmlType::Q6_K, 256, 210, Scales::Super16, 6, 32, false},
    {GgmlType::Q8_0, 32, 34, Scales::Block32, 8, 128, false},  // in two planes
    {GgmlType::IQ4_NL, 32, 18, Scales::Block32, 4, 128, false, true},
    {GgmlType::IQ4_XS, 256, 136, Scales::Super32, 4, 128, false, true},
};
// clang-format on

// The sixteen levels of IQ4_NL and IQ4_XS as GGML defines them, and the offset of 128: -127, -104, -83 ... 113. Weights are normal
// rather than uniform, so levels lie closer together about zero.
alignas(16) constexpr uint8_t kLevels[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

constexpr int kVocabularyRows = 16384;  // a Q8_0 matrix of at least so many rows is kept in two planes
constexpr size_t kPlaneBytes = kPanelRows * kBlock / 2;

constexpr const Format& format(FormatId id) { return kFormat[static_cast<int>(id)]; }

// 32 activations as 16-bit integers in two signed bytes: x ~ d * (256 * high + low). One byte alone does for perplexity
// (precision "int8"), but lets a greedy choice flip where the best two logits lie tenths of a nat apart.
struct ActBlock {
  int8_t high[kBlock], low[kBlock];
  float d;
  float s;         // d * (sum of the integers): the factor of a weight block's min
  int32_t sum[2];  // of the integers, each 16: the factor of a weight block's offset
};
static_assert(sizeof(ActBlock) == 80);

// 32 activations in one byte each: x ~ d * high, with a scale for each half.
struct alignas(64) ByteBlock {
  int8_t high[kBlock];
  int32_t less[2];  // minus the sum of each half's bytes: the factor of a weight block's offset
  float d[2];
  float s[2], all;  // d * (sum of the bytes) of each half, and both: the factors of a weight block's min
};

// IEEE half precision, in plain integer arithmetic so that every ISA gives the same bits. Static, because a copy compiled
// for one ISA must not be linked into code for all.
static inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  uint32_t exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu, bits;
  if (exponent == 0x1f) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else if (mantissa == 0) {
    bits = sign;
  } else {
    exponent = 113;
    while (!(mantissa & 0x400u)) mantissa <<= 1, --exponent;
    bits = sign | (exponent << 23) | ((mantissa & 0x3ffu) << 13);
  }
  return __builtin_bit_cast(float, bits);
}

// Round to nearest, ties to even; what overflows becomes infinity.
static inline uint16_t float_to_half(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value), sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: let the adder round at the right bit
    const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (__builtin_bit_cast(uint32_t, shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

static inline float bfloat_to_float(uint16_t h) { return __builtin_bit_cast(float, static_cast<uint32_t>(h) << 16); }

}  // namespace millis
