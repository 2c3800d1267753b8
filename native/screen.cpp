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

constexpr uint32_t kAll = (1 << kPanelRows) - 1;

// A bit for each of a panel's 16 tokens that a mask allows.
uint32_t allowed_of(const std::vector<uint32_t>& mask, int panel) {
  static_assert(kPanelRows == 16);
  return mask.empty() ? kAll : mask[static_cast<size_t>(panel) / 2] >> (panel % 2 * kPanelRows) & kAll;
}

// The largest of 16 logits, of the tokens behind `first` that have a bit in `among`; in a race with what its token draws. NaNs
// are left out.
float furthest(const float* logits, const Choosing& choosing, int32_t first, uint32_t among) {
  double most = -INFINITY;
  for (int i = 0; i < kPanelRows; ++i) {
    if (!(among >> i & 1)) continue;
    const double drawn = choosing.heat > 0.0f ? -std::log(-std::log(race_uniform(race_bits(choosing.key, first + i)))) : 0.0;
    most = std::max(most, logits[i] + choosing.heat * drawn);
  }
  return static_cast<float>(most);
}

// Whether one of 16 logits that has a bit in `among` may reach `least`.
bool may_reach(const float* logits, float error, float least, uint32_t among) {
  uint32_t below = 0;
  for (int i = 0; i < kPanelRows; ++i) below |= static_cast<uint32_t>(logits[i] + error < least) << i;  // no NaN is
  return (among & ~below) != 0;
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
  if (thread == 0)  // one asks for all, so that a mask which is late is so for all
    for (int r = 0; r < rows; ++r) {
      allowed_[r].clear();
      if (choosing(r).among) choosing(r).among->allowed(allowed_[r]);
    }
  pool_.barrier(thread);
  const auto& masks = allowed_;
  const auto by_token = [&](int r) { return choosing(r).heat > 0.0f || !masks[r].empty(); };  // which ones may be chosen
  // Computes a full panel from both planes; returns the furthest of those that may be chosen.
  const auto compute = [&](int r, int p) {
    multiply_panel(kernels_, w, p, acts(r), blocks, 1, logits(r, p));
    return furthest(logits(r, p), choosing(r), p * kPanelRows, allowed_of(masks[r], p));
  };
  Bounds bounds[kPrivateRows];
  float likely[kPrivateRows];
  int best[kPrivateRows];
  std::fill(likely, likely + rows, -INFINITY);
  std::fill(best, best + rows, -1);
  for (int p = mine.first; p < mine.last; ++p) {
    uint32_t any = 0;
    for (int r = 0; r < rows; ++r) any |= allowed_of(masks[r], p);
    if (any == 0) continue;
    kernels_.screen(w.panel(p), cols, acts(0), blocks, own.screen.data(), rows, tile, bounds);
    for (int r = 0; r < rows; ++r) {
      const uint32_t among = allowed_of(masks[r], p);
      std::copy(tile + r * kPanelRows, tile + (r + 1) * kPanelRows, logits(r, p));
      bound(r, p) = by_token(r) ? bounds[r].error : bounds[r].upper;
      const float hope = among == kAll ? bounds[r].likely : furthest(logits(r, p), {}, 0, among);
      if (hope > likely[r]) likely[r] = hope, best[r] = p;
    }
  }
  for (int r = 0; r < rows; ++r) lower_[static_cast<size_t>(thread * kPrivateRows + r)] = best[r] < 0 ? -INFINITY : compute(r, best[r]);
  pool_.barrier(thread);
  for (int r = 0; r < rows; ++r) {
    const Choosing& how = choosing(r);
    float most = -INFINITY;
    for (int t = 0; t < pool_.threads(); ++t) most = std::max(most, lower_[static_cast<size_t>(t * kPrivateRows + r)]);
    for (int p = mine.first; p < mine.last; ++p) {
      const uint32_t among = allowed_of(masks[r], p);
      if (p == best[r] || among == 0) continue;
      const float limit = bound(r, p), least = most - how.margin;
      const bool open = how.heat > 0.0f ? kernels_.may_win(logits(r, p), limit, most, how, p * kPanelRows, among)
                        : by_token(r)   ? may_reach(logits(r, p), limit, least, among)
                                        : !(limit < least);  // nor a NaN
      if (open) most = std::max(most, compute(r, p));
      else if (how.heat > 0.0f) std::fill_n(logits(r, p), kPanelRows, -INFINITY);
    }
    if (thread != 0 || whole == panels) continue;
    multiply_panel(kernels_, w, whole, acts(r), blocks, 1, tile);  // the last, which is not full
    std::copy(tile, tile + w.rows() % kPanelRows, logits(r, whole));
  }
}

}  // namespace millis
