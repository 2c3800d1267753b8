// The race by which a token is drawn (sampler.h), and what a row of logits is needed for.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "candidates.h"

namespace millis {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

// Output of the SplitMix64 generator (Steele, Lea and Flood, 2014) in state z.
constexpr uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

// Of the race for token `index` of the output.
constexpr uint64_t race_key(uint64_t seed, uint64_t index) { return mix(mix(seed + kGolden) + (index + 1) * kGolden); }

// What a token draws in it: its first 52 bits are the digits of u.
constexpr uint64_t race_bits(uint64_t key, int32_t token) { return mix(key + (static_cast<uint64_t>(token) + 1) * kGolden); }

constexpr double race_uniform(uint64_t bits) { return (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52; }  // in (0, 1)

// What a token's logit becomes before the choice: with a bias, then with the penalties for having been used.
struct Change {
  int32_t token;
  float bias = 0.0f, repetition = 1.0f, less = 0.0f;
  float of(float x) const {
    x += bias;
    return (x > 0 ? x / repetition : x * repetition) - less;
  }
};

// What is to be asked of each row that is chosen from.
class Rules {
 public:
  // mask: bit t % 32 of word t / 32 is token t's; an empty one allows all. Waits for one that is still being computed; where that comes
  // too late the answer is an empty one, and nothing will be chosen.
  virtual void allowed(std::vector<uint32_t>& mask) const = 0;

  // Of the row that stands behind `ahead`, which are not committed; tokens ascend.
  virtual void changes(std::span<const int32_t> ahead, std::vector<Change>& out) const = 0;

 protected:
  ~Rules() = default;
};

// How a row's token is chosen. heat > 0: it is the one whose logit + heat * -log(-log(u)) is largest among those that the
// filters keep; who cannot be it may have a logit of -infinity. Logits further than `margin` below the largest may be
// approximate where there is no race, or where its winner does not follow from fewer: each token so far below is chosen less
// often than once in 100,000 draws. Logits that the rules change are exact; of those that they do not allow, they may be anything.
struct Choosing {
  float margin = INFINITY;
  float heat = 0.0f;
  uint64_t key = 0;
  Filters filters = {};                 // of a race
  int changed = 0;                      // so many logits are changed before the choice
  const Rules* rules = nullptr;         // null: all may be chosen, as they are
  std::span<const int32_t> ahead = {};  // for the rules
};

}  // namespace millis
