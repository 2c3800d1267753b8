// The output matrix screened. Its first plane gives every logit up to a known error. Each thread computes the panel that
// looks best from both planes: the largest logit cannot lie below what that holds. Panels that may reach it, or a margin
// below it, are computed from both planes, too; the others keep what the first plane says. In a race of tokens it is logits
// with what their tokens draw that are compared, and what cannot win is out. A race that filters narrow is first run among all;
// its winner stands if it passes the filters, which only those that are likelier decide: they are read, too. If it does not, or
// not surely, all within the margin is read.
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

// Of 16 logits that have a bit in `among`; NaNs are left out.
float largest(const float* logits, uint32_t among) {
  float most = -INFINITY;
  for (int i = 0; i < kPanelRows; ++i)
    if (among >> i & 1) most = std::max(most, logits[i]);
  return most;
}

// Whether one of 16 logits that has a bit in `among` may reach `least`.
bool may_reach(const float* logits, float error, float least, uint32_t among) {
  uint32_t below = 0;
  for (int i = 0; i < kPanelRows; ++i) below |= static_cast<uint32_t>(logits[i] + error < least) << i;  // no NaN is
  return (among & ~below) != 0;
}

constexpr float kRead = -INFINITY;  // instead of a panel's bound: it was computed from both planes

}  // namespace

// One thread's part of a screened product.
class Runtime::Screening {
 public:
  Screening(Runtime& runtime, const MatMulOp& op, const Step& step, int thread)
      : runtime_(runtime), op_(op), step_(step), thread_(thread), own_(runtime.private_[static_cast<size_t>(thread)]) {}

  void run() {
    prepare();
    barrier();
    look();
    barrier();
    for (int r = 0; r < rows_; ++r) decide(r);
    if (!narrowed()) return;
    barrier();
    for (int r = 0; r < rows_; ++r)
      if (narrowed(r)) read(r, least(r, front(1, r)));
    barrier();
    for (int r = thread_; r < rows_; r += threads())
      if (narrowed(r)) settle(r);
    barrier();
    for (int r = 0; r < rows_; ++r)
      if (narrowed(r)) widen(r);
  }

 private:
  void barrier() { runtime_.pool_.barrier(thread_); }
  int threads() const { return runtime_.pool_.threads(); }
  const Choosing& choosing(int r) const { return step_.choosing[step_.chunk + static_cast<size_t>(r)]; }
  bool races(int r) const { return choosing(r).heat > 0.0f; }
  bool narrowed(int r) const { return races(r) && !choosing(r).filters.none(); }
  bool narrowed() const {
    for (int r = 0; r < rows_; ++r)
      if (narrowed(r)) return true;
    return false;
  }
  // Whether it is asked of each token of a panel if it may be chosen, not of a panel as a whole.
  bool by_token(int r) const { return races(r) || !runtime_.allowed_[r].empty(); }
  uint32_t allowed(int r, int p) const {
    const uint32_t there = p < whole_ ? kAll : (uint32_t{1} << w_.rows() % kPanelRows) - 1;
    return allowed_of(runtime_.allowed_[r], p) & there;
  }
  float& bound(int r, int p) const { return runtime_.bound_[static_cast<size_t>(r) * static_cast<size_t>(panels_) + static_cast<size_t>(p)]; }
  float* logits(int r, int p) const { return row(*op_.out, r) + static_cast<size_t>(p) * kPanelRows; }
  const ActBlock* acts(int r) const { return own_.acts.data() + static_cast<size_t>(r) * blocks_; }
  Front& front(int round, int thread, int r) const { return runtime_.fronts_[static_cast<size_t>((round * threads() + thread) * kPrivateRows + r)]; }
  // Of all threads.
  Front front(int round, int r) const {
    Front all = front(round, 0, r);
    for (int t = 1; t < threads(); ++t) all.take(front(round, t, r));
    return all;
  }

  // Calls visit(token, logit) for the tokens of a panel that may be chosen, with their logits as they are compared.
  template <class Visit>
  void each(int r, int p, const Visit& visit) const {
    const auto& changes = runtime_.changes_[r];
    const uint32_t among = allowed(r, p);
    const float* found = logits(r, p);
    int32_t token = p * kPanelRows;
    auto change = std::lower_bound(changes.begin(), changes.end(), token, [](const Change& c, int32_t t) { return c.token < t; });
    for (int i = 0; i < kPanelRows; ++i, ++token) {
      const bool changed = change != changes.end() && change->token == token;
      if (among >> i & 1) visit(token, changed ? change->of(found[i]) : found[i]);
      if (changed) ++change;
    }
  }

  void prepare() {
    for (int r = 0; r < rows_; ++r) {
      const auto width = static_cast<size_t>(cols_);
      const float* x = row(*(op_.norm ? op_.norm->x : op_.x), r);
      float* normal = own_.rows.data() + static_cast<size_t>(r) * width;
      if (op_.norm) normalize_row(runtime_.kernels_, *op_.norm, x, normal), x = normal;
      const size_t first = static_cast<size_t>(r) * blocks_;
      runtime_.kernels_.quantize(x, cols_, own_.acts.data() + first);
      for (size_t b = 0; b < blocks_; ++b) own_.screen[first + b] = screen_block(own_.acts[first + b], x + b * kBlock);
    }
    if (thread_ != 0) return;
    for (int r = 0; r < rows_; ++r) {  // one asks for all, so that a mask which is late is so for all
      const Choosing& how = choosing(r);
      runtime_.allowed_[r].clear(), runtime_.changes_[r].clear();
      if (how.rules) how.rules->allowed(runtime_.allowed_[r]), how.rules->changes(how.ahead, runtime_.changes_[r]);
    }
  }

  // Computes a panel from both planes; returns the foremost of those that may be chosen.
  Front compute(int r, int p) {
    float* out = logits(r, p);
    multiply_panel(runtime_.kernels_, w_, p, acts(r), blocks_, 1, p < whole_ ? out : tile_);
    if (p == whole_) std::copy(tile_, tile_ + w_.rows() % kPanelRows, out);  // the last, which is not full
    bound(r, p) = kRead;
    const Choosing& how = choosing(r);
    Front front;
    each(r, p, [&](int32_t token, float logit) {
      const double drawn = races(r) ? -std::log(-std::log(race_uniform(race_bits(how.key, token)))) : 0.0;
      front.take({logit + how.heat * drawn, logit, token});
    });
    return front;
  }

  // The first plane of this thread's panels, and both of the one that looks best and of those with changed logits.
  void look() {
    float likely[kPrivateRows];
    int best[kPrivateRows];
    std::fill(likely, likely + rows_, -INFINITY);
    std::fill(best, best + rows_, -1);
    Bounds bounds[kPrivateRows];
    for (int p = mine_.first; p < mine_.last; ++p) {
      uint32_t any = 0;
      for (int r = 0; r < rows_; ++r) any |= allowed(r, p);
      if (any == 0) continue;
      runtime_.kernels_.screen(w_.panel(p), cols_, acts(0), blocks_, own_.screen.data(), rows_, tile_, bounds);
      for (int r = 0; r < rows_; ++r) {
        const uint32_t among = allowed(r, p);
        const float* found = std::copy(tile_ + r * kPanelRows, tile_ + (r + 1) * kPanelRows, logits(r, p)) - kPanelRows;
        bound(r, p) = by_token(r) ? bounds[r].error : bounds[r].upper;
        const float hope = among == kAll ? bounds[r].likely : largest(found, among);
        if (hope > likely[r]) likely[r] = hope, best[r] = p;
      }
    }
    for (int r = 0; r < rows_; ++r) {
      Front& found = front(0, thread_, r) = Front{};
      if (best[r] >= 0) found = compute(r, best[r]);
      for (const Change& change : runtime_.changes_[r]) {
        const int p = change.token / kPanelRows;
        if (p >= mine_.first && p < mine_.last && allowed(r, p) != 0 && bound(r, p) != kRead) found.take(compute(r, p));
      }
      if (thread_ == 0 && whole_ < panels_) found.take(compute(r, whole_));
    }
  }

  // Reads the panels in which the choice may lie.
  void decide(int r) {
    const Choosing& how = choosing(r);
    auto most = static_cast<float>(front(0, r).place);
    Front& found = front(1, thread_, r) = front(0, thread_, r);
    for (int p = mine_.first; p < mine_.last; ++p) {
      const uint32_t among = allowed(r, p);
      const float limit = bound(r, p);
      if (among == 0 || limit == kRead) continue;
      const bool open = races(r)      ? runtime_.kernels_.may_win(logits(r, p), limit, most, how, p * kPanelRows, among)
                        : by_token(r) ? may_reach(logits(r, p), limit, most - how.margin, among)
                                      : !(limit < most - how.margin);  // nor a NaN
      if (open) found.take(compute(r, p)), most = std::max(most, static_cast<float>(found.place));
      else if (races(r) && !narrowed(r)) std::fill_n(logits(r, p), kPanelRows, -INFINITY);
    }
  }

  // Of a race among all, the winner's logit, or what no logit of use lies below.
  float least(int r, const Front& all) const { return std::max(all.logit, all.largest - choosing(r).margin); }

  // Reads the panels that may hold a logit of `least` or more.
  void read(int r, float least) {
    for (int p = mine_.first; p < mine_.last; ++p) {
      const uint32_t among = allowed(r, p);
      if (among != 0 && bound(r, p) != kRead && may_reach(logits(r, p), bound(r, p), least, among)) compute(r, p);
    }
  }

  // Whether the winner among all is that among those which the filters keep of what was read. Then it is that among those
  // which they keep of all: all that are likelier were read, and what was not read only raises the sum that top_p shares.
  void settle(int r) {
    const Choosing& how = choosing(r);
    const Front all = front(1, r);
    Candidates& candidates = own_.candidates;
    candidates.begin(how.filters, how.heat);
    float largest = all.largest;
    for (int p = 0; p < panels_; ++p) {
      if (allowed(r, p) == 0 || bound(r, p) != kRead) continue;
      each(r, p, [&](int32_t token, float logit) { candidates.offer(logit, token), largest = std::max(largest, logit); });
    }
    bool settled = false;
    if (all.logit >= least(r, all))
      for (const Candidate& c : candidates.keep()) settled |= c.second == all.token;
    runtime_.least_[r] = settled ? INFINITY : std::max(largest - how.margin, candidates.floor());
  }

  void widen(int r) {
    const float least = runtime_.least_[r];
    if (least < INFINITY) return read(r, least);
    for (int p = mine_.first; p < mine_.last; ++p)
      if (allowed(r, p) != 0 && bound(r, p) != kRead) std::fill_n(logits(r, p), kPanelRows, -INFINITY);
  }

  Runtime& runtime_;
  const MatMulOp& op_;
  const Step& step_;
  const int thread_;
  Scratch& own_;
  const Matrix& w_ = *op_.segments[0].weight;
  const int rows_ = step_.count, cols_ = op_.x->width, panels_ = w_.panels(), whole_ = w_.rows() / kPanelRows;  // the last may not be full
  const size_t blocks_ = static_cast<size_t>(cols_ / kBlock);
  const Range mine_ = share(whole_, thread_, threads());
  alignas(64) float tile_[kPrivateRows * kPanelRows];
};

bool Runtime::screened(const MatMulOp& op, const Step& step) const {
  if (&op != std::get_if<MatMulOp>(&ops_.back())) return false;
  if (!config_.screen || bound_.empty() || step.choosing.empty() || op.segments.size() != 1) return false;
  if (step.count > kPrivateRows || op.activation != Activation::None) return false;
  if (op.segments[0].weight->format_id() != FormatId::Q8_0Planes || op.gate || op.residual || op.segments[0].bias) return false;
  const auto choosing = step.choosing.subspan(step.chunk, static_cast<size_t>(step.count));
  int changed = 0, ranked = 0;
  for (const Choosing& how : choosing) {
    if (!std::isfinite(how.margin)) return false;
    changed += how.changed, ranked += how.filters.top_k > 0;
  }
  return changed <= op.segments[0].weight->rows() / kScreenChanged && ranked <= kScreenRanked;
}

void Runtime::execute_screened(const MatMulOp& op, Step& step, int thread) { Screening(*this, op, step, thread).run(); }

}  // namespace millis
