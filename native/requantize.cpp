// Any format to Q4_0: 32 values share a scale, so that the one of largest magnitude becomes -8 exactly.
#include "requantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "pack.h"

namespace millis {
namespace {

constexpr int kChunk = 256;       // values decoded at a time: a whole number of blocks of every type
constexpr size_t kQ4Bytes = 18;   // f16 scale, then value i in the low and i + 16 in the high nibble of byte i
constexpr float kLeast = 1e-20f;  // a block below counts as zero: its inverse could overflow

void quantize_block(const float* x, uint8_t* out) {
  float largest = 0.0f;
  for (int i = 0; i < kBlock; ++i)
    if (std::abs(x[i]) > std::abs(largest)) largest = x[i];
  const float scale = largest / -8.0f, inverse = std::abs(largest) > kLeast ? 1.0f / scale : 0.0f;
  const uint16_t d = float_to_half(scale);
  const auto quant = [&](float value) { return static_cast<uint8_t>(std::clamp(static_cast<int>(value * inverse + 8.5f), 0, 15)); };
  std::memcpy(out, &d, 2);
  for (int i = 0; i < kBlock / 2; ++i) out[2 + i] = static_cast<uint8_t>(quant(x[i]) | quant(x[i + kBlock / 2]) << 4);
}

}  // namespace

std::vector<uint8_t> to_q4_0(GgmlType type, std::span<const uint8_t> data, Pool& pool) {
  const FormatId id = format_of(type);
  const Format& f = format(id);
  const auto block_bytes = static_cast<size_t>(f.file_bytes), block_values = static_cast<size_t>(f.file_values);
  if (data.size() % block_bytes != 0 || data.size() / block_bytes * block_values % kBlock != 0)
    throw std::invalid_argument("to_q4_0: not a whole number of blocks");
  const size_t count = data.size() / block_bytes * block_values;
  std::vector<uint8_t> out(count / kBlock * kQ4Bytes);
  const size_t chunks = (count + kChunk - 1) / kChunk, threads = static_cast<size_t>(pool.threads());
  pool.run([&](int thread) {
    const auto t = static_cast<size_t>(thread);
    float values[kChunk];
    for (size_t c = chunks * t / threads; c < chunks * (t + 1) / threads; ++c) {
      const size_t first = c * kChunk, some = std::min<size_t>(kChunk, count - first);
      dequantize(id, data.data() + first / block_values * block_bytes, some, values);
      for (size_t b = 0; b < some; b += kBlock) quantize_block(values + b, out.data() + (first + b) / kBlock * kQ4Bytes);
    }
  });
  return out;
}

}  // namespace millis
