// Penalties, filters and the draw, in the order that sampler.h states.
#include "sampler.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <mutex>
#include <stdexcept>

namespace millis {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr std::chrono::seconds kMaskPatience{2};

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

int32_t argmax(std::span<const float> logits) {
  int32_t best = -1;
  float most = kNever;
  each_above(logits, [&] { return most; }, [&](float logit, int32_t token) { most = logit, best = token; });
  return best;
}

// What choosing a row needs besides the sampler; one a thread, so that rows are chosen side by side.
struct Scratch {
  std::vector<Change> changes;
  std::vector<std::pair<int32_t, float>> raw;  // logits as they were before their changes
  std::vector<Candidate> best;
  Candidates candidates;
};
thread_local Scratch scratch;

// The race for one token of the output.
class Race {
 public:
  explicit Race(uint64_t key) : key_(key) {}

  // Enters a token of weight e^z, z <= 0.
  void enter(int32_t token, double z) {
    const double u = race_uniform(race_bits(key_, token));
    // Most are late by a bound that needs neither log nor exp: -log(u) >= 1 - u and e^-z >= 1 - z + z^2/2 - z^3/6.
    if ((1.0 - u) * (1.0 - z * (1.0 - z * (0.5 - z / 6.0))) >= best_) return;
    const double time = -std::log(u) * std::exp(-z);
    if (time < best_) best_ = time, winner_ = token;
  }
  int32_t winner() const { return winner_; }

 private:
  uint64_t key_;
  double best_ = std::numeric_limits<double>::infinity();
  int32_t winner_ = -1;
};

}  // namespace

void largest(std::span<const float> logits, size_t n, std::vector<Candidate>& out) {
  out.clear();
  float least = kNever;  // what is no larger finds no place
  const auto take = [&](float logit, int32_t token) {
    if (out.size() == n) out.pop_back();
    const auto at = std::upper_bound(out.begin(), out.end(), logit, [](float x, const auto& kept) { return x > kept.first; });
    out.emplace(at, logit, token);
    if (out.size() == n) least = out.back().first;
  };
  if (n > 0) each_above(logits, [&] { return least; }, take);
}

Sampler::Sampler(int vocab, SamplerParams params) : vocab_(vocab), params_(std::move(params)) {
  require(vocab >= 1, "sampler: empty vocabulary");
  const Filters& f = params_.filters;
  require(params_.temperature >= 0 && f.top_k >= 0 && f.top_p > 0 && f.min_p >= 0 && f.min_p <= 1,
          "sampler: temperature, top_k, top_p or min_p out of range");
  require(params_.repetition > 0 && std::isfinite(params_.presence) && std::isfinite(params_.frequency), "sampler: penalty out of range");
  for (const auto& [token, bias] : params_.bias) require(token >= 0 && token < vocab && !std::isnan(bias), "sampler: bias out of range");
  counts_used_ = params_.repetition != 1.0f || params_.presence != 0.0f || params_.frequency != 0.0f;
  if (counts_used_) uses_.assign(static_cast<size_t>(vocab), -1);
}

void Sampler::seen(std::span<const int32_t> tokens) {
  const std::lock_guard lock(turn_);
  for (const int32_t token : tokens) {
    require(token >= 0 && token < vocab_, "sampler: token out of the vocabulary");
    count(token, 0);
  }
}

void Sampler::set_mask(std::vector<uint32_t> mask) {
  if (!mask.empty()) {
    require(mask.size() == (static_cast<size_t>(vocab_) + 31) / 32, "sampler: a mask of another vocabulary");
    if (vocab_ % 32) mask.back() &= (uint32_t{1} << (vocab_ % 32)) - 1;
    require(std::any_of(mask.begin(), mask.end(), [](uint32_t word) { return word != 0; }), "sampler: the mask allows no token");
  }
  {
    const std::lock_guard lock(turn_);
    mask_ = std::move(mask);
    expected_ = false;
  }
  arrived_.notify_all();
}

void Sampler::expect_mask() {
  const std::lock_guard lock(turn_);
  expected_ = true, late_ = false;
  patience_ = std::chrono::steady_clock::now() + kMaskPatience;
}

bool Sampler::masked() const {
  const std::shared_lock lock(turn_);
  return expected_ || !mask_.empty();
}

Choosing Sampler::choosing(std::span<const int32_t> ahead) const {
  const std::shared_lock lock(turn_);
  if (params_.logprobs >= 0) return {};
  Choosing how{.margin = 0.0f, .ahead = ahead};
  how.changed = static_cast<int>(distinct_.size() + params_.bias.size() + (counts_used_ ? ahead.size() : 0));
  if (expected_ || !mask_.empty() || how.changed > 0) how.rules = this;
  const Filters& filters = params_.filters;
  if (params_.temperature == 0.0f || filters.top_k == 1) return how;
  constexpr float kRare = 12.0f;  // nats: e^-12 = 6e-6
  const float reach = filters.min_p > 0.0f ? 0.01f - std::log(filters.min_p) : INFINITY;
  how.margin = params_.temperature * std::min(reach, kRare);
  if (filters.top_k == 0 && filters.top_p >= 1.0f && reach <= kRare) return how;  // all that min-p keeps is within the margin
  how.heat = params_.temperature, how.key = race_key(params_.seed, drawn_ + ahead.size()), how.filters = filters;
  return how;
}

bool Sampler::wait(std::shared_lock<std::shared_mutex>& lock) const {
  return arrived_.wait_until(lock, patience_, [this] { return !expected_; });
}

void Sampler::allowed(std::vector<uint32_t>& mask) const {
  std::shared_lock lock(turn_);
  mask.clear();
  if (wait(lock)) mask.assign(mask_.begin(), mask_.end());
  else late_ = true;
}

void Sampler::commit(std::span<const int32_t> tokens) {
  const std::lock_guard lock(turn_);
  for (const int32_t token : tokens) {
    require(token >= 0 && token < vocab_, "sampler: token out of the vocabulary");
    count(token, 1);
    ++drawn_;
  }
}

void Sampler::count(int32_t token, int32_t uses) {
  if (!counts_used_) return;
  int32_t& now = uses_[static_cast<size_t>(token)];
  if (now < 0) distinct_.push_back(token), now = 0;
  now += uses;
}

void Sampler::changes(std::span<const int32_t> ahead, std::vector<Change>& out) const {
  const std::shared_lock lock(turn_);
  find_changes(ahead, out);
}

void Sampler::find_changes(std::span<const int32_t> ahead, std::vector<Change>& out) const {
  out.clear();
  for (const auto& [token, bias] : params_.bias) out.push_back({token, bias});
  const auto punish = [&](int32_t token) {
    const auto uses = static_cast<float>(std::max(uses_[static_cast<size_t>(token)], 0) + std::count(ahead.begin(), ahead.end(), token));
    out.push_back({token, 0.0f, params_.repetition, (uses > 0 ? params_.presence : 0.0f) + uses * params_.frequency});
  };
  for (const int32_t token : distinct_) punish(token);
  for (auto it = ahead.begin(); counts_used_ && it != ahead.end(); ++it)
    if (uses_[static_cast<size_t>(*it)] < 0 && std::find(ahead.begin(), it, *it) == it) punish(*it);
  std::stable_sort(out.begin(), out.end(), [](const Change& a, const Change& b) { return a.token < b.token; });
  size_t kept = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    if (i == 0 || out[i].token != out[kept - 1].token) {
      out[kept++] = out[i];
      continue;
    }
    Change& one = out[kept - 1];  // biases come before the penalties
    one.bias += out[i].bias, one.repetition *= out[i].repetition, one.less += out[i].less;
  }
  out.resize(kept, {0});
}

void Sampler::penalize(std::span<float> logits, std::span<const int32_t> ahead) const {
  find_changes(ahead, scratch.changes);
  scratch.raw.clear();
  for (const Change& change : scratch.changes) {
    float& logit = logits[static_cast<size_t>(change.token)];
    scratch.raw.emplace_back(change.token, logit);
    logit = change.of(logit);
  }
}

void Sampler::forbid(std::span<float> logits) const {
  for (size_t w = 0; w < mask_.size(); ++w) {
    const size_t first = 32 * w, count = std::min<size_t>(32, logits.size() - first);
    if (mask_[w] == ~uint32_t{0}) continue;
    for (size_t i = 0; i < count; ++i)
      if (!(mask_[w] >> i & 1)) logits[first + i] = kNever;
  }
}

void Sampler::report(std::span<const float> logits, LogSumExp log_sum_exp, Choice& out) const {
  if (argmax(logits) < 0) return;
  out.logprob = log_sum_exp(logits.data(), static_cast<int>(logits.size()));  // for now
  largest(logits, static_cast<size_t>(params_.logprobs), scratch.best);
  for (const auto& [logit, token] : scratch.best) out.top.emplace_back(token, logit - out.logprob);
}

void Sampler::choose(std::span<float> logits, std::span<const int32_t> ahead, LogSumExp log_sum_exp, Choice& out) const {
  std::shared_lock lock(turn_);
  out = Choice{};
  if (late_ || !wait(lock)) {
    out.token = kMaskLate;
    return;
  }
  require(logits.size() == static_cast<size_t>(vocab_), "sampler: logits of another vocabulary");
  if (params_.logprobs >= 0) report(logits, log_sum_exp, out);
  require(mask_.empty() || ahead.empty(), "sampler: drafts behind a mask");
  penalize(logits, ahead);
  forbid(logits);
  int32_t best = argmax(logits);
  if (best < 0 && !scratch.raw.empty()) {
    for (const auto& [token, logit] : scratch.raw) logits[static_cast<size_t>(token)] = logit;
    forbid(logits);
    best = argmax(logits);
  }
  if (best < 0) return;
  out.token = params_.temperature == 0.0f ? best : draw(logits, best, drawn_ + ahead.size());
  out.logit = logits[static_cast<size_t>(out.token)];
  for (const auto& [token, logit] : scratch.raw)
    if (token == out.token) out.logit = logit;
  if (params_.logprobs >= 0) out.logprob = out.logit - out.logprob;
}

int32_t Sampler::draw(std::span<const float> logits, int32_t best, uint64_t index) const {
  const double most = logits[static_cast<size_t>(best)], heat = params_.temperature;
  Race race(race_key(params_.seed, index));
  const auto enter = [&](float logit, int32_t token) {
    const double z = (static_cast<double>(logit) - most) / heat;
    if (z >= -745.0) race.enter(token, z);  // beyond, the weight is 0 in double precision
  };
  race.enter(best, 0.0);  // first, so that the others are soon told that they are late
  if (params_.filters.none()) {
    each_above(logits, [] { return kNever; }, enter);  // most are no more, where the row was screened
    return race.winner();
  }
  Candidates& candidates = scratch.candidates;
  candidates.begin(params_.filters, params_.temperature);
  each_above(logits, [&] { return candidates.floor(); }, [&](float logit, int32_t token) { candidates.offer(logit, token); });
  for (const auto& [logit, token] : candidates.keep()) enter(logit, token);
  return race.winner();
}

}  // namespace millis
