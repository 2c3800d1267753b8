// The tokens that a draw is among.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace millis {

// What narrows a draw: tokens less likely than min_p times the likeliest are out, then all but the top_k likeliest, then those
// behind the likeliest that have a share of top_p together.
struct Filters {
  int top_k = 0;  // 0: off
  float top_p = 1.0f, min_p = 0.0f;
  bool none() const { return top_k == 0 && top_p >= 1.0f && min_p == 0.0f; }
};

using Candidate = std::pair<float, int32_t>;  // logit, token

// Likelier first; equal logits in order of their ids, so that a result never depends on the sort.
constexpr auto kBetter = [](const Candidate& a, const Candidate& b) { return a.first > b.first || (a.first == b.first && a.second < b.second); };

// Calls visit(logit, token) for logits above least(), which may rise meanwhile; tokens ascend. Few are, and the others
// are passed over a block at a time, by comparisons that need no branch.
template <class Least, class Visit>
void each_above(std::span<const float> logits, const Least& least, const Visit& visit) {
  constexpr size_t kBlock = 64;
  for (size_t first = 0; first < logits.size(); first += kBlock) {
    const std::span<const float> block = logits.subspan(first, std::min(kBlock, logits.size() - first));
    const float bar = least();
    int any = 0;
    for (const float logit : block) any |= logit > bar;  // no NaN is
    for (size_t i = 0; any && i < block.size(); ++i)
      if (block[i] > least()) visit(block[i], static_cast<int32_t>(first + i));
  }
}

// Offered tokens in ascending order, it keeps those that the filters do. Most are turned away by a comparison.
class Candidates {
 public:
  // For a draw at a temperature of `heat`.
  void begin(const Filters& filters, float heat) {
    filters_ = filters, heat_ = heat;
    most_ = static_cast<size_t>(filters.top_k);
    // Weights are 0 in double precision below e^-745; all of a vocabulary below e^-40 are less than what any top_p leaves out.
    reach_ = filters.min_p > 0 ? std::log(static_cast<double>(filters.min_p)) : filters.top_p < 1 ? -40.0 : -745.0;
    found_.clear();
    best_ = floor_ = -INFINITY;
  }

  // Not those of -infinity, nor NaN.
  void offer(float logit, int32_t token) {
    if (!(logit > floor_)) return;
    if (logit > best_) {
      best_ = logit;
      constexpr double kRounding = 1e-5;
      floor_ = std::max(floor_, static_cast<float>(best_ + heat_ * reach_ - kRounding * (std::abs(best_) - heat_ * reach_)));
    }
    found_.emplace_back(logit, token);
    if (most_ > 0 && found_.size() >= 2 * most_ + 64) cut();
  }

  // Those kept, in no order.
  std::span<Candidate> keep() {
    if (most_ > 0 && found_.size() >= most_) cut();
    const auto exponent = [&](const Candidate& c) { return (static_cast<double>(c.first) - best_) / heat_; };
    std::erase_if(found_, [&](const Candidate& c) { return exponent(c) < reach_; });
    if (filters_.top_p >= 1) return found_;
    constexpr double kNear = -8.0;  // few are so near, and most often enough
    const auto weight = [&](const Candidate& c) { return static_cast<double>(std::exp(static_cast<float>(exponent(c)))); };
    double total = 0, near = 0, sum = 0;
    for (const Candidate& c : found_) {
      const double w = weight(c);
      total += w;
      if (exponent(c) >= kNear) near += w;
    }
    if (near > filters_.top_p * total) std::erase_if(found_, [&](const Candidate& c) { return exponent(c) < kNear; });
    constexpr auto behind = [](const Candidate& a, const Candidate& b) { return kBetter(b, a); };
    std::make_heap(found_.begin(), found_.end(), behind);
    auto first = found_.end();  // of those kept, the likeliest last
    while (first != found_.begin() && sum < filters_.top_p * total) {
      std::pop_heap(found_.begin(), first--, behind);
      sum += weight(*first);
    }
    return {first, found_.end()};
  }

  // What lies below is not among those kept.
  float floor() const { return floor_; }

 private:
  void cut() {
    const auto last = found_.begin() + static_cast<std::ptrdiff_t>(most_) - 1;
    std::nth_element(found_.begin(), last, found_.end(), kBetter);
    floor_ = std::max(floor_, last->first);  // those that follow have larger ids
    found_.resize(most_);
  }

  Filters filters_;
  double heat_ = 0, reach_ = 0;
  size_t most_ = 0;
  float best_ = -INFINITY, floor_ = -INFINITY;
  std::vector<Candidate> found_;
};

}  // namespace millis
