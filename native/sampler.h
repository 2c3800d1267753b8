// Chooses one token from a row of logits. One Sampler belongs to one request and holds its counts and random stream;
// threads that call it take turns.
#pragma once

#include <cstdint>
#include <mutex>
#include <random>
#include <span>
#include <utility>
#include <vector>

namespace millis {

struct SamplerParams {
  float temperature = 0.0f;  // 0: greedy
  int top_k = 0;             // 0: off
  float top_p = 1.0f, min_p = 0.0f;
  float repetition = 1.0f, presence = 0.0f, frequency = 0.0f;
  std::vector<std::pair<int32_t, float>> bias;
  uint64_t seed = 0;
  int logprobs = -1;  // -1: off; n: the chosen token's and the n best
};

struct Choice {
  int32_t token = -1;    // stays -1 where no logit was usable
  float logprob = 0.0f;  // nats, of the model's own distribution
  std::vector<std::pair<int32_t, float>> top;
};

class Sampler {
 public:
  Sampler(int vocab, SamplerParams params);  // throws std::invalid_argument on a parameter out of range

  // Counts prompt tokens for the repetition penalty.
  void seen(std::span<const int32_t> tokens);

  // Applies bias, repetition penalty (prompt and output), presence and frequency penalties (output), then
  // temperature, min-p, top-k, top-p, and draws. Uses `logits` as scratch; counts the chosen token.
  void sample(std::span<float> logits, Choice& out);

  int vocab() const { return vocab_; }
  int logprobs() const { return params_.logprobs; }

 private:
  void report(std::span<const float> logits, Choice& out);
  void penalize(std::span<float> logits);
  int32_t draw(std::span<const float> logits, int32_t best);
  void count(int32_t token, int32_t uses);

  std::mutex turn_;
  int vocab_;
  SamplerParams params_;
  std::mt19937_64 random_;
  bool counts_used_;
  std::vector<int32_t> uses_;                   // [vocab] in the output; -1: never seen, 0: in the prompt only
  std::vector<int32_t> distinct_;               // tokens with uses >= 0
  std::vector<std::pair<int32_t, float>> raw_;  // logits as they were before a bias or a penalty
  std::vector<std::pair<float, int32_t>> candidates_;
};

}  // namespace millis
