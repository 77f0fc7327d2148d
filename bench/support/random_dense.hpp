// SPDX-License-Identifier: Apache-2.0
//
// bench/support/random_dense.hpp - a dense decoder of random weights on the host, the same in any process.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include <codegemm/quantize/additive.hpp>
#include <prefillshare/model/dense_linear.hpp>
#include <prefillshare/model/llama.hpp>

namespace codegemm::bench {

/// Layers of unit gain, norms of 1, embeddings of that root mean square, tied with the head.
inline std::shared_ptr<prefillshare::LlamaModel<prefillshare::DenseLinear>> random_dense_model(
    const prefillshare::ModelConfig& c, double embedding_size) {
  using prefillshare::DenseLinear;
  codegemm::detail::SplitMix random(1);
  // The sum of three uniform numbers is nearly normal.
  const auto draw = [&](std::int64_t count, double size) {
    auto out = std::make_shared<std::vector<float>>(static_cast<std::size_t>(count));
    for (float& x : *out)
      x = static_cast<float>(size * (random.uniform() + random.uniform() + random.uniform() - 1.5) * 2.0);
    return out;
  };
  const auto linear = [&](std::int64_t rows, std::int64_t cols) {
    return DenseLinear(draw(rows * cols, 1.0 / std::sqrt(static_cast<double>(cols))), rows, cols);
  };
  auto model = std::make_shared<prefillshare::LlamaModel<DenseLinear>>();
  model->config = c;
  model->embedding = draw(c.vocab_size * c.hidden_size, embedding_size);
  const std::vector<float> ones(static_cast<std::size_t>(c.hidden_size), 1.0F);
  for (std::int64_t i = 0; i < c.layers; ++i) {
    prefillshare::LlamaLayer<DenseLinear> layer;
    layer.input_norm = layer.post_attention_norm = ones;
    layer.q = linear(c.q_size(), c.hidden_size);
    layer.k = linear(c.kv_size(), c.hidden_size);
    layer.v = linear(c.kv_size(), c.hidden_size);
    layer.o = linear(c.hidden_size, c.q_size());
    layer.gate = linear(c.intermediate_size, c.hidden_size);
    layer.up = linear(c.intermediate_size, c.hidden_size);
    layer.down = linear(c.hidden_size, c.intermediate_size);
    model->layers.push_back(std::move(layer));
  }
  model->final_norm = ones;
  model->head = DenseLinear(model->embedding, c.vocab_size, c.hidden_size);
  return model;
}

}  // namespace codegemm::bench
