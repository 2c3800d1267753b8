// The kernels, written once over the Vec vocabulary. Each kernels_<isa>.cpp includes this after choosing a namespace
// MILLIS_VEC. Nothing here may have external linkage: the same templates are compiled with different instructions.
#include <cmath>

#include "kernels.h"

namespace millis {
namespace {

using namespace MILLIS_VEC;

constexpr float kMasked = -2e30f;  // a score no softmax sees; below the start of the running maximum
constexpr float kNoScore = -1e30f;

// e^x to about 1 ulp for x in [-87, 88], clamped outside: x = n ln 2 + r, then a polynomial in r (Cephes, expf). NaN stays NaN:
// x86's max and min give their second operand where one is none.
inline F32 exp(F32 x) {
  x = min(set1(88.0f), max(set1(-87.0f), x));
  const F32 n = round(mul(x, set1(1.44269504f)));
  const F32 r = fnma(n, set1(-2.12194440e-4f), fnma(n, set1(0.693359375f), x));
  F32 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  return mul(add(fma(mul(r, r), p, r), set1(1.0f)), exp2_whole(n));
}

// 2^x for x <= 0 to 3e-6, 0 far below: a polynomial in what lies above the next whole number (minimax of the relative error). NaN stays NaN.
inline F32 exp2(F32 x) {
#ifdef MILLIS_SCALE
  const F32 r = above_floor(x);
#else
  x = max(set1(-126.0f), x);
  const F32 n = round(sub(x, set1(0.5f))), r = sub(x, n);
#endif
  F32 p = set1(1.3534167781e-2f);
  p = fma(p, r, set1(5.2011460066e-2f));
  p = fma(p, r, set1(2.4144275486e-1f));
  p = fma(p, r, set1(6.9300383329e-1f));
  p = fma(p, r, set1(1.0000026226f));
#ifdef MILLIS_SCALE
  return times_exp2_floor(p, x);
#else
  return mul(p, exp2_whole(n));
#endif
}

// x (1 + erf(x / sqrt 2)) / 2 to 4e-7, by erf's formula 7.1.26 of Abramowitz and Stegun (1964).
inline F32 gelu(F32 x) {
  const F32 size = abs(x), z = mul(size, set1(0.70710678f)), t = div(set1(1.0f), fma(z, set1(0.3275911f), set1(1.0f)));
  F32 p = fma(t, set1(1.061405429f), set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  const F32 rest = mul(mul(p, t), exp(sub(set1(0.0f), mul(z, z))));  // 1 - erf(z)
  return fnma(mul(size, set1(0.5f)), rest, max(x, set1(0.0f)));
}

inline F32 activate(F32 x, Activation kind) {
  if (kind == Activation::None) return x;
  if (kind == Activation::Gelu) return gelu(x);
  if (kind == Activation::Relu) return max(set1(0.0f), x);
  if (kind == Activation::Tanh) return sub(set1(1.0f), div(set1(2.0f), add(set1(1.0f), exp(add(x, x)))));
  F32 z = x;  // silu is x sigmoid(x); gelu's tanh form is x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))
  if (kind == Activation::GeluTanh) z = mul(mul(set1(1.5957691216f), x), fma(mul(x, x), set1(0.044715f), set1(1.0f)));
  return div(x, add(set1(1.0f), exp(sub(set1(0.0f), z))));
}

// ---- products -----------------------------------------------------------------------------------------------------

// The bytes of vector j of a packed block.
template <int bits, int j>
inline U8 quants(const uint8_t* p) {
  if constexpr (bits == 8) return load_bytes(p + 64 * j);
  const U8 plane = load_bytes(p + 64 * (j % 4));
  const U8 four = j < 4 ? low_nibbles(plane) : high_nibbles(plane);
  if constexpr (bits == 5) return with_high_bits<j, 1>(four, load_bytes(p + 256));
  if constexpr (bits == 6) return with_high_bits<j % 4 * 2, 3>(four, load_bytes(p + 256 + 64 * (j / 4)));
  return four;
}

// The same as unsigned bytes of a format.
template <const Format& f, int j>
inline U8 weights(const uint8_t* p) {
  if constexpr (f.levels) return looked_up(kLevels, quants<f.bits, j>(p));
  else return quants<f.bits, j>(p);
}

template <const Format& f>
struct Block {
  static constexpr bool wide = f.wide();
  const uint8_t* p;
  template <int j>
  U8 vector() const {
    return weights<f, j>(p);
  }
};

// Block after block with something to compute on each, memory's own prefetching falls behind: so what lies some way on is asked for.
template <size_t bytes, int cache>
inline void prefetch(const uint8_t* at) {
  for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line, 0, cache == 1 ? 3 : 2);
}

// M rows of activations by this block. Few rows wait for memory, for which the first cache can wait for few lines at once; then nothing
// else goes on. So they ask for what is far ahead, and into the second. Many rows compute meanwhile, and want it nearby; where they are
// soon done with a block, `far`, they ask for it twice.
template <size_t block_bytes, int M, bool far = false>
inline void prefetch_weights(const uint8_t* p) {
  constexpr size_t kFar = size_t{6} << 10, kNear = 4 * block_bytes;
  constexpr int kFewRows = 4;
  if constexpr (M <= kFewRows || far) prefetch<block_bytes, 2>(p + kFar);
  if constexpr (M > kFewRows) prefetch<block_bytes, 1>(p + kNear);
}

// Vectors [first, first + count) of a block times the same columns of M rows of activations.
template <int first, int count, int M, class Quants>
[[gnu::always_inline]] inline void dot_vectors(const Quants& q, const ActBlock* x, size_t stride, I32 (&high)[M], I32 (&low)[M]) {
  if constexpr (kParts > 1) {
    const int8_t* columns[M];
    for (int m = 0; m < M; ++m) columns[m] = x[m * stride].high + 4 * first;
    const auto weights = [&]<int i, int j>() __attribute__((always_inline)) {
      U8 w = q.template vector<first + j>();
      return part<i>(w);
    };
    dot_columns<Quants::wide, count>(weights, columns, high, low);
  } else {
    const U8 w = q.template vector<first>();
    for (int m = 0; m < M; ++m) {
      high[m] = dot4<Quants::wide>(high[m], w, x[m * stride].high + 4 * first);
      low[m] = dot4<Quants::wide>(low[m], w, x[m * stride].low + 4 * first);
    }
    if constexpr (count > 1) dot_vectors<first + 1, count - 1, M>(q, x, stride, high, low);
  }
}

// The same of the activations' high bytes alone.
template <int first, int count, int M, class Quants, class Act>
[[gnu::always_inline]] inline void dot_high(const Quants& q, const Act* x, size_t stride, I32 (&high)[M]) {
  if constexpr (kParts > 1) {
    I32 low[M];
    for (int m = 0; m < M; ++m) low[m] = set1_i32(0);
    dot_vectors<first, count, M>(q, x, stride, high, low);
  } else {
    const U8 w = q.template vector<first>();
    for (int m = 0; m < M; ++m) high[m] = dot4<Quants::wide>(high[m], w, x[m * stride].high + 4 * first);
    if constexpr (count > 1) dot_high<first + 1, count - 1, M>(q, x, stride, high);
  }
}

inline void ask(Ahead& ahead) {
  for (int i = 0; i < ahead.lines && ahead.span != ahead.last; ++i) {
    __builtin_prefetch(ahead.span->at, 0, 2);
    if ((ahead.span->at += 64) >= ahead.span->end) ++ahead.span;
  }
}

template <const Format& f, int M>
void quant_rows(const uint8_t* p, int cols, const ActBlock* x, size_t stride, float* tile, Ahead& ahead) {
  constexpr int groups = f.groups(), vectors = 8 / groups;
  constexpr bool super = f.scales != Scales::Block32;
  constexpr int offset = f.offset - (f.wide() ? kWideOffset : 0);
  F32 total[M];
  for (int m = 0; m < M; ++m) total[m] = set1(0.0f);
  F32 d = set1(0.0f), dmin = d;
  for (int b = 0; b < cols / kBlock; ++b, ++x) {
    if (!super || b % 8 == 0) {
      d = load_half(reinterpret_cast<const uint16_t*>(p));
      if constexpr (f.mins) dmin = load_half(reinterpret_cast<const uint16_t*>(p + 32));
      p += f.super_header();
    }
    const uint8_t* q = p + f.block_header();
    prefetch_weights<f.block_header() + f.quant_bytes(), M>(p);
    if (ahead.span != ahead.last) ask(ahead);
    const auto group = [&]<int g>() __attribute__((always_inline)) {
      I32 high[M], low[M];  // their sums stay below 2^28
      for (int m = 0; m < M; ++m) {
        const int32_t sum = groups == 1 ? x[m * stride].sum[0] + x[m * stride].sum[1] : x[m * stride].sum[g];
        high[m] = set1_i32(0), low[m] = set1_i32(offset == 0 ? 0 : -offset * sum);
      }
      dot_vectors<g * vectors, vectors, M>(Block<f>{q}, x, stride, high, low);
      F32 scale = d, least = dmin;
      if constexpr (super) scale = mul(d, f.mins ? load_u8(p + 16 * g) : load_i8(p + 16 * g));
      if constexpr (super && f.mins) least = mul(dmin, load_u8(p + 16 * (groups + g)));
      for (int m = 0; m < M; ++m) {
        const ActBlock& a = x[m * stride];
        total[m] = fma(mul(scale, set1(a.d)), to_float(times_256_plus(high[m], low[m])), total[m]);
        const float s = groups == 1 ? a.s : a.d * static_cast<float>(a.sum[g]);
        if constexpr (f.mins) total[m] = super ? fnma(least, set1(s), total[m]) : fma(least, set1(s), total[m]);
      }
    };
    group.template operator()<0>();
    if constexpr (groups == 2) group.template operator()<1>();
    p = q + f.quant_bytes();
  }
  for (int m = 0; m < M; ++m) store(tile + m * kPanelRows, total[m]);
}

template <FormatId id>
inline F32 load_weights(const uint8_t* p, size_t at) {
  if constexpr (id == FormatId::F32) return load(reinterpret_cast<const float*>(p) + at);
  if constexpr (id == FormatId::F16) return load_half(reinterpret_cast<const uint16_t*>(p) + at);
  return load_bfloat(reinterpret_cast<const uint16_t*>(p) + at);
}

// U partial sums for each row hide the latency of the adds where M is small.
template <FormatId id, int M>
void float_rows(const uint8_t* p, int cols, const float* x, size_t stride, float* tile) {
  constexpr int U = M >= 4 ? 1 : M >= 2 ? 2 : 4;
  F32 total[M][U];
  for (auto& row : total)
    for (F32& part : row) part = set1(0.0f);
  int k = 0;
  for (; k + U <= cols; k += U)
    for (int u = 0; u < U; ++u) {
      const F32 w = load_weights<id>(p, static_cast<size_t>(k + u) * kPanelRows);
      for (int m = 0; m < M; ++m) total[m][u] = fma(w, set1(x[m * stride + static_cast<size_t>(k + u)]), total[m][u]);
    }
  for (; k < cols; ++k) {
    const F32 w = load_weights<id>(p, static_cast<size_t>(k) * kPanelRows);
    for (int m = 0; m < M; ++m) total[m][0] = fma(w, set1(x[m * stride + static_cast<size_t>(k)]), total[m][0]);
  }
  for (int m = 0; m < M; ++m) {
    for (int u = 1; u < U; ++u) total[m][0] = add(total[m][0], total[m][u]);
    store(tile + m * kPanelRows, total[m][0]);
  }
}

#ifndef MILLIS_ROWS
#define MILLIS_ROWS 8  // of activations whose sums stay in registers together
#endif

template <int M, class X, class Rows>
inline void some_rows(const X* x, int rows, float* tile, const Rows& call) {
  if (rows == M) call.template operator()<M>(x, tile);
  else if constexpr (M > 1) some_rows<M - 1>(x, rows, tile, call);
}

// Calls rows<M> for as many rows at a time as the registers hold.
template <class X, class Rows>
inline void in_row_groups(const X* x, size_t stride, int rows, float* tile, const Rows& call) {
  for (int m; rows > 0; x += static_cast<size_t>(m) * stride, tile += m * kPanelRows, rows -= m) {
    m = rows < MILLIS_ROWS ? rows : MILLIS_ROWS;
    some_rows<MILLIS_ROWS>(x, m, tile, call);
  }
}

template <int id>
void quant_panel(const uint8_t* panel, int cols, const ActBlock* x, size_t stride, int rows, float* tile, Ahead& ahead) {
  in_row_groups(x, stride, rows, tile, [&]<int M>(const ActBlock* at, float* to) { quant_rows<kFormat[id], M>(panel, cols, at, stride, to, ahead); });
}

template <int id>
void float_panel(const uint8_t* panel, int cols, const float* x, size_t stride, int rows, float* tile) {
  in_row_groups(x, stride, rows, tile,
                [&]<int M>(const float* at, float* to) { float_rows<static_cast<FormatId>(id), M>(panel, cols, at, stride, to); });
}

template <FormatId id, int M>
void add_rows(const uint8_t* p, int rank, const float* u, size_t stride, float* tile) {
  constexpr int U = M >= 4 ? 1 : M >= 2 ? 2 : 4;
  F32 total[M][U];
  for (int m = 0; m < M; ++m) {
    total[m][0] = load(tile + m * kPanelRows);
    for (int i = 1; i < U; ++i) total[m][i] = set1(0.0f);
  }
  int k = 0;
  for (; k + U <= rank; k += U)
    for (int i = 0; i < U; ++i) {
      const F32 w = load_weights<id>(p, static_cast<size_t>(k + i) * kPanelRows);
      for (int m = 0; m < M; ++m) total[m][i] = fma(w, set1(u[m * stride + static_cast<size_t>(k + i)]), total[m][i]);
    }
  for (; k < rank; ++k) {
    const F32 w = load_weights<id>(p, static_cast<size_t>(k) * kPanelRows);
    for (int m = 0; m < M; ++m) total[m][0] = fma(w, set1(u[m * stride + static_cast<size_t>(k)]), total[m][0]);
  }
  for (int m = 0; m < M; ++m) {
    for (int i = 1; i < U; ++i) total[m][0] = add(total[m][0], total[m][i]);
    store(tile + m * kPanelRows, total[m][0]);
  }
}

template <FormatId id>
void add_products(const Addend* list, int count, int panel, int panels, size_t stride, float* tiles, size_t tile_stride) {
  for (const Addend* a = list; a < list + count; ++a) {
    const size_t bytes = static_cast<size_t>(a->rank) * kPanelRows * (id == FormatId::F32 ? 4 : 2);
    const uint8_t* p = a->panels + static_cast<size_t>(panel) * bytes;
    float* tile = tiles + a->first * kPanelRows;
    for (int i = 0; i < panels; ++i, p += bytes, tile += tile_stride)
      in_row_groups(a->u, stride, a->rows, tile, [&]<int M>(const float* u, float* to) { add_rows<id, M>(p, a->rank, u, stride, to); });
  }
}

// Row m of a tile, but for the residual.
inline F32 finished(const float* tile, const Epilogue& e, int m) {
  F32 x = load(tile + m * kPanelRows);
  if (e.bias) x = add(x, load(e.bias));
  x = activate(x, e.activation);
  if (e.gated) x = mul(x, load(e.gated + m * kPanelRows));
  return x;
}

void finish(const float* tile, const Epilogue& e, int rows, int columns, float* out, size_t stride) {
  for (int m = 0; m < rows; ++m, out += stride) {
    F32 x = finished(tile, e, m);
    if (columns == kPanelRows) {
      if (e.residual) x = add(x, load(e.residual + static_cast<size_t>(m) * stride));
      store(out, x);
      continue;
    }
    float part[kPanelRows];
    store(part, x);
    for (int n = 0; n < columns; ++n) out[n] = part[n] + (e.residual ? e.residual[static_cast<size_t>(m) * stride + static_cast<size_t>(n)] : 0.0f);
  }
}

void quantize(const float* x, int n, ActBlock* out) {
  constexpr float kLevels = 127.0f * 256.0f;
  constexpr float kLeast = 1e-30f;  // a block below counts as zero: its inverse could overflow
  for (; n >= kBlock; n -= kBlock, x += kBlock, ++out) {
    const float largest = max(max(abs(load(x)), abs(load(x + kLanes))));
    const float inverse = largest >= kLeast ? kLevels / largest : 0.0f;
    const F32 scale = set1(inverse), whole[2] = {round(mul(load(x), scale)), round(mul(load(x + kLanes), scale))};
    // Half a unit up, so that no tie rounds down and leaves low at 128.
    const F32 step = set1(1.0f / 256.0f), half_unit = set1(0.5f / 256.0f);
    const F32 high[2] = {round(fma(whole[0], step, half_unit)), round(fma(whole[1], step, half_unit))};
    const float highs[2] = {sum(high[0]), sum(high[1])};
    const float all = highs[0] + highs[1];
    if (all != all) {  // x holds a NaN or an infinity: let the product be NaN
      *out = ActBlock{};
      out->d = out->s = all;
      continue;
    }
    out->d = largest / kLevels;
    for (int half = 0; half < 2; ++half) {
      const F32 low = fnma(high[half], set1(256.0f), whole[half]);
      store_i8(out->high + half * kLanes, high[half]);
      store_i8(out->low + half * kLanes, low);
      out->sum[half] = 256 * static_cast<int32_t>(highs[half]) + static_cast<int32_t>(sum(low));
    }
    out->s = out->d * static_cast<float>(out->sum[0] + out->sum[1]);
  }
}

// ---- rows ---------------------------------------------------------------------------------------------------------

// Folds f(lane values) over x[0, n), a scalar loop taking what is left of the last vector.
template <class Vector, class Scalar>
inline float reduce(int n, const Vector& vector, const Scalar& scalar) {
  F32 total = set1(0.0f);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) total = vector(total, i);
  float rest = sum(total);
  for (; i < n; ++i) rest = scalar(rest, i);
  return rest;
}

inline float sum_of_squares(const float* x, float shift, int n) {
  return reduce(
      n,
      [&](F32 total, int i) {
        const F32 v = sub(load(x + i), set1(shift));
        return fma(v, v, total);
      },
      [&](float total, int i) { return total + (x[i] - shift) * (x[i] - shift); });
}

void normalize(const float* x, const float* weight, const float* bias, float shift, float scale, int n, float* out) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F32 v = mul(mul(sub(load(x + i), set1(shift)), set1(scale)), load(weight + i));
    store(out + i, bias ? add(v, load(bias + i)) : v);
  }
  for (; i < n; ++i) out[i] = (x[i] - shift) * scale * weight[i] + (bias ? bias[i] : 0.0f);
}

void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
  const float mean = sum_of_squares(x, 0.0f, n) / static_cast<float>(n);
  normalize(x, weight, nullptr, 0.0f, 1.0f / std::sqrt(mean + eps), n, out);
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int n, float* out) {
  const float mean =
      reduce(n, [&](F32 total, int i) { return add(total, load(x + i)); }, [&](float total, int i) { return total + x[i]; }) / static_cast<float>(n);
  const float variance = sum_of_squares(x, mean, n) / static_cast<float>(n);
  normalize(x, weight, bias, mean, 1.0f / std::sqrt(variance + eps), n, out);
}

void rotate(float* x, const float* cosines, const float* sines, int head_dim, bool interleaved) {
  const int half = head_dim / 2, step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
  for (int i = 0; i < half; ++i) {
    const float a = x[i * step], b = x[i * step + other];
    x[i * step] = a * cosines[i] - b * sines[i];
    x[i * step + other] = b * cosines[i] + a * sines[i];
  }
}

float log_sum_exp(const float* x, int n) {
  float largest = x[0];
  for (int i = 1; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  const float total = reduce(
      n, [&](F32 part, int i) { return add(part, exp(sub(load(x + i), set1(largest)))); },
      [&](float part, int i) { return part + std::exp(x[i] - largest); });
  return largest + std::log(total);
}

uint64_t read(const uint8_t* data, size_t bytes) {
  U8 kept[4] = {load_bytes(data), load_bytes(data), load_bytes(data), load_bytes(data)};
  for (size_t i = 0; i + 256 <= bytes; i += 256)
    for (size_t u = 0; u < 4; ++u) {
      kept[u] = load_bytes(data + i + 64 * u);
      asm volatile("" : : "m"(kept[u]));  // the loads are the point
    }
  return reinterpret_cast<const uint8_t*>(kept)[0];
}

}  // namespace
}  // namespace millis

#include "wide_body.h"
// The rest builds on it.
#include "attention_body.h"
#include "bytes_body.h"
#include "encoder_body.h"
#include "screen_body.h"

namespace millis {
namespace {

Kernels make_table(const char* isa) {
  Kernels k = {};
  k.isa = isa;
  const auto fill = [&]<int id>(const auto& next) {
    if constexpr (kFormat[id].is_float()) k.float_panel[id] = float_panel<id>;
    else if constexpr (static_cast<FormatId>(id) != FormatId::Q8_0Planes) {
      k.quant_panel[id] = quant_panel<id>;
      if constexpr (kParts == 1) k.bytes_panel[id] = bytes_panel<id>;
    }
    if constexpr (id + 1 < kFormats) next.template operator()<id + 1>(next);
  };
  fill.template operator()<0>(fill);
  k.add_products[0] = add_products<FormatId::F16>, k.add_products[1] = add_products<FormatId::F32>;
  k.finish = finish, k.quantize = quantize, k.rms_norm = rms_norm, k.layer_norm = layer_norm, k.rotate = rotate;
  k.write_kv[0] = write_kv<uint16_t>, k.write_kv[1] = write_kv<float>;
  k.attend[0] = attend<uint16_t>, k.attend[1] = attend<float>, k.attend_wide = attend_wide, k.attend_all = attend_all;
  k.convolve[0] = convolve<uint16_t>, k.convolve[1] = convolve<float>;
  k.screen = screen_panel, k.planes_panel = planes_panel, k.may_win = may_win;
  k.byte_rows = MILLIS_BYTE_ROWS, k.quantize_bytes = quantize_bytes;
  k.log_sum_exp = log_sum_exp, k.read = read, k.wide = make_wide();
  return k;
}

}  // namespace
}  // namespace millis
