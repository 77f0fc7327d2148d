// SPDX-License-Identifier: Apache-2.0
//
// tests/support/tiny_training.hpp - a model, examples and options for fine-tuning that takes a second.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <prefillshare/train/trainer.hpp>
#include <support/quantized.hpp>
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

/// A run of three steps over 24 examples, each once, in which one example alone reads an infinite embedding.
struct PoisonedRun {
  std::shared_ptr<const LlamaModel<DenseLinear>> base = random_model(small_config(), 1031);
  std::shared_ptr<const LlamaModel<DenseLinear>> poisoned;  // what is trained
  std::vector<TrainingExample> examples = some_examples(1032, 24);
  TrainOptions options = quick_options();

  PoisonedRun() {
    constexpr std::int32_t kToken = 59;
    for (TrainingExample& example : examples) {
      for (std::int32_t& token : example.prompt) token = token == kToken ? 3 : token;
    }
    examples[17].prompt.back() = kToken;
    options.steps = 3;
    options.adam.weight_decay = 0.0;
    auto model = std::make_shared<LlamaModel<DenseLinear>>(*base);
    model->config.tied_embeddings = false;
    auto table = std::make_shared<std::vector<float>>(*base->embedding);
    (*table)[static_cast<std::size_t>(kToken * base->config.hidden_size + 1)] =
        std::numeric_limits<float>::infinity();
    model->embedding = std::move(table);
    poisoned = std::move(model);
  }
  /// What the trainer says when it has taken `good` steps before.
  [[nodiscard]] static std::string words(std::int64_t good) {
    return codegemm::concat("in step ", good + 1,
                            ", example 17, target token 0; the parameters are those after ", good, " steps");
  }
};

/// A scale with which a product's outputs are about as large as its inputs.
[[nodiscard]] inline float unit_scale(Rng& rng, const DenseLinear& layer) {
  return rng.uniform(0.5F, 1.0F) / std::sqrt(static_cast<float>(layer.cols()));
}

/// Random codes of three formats in turn for the layers of a model; one stays dense.
[[nodiscard]] inline std::map<std::string, codegemm::QuantizedMatrix> random_matrices(
    const LlamaModel<DenseLinear>& model, std::uint64_t seed,
    float (*scale)(Rng&, const DenseLinear&) = unit_scale) {
  Rng rng(seed);
  const codegemm::Format formats[] = {{8, 2, 4, -1}, {4, 1, 5, 8}, {2, 3, 4, 16}};
  std::map<std::string, codegemm::QuantizedMatrix> out;
  std::size_t i = 0;
  for_each_linear(model, [&](const std::string& name, const DenseLinear& layer) {
    if (name == "lm_head" && model.config.tied_embeddings) return;
    if (name == "model.layers.1.mlp.gate_proj") return;
    codegemm::QuantizedMatrix matrix =
        codegemm::test::random_matrix(formats[i++ % 3], layer.rows(), layer.cols(), rng);
    for (codegemm::Half& value : matrix.scales()) value = codegemm::Half::from_float(scale(rng, layer));
    out.emplace(name, std::move(matrix));
  });
  return out;
}

/// All parameters, one behind the other.
[[nodiscard]] inline std::vector<float> values_of(const TrainableModel<float>& model) {
  std::vector<float> out;
  for (const Parameter<float>& p : model.parameters())
    out.insert(out.end(), p.value.span().begin(), p.value.span().end());
  return out;
}

[[nodiscard]] inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace prefillshare::test
