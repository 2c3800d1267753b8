// Decodes the blocks of every GGML type, and lays them out in panels.
#include "pack.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "aligned.h"

namespace millis {
namespace {

// One file block of any quantised type, decoded: value = (d * sc[g]) * (q - offset) (+ m, or - dmin * mn[g]), where levels q is a place.
struct Decoded {
  uint16_t d = 0, m = 0;             // f16 bits; m is the block's min, or dmin
  uint8_t sc[16] = {}, mn[16] = {};  // per group, of Super types; sc is signed where there are no mins
  uint8_t q[kSuperBlock] = {};
};

uint16_t read_u16(const uint8_t* p) {
  uint16_t value;
  std::memcpy(&value, p, 2);
  return value;
}

// 32 low nibbles of k 0-15 and high nibbles of k 16-31, as the Block32 types store them.
void split_nibbles(const uint8_t* src, uint8_t* q) {
  for (int i = 0; i < 16; ++i) q[i] = src[i] & 15, q[i + 16] = src[i] >> 4;
}

void add_fifth_bits(const uint8_t* src, uint8_t* q) {
  uint32_t bits;
  std::memcpy(&bits, src, 4);
  for (int i = 0; i < 32; ++i) q[i] = static_cast<uint8_t>(q[i] | ((bits >> i) & 1) << 4);
}

// Six-bit scales and mins of Q4_K and Q5_K: 8 of each in 12 bytes.
void six_bit_scales(const uint8_t* src, uint8_t* sc, uint8_t* mn) {
  for (int j = 0; j < 4; ++j) {
    sc[j] = src[j] & 63, mn[j] = src[j + 4] & 63;
    sc[j + 4] = static_cast<uint8_t>((src[j + 8] & 15) | (src[j] >> 6) << 4);
    mn[j + 4] = static_cast<uint8_t>((src[j + 8] >> 4) | (src[j + 4] >> 6) << 4);
  }
}

void decode_q2_k(const uint8_t* p, Decoded& out) {
  out.d = read_u16(p + 80), out.m = read_u16(p + 82);
  for (int g = 0; g < 16; ++g) out.sc[g] = p[g] & 15, out.mn[g] = p[g] >> 4;
  for (int k = 0; k < kSuperBlock; ++k) out.q[k] = (p[16 + k / 128 * 32 + k % 32] >> (k % 128 / 32 * 2)) & 3;
}

void decode_q3_k(const uint8_t* p, Decoded& out) {
  const uint8_t *high = p, *low = p + 32, *scales = p + 96;
  out.d = read_u16(p + 108);
  for (int g = 0; g < 16; ++g) {
    const int four = g < 8 ? scales[g] & 15 : scales[g - 8] >> 4;
    const int two = (scales[8 + g % 4] >> (g / 4 * 2)) & 3;
    out.sc[g] = static_cast<uint8_t>((four | two << 4) - 32);
  }
  for (int k = 0; k < kSuperBlock; ++k) {
    const int two = (low[k / 128 * 32 + k % 32] >> (k % 128 / 32 * 2)) & 3, third = (high[k % 32] >> (k / 32)) & 1;
    out.q[k] = static_cast<uint8_t>(two | third << 2);
  }
}

void decode_q4_k(const uint8_t* p, Decoded& out, const uint8_t* high, const uint8_t* low) {
  out.d = read_u16(p), out.m = read_u16(p + 2);
  six_bit_scales(p + 4, out.sc, out.mn);
  for (int k = 0; k < kSuperBlock; ++k) {
    const int four = (low[k / 64 * 32 + k % 32] >> (k % 64 / 32 * 4)) & 15;
    const int fifth = high ? (high[k % 32] >> (k / 32)) & 1 : 0;
    out.q[k] = static_cast<uint8_t>(four | fifth << 4);
  }
}

void decode_q6_k(const uint8_t* p, Decoded& out) {
  const uint8_t *low = p, *high = p + 128;
  std::memcpy(out.sc, p + 192, 16);
  out.d = read_u16(p + 208);
  for (int k = 0; k < kSuperBlock; ++k) {
    const int half = k / 128, quarter = k % 128 / 32, i = k % 32;
    const int four = (low[half * 64 + quarter % 2 * 32 + i] >> (quarter / 2 * 4)) & 15;
    out.q[k] = static_cast<uint8_t>(four | ((high[half * 32 + i] >> (quarter * 2)) & 3) << 4);
  }
}

void decode_iq4_xs(const uint8_t* p, Decoded& out) {
  const uint16_t high = read_u16(p + 2);
  out.d = read_u16(p);
  for (int b = 0; b < 8; ++b) {
    const int four = (p[4 + b / 2] >> (b % 2 * 4)) & 15, two = (high >> (2 * b)) & 3;
    out.sc[b] = static_cast<uint8_t>((four | two << 4) - 32);
    split_nibbles(p + 8 + 16 * b, out.q + kBlock * b);
  }
}

void decode(FormatId id, const uint8_t* p, Decoded& out) {
  out.d = read_u16(p);
  switch (id) {
    case FormatId::Q4_0:
    case FormatId::IQ4_NL: return split_nibbles(p + 2, out.q);
    case FormatId::Q4_1: return out.m = read_u16(p + 2), split_nibbles(p + 4, out.q);
    case FormatId::Q5_0: return split_nibbles(p + 6, out.q), add_fifth_bits(p + 2, out.q);
    case FormatId::Q5_1: return out.m = read_u16(p + 2), split_nibbles(p + 8, out.q), add_fifth_bits(p + 4, out.q);
    case FormatId::Q8_0:
    case FormatId::Q8_0Planes:
      for (int i = 0; i < 32; ++i) out.q[i] = p[2 + i] ^ 0x80;
      return;
    case FormatId::Q2_K: return decode_q2_k(p, out);
    case FormatId::Q3_K: return decode_q3_k(p, out);
    case FormatId::Q4_K: return decode_q4_k(p, out, nullptr, p + 16);
    case FormatId::Q5_K: return decode_q4_k(p, out, p + 16, p + 48);
    case FormatId::Q6_K: return decode_q6_k(p, out);
    case FormatId::IQ4_XS: return decode_iq4_xs(p, out);
    default: throw std::logic_error("decode: not a quantised format");
  }
}

float decoded_value(const Format& f, const Decoded& b, int k) {
  const float d = half_to_float(b.d), m = half_to_float(b.m);
  const float q = static_cast<float>((f.levels ? kLevels[b.q[k]] : b.q[k]) - f.offset);
  if (f.scales == Scales::Block32) return f.mins ? d * q + m : d * q;
  const int g = k / (f.scales == Scales::Super16 ? 16 : 32);
  if (f.mins) return d * static_cast<float>(b.sc[g]) * q - m * static_cast<float>(b.mn[g]);
  return d * static_cast<float>(static_cast<int8_t>(b.sc[g])) * q;
}

// Writes 32 quants of row r into the planes of one packed block, whose bytes are zero before the first row.
void place_quants(int bits, int r, const uint8_t* q, uint8_t* out) {
  for (int k = 0; k < kBlock; ++k) {
    const int j = k / 4, at = 4 * r + k % 4, value = q[k];
    if (bits == 8) {
      out[64 * j + at] = static_cast<uint8_t>(value);
      continue;
    }
    out[64 * (j % 4) + at] |= static_cast<uint8_t>((value & 15) << (j / 4 * 4));
    if (bits == 5) out[256 + at] |= static_cast<uint8_t>((value >> 4) << j);
    if (bits == 6) out[256 + 64 * (j / 4) + at] |= static_cast<uint8_t>((value >> 4) << (j % 4 * 2));
  }
}

int take_quant(int bits, int r, int k, const uint8_t* in) {
  const int j = k / 4, at = 4 * r + k % 4;
  if (bits == 8) return in[64 * j + at];
  int value = (in[64 * (j % 4) + at] >> (j / 4 * 4)) & 15;
  if (bits == 5) value |= ((in[256 + at] >> j) & 1) << 4;
  if (bits == 6) value |= ((in[256 + 64 * (j / 4) + at] >> (j % 4 * 2)) & 3) << 4;
  return value;
}

void put_half(uint8_t* at, int r, uint16_t bits) { std::memcpy(at + 2 * r, &bits, 2); }

// One row of a Block32 panel. `src`: the row's blocks in the file.
void pack_row_block32(FormatId id, int r, int cols, const uint8_t* src, uint8_t* panel) {
  const Format& f = format(id);
  Decoded block;
  for (int b = 0; b < cols / kBlock; ++b, src += f.file_bytes) {
    decode(id, src, block);
    put_half(panel, r, block.d);
    if (f.mins) put_half(panel + 32, r, block.m);
    place_quants(f.bits, r, block.q, panel + f.block_header());
    panel += f.block_header() + f.quant_bytes();
  }
}

void pack_row_planes(int r, int cols, const uint8_t* src, uint8_t* high_plane, uint8_t* low_plane) {
  constexpr Format f = format(FormatId::Q8_0Planes);
  Decoded block;
  for (int b = 0; b < cols / kBlock; ++b, src += f.file_bytes, low_plane += kPlaneBytes) {
    decode(FormatId::Q8_0Planes, src, block);
    put_half(high_plane, r, block.d);
    uint8_t high[kBlock];
    for (int k = 0; k < kBlock; ++k) high[k] = block.q[k] >> 4, block.q[k] &= 15;
    high_plane += f.block_header();
    place_quants(4, r, high, high_plane);
    place_quants(4, r, block.q, low_plane);
    high_plane += kPlaneBytes;
  }
}

void pack_row_super(FormatId id, int r, int cols, const uint8_t* src, uint8_t* panel) {
  const Format& f = format(id);
  const int groups = f.groups();
  Decoded block;
  for (int s = 0; s < cols / kSuperBlock; ++s, src += f.file_bytes) {
    decode(id, src, block);
    put_half(panel, r, block.d);
    if (f.mins) put_half(panel + 32, r, block.m);
    panel += f.super_header();
    for (int b = 0; b < 8; ++b) {
      for (int g = 0; g < groups; ++g) {
        panel[16 * g + r] = block.sc[b * groups + g];
        if (f.mins) panel[16 * (groups + g) + r] = block.mn[b * groups + g];
      }
      place_quants(f.bits, r, block.q + b * kBlock, panel + f.block_header());
      panel += f.block_header() + f.quant_bytes();
    }
  }
}

template <class T>
void pack_row_float(int r, int cols, const uint8_t* src, uint8_t* panel) {
  for (int k = 0; k < cols; ++k)
    std::memcpy(panel + sizeof(T) * static_cast<size_t>(k * kPanelRows + r), src + sizeof(T) * static_cast<size_t>(k), sizeof(T));
}

void pack_row(FormatId id, int r, int cols, const uint8_t* src, uint8_t* panel) {
  if (id == FormatId::F32) return pack_row_float<float>(r, cols, src, panel);
  if (format(id).is_float()) return pack_row_float<uint16_t>(r, cols, src, panel);
  if (format(id).scales == Scales::Block32) return pack_row_block32(id, r, cols, src, panel);
  pack_row_super(id, r, cols, src, panel);
}

}  // namespace

std::shared_ptr<uint8_t> panel_memory(size_t bytes) {
  const size_t with_tail = bytes + kCacheLine;  // which vector loads may touch
  std::shared_ptr<uint8_t> memory = large_memory(with_tail);
  std::memset(memory.get(), 0, with_tail);
  return memory;
}

FormatId format_of(GgmlType type) {
  for (int i = 0; i < kFormats; ++i)
    if (kFormat[i].type == type) return static_cast<FormatId>(i);
  throw std::invalid_argument("GGML type " + std::to_string(static_cast<int>(type)) + " is not supported");
}

FormatId packed_format_of(GgmlType type, int rows) {
  return type == GgmlType::Q8_0 && rows >= kVocabularyRows ? FormatId::Q8_0Planes : format_of(type);
}

void dequantize(FormatId id, const uint8_t* data, size_t count, float* out) {
  const Format& f = format(id);
  if (f.is_float()) {
    for (size_t i = 0; i < count; ++i) {
      if (id == FormatId::F32) std::memcpy(out + i, data + 4 * i, 4);
      else out[i] = id == FormatId::F16 ? half_to_float(read_u16(data + 2 * i)) : bfloat_to_float(read_u16(data + 2 * i));
    }
    return;
  }
  Decoded block;
  for (size_t i = 0; i < count; i += static_cast<size_t>(f.file_values), data += f.file_bytes) {
    decode(id, data, block);
    for (int k = 0; k < f.file_values; ++k) out[i + static_cast<size_t>(k)] = decoded_value(f, block, k);
  }
}

Matrix::Matrix(std::string name, GgmlType type, int rows, int cols, std::span<const uint8_t> data, bool as_f32, Pool& pool)
    : name_(std::move(name)), format_(packed_format_of(type, rows)), rows_(rows), cols_(cols) {
  const FormatId source = format_;
  const Format& from = format(source);
  if (rows < 1 || cols < 1 || rows > kMostSide || cols > kMostSide)
    throw std::invalid_argument(name_ + ": " + std::to_string(rows) + " rows of " + std::to_string(cols) + " values are out of range");
  if (cols % from.file_values != 0)
    throw std::invalid_argument(name_ + ": a row of " + std::to_string(cols) + " values is not a whole number of blocks");
  const size_t row_bytes = static_cast<size_t>(cols / from.file_values) * static_cast<size_t>(from.file_bytes);
  if (data.size() != row_bytes * static_cast<size_t>(rows))
    throw std::invalid_argument(name_ + ": " + std::to_string(data.size()) + " bytes do not fit its type and shape");
  if (as_f32) format_ = FormatId::F32;
  panel_bytes_ = format(format_).panel_bytes(cols);
  set_strides();
  const std::shared_ptr<uint8_t> panels_data = panel_memory(bytes());
  data_ = panels_data;
  const auto threads = static_cast<size_t>(pool.threads()), width = static_cast<size_t>(cols);
  std::vector<float> values(as_f32 ? threads * width : 0);  // a row for each thread
  pool.run([&](int thread) {
    const Range mine = share(panels(), thread, pool.threads());
    const int last = std::min(rows, mine.last * kPanelRows);
    for (int row = mine.first * kPanelRows; row < last; ++row) {
      const uint8_t* src = data.data() + row_bytes * static_cast<size_t>(row);
      if (as_f32) {
        float* floats = values.data() + static_cast<size_t>(thread) * width;
        dequantize(source, src, width, floats);
        src = reinterpret_cast<const uint8_t*>(floats);
      }
      const int p = row / kPanelRows, r = row % kPanelRows;
      const auto at = [&](const uint8_t* place) { return panels_data.get() + (place - panels_data.get()); };
      if (format_ == FormatId::Q8_0Planes) pack_row_planes(r, cols, src, at(panel(p)), at(low_plane(p)));
      else pack_row(format_, r, cols, src, at(panel(p)));
    }
  });
}

Matrix::Matrix(std::string name, FormatId format_id, int rows, int cols, std::shared_ptr<const uint8_t> panels)
    : name_(std::move(name)),
      format_(format_id),
      rows_(rows),
      cols_(cols),
      panel_bytes_(format(format_id).panel_bytes(cols)),
      data_(std::move(panels)) {
  set_strides();
}

void Matrix::set_strides() {
  const size_t low = format_ == FormatId::Q8_0Planes ? kPlaneBytes * static_cast<size_t>(cols_ / kBlock) : 0;
  stride_ = panel_bytes_ - low;
}

void multiply_panel(const Kernels& k, const Matrix& w, int p, const ActBlock* x, size_t stride, int rows, float* tile, Ahead* ahead) {
  Ahead none;
  if (w.format_id() == FormatId::Q8_0Planes) k.planes_panel(w.panel(p), w.low_plane(p), w.cols(), x, stride, rows, tile);
  else k.quant_panel[static_cast<int>(w.format_id())](w.panel(p), w.cols(), x, stride, rows, tile, ahead ? *ahead : none);
}

void Matrix::unpack_row(int row, float* out) const {
  const Format& f = format(format_);
  const uint8_t* at = panel(row / kPanelRows);
  const int r = row % kPanelRows;
  if (f.is_float()) {
    const size_t width = static_cast<size_t>(f.bits) / 8;
    for (int k = 0; k < cols_; ++k) dequantize(format_, at + width * static_cast<size_t>(k * kPanelRows + r), 1, out + k);
    return;
  }
  Decoded block;
  if (format_ == FormatId::Q8_0Planes) {
    const uint8_t* low = low_plane(row / kPanelRows);
    for (int b = 0; b < cols_ / kBlock; ++b, at += f.block_header() + kPlaneBytes, low += kPlaneBytes) {
      block.d = read_u16(at + 2 * r);
      for (int k = 0; k < kBlock; ++k) {
        block.q[k] = static_cast<uint8_t>(take_quant(4, r, k, at + f.block_header()) << 4 | take_quant(4, r, k, low));
        out[b * kBlock + k] = decoded_value(f, block, k);
      }
    }
    return;
  }
  for (int b = 0; b < cols_ / kBlock; ++b) {
    if (f.scales == Scales::Block32 || b % 8 == 0) {
      block.d = read_u16(at + 2 * r);
      if (f.mins) block.m = read_u16(at + 32 + 2 * r);
      at += f.super_header();
    }
    const int groups = f.groups();
    for (int g = 0; f.scales != Scales::Block32 && g < groups; ++g) {
      block.sc[g] = at[16 * g + r];
      if (f.mins) block.mn[g] = at[16 * (groups + g) + r];
    }
    for (int k = 0; k < kBlock; ++k) {
      block.q[k] = static_cast<uint8_t>(take_quant(f.bits, r, k, at + f.block_header()));
      out[b * kBlock + k] = decoded_value(f, block, k);
    }
    at += f.block_header() + f.quant_bytes();
  }
}

}  // namespace millis
