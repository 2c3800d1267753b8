// The output matrix in two planes, part of kernels_body.h: all of it, or the high nibbles alone with a bound of what the
// low ones may add.

namespace millis {
namespace {

struct TwoPlanes {
  static constexpr bool wide = true;
  const uint8_t *high, *low;
  template <int j>
  U8 vector() const {
    const U8 four = quants<4, j>(low);
    return with_high_bits < j<4 ? 0 : 4, 15>(four, load_bytes(high + 64 * (j % 4)));
  }
};

template <int M>
void planes_rows(const uint8_t* p, const uint8_t* low_plane, int cols, const ActBlock* x, size_t stride, float* tile) {
  constexpr Format f = format(FormatId::Q8_0Planes);
  F32 total[M];
  for (int m = 0; m < M; ++m) total[m] = set1(0.0f);
  for (int b = 0; b < cols / kBlock; ++b, ++x, p += f.block_header() + kPlaneBytes, low_plane += kPlaneBytes) {
    prefetch_weights<f.block_header() + kPlaneBytes, M>(p);
    prefetch_weights<kPlaneBytes, M>(low_plane);
    const F32 d = load_half(reinterpret_cast<const uint16_t*>(p));
    I32 high[M], low[M];
    for (int m = 0; m < M; ++m) high[m] = set1_i32(0), low[m] = set1_i32(-(f.offset - kWideOffset) * (x[m * stride].sum[0] + x[m * stride].sum[1]));
    dot_vectors<0, 8, M>(TwoPlanes{p + f.block_header(), low_plane}, x, stride, high, low);
    for (int m = 0; m < M; ++m) total[m] = fma(mul(d, set1(x[m * stride].d)), to_float(times_256_plus(high[m], low[m])), total[m]);
  }
  for (int m = 0; m < M; ++m) store(tile + m * kPanelRows, total[m]);
}

void planes_panel(const uint8_t* high, const uint8_t* low, int cols, const ActBlock* x, size_t stride, int rows, float* tile) {
  in_row_groups(x, stride, rows, tile, [&]<int M>(const ActBlock* at, float* to) { planes_rows<M>(high, low, cols, at, stride, to); });
}

using Nibbles = Block<kFormat[static_cast<int>(FormatId::Q4_0)]>;  // the first plane is one of these

// A quant is 16 high + low, and low is taken for 7.5. Its error is that of a uniform choice of 16, and those of a row's
// weights are taken for independent.
template <int M>
void screen_rows(const uint8_t* p, int cols, const ActBlock* x, size_t stride, const ScreenBlock* s, float* tile, Bounds* bounds) {
  constexpr float kDeviations = 6.0f;
  F32 total[M], variance[M];
  for (int m = 0; m < M; ++m) total[m] = variance[m] = set1(0.0f);
  const size_t blocks = static_cast<size_t>(cols / kBlock), panel = blocks * (32 + kPlaneBytes);
  for (size_t b = 0; b < blocks; ++b, ++x, ++s) {
    prefetch<32 + kPlaneBytes, 2>(p + panel);  // the next panel
    const F32 d = load_half(reinterpret_cast<const uint16_t*>(p)), dd = mul(d, d);
    I32 high[M];
    for (int m = 0; m < M; ++m) high[m] = set1_i32(0);
    dot_high<0, 8, M>(Nibbles{p + 32}, x, stride, high);
    for (int m = 0; m < M; ++m) {
      const ScreenBlock& block = s[static_cast<size_t>(m) * blocks];
      total[m] = fma(d, fma(set1(block.scale), to_float(high[m]), set1(block.offset)), total[m]);
      variance[m] = fma(dd, set1(block.variance), variance[m]);
    }
    p += 32 + kPlaneBytes;
  }
  for (int m = 0; m < M; ++m) {
    const F32 off = mul(set1(kDeviations), sqrt(variance[m]));
    store(tile + m * kPanelRows, total[m]);
    bounds[m] = {max(total[m]), max(add(total[m], off)), max(off)};
  }
}

void screen_panel(const uint8_t* panel, int cols, const ActBlock* x, size_t stride, const ScreenBlock* s, int rows, float* tile, Bounds* bounds) {
  in_row_groups(x, stride, rows, tile, [&]<int M>(const ActBlock* at, float* to) {
    const auto done = (to - tile) / kPanelRows;
    screen_rows<M>(panel, cols, at, stride, s + done * (cols / kBlock), to, bounds + done);
  });
}

// A token that lacks c * log(2) draws so much with u >= exp(-2^-c), that is 1 - u <= 2^-c: then the first c bits it drew are ones.
bool may_win(const float* logits, float error, float most, const Choosing& race, int32_t first, uint32_t among) {
  constexpr float kDigits = 52.0f;
  const float scale = 1.44269504f / race.heat;
  uint64_t zeros[kPanelRows];
  for (int i = 0; i < kPanelRows; ++i) {
    const float lacks = (most - error - logits[i]) * scale - 0.01f;
    const int bits = lacks > 0.0f ? static_cast<int>(lacks < kDigits ? lacks : kDigits) : 0;  // nor a NaN
    const uint64_t barred = static_cast<uint64_t>(among >> i & 1) - 1;                        // all ones, or 0
    zeros[i] = ~race_bits(race.key, first + i) >> (63 - bits) >> 1 | barred;
  }
  uint64_t least = zeros[0];
  for (int i = 1; i < kPanelRows; ++i) least = zeros[i] < least ? zeros[i] : least;
  return least == 0;
}

}  // namespace
}  // namespace millis
