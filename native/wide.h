// The way of many rows through a product's panels: which are unpacked, in which order, and what is made of them.
#pragma once

#include <algorithm>
#include <span>

#include "step.h"

namespace millis {

// Panels that one product takes together, and the columns it is at: two of a weight, or one of a weight and its gate's.
class WidePlace {
 public:
  WidePlace(const Wide& wide, std::span<const Segment> segments, const Matrix* gate, int cols, Range panels)
      : wide_(&wide), segments_(segments), gate_(gate), cols_(cols), all_(panels), panel_(panels.first) {
    settle();
  }

  bool valid() const { return segment_ < segments_.size(); }
  bool first_columns() const { return column_ == 0; }
  bool last_columns() const { return column_ + columns() == cols_; }
  size_t segment() const { return segment_; }
  int panel() const { return panel_; }
  int panels() const { return count_; }                      // of the weight
  int operand_panels() const { return gate_ ? 2 : count_; }  // and of the gate
  int column() const { return column_; }
  int columns() const { return std::min(wide_->columns, cols_ - column_); }

  WidePlace next() const {
    WidePlace after = *this;
    after.column_ += columns();
    if (after.column_ < cols_) return after;
    after.column_ = 0, after.panel_ += count_;
    after.settle();
    return after;
  }

  Unpacking operands(uint32_t* out) const {
    Unpacking a;
    if (!valid()) return a;
    const Matrix* weight = segments_[segment_].weight;
    a.panels = operand_panels();
    for (int i = 0; i < a.panels; ++i) {
      const Matrix* w = i == 1 && gate_ ? gate_ : weight;
      a.unpack[i] = wide_->unpack[static_cast<int>(w->format_id())];
      a.panel[i] = w->panel(gate_ ? panel_ : panel_ + i);
    }
    a.out = out, a.stride = wide_->operands(wide_->columns), a.block_dwords = wide_->operands(kBlock), a.first = column_, a.cols = columns();
    return a;
  }

 private:
  // From a panel that may lie behind its segment to one that is there, or to the end.
  void settle() {
    for (; valid(); before_ += segments_[segment_].weight->panels(), ++segment_, panel_ = std::max(all_.first - before_, 0)) {
      const int last = std::min(all_.last - before_, segments_[segment_].weight->panels());
      count_ = std::min(gate_ ? 1 : wide_->panels, last - panel_);
      if (count_ > 0) return;
    }
  }

  const Wide* wide_;
  std::span<const Segment> segments_;
  const Matrix* gate_;
  int cols_;
  Range all_;  // a thread's panels, counted through all segments
  size_t segment_ = 0;
  int before_ = 0;  // panels of the segments before
  int panel_, count_ = 0, column_ = 0;
};

constexpr size_t kWideOperands = 2 * static_cast<size_t>(kWideColumns) * kPanelRows;                    // dwords
constexpr size_t kWideTile = static_cast<size_t>(kWideBlock) * kPanelRows, kWideTiles = 2 * kWideTile;  // floats

// Multiplies packed rows by the panels of a place and those behind it. begin(first, count) is called before each block of rows, done(place, first,
// count) when a place's sums are complete: the panels' tiles, or the weight's and then the gate's, lie kWideTile floats apart.
template <class Begin, class Done>
void wide_products(const Wide& wide, WidePlace start, const uint32_t* x, int cols, Range rows, uint32_t* operands, float* tiles, const Begin& begin,
                   const Done& done) {
  if (!start.valid() || rows.first == rows.last) return;
  const size_t step = static_cast<size_t>(kGroupRows) * kStepDwords, group = wide.operands(cols);
  const size_t panel = wide.operands(wide.columns),
               other = wide.unpacks ? 2 * panel : 0;  // where what comes next is unpacked: beside, or in the same place afterwards
  size_t half = 0;
  start.operands(operands).rest();
  for (int block = rows.first; block < rows.last; block += kWideBlock) {
    const int some = std::min(kWideBlock, rows.last - block);
    begin(block, some);
    for (WidePlace at = start; at.valid(); half = other - half) {
      const WidePlace after = at.next();
      Unpacking following = (!after.valid() && block + kWideBlock < rows.last ? start : after).operands(operands + (other - half));
      const uint32_t* from = x + static_cast<size_t>(block / kGroupRows) * group + static_cast<size_t>(at.column() / wide.step_columns) * step;
      wide.product({operands + half, panel, at.operand_panels(), wide.steps(at.columns()), from, group, some, tiles, kWideTile, !at.first_columns(),
                    wide.unpacks ? &following : nullptr});
      following.rest();
      if (at.last_columns()) done(at, block, some);
      at = after;
    }
  }
}

}  // namespace millis
