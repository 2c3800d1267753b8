// Penalties, filters and the draw, in the order that sampler.h states.
#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

namespace millis {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

// Most likely first; equal logits in order of their ids, so that a result never depends on the sort.
constexpr auto kBetter = [](const std::pair<float, int32_t>& a, const std::pair<float, int32_t>& b) {
  return a.first > b.first || (a.first == b.first && a.second < b.second);
};

int32_t argmax(std::span<const float> logits) {
  int32_t best = -1;
  float most = kNever;
  for (size_t i = 0; i < logits.size(); ++i)
    if (logits[i] > most) most = logits[i], best = static_cast<int32_t>(i);
  return best;
}

}  // namespace

Sampler::Sampler(int vocab, SamplerParams params) : vocab_(vocab), params_(std::move(params)), random_(params_.seed) {
  require(vocab >= 1, "sampler: empty vocabulary");
  require(params_.temperature >= 0 && params_.top_k >= 0 && params_.top_p > 0 && params_.min_p >= 0 && params_.min_p <= 1,
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

void Sampler::count(int32_t token, int32_t uses) {
  if (!counts_used_) return;
  int32_t& now = uses_[static_cast<size_t>(token)];
  if (now < 0) distinct_.push_back(token), now = 0;
  now += uses;
}

void Sampler::penalize(std::span<float> logits) {
  raw_.clear();
  const auto change = [&](int32_t token, auto&& to) {
    float& logit = logits[static_cast<size_t>(token)];
    raw_.emplace_back(token, logit);
    logit = to(logit);
  };
  for (const auto& [token, bias] : params_.bias) change(token, [&](float x) { return x + bias; });
  for (const int32_t token : distinct_) {
    const auto uses = static_cast<float>(uses_[static_cast<size_t>(token)]);
    change(token, [&](float x) {
      x = x > 0 ? x / params_.repetition : x * params_.repetition;
      return x - (uses > 0 ? params_.presence : 0.0f) - uses * params_.frequency;
    });
  }
}

void Sampler::report(std::span<const float> logits, Choice& out) {
  const int32_t best = argmax(logits);
  if (best < 0) return;
  const double most = logits[static_cast<size_t>(best)];
  double sum = 0;
  for (const float x : logits) sum += x > kNever ? std::exp(static_cast<double>(x) - most) : 0.0;
  out.logprob = static_cast<float>(most + std::log(sum));  // the log-sum-exp for now
  candidates_.clear();
  for (size_t i = 0; i < logits.size(); ++i)
    if (logits[i] > kNever) candidates_.emplace_back(logits[i], static_cast<int32_t>(i));
  const auto count = std::min(static_cast<size_t>(params_.logprobs), candidates_.size());
  std::partial_sort(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(count), candidates_.end(), kBetter);
  for (size_t i = 0; i < count; ++i) out.top.emplace_back(candidates_[i].second, candidates_[i].first - out.logprob);
}

void Sampler::sample(std::span<float> logits, Choice& out) {
  const std::lock_guard lock(turn_);
  out = Choice{};
  require(logits.size() == static_cast<size_t>(vocab_), "sampler: logits of another vocabulary");
  if (params_.logprobs >= 0) report(logits, out);
  penalize(logits);
  const int32_t best = argmax(logits);
  if (best < 0) return;
  out.token = params_.temperature == 0.0f ? best : draw(logits, best);
  if (params_.logprobs >= 0) {
    float logit = logits[static_cast<size_t>(out.token)];
    for (auto it = raw_.rbegin(); it != raw_.rend(); ++it)
      if (it->first == out.token) logit = it->second;
    out.logprob = logit - out.logprob;
  }
  count(out.token, 1);
}

int32_t Sampler::draw(std::span<const float> logits, int32_t best) {
  const double most = logits[static_cast<size_t>(best)], heat = params_.temperature;
  const auto weight = [&](float x) { return std::exp((static_cast<double>(x) - most) / heat); };
  // Beyond this the weight is 0 in double precision, or below min_p.
  const double reach = params_.min_p > 0 ? -std::log(static_cast<double>(params_.min_p)) : 745.0;
  candidates_.clear();
  for (size_t i = 0; i < logits.size(); ++i)
    if ((most - logits[i]) / heat <= reach) candidates_.emplace_back(logits[i], static_cast<int32_t>(i));

  if (params_.top_k > 0 && static_cast<size_t>(params_.top_k) < candidates_.size()) {
    std::nth_element(candidates_.begin(), candidates_.begin() + params_.top_k, candidates_.end(), kBetter);
    candidates_.resize(static_cast<size_t>(params_.top_k));
  }
  double total = 0;
  for (const auto& c : candidates_) total += weight(c.first);
  if (params_.top_p < 1.0f) {
    std::sort(candidates_.begin(), candidates_.end(), kBetter);
    size_t keep = 0;
    double sum = 0;
    while (keep < candidates_.size() && sum < params_.top_p * total) sum += weight(candidates_[keep++].first);
    candidates_.resize(keep);
    total = sum;
  }
  double left = static_cast<double>(random_() >> 11) * 0x1p-53 * total;
  for (const auto& c : candidates_)
    if ((left -= weight(c.first)) < 0) return c.second;
  return best;
}

}  // namespace millis
