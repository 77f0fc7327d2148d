// SPDX-License-Identifier: Apache-2.0
//
// common/sampler.hpp - the next token from a model's logits.
// Layer: examples (host only).
// The order of steps is that of Hugging Face's generate(): repetition penalty, temperature, top-k, top-p.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include <codegemm/base/status.hpp>

namespace prefillshare::examples {

using codegemm::error;
using codegemm::Result;
using codegemm::Status;
using codegemm::StatusCode;

struct SamplerOptions {
  float temperature = 0.0F;         ///< 0: greedy, whatever top_k and top_p say
  int top_k = 0;                    ///< keep the k most likely; 0: all
  float top_p = 1.0F;               ///< keep the fewest whose probabilities reach this sum
  float repetition_penalty = 1.0F;  ///< above 1: tokens that were there before get less likely
  std::uint64_t seed = 0;           ///< the same seed and logits give the same tokens on every machine
};

/// Not for sharing between threads: sampling advances the generator.
class Sampler {
 public:
  [[nodiscard]] static Result<Sampler> create(const SamplerOptions& options) {
    // Written so that a NaN fails.
    if (!(options.temperature >= 0.0F) || std::isinf(options.temperature)) {
      return error(StatusCode::kInvalidArgument, "temperature is ", options.temperature,
                   ", must be 0 or more");
    }
    if (options.top_k < 0)
      return error(StatusCode::kInvalidArgument, "top_k is ", options.top_k, ", must be 0 or more");
    if (!(options.top_p > 0.0F && options.top_p <= 1.0F)) {
      return error(StatusCode::kInvalidArgument, "top_p is ", options.top_p,
                   ", must be above 0 and at most 1");
    }
    if (!(options.repetition_penalty > 0.0F) || std::isinf(options.repetition_penalty)) {
      return error(StatusCode::kInvalidArgument, "repetition_penalty is ", options.repetition_penalty,
                   ", must be above 0");
    }
    return Sampler(options);
  }

  /// A token of `logits` [vocabulary]. `previous`: the tokens that the repetition penalty is for. Greedy
  /// takes the lowest id of several with the same logit. A NaN is never chosen; kInvalidArgument where
  /// nothing else is there or `previous` has an id outside the vocabulary.
  [[nodiscard]] Result<std::int32_t> sample(std::span<const float> logits,
                                            std::span<const std::int32_t> previous = {}) {
    if (logits.size() > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
      return error(StatusCode::kInvalidArgument, "logits: ", logits.size(), " of them");
    }
    constexpr float kNever = -std::numeric_limits<float>::infinity();
    scores_.assign(logits.begin(), logits.end());
    for (float& score : scores_) {
      if (std::isnan(score)) score = kNever;
    }
    if (Status status = penalize(previous); !status.ok()) return status;
    const auto best = std::max_element(scores_.begin(), scores_.end());  // the first of equals
    if (best == scores_.end() || !(*best > kNever)) {
      return error(StatusCode::kInvalidArgument, "logits: none of ", logits.size(),
                   " is a number above minus infinity");
    }
    const auto best_id = static_cast<std::int32_t>(best - scores_.begin());
    if (!(options_.temperature > 0.0F) || std::isinf(*best)) return best_id;
    return draw(*best);
  }

 private:
  struct Candidate {
    std::int32_t id;
    double weight;  // not yet divided by the sum
  };

  explicit Sampler(const SamplerOptions& options) : options_(options), state_(options.seed) {}

  Status penalize(std::span<const std::int32_t> previous) {
    if (!(options_.repetition_penalty < 1.0F) && !(options_.repetition_penalty > 1.0F)) return {};
    seen_.assign(previous.begin(), previous.end());
    std::sort(seen_.begin(), seen_.end());
    seen_.erase(std::unique(seen_.begin(), seen_.end()),
                seen_.end());  // once each, however often it was there
    for (const std::int32_t id : seen_) {
      if (id < 0 || static_cast<std::size_t>(id) >= scores_.size()) {
        return error(StatusCode::kInvalidArgument, "previous token ", id, " is not in a vocabulary of ",
                     scores_.size());
      }
      float& score = scores_[static_cast<std::size_t>(id)];
      score = score > 0.0F ? score / options_.repetition_penalty : score * options_.repetition_penalty;
    }
    return {};
  }

  // `best` is the greatest score, finite.
  std::int32_t draw(float best) {
    candidates_.clear();
    for (std::size_t i = 0; i < scores_.size(); ++i) {
      const double distance = static_cast<double>(scores_[i]) - static_cast<double>(best);
      const double weight = std::exp(distance / static_cast<double>(options_.temperature));
      if (weight > 0.0) candidates_.push_back({static_cast<std::int32_t>(i), weight});
    }
    const auto more_likely = [](const Candidate& a, const Candidate& b) {
      return a.weight > b.weight || (!(a.weight < b.weight) && a.id < b.id);
    };
    std::sort(candidates_.begin(), candidates_.end(), more_likely);
    const auto top_k = static_cast<std::size_t>(options_.top_k);
    if (top_k > 0 && candidates_.size() > top_k) candidates_.resize(top_k);
    double sum = 0.0;
    for (const Candidate& candidate : candidates_) sum += candidate.weight;
    if (options_.top_p < 1.0F) {
      double kept = 0.0;
      std::size_t count = 0;
      while (count < candidates_.size() && kept < static_cast<double>(options_.top_p) * sum) {
        kept += candidates_[count++].weight;
      }
      candidates_.resize(count);
      sum = kept;
    }
    double at = uniform() * sum;
    for (const Candidate& candidate : candidates_) {
      at -= candidate.weight;
      if (at < 0.0) return candidate.id;
    }
    return candidates_.back().id;  // rounding in the sum
  }

  // splitmix64; the standard distributions are not the same everywhere.
  double uniform() {
    state_ += 0x9E3779B97F4A7C15ULL;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
  }

  SamplerOptions options_;
  std::uint64_t state_;
  std::vector<float> scores_;
  std::vector<std::int32_t> seen_;
  std::vector<Candidate> candidates_;
};

}  // namespace prefillshare::examples
