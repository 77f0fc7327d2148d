// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/gpu_model.cuh - what the tests of models on the GPU share: a small shape, and weights
// that a type of the GPU holds exactly.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <support/tiny_model.hpp>

#include "../codegemm/cuda/gpu.cuh"

namespace prefillshare::test {

using codegemm::test::gpu_count;
using codegemm::test::Stream;
using codegemm::test::take;

/// Heads of 64, two query heads on one KV head, a vocabulary that no tile divides.
[[nodiscard]] inline ModelConfig gpu_config() {
  ModelConfig c;
  c.vocab_size = 203;
  c.hidden_size = 128;
  c.intermediate_size = 192;
  c.layers = 2;
  c.heads = 4;
  c.kv_heads = 2;
  c.head_dim = 64;
  c.context_length = 256;
  c.rope.head_dim = 64;
  c.tied_embeddings = true;
  return c;
}

/// random_model() with weights that T holds, so that only activations are rounded.
template <class T>
[[nodiscard]] std::shared_ptr<LlamaModel<DenseLinear>> rounded_model(const ModelConfig& c,
                                                                     std::uint64_t seed) {
  auto out = std::make_shared<LlamaModel<DenseLinear>>(*random_model(c, seed));
  const auto round = [](std::span<const float> values) {
    std::vector<float> low(values.begin(), values.end());
    for (float& value : low) value = static_cast<float>(static_cast<T>(value));
    return low;
  };
  out->embedding = std::make_shared<const std::vector<float>>(round(*out->embedding));
  for_each_linear(*out, [&](const std::string& name, DenseLinear& layer) {
    const auto weights = layer.weights();
    const auto size = static_cast<std::size_t>(weights.rows * weights.cols);
    auto low = std::make_shared<const std::vector<float>>(round({weights.data, size}));
    if (c.tied_embeddings && name == "lm_head") low = out->embedding;
    layer = DenseLinear(std::move(low), layer.rows(), layer.cols(), round(layer.bias()));
  });
  return out;
}

}  // namespace prefillshare::test
