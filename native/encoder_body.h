// Attention of all tokens of a text to all of them, part of kernels_body.h: float32 throughout, nothing cached.

namespace millis {
namespace {

// score[m][keys] = q[m] . keys + bias[keys - m] for M queries, the first at key `at`, then its softmax; returns 1 / the sums of the weights in
// `inverse`.
template <int M>
inline void weigh_all(const AttendAll& a, int at, const float* q, const float* bias, const float* transposed, int width, float* score,
                      float (&inverse)[M]) {
  for (int p = 0; p < width / kPanelRows; ++p, transposed += a.head_dim * kPanelRows) {
    F32 total[M];
    for (int m = 0; m < M; ++m) total[m] = set1(0.0f);
    for (int d = 0; d < a.head_dim; ++d) {
      const F32 k = load(transposed + d * kPanelRows);
      for (int m = 0; m < M; ++m) total[m] = fma(k, set1(q[static_cast<size_t>(m) * a.stride + static_cast<size_t>(d)]), total[m]);
    }
    for (int m = 0; m < M; ++m) store(score + m * width + p * kPanelRows, bias ? add(total[m], load(bias - m + p * kPanelRows)) : total[m]);
  }
  for (int m = 0; m < M; ++m, score += width) {
    for (int i = a.keys; i < width; ++i) score[i] = kMasked;
    if (a.window > 0) {
      for (int i = 0; i < at + m - a.window; ++i) score[i] = kMasked;
      for (int i = at + m + a.window + 1; i < a.keys; ++i) score[i] = kMasked;
    }
    F32 most = set1(kNoScore), total = set1(0.0f);
    for (int i = 0; i < width; i += kLanes) most = max(most, load(score + i));
    const F32 shift = set1(max(most));
    for (int i = 0; i < width; i += kLanes) {
      const F32 weight = exp(sub(load(score + i), shift));
      store(score + i, weight);
      total = add(total, weight);
    }
    inverse[m] = 1.0f / sum(total);
  }
}

template <int M>
inline void attend_all_rows(const AttendAll& a, int first, const float* transposed, int width, float* score) {
  const auto begin = static_cast<size_t>(first);
  float inverse[M];
  weigh_all<M>(a, a.at + first, a.q + begin * a.stride, a.bias ? a.bias - first : nullptr, transposed, width, score, inverse);
  for (int d = 0; d < a.head_dim; d += kPanelRows) {
    F32 part[M];
    for (int m = 0; m < M; ++m) part[m] = set1(0.0f);
    const float* v = a.v + d;
    for (int j = 0; j < a.keys; ++j, v += a.stride) {
      const F32 value = load(v);
      for (int m = 0; m < M; ++m) part[m] = fma(set1(score[m * width + j]), value, part[m]);
    }
    for (int m = 0; m < M; ++m) store(a.out + (begin + static_cast<size_t>(m)) * a.out_stride + d, mul(part[m], set1(inverse[m])));
  }
}

void attend_all(const AttendAll& a) {
  const int panels = (a.keys + kPanelRows - 1) / kPanelRows, width = panels * kPanelRows;
  float *transposed = a.scratch, *score = transposed + static_cast<size_t>(width) * static_cast<size_t>(a.head_dim);
  for (int i = 0; i < width; ++i) {
    float* to = transposed + (i / kPanelRows * a.head_dim) * kPanelRows + i % kPanelRows;
    const float* k = a.k + static_cast<size_t>(i) * a.stride;
    for (int d = 0; d < a.head_dim; ++d) to[d * kPanelRows] = i < a.keys ? k[d] * a.scale : 0.0f;
  }
  static_assert(kAllRows == 8);
  int first = 0;
  for (; first + 8 <= a.queries; first += 8) attend_all_rows<8>(a, first, transposed, width, score);
  for (; first + 4 <= a.queries; first += 4) attend_all_rows<4>(a, first, transposed, width, score);
  for (; first < a.queries; ++first) attend_all_rows<1>(a, first, transposed, width, score);
}

}  // namespace
}  // namespace millis
