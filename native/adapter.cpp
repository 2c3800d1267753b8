// Adapters: packed when they come, found row by row when a step begins, added to the tiles of its products.
#include "adapter.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "step.h"

namespace millis {
namespace {

// A step reads the same place of many adapters at once. Were they laid out alike, these would share sets of the caches and
// throw each other out (20 adapters: a step took half as long again); so each begins elsewhere.
constexpr size_t kStagger = 37 * 512, kStaggerMost = size_t{128} << 10;

constexpr int kHalfExponent = 14;  // the largest value of a scaled matrix lies below 2^14: sums of two still fit an f16

void require(bool ok, const std::string& what) {
  if (!ok) throw std::invalid_argument(what);
}

// The power of two that brings the largest of `values` just below 2^kHalfExponent.
float scale_for(const std::vector<float>& values) {
  float largest = 0.0f;
  for (const float v : values) largest = std::max(largest, std::fabs(v));
  int exponent = 0;
  std::frexp(largest, &exponent);
  return largest > 0.0f ? std::ldexp(1.0f, std::clamp(kHalfExponent - exponent, -100, 100)) : 1.0f;
}

void check(const AdapterPair& pair, int rows, int cols) {
  require(pair.rank >= 1 && pair.rank <= kMostRank, "the rank of " + pair.weight + " must lie in [1, " + std::to_string(kMostRank) + "]");
  const auto rank = static_cast<size_t>(pair.rank);
  require(pair.a.size() == rank * static_cast<size_t>(cols) && pair.b.size() == rank * static_cast<size_t>(rows),
          "the matrices of " + pair.weight + " must be [rank, " + std::to_string(cols) + "] and [" + std::to_string(rows) + ", rank]");
  const auto finite = [](float v) { return std::isfinite(v); };
  require(std::all_of(pair.a.begin(), pair.a.end(), finite) && std::all_of(pair.b.begin(), pair.b.end(), finite) && finite(pair.scale),
          pair.weight + " holds a value that is no finite number");
}

void store(bool exact, float value, float scale, uint8_t* data, size_t at) {
  if (exact) return void(std::memcpy(data + 4 * at, &value, 4));
  const uint16_t half = float_to_half(value * scale);
  std::memcpy(data + 2 * at, &half, 2);
}

// A weight's place: the op, which of its targets, and how many rows.
struct Place {
  const MatMulOp* op = nullptr;
  size_t target = 0;
  int rows = 0;
};

Place place_of(const std::vector<const MatMulOp*>& ops, const std::string& weight) {
  for (const MatMulOp* op : ops) {
    for (size_t s = 0; s < op->segments.size(); ++s)
      if (op->segments[s].weight->name() == weight) return {op, s, op->segments[s].weight->rows()};
    if (op->gate && op->gate->name() == weight) return {op, op->segments.size(), op->gate->rows()};
  }
  throw std::invalid_argument("no product of this model reads " + weight);
}

}  // namespace

Adapter::Adapter(const Runtime& owner, const std::vector<const MatMulOp*>& ops, const std::vector<AdapterPair>& pairs, bool exact) : owner_(owner) {
  const size_t element = exact ? 4 : 2;
  std::vector<Place> places;
  for (const MatMulOp* op : ops) parts_.resize(std::max(parts_.size(), static_cast<size_t>(op->number) + 1));
  for (const MatMulOp* op : ops) parts_[static_cast<size_t>(op->number)].targets.resize(op->segments.size() + 1);
  for (const AdapterPair& pair : pairs) {
    const Place place = places.emplace_back(place_of(ops, pair.weight));
    check(pair, place.rows, place.op->x->width);
    Part& part = parts_[static_cast<size_t>(place.op->number)];
    Target& target = part.targets[place.target];
    require(target.rank == 0, pair.weight + " is given twice");
    target.rank = pair.rank, target.first = part.ranks;
    part.ranks += pair.rank;
    panels_ = std::max(panels_, part.panels());
  }
  const auto a_values = [&](const MatMulOp& op) {
    return static_cast<size_t>(part(op.number).panels()) * static_cast<size_t>(op.x->width) * kPanelRows;
  };
  const auto b_values = [](const Place& place, int rank) {
    return static_cast<size_t>((place.rows + kPanelRows - 1) / kPanelRows) * static_cast<size_t>(rank) * kPanelRows;
  };
  for (const MatMulOp* op : ops) bytes_ += element * a_values(*op);
  for (size_t i = 0; i < pairs.size(); ++i) bytes_ += element * b_values(places[i], pairs[i].rank);

  static std::atomic<size_t> made{0};
  const size_t stagger = made++ * kStagger % kStaggerMost;
  data_ = panel_memory(bytes_ + stagger);
  next_.assign(parts_.size(), -1);
  for (size_t i = parts_.size(), later = 0; i-- > 0;) {
    next_[i] = later ? static_cast<int>(later) : -1;
    if (parts_[i].ranks > 0) later = i;
  }
  uint8_t* at = data_.get() + stagger;
  for (const MatMulOp* op : ops) {  // in the order in which a step reads them
    Part& p = parts_[static_cast<size_t>(op->number)];
    const auto cols = static_cast<size_t>(op->x->width);
    uint8_t* a = at;
    p.a = a, p.cols = op->x->width, p.factors.assign(static_cast<size_t>(p.ranks), 0.0f);
    at += element * a_values(*op);
    for (size_t i = 0; i < pairs.size(); ++i) {
      if (places[i].op != op) continue;
      const AdapterPair& pair = pairs[i];
      Target& target = p.targets[places[i].target];
      const float scale_a = exact ? 1.0f : scale_for(pair.a), scale_b = exact ? 1.0f : scale_for(pair.b);
      const auto rank = static_cast<size_t>(pair.rank), first = static_cast<size_t>(target.first);
      std::fill_n(p.factors.begin() + target.first, rank, pair.scale / scale_a / scale_b);
      for (size_t r = 0; r < rank; ++r)
        for (size_t k = 0; k < cols; ++k)
          store(exact, pair.a[r * cols + k], scale_a, a, ((first + r) / kPanelRows * cols + k) * kPanelRows + (first + r) % kPanelRows);
      for (size_t n = 0; n < static_cast<size_t>(places[i].rows); ++n)
        for (size_t r = 0; r < rank; ++r) store(exact, pair.b[n * rank + r], scale_b, at, (n / kPanelRows * rank + r) * kPanelRows + n % kPanelRows);
      target.b = at;
      at += element * b_values(places[i], pair.rank);
    }
  }
}

void Adding::begin(const Batch& batch) {
  runs_.clear();
  int row = 0, most = 0;
  for (size_t s = 0; s < batch.adapters.size(); row += batch.lengths[s], ++s) {
    const Adapter* adapter = batch.adapters[s];
    if (!adapter) continue;
    most = std::max(most, adapter->panels());
    if (!runs_.empty() && runs_.back().last == row && runs_.back().adapter == adapter) runs_.back().last += batch.lengths[s];
    else runs_.push_back({row, row + batch.lengths[s], adapter});
  }
  if (runs_.empty()) return;
  rows_ = static_cast<int>(batch.tokens.size()), panels_ = most;
  const size_t panels = static_cast<size_t>(panels_) * kPanelRows, values = kColumnParts * panels * static_cast<size_t>(rows_);
  if (parts_.size() < values) parts_.resize(values);
  for (Own& own : own_) {
    if (own.sums.size() < kWideBlock * panels) own.sums.resize(kWideBlock * panels);
    own.tiles.resize(kAddingPanels * kTileRows * kPanelRows);
  }
}

bool Adding::serves(const MatMulOp& op) const {
  return op.number >= 0 && std::any_of(runs_.begin(), runs_.end(), [&](const Run& run) { return run.adapter->part(op.number).ranks > 0; });
}

template <class Visit>
void Adding::each_share(int number, int thread, int threads, const Visit& visit) const {
  int units = 0, before = 0;
  for (const Run& run : runs_) units += run.adapter->part(number).units();
  const Range mine = share(units, thread, threads);
  for (const Run& run : runs_) {
    const Adapter::Part& part = run.adapter->part(number);
    const int first = std::max(0, mine.first - before), last = std::min(part.units(), mine.last - before);
    if (first < last) visit(run, part, first, last);
    before += part.units();
  }
}

// A unit is a part of the columns of a panel of A: they lie one after the other.
const uint8_t* Adding::a_of(const Adapter::Part& part, int unit) const {
  const size_t value_bytes = exact_ ? 4 : 2, column = static_cast<size_t>(share(part.cols, unit % kColumnParts, kColumnParts).first);
  return part.a + (static_cast<size_t>(unit / kColumnParts) * static_cast<size_t>(part.cols) + column) * kPanelRows * value_bytes;
}

void Adding::multiply(const Adapter::Part& part, int unit, const float* x, int first, int last) {
  const auto id = static_cast<int>(exact_ ? FormatId::F32 : FormatId::F16);
  const auto width = static_cast<size_t>(part.cols);
  const Range columns = share(part.cols, unit % kColumnParts, kColumnParts);
  kernels_.float_panel[id](a_of(part, unit), columns.last - columns.first, x + static_cast<size_t>(first) * width + columns.first, width,
                           last - first, sums_of(unit % kColumnParts, unit / kColumnParts, first));
}

void Adding::shrink(const MatMulOp& op, const float* x, int first, int last) {
  for (const Run& run : runs_) {
    const Adapter::Part& part = run.adapter->part(op.number);
    const int from = std::max(first, run.first), to = std::min(last, run.last);
    for (int unit = 0; unit < part.units() && from < to; ++unit) multiply(part, unit, x, from, to);
  }
}

void Adding::shrink_share(const MatMulOp& op, const float* x, int thread, int threads) {
  each_share(op.number, thread, threads, [&](const Run& run, const Adapter::Part& part, int first, int last) {
    for (int unit = first; unit < last; ++unit) multiply(part, unit, x, run.first, run.last);
  });
}

// What this thread reads from here on: the B of `op`, several panels at a time, then the A of the next op. It is asked for while
// products compute, which leave the memory idle where rows are several.
void Adding::look_ahead(const MatMulOp& op, int thread, int threads) {
  Own& own = own_[static_cast<size_t>(thread)];
  own.spans.clear();
  size_t lines = 0;
  const auto expect = [&](const uint8_t* at, const uint8_t* end) {
    if (at >= end) return;
    own.spans.push_back({at, end});
    lines += static_cast<size_t>(end - at) / 64;
  };
  const size_t value_bytes = exact_ ? 4 : 2;
  int panels = 0, before = 0;
  for (const auto& s : op.segments) panels += s.weight->panels();
  const Range mine = share(panels, thread, threads);
  const int take = op.gate ? kAddingPanels / 2 : kAddingPanels;
  for (size_t s = 0; s < op.segments.size(); ++s) {
    const int first = std::max(mine.first - before, 0), last = std::min(mine.last - before, op.segments[s].weight->panels());
    before += op.segments[s].weight->panels();
    for (int p = first; p < last; p += take)
      for (size_t target = s; target < op.segments.size() + (op.gate ? 1 : 0); target += op.segments.size())
        for (const Run& run : runs_) {
          const Adapter::Part& part = run.adapter->part(op.number);
          if (part.ranks == 0 || part.targets[target].rank == 0) continue;
          const size_t bytes = static_cast<size_t>(part.targets[target].rank) * kPanelRows * value_bytes;
          expect(part.targets[target].b + static_cast<size_t>(p) * bytes,
                 part.targets[target].b + static_cast<size_t>(std::min(p + take, last)) * bytes);
        }
  }
  const int next = runs_.front().adapter->next(op.number);
  if (next >= 0 && rows_ <= kPrivateRows) {
    each_share(next, thread, threads,
               [&](const Run&, const Adapter::Part& part, int first, int last) { expect(a_of(part, first), a_of(part, last)); });
  } else if (next >= 0) {
    const Range rows = share(rows_, thread, threads);
    for (const Run& run : runs_)
      if (run.first < rows.last && run.last > rows.first)
        expect(run.adapter->part(next).a, a_of(run.adapter->part(next), run.adapter->part(next).units()));
  }
  const int products = (op.gate ? 2 : 1) * (mine.last - mine.first) * ((rows_ + kAddingRows - 1) / kAddingRows);
  const int blocks = std::max(1, products * (op.x->width / kBlock));
  own.ahead = {own.spans.data(), own.spans.data() + own.spans.size(), static_cast<int>(lines / static_cast<size_t>(blocks)) + 1};
}

void Adding::gather(const MatMulOp& op, int first, int count, int thread) {
  Own& own = own_[static_cast<size_t>(thread)];
  own.gathered = first, own.first = -1;
  const size_t stride = static_cast<size_t>(panels_) * kPanelRows;
  for (const Run& run : runs_) {
    const Adapter::Part& part = run.adapter->part(op.number);
    for (int r = std::max(first, run.first); r < std::min(first + count, run.last); ++r) {
      float* sums = own.sums.data() + static_cast<size_t>(r - first) * stride;
      for (int i = 0; i < part.ranks; i += kPanelRows) {
        const float* parts[kColumnParts];
        for (int c = 0; c < kColumnParts; ++c) parts[c] = sums_of(c, i / kPanelRows, r);
        for (int j = 0; j < std::min(kPanelRows, part.ranks - i); ++j)
          sums[i + j] = ((parts[0][j] + parts[1][j]) + (parts[2][j] + parts[3][j])) * part.factors[static_cast<size_t>(i + j)];
      }
    }
  }
}

void Adding::add(const MatMulOp& op, size_t target, int panel, int panels, int first, int count, float* tiles, size_t tile_stride, int thread) {
  Own& own = own_[static_cast<size_t>(thread)];
  const size_t stride = static_cast<size_t>(panels_) * kPanelRows;
  if (own.first != first || own.target != target || own.count != count) {
    own.first = first, own.target = target, own.count = count;
    own.addends.clear();
    for (const Run& run : runs_) {
      const Adapter::Part& part = run.adapter->part(op.number);
      const int from = std::max(first, run.first), to = std::min(first + count, run.last);
      if (part.ranks == 0 || from >= to || part.targets[target].rank == 0) continue;
      const Adapter::Target& t = part.targets[target];
      own.addends.push_back({t.b, t.rank, from - first, to - from, own.sums.data() + static_cast<size_t>(from - own.gathered) * stride + t.first});
    }
  }
  kernels_.add_products[exact_](own.addends.data(), static_cast<int>(own.addends.size()), panel, panels, stride, tiles, tile_stride);
}

}  // namespace millis
