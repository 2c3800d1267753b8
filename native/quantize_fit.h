// One group of values as scale * q (+ offset): the search that every type of quantize.cpp shares.
//
// For a few trial scales the values are rounded, and the scale (and offset) that then fits best in the least squares is
// computed in closed form; the trial of least error is kept. The idea is that of the K-quants' published description.
#pragma once

#include <algorithm>
#include <cmath>

#include "format.h"

namespace millis {

// Compiled for each level of the machine and chosen at start: the search is plain loops over groups.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MILLIS_CLONES __attribute__((flatten, target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MILLIS_CLONES
#endif

inline float nearest(float x) {  // for |x| < 2^22; vectorises everywhere
  constexpr float kShift = 12582912.0f;
  return (x + kShift) - kShift;
}

// value = scale * q + offset, with q on a grid.
struct Fit {
  float scale = 0, offset = 0, error = 0;
};

// Whole numbers from `low` to `high`, stored as themselves and `bias`.
struct Whole {
  float low, high, bias = 0;
  static constexpr float kStep = 1;
  float round(float x) const { return nearest(std::min(std::max(x, low), high)); }
  uint8_t stored(float x) const { return static_cast<uint8_t>(static_cast<int>(round(x) + bias)); }
};

// The levels of IQ4_NL and IQ4_XS, stored as their places.
struct Curve {
  static constexpr float low = -127, high = 113, kStep = 16;
  static constexpr float level(int i) { return static_cast<float>(kLevels[i]) - 128; }
  static constexpr float bound(int i) { return (level(i) + level(i + 1)) / 2; }  // between a level and the next
  float round(float x) const {
    float found = low;
    for (int i = 0; i < 15; ++i) found = x > bound(i) ? level(i + 1) : found;
    return found;
  }
  uint8_t stored(float x) const {
    int place = 0;
    for (int i = 0; i < 15; ++i) place += x > bound(i);
    return static_cast<uint8_t>(place);
  }
};

template <class Grid>
inline float rounded(float x, float inverse, float offset, const Grid& grid) {
  return grid.round((x - offset) * inverse);
}

struct Sums {
  float w = 0, x = 0, xx = 0, q = 0, qq = 0, xq = 0;  // of weights, weighted values, squares, quants, products
};

template <int N, class Grid>
inline Sums sums_at(const float* x, const float* w, float inverse, float offset, const Grid& grid) {
  float sw = 0, sx = 0, sxx = 0, sq = 0, sqq = 0, sxq = 0;
#pragma omp simd reduction(+ : sw, sx, sxx, sq, sqq, sxq)
  for (int i = 0; i < N; ++i) {
    const float q = rounded(x[i], inverse, offset, grid), wq = w[i] * q, wx = w[i] * x[i];
    sw += w[i], sx += wx, sxx += wx * x[i], sq += wq, sqq += wq * q, sxq += wx * q;
  }
  return {sw, sx, sxx, sq, sqq, sxq};
}

// The error of rounding with a given scale and offset.
template <int N, class Grid>
inline float error_at(const float* x, const float* w, float scale, float offset, const Grid& grid) {
  const float inverse = scale != 0 ? 1 / scale : 0;
  float error = 0;
#pragma omp simd reduction(+ : error)
  for (int i = 0; i < N; ++i) {
    const float q = rounded(x[i], inverse, offset, grid), d = x[i] - offset - scale * q;
    error += w[i] * d * d;
  }
  return error;
}

inline Fit symmetric_of(const Sums& s) {
  if (!(s.qq > 0)) return {0, 0, s.xx};
  const float scale = s.xq / s.qq;
  return {scale, 0, s.xx - scale * s.xq};
}

// `below`: the offset must not be above zero.
inline Fit affine_of(const Sums& s, bool below) {
  const float determinant = s.w * s.qq - s.q * s.q;
  if (!(determinant > 0)) {
    const float offset = s.w > 0 ? s.x / s.w : 0;
    return below && offset > 0 ? symmetric_of(s) : Fit{0, offset, s.xx - offset * s.x};
  }
  const float scale = (s.w * s.xq - s.x * s.q) / determinant, offset = (s.qq * s.x - s.q * s.xq) / determinant;
  if (below && offset > 0) return symmetric_of(s);
  return {scale, offset, s.xx - scale * s.xq - offset * s.x};
}

inline void keep_better(Fit& best, const Fit& fit) {
  if (fit.scale != 0 && fit.error < best.error) best = fit;
}

// The largest magnitude lands on either end of the range, or a little inside or outside.
template <int N, class Grid>
inline Fit fit_symmetric(const float* x, const float* w, const Grid& grid, int trials) {
  float largest = 0;
  for (int i = 0; i < N; ++i)
    if (std::abs(x[i]) > std::abs(largest)) largest = x[i];
  if (std::abs(largest) < 1e-20f) return {};
  Fit best = {0, 0, sums_at<N>(x, w, 0, 0, grid).xx};
  for (const float end : {grid.low, grid.high}) {
    for (int t = -trials; t <= trials; ++t) {
      const float inverse = (end + 0.1f * Grid::kStep * static_cast<float>(t)) / largest;
      keep_better(best, symmetric_of(sums_at<N>(x, w, inverse, 0, grid)));
    }
  }
  for (int i = 0; i < 2 && best.scale != 0; ++i) keep_better(best, symmetric_of(sums_at<N>(x, w, 1 / best.scale, 0, grid)));
  return best;
}

// The span of the values takes the whole range, a little less, or more.
template <int N>
inline Fit fit_affine(const float* x, const float* w, const Whole& grid, bool below) {
  float least = x[0], most = x[0];
  for (int i = 1; i < N; ++i) least = std::min(least, x[i]), most = std::max(most, x[i]);
  if (below) least = std::min(least, 0.0f);
  Fit best = affine_of(sums_at<N>(x, w, 0, 0, grid), below);
  if (most - least < 1e-20f) return best;
  best.error = std::max(best.error, 0.0f) + 1e-30f;
  for (int t = -8; t <= 20; ++t) {
    const float inverse = (grid.high + 0.1f * static_cast<float>(t)) / (most - least);
    Fit fit = affine_of(sums_at<N>(x, w, inverse, least, grid), below);
    keep_better(best, fit);
    if (fit.scale != 0 && fit.error < 2 * best.error) keep_better(best, affine_of(sums_at<N>(x, w, 1 / fit.scale, fit.offset, grid), below));
  }
  for (int i = 0; i < 2 && best.scale != 0; ++i) keep_better(best, affine_of(sums_at<N>(x, w, 1 / best.scale, best.offset, grid), below));
  return best;
}

}  // namespace millis
