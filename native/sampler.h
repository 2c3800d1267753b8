// Chooses one token from a row of logits. One Sampler belongs to one request: its parameters, counts and random stream.
//
// A token is drawn by an exponential race: token i arrives after -log(u_i) / weight_i, the first one wins, which it does
// with its probability (Yellott, 1977, the Gumbel-max trick). u_i is a function of the seed, the number of tokens drawn
// before and i alone. So a choice depends on nothing but the logits and the tokens before it: a draft is right when it
// equals what is chosen anyway, and a draft model that draws with the same u_i is right often (Daliri, Musco and Suresh,
// 2024, "Coupling without Communication and Drafter-Invariant Speculative Decoding").
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <shared_mutex>
#include <span>
#include <utility>
#include <vector>

#include "race.h"

namespace millis {

struct SamplerParams {
  float temperature = 0.0f;  // 0: greedy
  Filters filters;
  float repetition = 1.0f, presence = 0.0f, frequency = 0.0f;
  std::vector<std::pair<int32_t, float>> bias;
  uint64_t seed = 0;
  int logprobs = -1;  // -1: off; n: the chosen token's and the n best
};

constexpr int32_t kUnusable = -1, kMaskLate = -2;  // instead of a token: no logit was a number; the mask did not come in time

struct Choice {
  int32_t token = kUnusable;
  float logit = 0.0f;    // as the model gave it
  float logprob = 0.0f;  // nats, of the model's own distribution; where the sampler reports them
  std::vector<std::pair<int32_t, float>> top;
};

// The n largest logits with their tokens, best first, equal ones in order of their ids; -inf and what is no number are none.
void largest(std::span<const float> logits, size_t n, std::vector<Candidate>& out);

using LogSumExp = float (*)(const float* x, int n);  // Kernels has one

// Any thread may call any of it.
class Sampler final : public Rules {
 public:
  Sampler(int vocab, SamplerParams params);  // throws std::invalid_argument on a parameter out of range

  // Counts prompt tokens for the repetition penalty.
  void seen(std::span<const int32_t> tokens);

  // From here on only tokens whose bit is set may be chosen, bit t % 32 of word t / 32; an empty mask allows all. Throws
  // std::invalid_argument where the mask is of another size or allows no token.
  void set_mask(std::vector<uint32_t> mask);

  // The mask is still being computed: choose waits for set_mask, until two seconds from now.
  void expect_mask();

  // The choice for a row that stands behind `ahead`, tokens not yet committed: applies bias, repetition penalty (prompt and
  // output), presence and frequency penalties (output), the mask, then temperature, min-p, top-k, top-p, and draws. Uses
  // `logits` as scratch. Rows of one sequence may be chosen side by side. Where biases forbid all that the mask allows,
  // they do not count. A mask speaks of the next token only: `ahead` must be empty.
  void choose(std::span<float> logits, std::span<const int32_t> ahead, LogSumExp log_sum_exp, Choice& out) const;

  // Counts tokens of the output and moves the random stream behind them.
  void commit(std::span<const int32_t> tokens);

  // What the row behind `ahead`, tokens not yet committed, is needed for. Whole where it is reported, or changed in many places.
  Choosing choosing(std::span<const int32_t> ahead) const;
  void allowed(std::vector<uint32_t>& mask) const override;
  void changes(std::span<const int32_t> ahead, std::vector<Change>& out) const override;

  int vocab() const { return vocab_; }
  int logprobs() const { return params_.logprobs; }
  bool masked() const;

 private:
  bool wait(std::shared_lock<std::shared_mutex>& lock) const;  // for the mask; false: it is late
  void report(std::span<const float> logits, LogSumExp log_sum_exp, Choice& out) const;
  void find_changes(std::span<const int32_t> ahead, std::vector<Change>& out) const;
  void penalize(std::span<float> logits, std::span<const int32_t> ahead) const;
  void forbid(std::span<float> logits) const;
  int32_t draw(std::span<const float> logits, int32_t best, uint64_t index) const;
  void count(int32_t token, int32_t uses);

  mutable std::shared_mutex turn_;  // choosing reads, counting writes
  mutable std::condition_variable_any arrived_;
  bool expected_ = false;                             // a mask that is not there yet
  std::chrono::steady_clock::time_point patience_{};  // until then
  mutable std::atomic<bool> late_ = false;            // it was given up, and what was computed since is without it
  int vocab_;
  SamplerParams params_;
  bool counts_used_;
  uint64_t drawn_ = 0;             // tokens committed
  std::vector<int32_t> uses_;      // [vocab] in the output; -1: never seen, 0: in the prompt only
  std::vector<int32_t> distinct_;  // tokens with uses >= 0
  std::vector<uint32_t> mask_;     // [vocab / 32, rounded up], or empty
};

}  // namespace millis
