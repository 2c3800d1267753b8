// Products with activations of one byte: the input is rounded once for all threads, then each takes its share of the outputs.
#include <algorithm>

#include "step.h"

namespace millis {
namespace {

constexpr int kTogether = 28;  // rows that pass over a panel before their sums are finished
static_assert(kTogether <= kTileRows);

}  // namespace

bool Runtime::takes_bytes(const MatMulOp& op) const {
  const auto fits = [](const Segment& s) { return s.weight->format_id() == FormatId::Q8_0; };
  return config_.bytes && kernels_.bytes_panel && !op.gate && !op.norm && std::all_of(op.segments.begin(), op.segments.end(), fits);
}

void Runtime::execute_bytes(const MatMulOp& op, Step& step, int thread) {
  const int rows = step.count, cols = op.x->width;
  const auto blocks = static_cast<size_t>(cols / kBlock), out_width = static_cast<size_t>(op.out->width);
  const auto threads = static_cast<size_t>(pool_.threads()), t = static_cast<size_t>(thread), all = static_cast<size_t>(rows) * blocks;
  const size_t first_block = all * t / threads, last_block = all * (t + 1) / threads;
  kernels_.quantize_bytes(op.x->data.data() + first_block * kBlock, (last_block - first_block) * kBlock, shared_.bytes.data() + first_block);
  pool_.barrier(thread);

  int panels = 0, before = 0;
  for (const auto& s : op.segments) panels += s.weight->panels();
  const Range own = share(panels, thread, pool_.threads());
  alignas(64) float tile[kTileRows * kPanelRows];
  for (const auto& s : op.segments) {
    const int first = std::max(own.first - before, 0), last = std::min(own.last - before, s.weight->panels());
    before += s.weight->panels();
    for (int p = first; p < last; ++p) {
      const int column = s.column + p * kPanelRows, columns = std::min(kPanelRows, s.weight->rows() - p * kPanelRows);
      Epilogue e;
      e.bias = s.bias ? s.bias + p * kPanelRows : nullptr;
      e.activation = op.activation;
      for (int r = 0; r < rows; r += kTogether) {
        const int count = std::min(kTogether, rows - r);
        const size_t at = static_cast<size_t>(r) * out_width + static_cast<size_t>(column);
        kernels_.bytes_panel(s.weight->panel(p), cols, shared_.bytes.data() + static_cast<size_t>(r) * blocks, blocks, count, tile);
        e.residual = op.residual ? op.residual->data.data() + at : nullptr;
        kernels_.finish(tile, e, count, columns, op.out->data.data() + at, out_width);
      }
    }
  }
}

}  // namespace millis
