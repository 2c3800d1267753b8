// The attention of a step: which thread computes which queries over which keys.
#include <algorithm>
#include <cmath>
#include <limits>

#include "step.h"

namespace millis {
namespace {

constexpr int kFewTokens = 8;    // of a sequence: up to here, a decode with drafts, each query is computed as if alone
constexpr int kWideLeast = 16;   // queries of a KV head from which on wide products pay
constexpr int kSharedPages = 8;  // from here on threads share the keys of a query

// parts: for each thread sums [head_dim], their largest score, the sum of their weights; `stride` floats apart.
void merge_parts(const float* parts, size_t stride, int threads, int head_dim, float* out) {
  float largest = parts[head_dim], total = 0.0f;
  for (int t = 1; t < threads; ++t) largest = std::max(largest, parts[static_cast<size_t>(t) * stride + static_cast<size_t>(head_dim)]);
  std::fill(out, out + head_dim, 0.0f);
  for (int t = 0; t < threads; ++t, parts += stride) {
    const float weight = std::exp(parts[head_dim] - largest);
    total += weight * parts[head_dim + 1];
    for (int d = 0; d < head_dim; ++d) out[d] += weight * parts[d];
  }
  for (int d = 0; d < head_dim; ++d) out[d] /= total;
}

}  // namespace

// Heads of q and k: norm and rotation, in that order or the other; k and v into the cache.
void Runtime::write_heads(const AttentionOp& op, Step& step, int thread) {
  const int threads = pool_.threads(), hd = config_.head_dim, kv_heads = config_.kv_heads;
  const int each = op.heads + kv_heads;
  const Range heads = share(step.count * each, thread, threads);
  float* normal = private_[static_cast<size_t>(thread)].attention.data();
  for (int i = heads.first; i < heads.last; ++i) {
    const int t = i / each, h = i % each, position = positions_[static_cast<size_t>(t)], slot = slots_[static_cast<size_t>(t)];
    float* x = row(*op.qkv, t) + h * hd;
    const Vector* weight = h < op.heads ? op.q_norm : op.k_norm;
    const auto norm = [&] {
      kernels_.rms_norm(x, weight->data(), op.eps, hd, normal);
      std::copy(normal, normal + hd, x);
    };
    if (weight && !op.norm_rotated) norm();
    if (op.rope) {
      const auto half = static_cast<size_t>(op.rotated / 2);
      const float* cosines = op.rope->data() + static_cast<size_t>(position) * half;
      kernels_.rotate(x, cosines, cosines + static_cast<size_t>(config_.context) * half, op.rotated, op.interleaved);
    }
    if (weight && op.norm_rotated) norm();
    if (h < op.heads) continue;
    const auto* table = step.batch.tables.data() + static_cast<size_t>(sequences_[static_cast<size_t>(t)]) * step.batch.table_width;
    kernels_.write_kv[config_.exact](x, x + kv_heads * hd, hd, slot % kPageTokens, cached(table[slot / kPageTokens], op.layer, h - op.heads));
  }
}

// Every thread has columns of its own, for all rows in order: what a token keeps is there for those behind it.
void Runtime::execute(const ConvolveOp& op, Step& step, int thread) {
  const auto width = static_cast<size_t>(op.out->width), element = size_t{config_.exact ? 4u : 2u};
  const Range lanes = share(op.out->width / kPanelRows, thread, pool_.threads());
  const auto first = static_cast<size_t>(lanes.first) * kPanelRows;
  Convolve task{};
  task.weight = op.weight->data() + first, task.stride = width, task.taps = op.taps, task.columns = (lanes.last - lanes.first) * kPanelRows;
  for (int t = 0; t < step.count; ++t) {
    const auto s = static_cast<size_t>(sequences_[static_cast<size_t>(t)]);
    const int32_t start = step.batch.starts[s], *table = step.batch.tables.data() + s * step.batch.table_width;
    const auto kept = [&](int32_t slot) {
      return cached(table[slot / kPageTokens], op.layer, 0) + (static_cast<size_t>(slot % kPageTokens) * width + first) * element;
    };
    // Of the sequence's tokens in this batch, from 0 on; what is cached lies before.
    const auto before = [&](int32_t i) {
      return i < 0 || step.batch.parents.empty() ? i - 1 : step.batch.parents[static_cast<size_t>(begins_[s] + i)];
    };
    int32_t at = t - begins_[s];
    task.kept = kept(start + at);
    for (int i = 0; i < op.taps - 1; ++i) {
      at = before(at);
      task.past[i] = start + at < 0 ? nullptr : kept(start + at);
    }
    const float* x = row(*op.bcx, t) + first;
    task.b = x, task.c = x + width, task.x = x + 2 * width, task.out = row(*op.out, t) + first;
    kernels_.convolve[config_.exact](task);
  }
}

// Queries of a unit of wide attention: as many as it takes, shared out evenly. Where that would make few units, and one thread would
// do more of them than another, those of the heads behind the last that all threads have their share of are half as large.
static int wide_rows(int rows, int head, int kv_heads, int threads) {
  constexpr int kPassRows = 4;  // that a product takes anyway
  int parts = (rows + kWideQueries - 1) / kWideQueries;
  const bool even = kv_heads * parts % threads == 0, many = kv_heads * parts >= 8 * threads;
  if (!even && !many && head >= kv_heads / threads * threads) parts *= 2;
  const int each = (rows + parts - 1) / parts;
  return (each + kPassRows - 1) / kPassRows * kPassRows;
}

// The keys that queries of sequence s see together, at positions from `low` on, the last of them in slot `high`; or all of its source.
Keys Runtime::keys_of(const AttentionOp& op, const Step& step, size_t s, int head, int low, int high) const {
  Keys k{};
  k.first = op.window && low >= op.window ? (low - op.window + 1) / kPageTokens * kPageTokens : 0;
  k.end = op.cross ? step.batch.sources[s] : high + 1;
  k.window = op.window, k.head_dim = config_.head_dim, k.scale = op.scale;
  k.table = op.cross ? step.batch.source_tables.data() + s * step.batch.source_width : step.batch.tables.data() + s * step.batch.table_width;
  k.cache = cached(0, op.layer, head);
  k.page_stride = page_stride_;
  k.masked_from = step.batch.parents.empty() ? std::numeric_limits<int>::max() : step.batch.starts[s] / kPageTokens * kPageTokens;
  return k;
}

void Runtime::execute(const AttentionOp& op, Step& step, int thread) {
  if (!op.cross) {
    write_heads(op, step, thread);
    pool_.barrier(thread);
  }
  const int threads = pool_.threads(), hd = config_.head_dim, kv_heads = config_.kv_heads, group = op.heads / kv_heads;
  const size_t part = kTileQueries * static_cast<size_t>(hd + 2);  // of a unit and a thread
  Scratch& own = private_[static_cast<size_t>(thread)];
  bool merge = false;
  const bool last = step.early && &op == std::get_if<AttentionOp>(&ops_[tail_ - 1]);

  // Units of queries of one sequence and KV head. Row i of them is query i / group, head i % group. Units are dealt out in
  // turn, there and back, for each sees more keys than the one before; but where a few queries see many keys, every thread
  // takes its share of the keys.
  const auto each_unit = [&](const auto& visit) {
    int unit = 0, token = 0, split = 0;
    for (size_t s = 0; s < step.batch.lengths.size(); token += step.batch.lengths[s], ++s) {
      const int rows = step.batch.lengths[s] * group, seen = op.cross ? step.batch.sources[s] : step.batch.starts[s] + step.batch.lengths[s];
      const int pages = seen / kPageTokens;
      const auto units = static_cast<int64_t>(step.batch.lengths.size()) * kv_heads * ((rows + kTileQueries - 1) / kTileQueries);
      const bool wide = step.batch.lengths[s] > kFewTokens && rows >= kWideLeast && !config_.exact && !op.bias;
      const bool shared = !wide && threads > 1 && pages >= kSharedPages && split + units <= static_cast<int64_t>(kMostShared);
      const int few = units >= threads || shared ? kTileQueries : std::clamp((rows + threads - 1) / threads, 1, kTileQueries);
      for (int h = 0; h < kv_heads; ++h) {
        const int most = wide ? wide_rows(rows, h, kv_heads, threads) : few;
        for (int first = 0; first < rows; first += most) {
          const int count = std::min(most, rows - first), begin = token + first / group, end = token + (first + count - 1) / group + 1;
          if (!last || step.selects(begin, end)) visit(s, h, token, first, count, wide, shared ? split++ : -1, unit++);
        }
      }
    }
  };
  each_unit([&](size_t s, int h, int token, int first, int count, bool wide, int split, int unit) {
    const int turn = unit % (2 * threads);
    if (split < 0 && std::min(turn, 2 * threads - 1 - turn) != thread) return;
    const int begin = token + first / group, end = token + (first + count - 1) / group + 1;
    const int low =
        step.batch.parents.empty() ? positions_[static_cast<size_t>(begin)] : *std::min_element(positions_.begin() + begin, positions_.begin() + end);
    const Keys keys = keys_of(op, step, s, h, low, slots_[static_cast<size_t>(end - 1)]);
    const uint32_t* masks = step.batch.parents.empty() ? nullptr : masks_.at(op.window).data();
    const auto fill = [&](auto& a) {
      static_cast<Keys&>(a) = keys;
      for (int n = 0; n < count; ++n) {
        const int t = token + (first + n) / group, head = h * group + (first + n) % group;
        a.q[n] = row(*op.qkv, t) + head * hd, a.out[n] = row(*op.out, t) + head * hd;
        a.position[n] = op.cross ? step.batch.sources[s] - 1 : positions_[static_cast<size_t>(t)];
        if (masks) a.mask[n] = masks + static_cast<size_t>(t) * mask_words_;
      }
    };
    if (wide) {
      AttendWide a{};
      fill(a);
      a.rows = count, a.product = kernels_.wide.product, a.words = own.wide.data(), a.floats = own.tile.data();
      return kernels_.attend_wide(a);
    }
    Attend a{};
    fill(a);
    for (int n = 0; op.bias && n < count; ++n) a.bias[n] = score_bias(op.bias, h * group + (first + n) % group, config_.context) - a.position[n];
    a.queries = count, a.scratch = own.attention.data();
    if (split >= 0) {
      merge = a.partial = true;
      const Range pages = share((keys.end - keys.first + kPageTokens - 1) / kPageTokens, thread, threads);
      a.first = keys.first + pages.first * kPageTokens, a.end = std::min(keys.end, keys.first + pages.last * kPageTokens);
      float* to = partial_.data() + (static_cast<size_t>(split) * static_cast<size_t>(threads) + static_cast<size_t>(thread)) * part;
      for (int n = 0; n < count; ++n) a.out[n] = to + n * (hd + 2);
    }
    kernels_.attend[config_.exact](a);
  });
  if (!merge) return;
  pool_.barrier(thread);
  each_unit([&](size_t, int h, int token, int first, int count, bool, int split, int) {
    if (split < 0 || split % threads != thread) return;
    const float* parts = partial_.data() + static_cast<size_t>(split) * static_cast<size_t>(threads) * part;
    for (int n = 0; n < count; ++n) {
      float* out = row(*op.out, token + (first + n) / group) + (h * group + (first + n) % group) * hd;
      merge_parts(parts + n * (hd + 2), part, threads, hd, out);
    }
  });
}

}  // namespace millis
