// SPDX-License-Identifier: Apache-2.0
//
// tests/support/tiny_training.hpp - a model, examples and options for fine-tuning that takes a second.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include <prefillshare/train/trainer.hpp>
#include <support/tiny_model.hpp>

namespace prefillshare::test {

/// A tiny model with head norms.
[[nodiscard]] inline ModelConfig small_config() {
  ModelConfig c = tiny_config();
  c.qk_norm = true;
  return c;
}

/// Prompts of 1 to 9 tokens below 60 with targets that follow a rule.
[[nodiscard]] inline std::vector<TrainingExample> some_examples(std::uint64_t seed, int count) {
  Rng rng(seed);
  std::vector<TrainingExample> out;
  for (int i = 0; i < count; ++i) {
    TrainingExample example;
    example.prompt = random_tokens(rng, 1 + rng.below(9), 60);
    // A rule that can be learned: the last prompt token, doubled, and an end.
    example.target = {(2 * example.prompt.back()) % 60, 60};
    if (rng.below(2) == 0) example.target.insert(example.target.begin(), example.prompt.back());
    out.push_back(std::move(example));
  }
  return out;
}

/// Enough steps to learn the rule.
[[nodiscard]] inline TrainOptions quick_options() {
  TrainOptions options;
  options.steps = 60;
  options.batch = 8;
  options.pass_tokens = 24;
  options.max_tokens = 16;
  options.rate = 1e-2;
  options.warmup = 0.1;
  options.adam.weight_decay = 0.01;
  return options;
}

}  // namespace prefillshare::test
