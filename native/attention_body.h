// Attention over the pages of the KV cache, part of kernels_body.h: a few queries at a time, or many as wide products.

namespace millis {
namespace {

// ---- attention ----------------------------------------------------------------------------------------------------

inline F32 load_cached(const uint16_t* p) { return load_half(p); }
inline F32 load_cached(const float* p) { return load(p); }
inline void store_cached(uint16_t* p, F32 x) { store_half(p, x); }
inline void store_cached(float* p, F32 x) { store(p, x); }

template <class T>
void write_kv(const float* key, const float* value, int head_dim, int slot, uint8_t* page) {
  T* keys = reinterpret_cast<T*>(page);
  T* values = keys + head_dim * kPageTokens;
  for (int d = 0; d < head_dim; d += kLanes) {
    T some[kLanes];
    store_cached(some, load(key + d)), store_cached(values + slot * head_dim + d, load(value + d));
    for (int i = 0; i < kLanes; ++i) keys[(d + i) * kPageTokens + slot] = some[i];
  }
}

template <class T>
void convolve(const Convolve& task) {
  constexpr float kMost = 65504.0f;  // of f16
  const float* latest = task.weight + static_cast<size_t>(task.taps - 1) * task.stride;
  for (int i = 0; i < task.columns; i += kLanes) {
    const F32 product = mul(load(task.b + i), load(task.x + i));
    F32 sum = mul(load(latest + i), product);
    for (int before = 0; before < task.taps - 1; ++before) {
      if (!task.past[before]) break;
      const T* kept = reinterpret_cast<const T*>(task.past[before]) + i;
      sum = fma(load(latest + i - static_cast<size_t>(before + 1) * task.stride), load_cached(kept), sum);
    }
    store(task.out + i, mul(load(task.c + i), sum));
    store_cached(reinterpret_cast<T*>(task.kept) + i, sizeof(T) == 4 ? product : max(set1(-kMost), min(set1(kMost), product)));
  }
}

// hide(i) for each slot of a page that a query's mask leaves out.
template <class Hide>
inline void mask_page(uint32_t seen, const Hide& hide) {
  static_assert(kPageTokens == 32);
  for (uint32_t hidden = ~seen; hidden; hidden &= hidden - 1) hide(__builtin_ctz(hidden));
}

// score[n][32] = q[n] . keys of one page, masked outside each query's range. The `next` page's are asked for into the second cache: the
// first one can wait for few lines at once, and then nothing else goes on.
template <class T, int N>
inline void page_scores(const Attend& a, const float* q, const T* keys, const T* next, int first, float (&score)[N][kPageTokens]) {
  F32 low[N], high[N];
  for (int n = 0; n < N; ++n) low[n] = high[n] = set1(0.0f);
  for (int d = 0; d < a.head_dim; ++d, keys += kPageTokens, next += kPageTokens) {
    __builtin_prefetch(next, 0, 2);
    const F32 k0 = load_cached(keys), k1 = load_cached(keys + 16);
    for (int n = 0; n < N; ++n) {
      const F32 x = set1(q[n * a.head_dim + d]);
      low[n] = fma(x, k0, low[n]), high[n] = fma(x, k1, high[n]);
    }
  }
  for (int n = 0; n < N; ++n) {
    if (a.bias[n]) low[n] = add(low[n], load(a.bias[n] + first)), high[n] = add(high[n], load(a.bias[n] + first + 16));
    store(score[n], low[n]), store(score[n] + 16, high[n]);
    if (first >= a.masked_from) {
      mask_page(a.mask[n][(first - a.masked_from) / kPageTokens], [&](int i) { score[n][i] = kMasked; });
      continue;
    }
    const int last = a.position[n] - first, least = a.window ? last - a.window + 1 : 0;
    for (int i = 0; i < least && i < kPageTokens; ++i) score[n][i] = kMasked;
    for (int i = last + 1 > 0 ? last + 1 : 0; i < kPageTokens; ++i) score[n][i] = kMasked;
  }
}

// Moves one query's running softmax (Milakov and Gimelshein, 2018) over a page: scores become weights.
inline void page_softmax(float (&score)[kPageTokens], float& largest, float& total, float* sums, int head_dim) {
  const F32 s0 = load(score), s1 = load(score + 16);
  const float page_largest = max(max(s0, s1));
  if (page_largest > largest) {
    const F32 shrink = exp(set1(largest - page_largest));
    float factor[kLanes];
    store(factor, shrink);
    total *= factor[0];
    for (int d = 0; d < head_dim; d += kLanes) store(sums + d, mul(load(sums + d), shrink));
    largest = page_largest;
  }
  const F32 p0 = exp(sub(s0, set1(largest))), p1 = exp(sub(s1, set1(largest)));
  store(score, p0), store(score + 16, p1);
  total += sum(add(p0, p1));
}

// sums[n] += weights[n] . values, two vectors of head_dim at a time (one where it is odd).
// `next`: those of the page to come.
template <class T, int N, int W>
inline void page_values(const T* values, const T* next, int head_dim, int count, const float (&weight)[N][kPageTokens], float* sums) {
  F32 part[N][W];
  for (int n = 0; n < N; ++n)
    for (int w = 0; w < W; ++w) part[n][w] = load(sums + n * head_dim + w * kLanes);
  for (int j = 0; j < count; ++j, values += head_dim, next += head_dim) {
    __builtin_prefetch(next, 0, 2);
    for (int w = 0; w < W; ++w) {
      const F32 v = load_cached(values + w * kLanes);
      for (int n = 0; n < N; ++n) part[n][w] = fma(set1(weight[n][j]), v, part[n][w]);
    }
  }
  for (int n = 0; n < N; ++n)
    for (int w = 0; w < W; ++w) store(sums + n * head_dim + w * kLanes, part[n][w]);
}

// The page that holds the key at a position.
template <class T>
inline const T* page_of(const Keys& k, int at) {
  return reinterpret_cast<const T*>(k.cache + static_cast<size_t>(k.table[at / kPageTokens]) * k.page_stride);
}

// The page behind it, or `here` itself where that is the last.
template <class T>
inline const T* page_behind(const Keys& k, int at, const T* here) {
  return at + kPageTokens < k.end ? page_of<T>(k, at + kPageTokens) : here;
}

template <class T, int N>
void attend_queries(const Attend& a) {
  float *q = a.scratch, *sums = a.scratch + N * a.head_dim;
  float largest[N], total[N];
  for (int n = 0; n < N; ++n) {
    largest[n] = kNoScore, total[n] = 0.0f;
    for (int d = 0; d < a.head_dim; ++d) q[n * a.head_dim + d] = a.q[n][d] * a.scale, sums[n * a.head_dim + d] = 0.0f;
  }
  for (int first = a.first; first < a.end; first += kPageTokens) {
    const T *keys = page_of<T>(a, first), *next = page_behind(a, first, keys);
    const T *values = keys + a.head_dim * kPageTokens, *then = next + a.head_dim * kPageTokens;
    const int count = a.end - first < kPageTokens ? a.end - first : kPageTokens;
    float weight[N][kPageTokens];
    page_scores<T, N>(a, q, keys, next, first, weight);
    for (int n = 0; n < N; ++n) page_softmax(weight[n], largest[n], total[n], sums + n * a.head_dim, a.head_dim);
    int d = 0;
    for (; d + 2 * kLanes <= a.head_dim; d += 2 * kLanes) page_values<T, N, 2>(values + d, then + d, a.head_dim, count, weight, sums + d);
    for (; d < a.head_dim; d += kLanes) page_values<T, N, 1>(values + d, then + d, a.head_dim, count, weight, sums + d);
  }
  for (int n = 0; n < N; ++n) {
    const float divisor = a.partial ? 1.0f : total[n];
    for (int d = 0; d < a.head_dim; ++d) a.out[n][d] = sums[n * a.head_dim + d] / divisor;
    if (a.partial) a.out[n][a.head_dim] = largest[n], a.out[n][a.head_dim + 1] = total[n];
  }
}

template <class T>
void attend(const Attend& a) {
  static_assert(kTileQueries == 4);
  if (a.queries == 4) return attend_queries<T, 4>(a);
  if (a.queries == 3) return attend_queries<T, 3>(a);
  if (a.queries == 2) return attend_queries<T, 2>(a);
  attend_queries<T, 1>(a);
}

// ---- many queries -------------------------------------------------------------------------------------------------

// The keys of a page as panels of 16: [steps][dwords][16 keys]. Keys and values of the `next` page are asked for meanwhile.
inline void unpack_keys(const AttendWide& a, const uint16_t* keys, const uint16_t* next, uint32_t* out) {
  for (int half = 0; half < kPageTokens / kPanelRows; ++half) {
    const uint16_t* from = keys + half * kPanelRows;
    int d = 0;
    for (; d < a.head_dim; d += 2, next += 2 * kPageTokens) {
      __builtin_prefetch(next, 0, 2), __builtin_prefetch(next + kPageTokens, 0, 2);
      put_columns(out, load_half(from + d * kPageTokens), load_half(from + (d + 1) * kPageTokens));
    }
    for (; d % kStepColumns != 0; d += 2) put_columns(out, set1(0.0f), set1(0.0f));
  }
}

// Values of a page as columns of the panels of 16 head dimensions; those from `count` on may be anything in the cache.
inline void unpack_values(const AttendWide& a, const uint16_t* values, int count, size_t stride, uint32_t* out) {
  for (int d = 0; d < a.head_dim; d += kPanelRows, out += stride) {
    uint32_t* to = out;
    const auto value = [&](int t) { return t < count ? load_half(values + t * a.head_dim + d) : set1(0.0f); };
    for (int t = 0; t < kPageTokens; t += 2) put_columns(to, value(t), value(t + 1));
  }
}

// One row's scores of some keys become weights, in the layout of a wide product's x. Scores are powers of two. Returns the factor of its old
// sums. total: of the weights so far, a part a lane.
inline float block_softmax(const AttendWide& a, int r, int first, int keys, float* score, float& largest, float* total, uint32_t* out) {
  constexpr size_t panel = static_cast<size_t>(kWideRows) * kPanelRows;
  const int last = a.position[r] - first, least = a.window ? last - a.window + 1 : 0;
  const int plain = a.masked_from - first >= keys ? keys : a.masked_from > first ? a.masked_from - first : 0;
  const auto hide = [&](int i) { score[static_cast<size_t>(i / kPanelRows) * panel + static_cast<size_t>(i % kPanelRows)] = kMasked; };
  // Panels, in twos, up to the last that holds a key which the row sees; what lies behind weighs nothing.
  constexpr int kTwo = 2 * kPanelRows;
  const int seen = plain < keys || last >= keys ? keys / kPanelRows : last < 0 ? 0 : (last / kTwo + 1) * 2;
  for (int i = last < 0 ? 0 : last + 1; i < plain && i < seen * kPanelRows; ++i) hide(i);
  for (int i = 0; i < least && i < plain; ++i) hide(i);
  for (int at = plain; at < keys; at += kPageTokens) mask_page(a.mask[r][(first + at - a.masked_from) / kPageTokens], [&](int i) { hide(at + i); });
  F32 most = set1(kNoScore);
  for (int p = 0; p < seen; ++p) most = max(most, load(score + static_cast<size_t>(p) * panel));
  const float block_most = max(most);
  float factor = 1.0f;
  if (block_most > largest) {
    float factors[kLanes];
    store(factors, exp2(set1(largest - block_most)));
    factor = factors[0], largest = block_most;
  }
  F32 part = mul(load(total), set1(factor));
  const F32 shift = set1(largest);
  for (int p = 0; p < keys / kPanelRows; p += 2) {
    F32 w0 = set1(0.0f), w1 = w0;
    if (p < seen) {
      w0 = exp2(sub(load(score + static_cast<size_t>(p) * panel), shift));
      w1 = exp2(sub(load(score + static_cast<size_t>(p + 1) * panel), shift));
      part = add(part, add(w0, w1));
    }
#ifdef MILLIS_PAIRS
    store_bfloats(reinterpret_cast<uint16_t*>(out), w0, w1);
#else
    store(reinterpret_cast<float*>(out), w0);
    out += kGroupRows * kStepDwords;
    store(reinterpret_cast<float*>(out), w1);
#endif
    out += kGroupRows * kStepDwords;
  }
  store(total, part);
  return factor;
}

// Blocks of keys outside, all rows inside (Dao et al., 2022), some of them at a time, whose scores and weights stay in the cache.
void attend_wide(const AttendWide& a) {
  constexpr size_t step = static_cast<size_t>(kGroupRows) * kStepDwords, tile = static_cast<size_t>(kWideRows) * kPanelRows;
  const int key_steps = (a.head_dim + kStepColumns - 1) / kStepColumns, head_panels = a.head_dim / kPanelRows;
  const size_t key_panel = static_cast<size_t>(key_steps) * step, value_panel = static_cast<size_t>(kWideKeys / kStepColumns) * step;
  const size_t row_sums = static_cast<size_t>(head_panels) * tile;
  uint32_t* q = a.words;
  uint32_t* weights = q + kWideQueries / kGroupRows * key_panel;
  uint32_t* keys = weights + kWideRows / kGroupRows * value_panel;
  uint32_t* values = keys + kWideKeys / kPanelRows * key_panel;
  float* scores = a.floats;
  float* sums = scores + kWideKeys / kPanelRows * tile;
  float* totals = sums + kWideQueries / kWideRows * row_sums;
  float largest[kWideQueries], *scaled = totals + kWideQueries * kLanes;
  for (int r = 0; r < a.rows; ++r) {
    constexpr float kLog2E = 1.44269504f;
    largest[r] = kNoScore;
    store(totals + r * kLanes, set1(0.0f));
    for (int d = 0; d < a.head_dim; ++d) scaled[d] = a.q[r][d] * (a.scale * kLog2E);
    pack_wide_rows(scaled, 0, 1, a.head_dim, q + packed_row(r, key_panel));
  }
  for (int first = a.first; first < a.end; first += kWideKeys) {
    const int pages = ((a.end - first < kWideKeys ? a.end - first : kWideKeys) + kPageTokens - 1) / kPageTokens;
    for (int p = 0; p < pages; ++p) {
      const int at = first + p * kPageTokens;
      const auto* here = page_of<uint16_t>(a, at);
      unpack_keys(a, here, page_behind(a, at, here), keys + static_cast<size_t>(p) * (kPageTokens / kPanelRows) * key_panel);
      unpack_values(a, here + a.head_dim * kPageTokens, a.end - at, value_panel,
                    values + static_cast<size_t>(p) * (kPageTokens / kStepColumns) * step);
    }
    for (int row = 0; row < a.rows; row += kWideRows) {
      const int rows = a.rows - row < kWideRows ? a.rows - row : kWideRows;
      const int seen = a.masked_from < a.end ? a.end : a.position[row + rows - 1] + 1;  // tokens in a line see none behind the last of them
      const int count = seen - first < pages * kPageTokens ? (seen - first + kPageTokens - 1) / kPageTokens * kPageTokens : pages * kPageTokens;
      if (seen <= first) continue;
      const uint32_t* x = q + packed_row(row, key_panel);
      float* sum_of = sums + static_cast<size_t>(row / kWideRows) * row_sums;
      a.product({keys, key_panel, count / kPanelRows, key_steps, x, key_panel, rows, scores, tile, false});
      for (int r = 0; r < rows; ++r) {
        uint32_t* to = weights + packed_row(r, value_panel);
        const float factor = block_softmax(a, row + r, first, count, scores + r * kPanelRows, largest[row + r], totals + (row + r) * kLanes, to);
        if (factor == 1.0f || first == a.first) continue;
        for (int p = 0; p < head_panels; ++p) {
          float* at = sum_of + static_cast<size_t>(p) * tile + r * kPanelRows;
          store(at, mul(load(at), set1(factor)));
        }
      }
      a.product({values, value_panel, head_panels, count / kStepColumns, weights, value_panel, rows, sum_of, tile, first != a.first});
    }
  }
  for (int r = 0; r < a.rows; ++r) {
    const F32 share = set1(1.0f / sum(load(totals + r * kLanes)));
    const float* sum_of = sums + static_cast<size_t>(r / kWideRows) * row_sums + r % kWideRows * kPanelRows;
    for (int p = 0; p < head_panels; ++p) store(a.out[r] + p * kPanelRows, mul(load(sum_of + static_cast<size_t>(p) * tile), share));
  }
}

}  // namespace
}  // namespace millis
