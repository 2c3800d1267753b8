// Floats to GGML's quantised blocks: how each type's scales are rounded, and how its bits lie.
//
// A block of 32 has its own scale (and offset) in f16. A super-block of 256 has one in f16, by which the whole-number scales
// of its groups are multiplied: those are rounded near what fits each group, then the f16 ones fitted to them, and so on.
#include "quantize.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "pack.h"
#include "quantize_fit.h"

namespace millis {
namespace {

constexpr float kMostHalf = 65504.0f;
constexpr int kRounds = 3;  // of fitting the scales of a super-block to one another
constexpr int kMostGroups = 16;

float as_half(float x, uint16_t* bits) {
  *bits = float_to_half(std::min(std::max(x, -kMostHalf), kMostHalf));
  return half_to_float(*bits);
}

template <int N, class Grid>
void round_all(const float* x, float scale, float offset, const Grid& grid, uint8_t* quants) {
  const float inverse = scale != 0 ? 1 / scale : 0;
  for (int i = 0; i < N; ++i) quants[i] = grid.stored((x[i] - offset) * inverse);
}

// Each run of `stride` bytes holds, in its lowest bits, the first values, then the next. `out` must be zero.
void put_bits(const uint8_t* quants, int count, int bits, int shift, int stride, uint8_t* out) {
  const int in_run = stride * 8 / bits;
  for (int i = 0; i < count; ++i) {
    const int at = i % in_run, value = (quants[i] >> shift) & ((1 << bits) - 1);
    out[i / in_run * stride + at % stride] |= static_cast<uint8_t>(value << (at / stride * bits));
  }
}

// Q4_0, Q5_0, Q8_0; with an offset Q4_1, Q5_1.
template <int Bits, bool Offset>
void block(const float* x, const float* w, uint8_t* out) {
  constexpr float half = 1 << (Bits - 1);
  constexpr Whole grid = Offset ? Whole{0, 2 * half - 1} : Bits == 8 ? Whole{1 - half, half - 1} : Whole{-half, half - 1, half};
  const Fit fit = Offset ? fit_affine<kBlock>(x, w, grid, false) : fit_symmetric<kBlock>(x, w, grid, Bits == 8 ? 3 : 12);
  uint16_t d, m = 0;
  const float scale = as_half(fit.scale, &d), offset = Offset ? as_half(fit.offset, &m) : 0;
  uint8_t quants[kBlock];
  round_all<kBlock>(x, scale, offset, grid, quants);
  std::memcpy(out, &d, 2), out += 2;
  if (Offset) std::memcpy(out, &m, 2), out += 2;
  if (Bits == 5) put_bits(quants, kBlock, 1, 4, 1, out), out += 4;
  if (Bits == 8) std::memcpy(out, quants, kBlock);
  else put_bits(quants, kBlock, 4, 0, 16, out);
}

void iq4_nl(const float* x, const float* w, int trials, uint8_t* out) {
  uint16_t d;
  const float scale = as_half(fit_symmetric<kBlock>(x, w, Curve{}, trials).scale, &d);
  uint8_t places[kBlock];
  round_all<kBlock>(x, scale, 0, Curve{}, places);
  std::memcpy(out, &d, 2);
  put_bits(places, kBlock, 4, 0, 16, out + 2);
}

// What a super-block says: value = d * scales[g] * (q - bias) (- m * mins[g]).
struct Super {
  uint16_t d = 0, m = 0;
  float scales[kMostGroups] = {}, mins[kMostGroups] = {};
};

// The scales of a super-block, searched.
template <int Group, bool Mins, class Grid = Whole>
class SuperFit {
 public:
  static constexpr int kGroups = kSuperBlock / Group;

  SuperFit(const float* x, const float* w, Grid grid, Whole scales, int trials = 12) : x_(x), w_(w), grid_(grid), range_(scales) {
    float largest = 0, lowest = 0;
    for (int g = 0; g < kGroups; ++g) {
      const float *gx = x + g * Group, *gw = w + g * Group;
      if constexpr (Mins) fits_[g] = fit_affine<Group>(gx, gw, grid_, true);
      else fits_[g] = fit_symmetric<Group>(gx, gw, grid_, trials);
      if (std::abs(fits_[g].scale) > std::abs(largest)) largest = fits_[g].scale;
      lowest = std::min(lowest, fits_[g].offset);
    }
    float best = -1;
    float d = largest / (Mins ? range_.high : range_.low), m = Mins ? -lowest / range_.high : 0;
    for (int round = 0; round < kRounds; ++round) {
      const float error = fit_groups(d, m, round == 0);
      if (best >= 0 && error >= best) break;
      best = error, kept_ = now_;
      refit(d, m);
    }
  }

  const Super& super() const { return kept_; }

  void quants(uint8_t* out) const {
    const float d = half_to_float(kept_.d), m = half_to_float(kept_.m);
    for (int g = 0; g < kGroups; ++g) round_all<Group>(x_ + g * Group, d * kept_.scales[g], -m * kept_.mins[g], grid_, out + g * Group);
  }

 private:
  // The whole-number scales of every group, for given f16 ones. Returns the error.
  float fit_groups(float d, float m, bool first) {
    d = as_half(d, &now_.d), m = as_half(m, &now_.m);
    float total = 0;
    for (int g = 0; g < kGroups; ++g) {
      const float scale = first ? whole(fits_[g].scale, d) : now_.scales[g], min = first ? whole(-fits_[g].offset, m) : now_.mins[g];
      float least = -1;
      for (float s = std::max(scale - 1, range_.low); s <= std::min(scale + 1, range_.high); ++s) {
        for (float n = Mins ? std::max(min - 1, 0.0f) : 0; n <= (Mins ? std::min(min + 1, range_.high) : 0); ++n) {
          const float error = error_at<Group>(x_ + g * Group, w_ + g * Group, d * s, -m * n, grid_);
          if (least < 0 || error < least) least = error, now_.scales[g] = s, now_.mins[g] = n;
        }
      }
      total += least;
    }
    return total;
  }

  float whole(float x, float unit) const { return unit != 0 ? nearest(std::min(std::max(x / unit, range_.low), range_.high)) : 0; }

  // The d and m that fit the values best, given all whole numbers.
  void refit(float& d, float& m) const {
    double uu = 0, uv = 0, vv = 0, xu = 0, xv = 0;
    const float d0 = half_to_float(now_.d), m0 = half_to_float(now_.m);
    for (int g = 0; g < kGroups; ++g) {
      const float scale = d0 * now_.scales[g], offset = -m0 * now_.mins[g], v = -now_.mins[g];
      const Sums s = sums_at<Group>(x_ + g * Group, w_ + g * Group, scale != 0 ? 1 / scale : 0, offset, grid_);
      uu += now_.scales[g] * now_.scales[g] * s.qq, uv += now_.scales[g] * s.q * v, vv += v * v * s.w;
      xu += now_.scales[g] * s.xq, xv += v * s.x;
    }
    const double determinant = uu * vv - uv * uv;
    if (Mins && determinant > 1e-9 * uu * vv) {
      d = static_cast<float>((xu * vv - xv * uv) / determinant), m = std::max(0.0f, static_cast<float>((xv * uu - xu * uv) / determinant));
    } else if (uu > 0) {
      d = static_cast<float>((xu - uv * static_cast<double>(m)) / uu);
    }
  }

  const float *x_, *w_;
  Grid grid_;
  Whole range_;  // of the scales
  Fit fits_[kGroups];
  Super now_, kept_;
};

// Six-bit scales and mins, 8 of each in 12 bytes.
void put_six_bits(const Super& s, uint8_t* out) {
  for (int j = 0; j < 4; ++j) {
    const auto sc = static_cast<uint8_t>(s.scales[j]), mn = static_cast<uint8_t>(s.mins[j]);
    const auto sc4 = static_cast<uint8_t>(s.scales[j + 4]), mn4 = static_cast<uint8_t>(s.mins[j + 4]);
    out[j] = static_cast<uint8_t>(sc | sc4 >> 4 << 6), out[j + 4] = static_cast<uint8_t>(mn | mn4 >> 4 << 6);
    out[j + 8] = static_cast<uint8_t>((sc4 & 15) | (mn4 & 15) << 4);
  }
}

template <int Bits>
void q4_or_q5_k(const float* x, const float* w, uint8_t* out) {
  const SuperFit<32, true> fit(x, w, {0, (1 << Bits) - 1}, {0, 63});
  uint8_t q[kSuperBlock];
  fit.quants(q);
  std::memcpy(out, &fit.super().d, 2), std::memcpy(out + 2, &fit.super().m, 2);
  put_six_bits(fit.super(), out + 4), out += 16;
  if (Bits == 5) put_bits(q, kSuperBlock, 1, 4, 32, out), out += 32;
  put_bits(q, kSuperBlock, 4, 0, 32, out);
}

void q6_k(const float* x, const float* w, uint8_t* out) {
  const SuperFit<16, false> fit(x, w, {-32, 31, 32}, {-128, 127}, 4);
  uint8_t q[kSuperBlock];
  fit.quants(q);
  put_bits(q, kSuperBlock, 4, 0, 64, out), put_bits(q, kSuperBlock, 2, 4, 32, out + 128);
  for (int g = 0; g < 16; ++g) out[192 + g] = static_cast<uint8_t>(static_cast<int>(fit.super().scales[g]));
  std::memcpy(out + 208, &fit.super().d, 2);
}

void q3_k(const float* x, const float* w, uint8_t* out) {
  const SuperFit<16, false> fit(x, w, {-4, 3, 4}, {-32, 31});
  uint8_t q[kSuperBlock], scales[16];
  fit.quants(q);
  for (int g = 0; g < 16; ++g) scales[g] = static_cast<uint8_t>(fit.super().scales[g] + 32);
  put_bits(q, kSuperBlock, 1, 2, 32, out), put_bits(q, kSuperBlock, 2, 0, 32, out + 32);
  put_bits(scales, 16, 4, 0, 8, out + 96), put_bits(scales, 16, 2, 4, 4, out + 104);
  std::memcpy(out + 108, &fit.super().d, 2);
}

void q2_k(const float* x, const float* w, uint8_t* out) {
  const SuperFit<16, true> fit(x, w, {0, 3}, {0, 15});
  uint8_t q[kSuperBlock];
  fit.quants(q);
  for (int g = 0; g < 16; ++g) out[g] = static_cast<uint8_t>(static_cast<int>(fit.super().scales[g]) | static_cast<int>(fit.super().mins[g]) << 4);
  put_bits(q, kSuperBlock, 2, 0, 32, out + 16);
  std::memcpy(out + 80, &fit.super().d, 2), std::memcpy(out + 82, &fit.super().m, 2);
}

void iq4_xs(const float* x, const float* w, uint8_t* out) {
  const SuperFit<32, false, Curve> fit(x, w, {}, {-32, 31});
  uint8_t places[kSuperBlock];
  fit.quants(places);
  std::memcpy(out, &fit.super().d, 2);
  uint16_t high = 0;
  for (int g = 0; g < 8; ++g) {
    const int scale = static_cast<int>(fit.super().scales[g]) + 32;
    high = static_cast<uint16_t>(high | scale >> 4 << 2 * g);
    out[4 + g / 2] |= static_cast<uint8_t>((scale & 15) << g % 2 * 4);
  }
  std::memcpy(out + 2, &high, 2);
  put_bits(places, kSuperBlock, 4, 0, 16, out + 8);
}

// One row of `cols` values.
MILLIS_CLONES void row(FormatId id, const float* x, const float* w, size_t cols, uint8_t* out) {
  const Format& f = format(id);
  for (size_t c = 0; c < cols; c += static_cast<size_t>(f.file_values), out += f.file_bytes) {
    switch (id) {
      case FormatId::Q4_0: block<4, false>(x + c, w + c, out); break;
      case FormatId::Q4_1: block<4, true>(x + c, w + c, out); break;
      case FormatId::Q5_0: block<5, false>(x + c, w + c, out); break;
      case FormatId::Q5_1: block<5, true>(x + c, w + c, out); break;
      case FormatId::Q8_0: block<8, false>(x + c, w + c, out); break;
      case FormatId::Q2_K: q2_k(x + c, w + c, out); break;
      case FormatId::Q3_K: q3_k(x + c, w + c, out); break;
      case FormatId::Q4_K: q4_or_q5_k<4>(x + c, w + c, out); break;
      case FormatId::Q5_K: q4_or_q5_k<5>(x + c, w + c, out); break;
      case FormatId::Q6_K: q6_k(x + c, w + c, out); break;
      case FormatId::IQ4_NL: iq4_nl(x + c, w + c, 12, out); break;
      case FormatId::IQ4_XS: iq4_xs(x + c, w + c, out); break;
      default: break;
    }
  }
}

double weighted_error(const float* x, const float* y, const float* w, size_t count) {
  double error = 0;
  for (size_t i = 0; i < count; ++i) error += static_cast<double>(w[i]) * (x[i] - y[i]) * (x[i] - y[i]);
  return error;
}

}  // namespace

MILLIS_CLONES void quick_iq4_nl(const float* x, uint8_t* out) {
  float w[kBlock];
  std::fill(w, w + kBlock, 1.0f);
  iq4_nl(x, w, 0, out);
}

std::vector<uint8_t> quantize(GgmlType type, std::span<const float> values, std::span<const float> weights, std::span<double> errors, Pool& pool) {
  const FormatId id = format_of(type);
  const Format& f = format(id);
  const size_t cols = weights.size(), rows = errors.size(), block_values = static_cast<size_t>(f.file_values);
  if (f.is_float()) throw std::invalid_argument("quantize: not a quantised type");
  if (cols == 0 || cols % block_values != 0 || values.size() != rows * cols)
    throw std::invalid_argument("quantize: rows of " + std::to_string(cols) + " values are not a whole number of blocks");
  const size_t row_bytes = cols / block_values * static_cast<size_t>(f.file_bytes), threads = static_cast<size_t>(pool.threads());
  std::vector<uint8_t> out(rows * row_bytes);
  std::vector<std::vector<float>> decoded(threads, std::vector<float>(cols));
  pool.run([&](int thread) {
    const auto t = static_cast<size_t>(thread);
    for (size_t r = rows * t / threads; r < rows * (t + 1) / threads; ++r) {
      const float* x = values.data() + r * cols;
      uint8_t* to = out.data() + r * row_bytes;
      row(id, x, weights.data(), cols, to);
      dequantize(id, to, cols, decoded[t].data());
      errors[r] = weighted_error(x, decoded[t].data(), weights.data(), cols);
    }
  });
  return out;
}

}  // namespace millis
