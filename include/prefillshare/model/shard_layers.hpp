// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/shard_layers.hpp - a rank's part of the layers of a model, cut before anything is
// packed for a GPU.
// Layer: model (host only).
// See: prefillshare/model/shard.hpp
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <codegemm/pack.hpp>
#include <codegemm/shard.hpp>
#include <prefillshare/model/codegemm_linear.hpp>
#include <prefillshare/model/dense_linear.hpp>
#include <prefillshare/model/llama.hpp>
#include <prefillshare/model/shard.hpp>

namespace prefillshare {

namespace detail {

[[nodiscard]] inline std::vector<float> shard_bias(std::span<const float> bias, ShardRange rows) {
  if (bias.empty()) return {};
  const auto part = bias.subspan(static_cast<std::size_t>(rows.first), static_cast<std::size_t>(rows.count));
  return {part.begin(), part.end()};
}
// Only one of the ranks may add it.
[[nodiscard]] inline std::vector<float> first_rank_bias(std::span<const float> bias, ModelShard part) {
  return part.rank == 0 ? std::vector<float>(bias.begin(), bias.end()) : std::vector<float>();
}

}  // namespace detail

/// A part of the rows of W, which are the outputs, with their bias. kInvalidArgument.
[[nodiscard]] inline Result<DenseLinear> shard_outputs(const DenseLinear& layer, ModelShard part) {
  const auto rows = detail::shard_range("N", layer.rows(), part);
  if (!rows.ok()) return rows.status();
  const float* const from = layer.weights().row(rows->first);
  return DenseLinear(std::make_shared<const std::vector<float>>(from, from + rows->count * layer.cols()),
                     rows->count, layer.cols(), detail::shard_bias(layer.bias(), *rows));
}
/// A part of the columns of W, which are the inputs: the products of all parts add up to the whole's. The
/// first has the bias. kInvalidArgument.
[[nodiscard]] inline Result<DenseLinear> shard_inputs(const DenseLinear& layer, ModelShard part) {
  const auto cols = detail::shard_range("K", layer.cols(), part);
  if (!cols.ok()) return cols.status();
  auto weights = std::make_shared<std::vector<float>>();
  weights->reserve(static_cast<std::size_t>(layer.rows() * cols->count));
  for (std::int64_t n = 0; n < layer.rows(); ++n) {
    const float* const from = layer.weights().row(n) + cols->first;
    weights->insert(weights->end(), from, from + cols->count);
  }
  return DenseLinear(std::move(weights), layer.rows(), cols->count,
                     detail::first_rank_bias(layer.bias(), part));
}
/// The same of codes, cut before they are packed. Errors also as codegemm::unpack(), shard_rows() and pack().
[[nodiscard]] inline Result<CodeGemmLinear> shard_outputs(const CodeGemmLinear& layer, ModelShard part) {
  const auto rows = detail::shard_range("N", layer.rows(), part);
  if (!rows.ok()) return rows.status();
  const auto whole = codegemm::unpack(layer.weights());
  if (!whole.ok()) return whole.status();
  const auto cut = codegemm::shard_rows(whole->view(), rows->first, rows->count);
  if (!cut.ok()) return cut.status();
  auto packed = codegemm::pack(cut->view());
  if (!packed.ok()) return packed.status();
  return CodeGemmLinear(std::move(packed).value(), detail::shard_bias(layer.bias(), *rows));
}
/// The same along K, where parts are cut at multiples of v and g. Errors also as shard_cols().
[[nodiscard]] inline Result<CodeGemmLinear> shard_inputs(const CodeGemmLinear& layer, ModelShard part) {
  const auto cols = detail::shard_range("K", layer.cols(), part);
  if (!cols.ok()) return cols.status();
  const auto whole = codegemm::unpack(layer.weights());
  if (!whole.ok()) return whole.status();
  const auto cut = codegemm::shard_cols(whole->view(), cols->first, cols->count);
  if (!cut.ok()) return cut.status();
  auto packed = codegemm::pack(cut->view());
  if (!packed.ok()) return packed.status();
  return CodeGemmLinear(std::move(packed).value(), detail::first_rank_bias(layer.bias(), part));
}

/// A rank's part of a block: its heads of q, k, v and the columns of o that they feed; its rows of gate and
/// up and the columns of down. Norms are whole. Errors name the layer.
template <LinearLayer Linear>
[[nodiscard]] Result<LlamaLayer<Linear>> shard_layer(const LlamaLayer<Linear>& layer, ModelShard part) {
  LlamaLayer<Linear> out;
  out.input_norm = layer.input_norm;
  out.post_attention_norm = layer.post_attention_norm;
  out.q_norm = layer.q_norm;
  out.k_norm = layer.k_norm;
  const auto take = [](const char* name, Linear& to, Result<Linear> made) -> Status {
    if (!made.ok()) return made.status().with_prefix(name);
    to = std::move(made).value();
    return {};
  };
  if (Status s = take("q_proj", out.q, shard_outputs(layer.q, part)); !s.ok()) return s;
  if (Status s = take("k_proj", out.k, shard_outputs(layer.k, part)); !s.ok()) return s;
  if (Status s = take("v_proj", out.v, shard_outputs(layer.v, part)); !s.ok()) return s;
  if (Status s = take("o_proj", out.o, shard_inputs(layer.o, part)); !s.ok()) return s;
  if (Status s = take("gate_proj", out.gate, shard_outputs(layer.gate, part)); !s.ok()) return s;
  if (Status s = take("up_proj", out.up, shard_outputs(layer.up, part)); !s.ok()) return s;
  if (Status s = take("down_proj", out.down, shard_inputs(layer.down, part)); !s.ok()) return s;
  return out;
}

}  // namespace prefillshare
