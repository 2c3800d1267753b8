// Any format to IQ4_NL, with less of a search than quantize.cpp makes: at load there is a second or two for it.
#include "requantize.h"

#include <stdexcept>

#include "pack.h"
#include "quantize.h"

namespace millis {
namespace {

constexpr int kChunk = 256;    // values decoded at a time: a whole number of blocks of every type
constexpr size_t kBytes = 18;  // f16 scale, then place i in the low and i + 16 in the high nibble of byte i

}  // namespace

std::vector<uint8_t> to_iq4_nl(GgmlType type, std::span<const uint8_t> data, Pool& pool) {
  const FormatId id = format_of(type);
  const Format& f = format(id);
  const auto block_bytes = static_cast<size_t>(f.file_bytes), block_values = static_cast<size_t>(f.file_values);
  if (data.size() % block_bytes != 0 || data.size() / block_bytes * block_values % kBlock != 0)
    throw std::invalid_argument("to_iq4_nl: not a whole number of blocks");
  const size_t count = data.size() / block_bytes * block_values;
  std::vector<uint8_t> out(count / kBlock * kBytes);
  const size_t chunks = (count + kChunk - 1) / kChunk, threads = static_cast<size_t>(pool.threads());
  pool.run([&](int thread) {
    const auto t = static_cast<size_t>(thread);
    float values[kChunk];
    for (size_t c = chunks * t / threads; c < chunks * (t + 1) / threads; ++c) {
      const size_t first = c * kChunk, some = std::min<size_t>(kChunk, count - first);
      dequantize(id, data.data() + first / block_values * block_bytes, some, values);
      for (size_t b = 0; b < some; b += kBlock) quick_iq4_nl(values + b, out.data() + (first + b) / kBlock * kBytes);
    }
  });
  return out;
}

}  // namespace millis
