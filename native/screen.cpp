// The output matrix screened. Its first plane gives every logit up to a known error, and so a bound that the largest
// cannot lie below. Panels whose bound reaches it, or a margin below it, are computed from both planes; the others keep
// what the first plane says.
#include <algorithm>
#include <cmath>

#include "step.h"

namespace millis {

namespace {

// A weight is d (16 t + l - 128), t and l its nibbles, an activation a.d (256 h + low). Known are t and h, so that the
// product is d (4096 a.d t h + offset) but for errors: (l - 7.5) x, l uniform in 0..15, a variance of 21.25, and low times
// what the weight is more than its mean, low uniform in -128..127, a variance of 5461, and weights at most 127.
ScreenBlock screen_block(const ActBlock& a, const float* x) {
  constexpr float kNibble = 21.25f, kLowByte = 5461.25f * 127.0f * 127.0f * kBlock;
  float squares = 0.0f;
  int32_t high = 0;
  for (int k = 0; k < kBlock; ++k) squares += x[k] * x[k], high += a.high[k];
  return {4096.0f * a.d, 7.5f * a.s - 32768.0f * a.d * static_cast<float>(high), kNibble * squares + kLowByte * a.d * a.d};
}

}  // namespace

bool Runtime::screened(const MatMulOp& op, const Step& step) const {
  if (!config_.screen || upper_.empty() || step.margins.empty() || op.segments.size() != 1) return false;
  const int64_t bytes = int64_t{op.x->width} * op.segments[0].weight->rows();
  if (step.count > (bytes > kSmallOutput ? kPrivateRows : kScreenRowsSmall)) return false;
  if (op.segments[0].weight->format_id() != FormatId::Q8_0Planes || op.gate || op.residual || op.segments[0].bias) return false;
  const auto margins = step.margins.subspan(step.chunk, static_cast<size_t>(step.count));
  return op.activation == Activation::None && std::all_of(margins.begin(), margins.end(), [](float m) { return std::isfinite(m); });
}

void Runtime::execute_screened(const MatMulOp& op, Step& step, int thread) {
  const Matrix& w = *op.segments[0].weight;
  const int rows = step.count, cols = op.x->width, panels = w.panels(), whole = w.rows() / kPanelRows;
  const size_t blocks = static_cast<size_t>(cols / kBlock), width = static_cast<size_t>(cols), out_width = static_cast<size_t>(op.out->width);
  Scratch& own = private_[static_cast<size_t>(thread)];
  for (int r = 0; r < rows; ++r) {
    const float* x = row(*(op.norm ? op.norm->x : op.x), r);
    float* normal = own.rows.data() + static_cast<size_t>(r) * width;
    if (op.norm) normalize_row(kernels_, *op.norm, x, normal), x = normal;
    kernels_.quantize(x, cols, own.acts.data() + static_cast<size_t>(r) * blocks);
    for (size_t b = 0, at = static_cast<size_t>(r) * blocks; b < blocks; ++b, ++at) own.screen[at] = screen_block(own.acts[at], x + b * kBlock);
  }
  const Range mine = share(panels, thread, pool_.threads());
  float* lower = lower_.data() + static_cast<size_t>(thread) * kPrivateRows;
  std::fill(lower, lower + rows, -INFINITY);
  alignas(64) float tile[kPrivateRows * kPanelRows];
  const auto keep = [&](int panel, int r, const float* values) {
    const int columns = std::min(kPanelRows, w.rows() - panel * kPanelRows);
    std::copy(values, values + columns, op.out->data.data() + static_cast<size_t>(r) * out_width + static_cast<size_t>(panel * kPanelRows));
  };
  for (int p = mine.first; p < std::min(mine.last, whole); ++p) {
    Bounds bounds[kPrivateRows];
    kernels_.screen(w.panel(p), cols, own.acts.data(), blocks, own.screen.data(), rows, tile, bounds);
    for (int r = 0; r < rows; ++r) {
      keep(p, r, tile + r * kPanelRows);
      upper_[static_cast<size_t>(r) * static_cast<size_t>(panels) + static_cast<size_t>(p)] = bounds[r].upper;
      lower[r] = std::max(lower[r], bounds[r].lower);
    }
  }
  pool_.barrier(thread);
  for (int r = 0; r < rows; ++r) {
    float least = -INFINITY;
    for (int t = 0; t < pool_.threads(); ++t) least = std::max(least, lower_[static_cast<size_t>(t) * kPrivateRows + static_cast<size_t>(r)]);
    least -= step.margins[step.chunk + static_cast<size_t>(r)];
    for (int p = mine.first; p < mine.last; ++p) {
      const float upper = upper_[static_cast<size_t>(r) * static_cast<size_t>(panels) + static_cast<size_t>(p)];
      if (p < whole && upper < least) continue;
      multiply_panel(kernels_, w, p, own.acts.data() + static_cast<size_t>(r) * blocks, blocks, 1, tile);
      keep(p, r, tile);
    }
  }
}

}  // namespace millis
