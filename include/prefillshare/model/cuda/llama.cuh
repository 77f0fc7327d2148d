// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/llama.cuh - the weights of a Llama-family decoder on the device.
// Layer: model/cuda (host, needs nvcc).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <prefillshare/model/config.hpp>
#include <prefillshare/model/cuda/linear.cuh>

namespace prefillshare::cuda {

/// One block: what is multiplied by the same activations is one matrix, merged along N.
template <DeviceLinearLayer Linear>
struct DeviceLlamaLayer {
  DeviceArray<float> input_norm;           ///< [hidden]
  DeviceArray<float> post_attention_norm;  ///< [hidden]
  DeviceArray<float> q_norm;               ///< [head_dim], with qk_norm only
  DeviceArray<float> k_norm;               ///< [head_dim], with qk_norm only
  Linear qkv;                              ///< [(heads + 2 * kv_heads) * head_dim][hidden]: q, k, v
  Linear o;                                ///< [hidden][heads * head_dim]
  Linear gate_up;                          ///< [2 * intermediate][hidden]: gate, up
  Linear down;                             ///< [hidden][intermediate]
};

/// A whole model on one device. Immutable once built; modules share it by pointer. The head may be of another
/// kind than the layers: it is often kept at more bits.
template <DeviceLinearLayer LinearKind, DeviceLinearLayer HeadKind = LinearKind>
struct DeviceLlama {
  using Linear = LinearKind;               ///< of the layers
  using Head = HeadKind;                   ///< of the head
  using Scalar = typename Linear::Scalar;  ///< of activations, embedding and cache

  ModelConfig config;                                    ///< shapes and kinds
  std::shared_ptr<const DeviceArray<Scalar>> embedding;  ///< [vocab][hidden]
  std::vector<DeviceLlamaLayer<Linear>> layers;          ///< [config.layers]
  DeviceArray<float> final_norm;                         ///< [hidden]
  DeviceArray<float> rope_frequencies;                   ///< [head_dim / 2], rope_frequency() of each pair
  Head head;                                             ///< [vocab][hidden]
};

/// Bytes of all linear layers together, the head among them; the embedding table is not.
template <class Linear, class Head>
[[nodiscard]] std::int64_t linear_bytes(const DeviceLlama<Linear, Head>& model) {
  std::int64_t bytes = model.head.parameter_bytes();
  for (const DeviceLlamaLayer<Linear>& l : model.layers) {
    bytes += l.qkv.parameter_bytes() + l.o.parameter_bytes() + l.gate_up.parameter_bytes() +
             l.down.parameter_bytes();
  }
  return bytes;
}

/// The frequencies of RoPE, for DeviceLlama. Errors as DeviceArray::copy_of().
[[nodiscard]] inline Result<DeviceArray<float>> upload_rope(const RopeConfig& rope) {
  std::vector<float> frequencies;
  for (int pair = 0; pair < rope.head_dim / 2; ++pair) frequencies.push_back(rope_frequency(rope, pair));
  return DeviceArray<float>::copy_of(frequencies);
}

/// Checks every shape against the config, so that the forward pass need not. The error names the tensor.
template <class Linear, class Head>
[[nodiscard]] Status validate(const DeviceLlama<Linear, Head>& model) {
  const ModelConfig& c = model.config;
  if (Status s = prefillshare::validate(c); !s.ok()) return s;
  if (c.hidden_size % 8 != 0 || c.intermediate_size % 8 != 0 || c.head_dim % 16 != 0 || c.head_dim > 256) {
    return codegemm::error(StatusCode::kUnsupported, "hidden_size ", c.hidden_size, ", intermediate_size ",
                           c.intermediate_size, ", head_dim ", c.head_dim,
                           ": on a GPU the sizes must be multiples of 8 and head_dim of 16, up to 256");
  }
  Status first;
  const auto expect = [&](const std::string& name, std::int64_t rows, std::int64_t cols,
                          std::int64_t wanted_rows, std::int64_t wanted_cols) {
    if (!first.ok() || (rows == wanted_rows && cols == wanted_cols)) return;
    first = codegemm::error(StatusCode::kShapeMismatch, name, " is ", rows, " x ", cols,
                            ", the config needs ", wanted_rows, " x ", wanted_cols);
  };
  const auto linear = [&](const std::string& name, const auto& layer, std::int64_t rows, std::int64_t cols) {
    expect(name, layer.rows(), layer.cols(), rows, cols);
  };
  const auto vector = [&](const std::string& name, std::size_t size, std::int64_t wanted) {
    expect(name, 1, static_cast<std::int64_t>(size), 1, wanted);
  };
  expect("the model", 1, std::ssize(model.layers), 1, c.layers);
  for (std::size_t i = 0; i < model.layers.size(); ++i) {
    const DeviceLlamaLayer<Linear>& l = model.layers[i];
    const std::string prefix = codegemm::concat("model.layers.", i, ".");
    vector(prefix + "input_layernorm", l.input_norm.size(), c.hidden_size);
    vector(prefix + "post_attention_layernorm", l.post_attention_norm.size(), c.hidden_size);
    vector(prefix + "self_attn.q_norm", l.q_norm.size(), c.qk_norm ? c.head_dim : 0);
    vector(prefix + "self_attn.k_norm", l.k_norm.size(), c.qk_norm ? c.head_dim : 0);
    linear(prefix + "self_attn.qkv_proj", l.qkv, c.q_size() + 2 * c.kv_size(), c.hidden_size);
    linear(prefix + "self_attn.o_proj", l.o, c.hidden_size, c.q_size());
    linear(prefix + "mlp.gate_up_proj", l.gate_up, 2 * c.intermediate_size, c.hidden_size);
    linear(prefix + "mlp.down_proj", l.down, c.hidden_size, c.intermediate_size);
  }
  vector("model.norm", model.final_norm.size(), c.hidden_size);
  vector("the RoPE frequencies", model.rope_frequencies.size(), c.head_dim / 2);
  vector("model.embed_tokens", model.embedding ? model.embedding->size() : 0, c.vocab_size * c.hidden_size);
  linear("lm_head", model.head, c.vocab_size, c.hidden_size);
  return first;
}

}  // namespace prefillshare::cuda
