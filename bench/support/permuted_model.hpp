// SPDX-License-Identifier: Apache-2.0
//
// bench/support/permuted_model.hpp - the same decoder with its channels in another order: neighbours in a
// block of weights are others, what the model says is not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include <codegemm/quantize/additive.hpp>
#include <prefillshare/model/dense_linear.hpp>
#include <prefillshare/model/llama.hpp>

namespace codegemm::bench {

namespace detail {

using Order = std::vector<std::int64_t>;

inline Order random_order(std::int64_t size, codegemm::detail::SplitMix& random) {
  Order out(static_cast<std::size_t>(size));
  std::iota(out.begin(), out.end(), std::int64_t{0});
  for (std::size_t i = out.size(); i > 1; --i)
    std::swap(out[i - 1], out[static_cast<std::size_t>(random.next() % i)]);
  return out;
}

/// Of `heads` heads of the same order within each.
inline Order repeated(const Order& of_head, std::int64_t heads) {
  Order out;
  for (std::int64_t h = 0; h < heads; ++h) {
    for (const std::int64_t i : of_head) out.push_back(h * static_cast<std::int64_t>(of_head.size()) + i);
  }
  return out;
}

inline void permute(std::vector<float>& values, const Order& order) {
  if (values.empty()) return;
  std::vector<float> out;
  out.reserve(values.size());
  for (const std::int64_t i : order) out.push_back(values[static_cast<std::size_t>(i)]);
  values = std::move(out);
}

/// Row n, column k becomes row rows[n], column cols[k] of the old one; null: as they are.
inline prefillshare::DenseLinear permuted(const prefillshare::DenseLinear& layer, const Order* rows,
                                          const Order* cols) {
  const std::int64_t width = layer.cols();
  auto values = std::make_shared<std::vector<float>>(static_cast<std::size_t>(layer.rows() * width));
  std::vector<float> bias(layer.bias().begin(), layer.bias().end());
  for (std::int64_t n = 0; n < layer.rows(); ++n) {
    const float* const from = layer.weights().row(rows != nullptr ? (*rows)[static_cast<std::size_t>(n)] : n);
    float* const to = values->data() + n * width;
    for (std::int64_t k = 0; k < width; ++k)
      to[k] = from[cols != nullptr ? (*cols)[static_cast<std::size_t>(k)] : k];
  }
  if (rows != nullptr) permute(bias, *rows);
  return {std::move(values), layer.rows(), width, std::move(bias)};
}

}  // namespace detail

/// The hidden channels, those between the MLP's layers and those within the heads' values, each in an order
/// drawn from the seed. Exactly the same function but for the order of sums.
[[nodiscard]] inline std::shared_ptr<prefillshare::LlamaModel<prefillshare::DenseLinear>> permuted_model(
    const prefillshare::LlamaModel<prefillshare::DenseLinear>& model, std::uint64_t seed) {
  using prefillshare::DenseLinear;
  const prefillshare::ModelConfig& c = model.config;
  codegemm::detail::SplitMix random(seed);
  auto out = std::make_shared<prefillshare::LlamaModel<DenseLinear>>(model);
  const detail::Order hidden = detail::random_order(c.hidden_size, random);
  const DenseLinear table(model.embedding, c.vocab_size, c.hidden_size);
  const DenseLinear embedding = detail::permuted(table, nullptr, &hidden);
  out->embedding = embedding.shared_weights();
  out->head = c.tied_embeddings ? embedding : detail::permuted(model.head, nullptr, &hidden);
  detail::permute(out->final_norm, hidden);
  for (prefillshare::LlamaLayer<DenseLinear>& layer : out->layers) {
    const detail::Order of_head = detail::random_order(c.head_dim, random);
    const detail::Order values = detail::repeated(of_head, c.kv_heads);
    const detail::Order heads = detail::repeated(of_head, c.heads);
    const detail::Order between = detail::random_order(c.intermediate_size, random);
    detail::permute(layer.input_norm, hidden);
    detail::permute(layer.post_attention_norm, hidden);
    layer.q = detail::permuted(layer.q, nullptr, &hidden);
    layer.k = detail::permuted(layer.k, nullptr, &hidden);
    layer.v = detail::permuted(layer.v, &values, &hidden);
    layer.o = detail::permuted(layer.o, &hidden, &heads);
    layer.gate = detail::permuted(layer.gate, &between, &hidden);
    layer.up = detail::permuted(layer.up, &between, &hidden);
    layer.down = detail::permuted(layer.down, &hidden, &between);
  }
  return out;
}

}  // namespace codegemm::bench
