// Products of Q8_0 weights and activations of one byte, part of kernels_body.h: one pass over the weights where ActBlock takes two.

#ifndef MILLIS_BYTE_ROWS
#define MILLIS_BYTE_ROWS 4  // rows of activations whose sums stay in registers together
#endif

namespace millis {
namespace {

template <int M>
void bytes_rows(const uint8_t* p, int cols, const ByteBlock* x, size_t stride, float* tile) {
  constexpr Format f = format(FormatId::Q8_0);
  constexpr int offset = f.offset - kWideOffset;
  F32 total[M];
  for (F32& t : total) t = set1(0.0f);
  for (int b = 0; b < cols / kBlock; ++b, ++x, p += f.block_header() + f.quant_bytes()) {
    prefetch_blocks<f.block_header() + f.quant_bytes()>(p);
    I32 sum[M];  // below 2^21
    for (int m = 0; m < M; ++m) sum[m] = set1_i32(offset == 0 ? 0 : -offset * x[static_cast<size_t>(m) * stride].sum);
    dot_high<0, 8, M>(Block<f.bits>{p + f.block_header()}, x, stride, sum);
    const F32 scale = load_half(reinterpret_cast<const uint16_t*>(p));
    for (int m = 0; m < M; ++m) total[m] = fma(mul(scale, set1(x[static_cast<size_t>(m) * stride].d)), to_float(sum[m]), total[m]);
  }
  for (int m = 0; m < M; ++m) store(tile + m * kPanelRows, total[m]);
}

template <int M>
inline void bytes_some(const uint8_t* p, int cols, const ByteBlock* x, size_t stride, int rows, float* tile) {
  if (rows == M) bytes_rows<M>(p, cols, x, stride, tile);
  else if constexpr (M > 1) bytes_some<M - 1>(p, cols, x, stride, rows, tile);
}

// Rows are taken in groups of nearly equal size.
void bytes_panel(const uint8_t* p, int cols, const ByteBlock* x, size_t stride, int rows, float* tile) {
  for (int groups = (rows + MILLIS_BYTE_ROWS - 1) / MILLIS_BYTE_ROWS; groups > 0; --groups) {
    const int some = (rows + groups - 1) / groups;
    bytes_some<MILLIS_BYTE_ROWS>(p, cols, x, stride, some, tile);
    x += static_cast<size_t>(some) * stride, tile += some * kPanelRows, rows -= some;
  }
}

void quantize_bytes(const float* x, size_t n, ByteBlock* out) {
  constexpr float kMost = 127.0f, kLeast = 1e-30f;  // a block below counts as zero: its inverse could overflow
  for (; n >= kBlock; n -= kBlock, x += kBlock, ++out) {
    const F32 first = load(x), second = load(x + kLanes);
    const float largest = max(max(abs(first), abs(second)));
    const F32 scale = set1(largest >= kLeast ? kMost / largest : 0.0f);
    const F32 whole[2] = {round(mul(first, scale)), round(mul(second, scale))};
    const float all = sum(add(whole[0], whole[1]));
    if (all != all) {  // x holds a NaN or an infinity: let the product be NaN
      *out = ByteBlock{};
      out->d = all;
      continue;
    }
    store_i8(out->high, whole[0]), store_i8(out->high + kLanes, whole[1]);
    out->d = largest / kMost, out->sum = static_cast<int32_t>(all);
  }
}

}  // namespace
}  // namespace millis
