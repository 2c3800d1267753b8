// The output matrix screened. Its first plane gives every logit up to a known error. Each thread computes the panel that
// looks best from both planes: the largest logit cannot lie below what that holds. Panels that may reach it, or a margin
// below it, are computed from both planes, too; the others keep what the first plane says. In a race of tokens it is logits
// with what their tokens draw that are compared, and what cannot win is out.
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

// The largest sum of a logit and what its token, one of 16 behind `first`, draws in a race. NaNs are left out.
float furthest(const float* logits, const Choosing& race, int32_t first) {
  double most = -INFINITY;
  for (int i = 0; i < kPanelRows; ++i) {
    const double drawn = -std::log(-std::log(race_uniform(race_bits(race.key, first + i))));
    most = std::max(most, logits[i] + race.heat * drawn);
  }
  return static_cast<float>(most);
}

}  // namespace

bool Runtime::screened(const MatMulOp& op, const Step& step) const {
  if (!config_.screen || bound_.empty() || step.choosing.empty() || op.segments.size() != 1) return false;
  if (step.count > kPrivateRows || op.activation != Activation::None) return false;
  if (op.segments[0].weight->format_id() != FormatId::Q8_0Planes || op.gate || op.residual || op.segments[0].bias) return false;
  const auto choosing = step.choosing.subspan(step.chunk, static_cast<size_t>(step.count));
  return std::all_of(choosing.begin(), choosing.end(), [](const Choosing& c) { return std::isfinite(c.margin); }) &&
         std::count_if(choosing.begin(), choosing.end(), [](const Choosing& c) { return c.margin > 0.0f; }) <= kScreenDrawn;
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
  const Range mine = share(whole, thread, pool_.threads());
  alignas(64) float tile[kPrivateRows * kPanelRows];
  const auto bound = [&](int r, int p) -> float& { return bound_[static_cast<size_t>(r) * static_cast<size_t>(panels) + static_cast<size_t>(p)]; };
  const auto logits = [&](int r, int p) { return op.out->data.data() + static_cast<size_t>(r) * out_width + static_cast<size_t>(p * kPanelRows); };
  const auto acts = [&](int r) { return own.acts.data() + static_cast<size_t>(r) * blocks; };
  const auto choosing = [&](int r) -> const Choosing& { return step.choosing[step.chunk + static_cast<size_t>(r)]; };
  // Computes a full panel from both planes; returns its largest logit or, of a race, logit with what its token draws.
  const auto compute = [&](int r, int p) {
    multiply_panel(kernels_, w, p, acts(r), blocks, 1, logits(r, p));
    return choosing(r).heat > 0.0f ? furthest(logits(r, p), choosing(r), p * kPanelRows) : *std::max_element(logits(r, p), logits(r, p) + kPanelRows);
  };
  Bounds bounds[kPrivateRows];
  float likely[kPrivateRows];
  int best[kPrivateRows];
  std::fill(likely, likely + rows, -INFINITY);
  std::fill(best, best + rows, -1);
  for (int p = mine.first; p < mine.last; ++p) {
    kernels_.screen(w.panel(p), cols, acts(0), blocks, own.screen.data(), rows, tile, bounds);
    for (int r = 0; r < rows; ++r) {
      std::copy(tile + r * kPanelRows, tile + (r + 1) * kPanelRows, logits(r, p));
      bound(r, p) = choosing(r).heat > 0.0f ? bounds[r].error : bounds[r].upper;
      if (bounds[r].likely > likely[r]) likely[r] = bounds[r].likely, best[r] = p;
    }
  }
  for (int r = 0; r < rows; ++r) lower_[static_cast<size_t>(thread * kPrivateRows + r)] = best[r] < 0 ? -INFINITY : compute(r, best[r]);
  pool_.barrier(thread);
  for (int r = 0; r < rows; ++r) {
    const Choosing& chosen = choosing(r);
    float most = -INFINITY;
    for (int t = 0; t < pool_.threads(); ++t) most = std::max(most, lower_[static_cast<size_t>(t * kPrivateRows + r)]);
    for (int p = mine.first; p < mine.last; ++p) {
      if (p == best[r]) continue;
      if (chosen.heat > 0.0f) {
        if (kernels_.may_win(logits(r, p), bound(r, p), most, chosen, p * kPanelRows)) most = std::max(most, compute(r, p));
        else std::fill_n(logits(r, p), kPanelRows, -INFINITY);
      } else if (!(bound(r, p) < most - chosen.margin)) {  // nor a NaN
        most = std::max(most, compute(r, p));
      }
    }
    if (thread != 0 || whole == panels) continue;
    multiply_panel(kernels_, w, whole, acts(r), blocks, 1, tile);  // the last, which is not full
    std::copy(tile, tile + w.rows() % kPanelRows, logits(r, whole));
  }
}

}  // namespace millis
