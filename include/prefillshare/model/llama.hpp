// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/llama.hpp - the weights of a Llama-family decoder, whatever its linear layers are
// made of.
// Layer: model (host only).
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include <prefillshare/model/config.hpp>
#include <prefillshare/model/linear.hpp>

namespace prefillshare {

/// The seven linear layers and the norms of one block.
template <LinearLayer Linear>
struct LlamaLayer {
  std::vector<float> input_norm;           ///< [hidden]
  std::vector<float> post_attention_norm;  ///< [hidden]
  std::vector<float> q_norm;               ///< [head_dim], with qk_norm only
  std::vector<float> k_norm;               ///< [head_dim], with qk_norm only
  Linear q;                                ///< [heads * head_dim][hidden]
  Linear k;                                ///< [kv_heads * head_dim][hidden]
  Linear v;                                ///< [kv_heads * head_dim][hidden]
  Linear o;                                ///< [hidden][heads * head_dim]
  Linear gate;                             ///< [intermediate][hidden]
  Linear up;                               ///< [intermediate][hidden]
  Linear down;                             ///< [hidden][intermediate]
};

/// A whole model. Immutable once built and safe to read from many threads; modules share it by pointer.
template <LinearLayer Linear>
struct LlamaModel {
  ModelConfig config;                                   ///< shapes and kinds
  std::shared_ptr<const std::vector<float>> embedding;  ///< [vocab][hidden]
  std::vector<LlamaLayer<Linear>> layers;               ///< [config.layers]
  std::vector<float> final_norm;                        ///< [hidden]
  Linear head;                                          ///< [vocab][hidden]
};

/// Calls visit(name, layer) for each linear layer in the order of the forward pass, the head last. Names are
/// those of the Hugging Face checkpoints: "model.layers.3.self_attn.q_proj", "lm_head". Model may be const.
template <class Model, class Visit>
void for_each_linear(Model& model, Visit&& visit) {
  for (std::size_t i = 0; i < model.layers.size(); ++i) {
    auto& layer = model.layers[i];
    const std::string prefix = codegemm::concat("model.layers.", i, ".");
    visit(prefix + "self_attn.q_proj", layer.q);
    visit(prefix + "self_attn.k_proj", layer.k);
    visit(prefix + "self_attn.v_proj", layer.v);
    visit(prefix + "self_attn.o_proj", layer.o);
    visit(prefix + "mlp.gate_proj", layer.gate);
    visit(prefix + "mlp.up_proj", layer.up);
    visit(prefix + "mlp.down_proj", layer.down);
  }
  visit(std::string("lm_head"), model.head);
}

/// Bytes of all linear layers together; the embedding table is not among them.
template <LinearLayer Linear>
[[nodiscard]] std::int64_t linear_bytes(const LlamaModel<Linear>& model) {
  std::int64_t bytes = 0;
  for_each_linear(model, [&](const std::string&, const Linear& layer) { bytes += layer.parameter_bytes(); });
  return bytes;
}

/// Weights of all linear layers together.
template <LinearLayer Linear>
[[nodiscard]] std::int64_t linear_weights(const LlamaModel<Linear>& model) {
  std::int64_t weights = 0;
  for_each_linear(model,
                  [&](const std::string&, const Linear& layer) { weights += layer.rows() * layer.cols(); });
  return weights;
}

/// Checks every shape against the config, so that the forward pass need not. The error names the tensor.
template <LinearLayer Linear>
[[nodiscard]] Status validate(const LlamaModel<Linear>& model) {
  const ModelConfig& c = model.config;
  if (Status status = validate(c); !status.ok()) return status;
  Status first;
  const auto linear = [&](const std::string& name, const Linear& layer, std::int64_t rows,
                          std::int64_t cols) {
    if (!first.ok() || (layer.rows() == rows && layer.cols() == cols)) return;
    first = error(StatusCode::kShapeMismatch, name, " is ", layer.rows(), " x ", layer.cols(),
                  ", the config needs ", rows, " x ", cols);
  };
  const auto vector = [&](const std::string& name, std::size_t size, std::int64_t wanted) {
    if (!first.ok() || static_cast<std::int64_t>(size) == wanted) return;
    static_cast<void>(
        first = error(StatusCode::kShapeMismatch, name, " has ", size, " values, the config needs ", wanted));
  };
  if (static_cast<std::int64_t>(model.layers.size()) != c.layers) {
    return error(StatusCode::kShapeMismatch, "model has ", model.layers.size(), " layers, the config needs ",
                 c.layers);
  }
  for (std::size_t i = 0; i < model.layers.size(); ++i) {
    const LlamaLayer<Linear>& l = model.layers[i];
    const std::string prefix = codegemm::concat("model.layers.", i, ".");
    vector(prefix + "input_layernorm", l.input_norm.size(), c.hidden_size);
    vector(prefix + "post_attention_layernorm", l.post_attention_norm.size(), c.hidden_size);
    vector(prefix + "self_attn.q_norm", l.q_norm.size(), c.qk_norm ? c.head_dim : 0);
    vector(prefix + "self_attn.k_norm", l.k_norm.size(), c.qk_norm ? c.head_dim : 0);
    linear(prefix + "self_attn.q_proj", l.q, c.q_size(), c.hidden_size);
    linear(prefix + "self_attn.k_proj", l.k, c.kv_size(), c.hidden_size);
    linear(prefix + "self_attn.v_proj", l.v, c.kv_size(), c.hidden_size);
    linear(prefix + "self_attn.o_proj", l.o, c.hidden_size, c.q_size());
    linear(prefix + "mlp.gate_proj", l.gate, c.intermediate_size, c.hidden_size);
    linear(prefix + "mlp.up_proj", l.up, c.intermediate_size, c.hidden_size);
    linear(prefix + "mlp.down_proj", l.down, c.hidden_size, c.intermediate_size);
  }
  vector("model.norm", model.final_norm.size(), c.hidden_size);
  vector("model.embed_tokens", model.embedding ? model.embedding->size() : 0, c.vocab_size * c.hidden_size);
  linear("lm_head", model.head, c.vocab_size, c.hidden_size);
  return first;
}

}  // namespace prefillshare
