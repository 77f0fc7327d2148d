// SPDX-License-Identifier: Apache-2.0
//
// examples/common/model_loader.hpp - a model file becomes a dense fp32 model.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/base/executor.hpp>
#include <common/tensor_source.hpp>
#include <prefillshare/model/block_reader.hpp>
#include <prefillshare/model/dense_linear.hpp>
#include <prefillshare/model/llama.hpp>

namespace prefillshare::examples {

/// Called with the tensors read and their number.
using LoadProgress = std::function<void(std::int64_t done, std::int64_t total)>;

/// A model as loaded: its weights in fp32 and a name for its content.
struct LoadedModel {
  std::shared_ptr<const LlamaModel<DenseLinear>> model;
  std::string fingerprint = {};  // 16 hex digits over all weights: the version in cache keys and file names
  /// Of load_model_by_blocks(), whose model has no weights in its linear layers; else empty.
  BlockReader read_block = {};
};

namespace detail {

/// A 64-bit hash of the weights, the same on every machine. It tells versions of a model apart; it is no
/// defence against somebody who wants two models to collide.
class Fingerprint {
 public:
  void add(std::span<const float> values) {
    for (const float value : values) {
      state_ = (state_ ^ std::bit_cast<std::uint32_t>(value)) * 0x9E3779B97F4A7C15ULL;
      state_ ^= state_ >> 29;
    }
  }
  [[nodiscard]] std::string text() const {
    char out[17];
    std::snprintf(out, sizeof(out), "%016llx", static_cast<unsigned long long>(state_));
    return out;
  }

 private:
  std::uint64_t state_ = 0x243F6A8885A308D3ULL;
};

/// Reads tensors by name, keeps the first error and goes on as if nothing was: the caller looks once.
class TensorLoader {
 public:
  TensorLoader(TensorSource& source, std::int64_t total, LoadProgress progress)
      : source_(source), total_(total), progress_(std::move(progress)) {}

  [[nodiscard]] const Status& status() const noexcept { return status_; }
  [[nodiscard]] std::string fingerprint() const { return fingerprint_.text(); }

  /// A tensor of rows x cols values; a vector is one row.
  [[nodiscard]] std::vector<float> read(const std::string& name, std::int64_t rows, std::int64_t cols) {
    if (!status_.ok()) return {};
    Result<TensorInfo> info = source_.info(name);
    if (!info.ok()) return fail(info.status());
    if (info->rows != rows || info->cols != cols) {
      return fail(error(StatusCode::kShapeMismatch, source_.path(), ": tensor '", name, "' is ", info->rows,
                        " x ", info->cols, ", the config needs ", rows, " x ", cols));
    }
    std::vector<float> values(static_cast<std::size_t>(rows * cols));
    if (Status s = source_.read_rows(name, 0, rows, values.data()); !s.ok()) return fail(s);
    fingerprint_.add(values);
    if (progress_) progress_(++done_, total_);
    return values;
  }

  [[nodiscard]] DenseLinear linear(const std::string& name, std::int64_t rows, std::int64_t cols, bool bias) {
    auto weights = std::make_shared<const std::vector<float>>(read(name + ".weight", rows, cols));
    std::vector<float> offsets;
    if (bias) offsets = read(name + ".bias", 1, rows);
    if (!status_.ok()) return {};
    return DenseLinear(std::move(weights), rows, cols, std::move(offsets));
  }

 private:
  std::vector<float> fail(Status status) {
    status_ = std::move(status);
    return {};
  }

  TensorSource& source_;
  Status status_;
  Fingerprint fingerprint_;
  std::int64_t done_ = 0;
  std::int64_t total_ = 0;
  LoadProgress progress_;
};

}  // namespace detail

/// The library's config out of a file's numbers. kUnsupported names what the forward pass does not have.
[[nodiscard]] inline Result<ModelConfig> model_config(const ModelHyperparameters& h) {
  ModelConfig c;
  c.vocab_size = h.vocab_size;
  c.hidden_size = h.hidden_size;
  c.intermediate_size = h.intermediate_size;
  c.layers = h.layers;
  c.heads = h.heads;
  c.kv_heads = h.kv_heads;
  c.head_dim = h.head_dim;
  // Within its window a sliding-window model attends to everything.
  c.context_length = h.sliding_window > 0 ? std::min(h.context_length, h.sliding_window) : h.context_length;
  c.rms_epsilon = h.rms_epsilon;
  c.tied_embeddings = h.tied_embeddings;
  c.attention_bias = h.attention_bias;
  c.qk_norm = h.qk_norm;
  c.rope.head_dim = static_cast<int>(h.head_dim);
  c.rope.theta = h.rope_theta;
  if (h.rope_scaling == "linear") {
    c.rope.scaling = RopeScaling::kLinear;
  } else if (h.rope_scaling == "llama3") {
    c.rope.scaling = RopeScaling::kLlama3;
  } else if (!h.rope_scaling.empty() && h.rope_scaling != "none" && h.rope_scaling != "default") {
    return error(StatusCode::kUnsupported, "RoPE scaling '", h.rope_scaling,
                 "'; known are none, linear, llama3");
  }
  c.rope.factor = h.rope_factor;
  c.rope.low_freq_factor = h.rope_low_freq_factor;
  c.rope.high_freq_factor = h.rope_high_freq_factor;
  if (h.rope_original_context > 0) c.rope.original_max_position_embeddings = h.rope_original_context;
  if (Status s = validate(c); !s.ok()) return s;
  return c;
}

namespace detail {

/// Tensors of the file that load_layer() reads.
[[nodiscard]] inline std::int64_t tensors_of_layer(const ModelConfig& c) {
  return 9 + (c.attention_bias ? 3 : 0) + (c.qk_norm ? 2 : 0);
}
[[nodiscard]] inline LlamaLayer<DenseLinear> load_layer(TensorLoader& load, const ModelConfig& c,
                                                        std::int64_t index) {
  LlamaLayer<DenseLinear> layer;
  const std::string prefix = codegemm::concat("model.layers.", index, ".");
  layer.input_norm = load.read(prefix + "input_layernorm.weight", 1, c.hidden_size);
  layer.q = load.linear(prefix + "self_attn.q_proj", c.q_size(), c.hidden_size, c.attention_bias);
  layer.k = load.linear(prefix + "self_attn.k_proj", c.kv_size(), c.hidden_size, c.attention_bias);
  layer.v = load.linear(prefix + "self_attn.v_proj", c.kv_size(), c.hidden_size, c.attention_bias);
  if (c.qk_norm) {
    layer.q_norm = load.read(prefix + "self_attn.q_norm.weight", 1, c.head_dim);
    layer.k_norm = load.read(prefix + "self_attn.k_norm.weight", 1, c.head_dim);
  }
  layer.o = load.linear(prefix + "self_attn.o_proj", c.hidden_size, c.q_size(), false);
  layer.post_attention_norm = load.read(prefix + "post_attention_layernorm.weight", 1, c.hidden_size);
  layer.gate = load.linear(prefix + "mlp.gate_proj", c.intermediate_size, c.hidden_size, false);
  layer.up = load.linear(prefix + "mlp.up_proj", c.intermediate_size, c.hidden_size, false);
  layer.down = load.linear(prefix + "mlp.down_proj", c.hidden_size, c.intermediate_size, false);
  return layer;
}

/// The layer's shapes, biases and norms alone.
inline void drop_weights(LlamaLayer<DenseLinear>& layer) {
  for (DenseLinear* const linear :
       {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
    *linear = DenseLinear::without_weights(linear->rows(), linear->cols(),
                                           std::vector<float>(linear->bias().begin(), linear->bias().end()));
  }
}

/// All of the file in load_model()'s order; change(layer) is called for each block as soon as it is read.
template <class Change>
[[nodiscard]] Result<LoadedModel> load_all(TensorSource& source, const LoadProgress& progress,
                                           Change&& change) {
  Result<ModelConfig> config = model_config(source.hyperparameters());
  if (!config.ok()) return config.status().with_prefix(source.path());
  const ModelConfig& c = *config;

  auto model = std::make_shared<LlamaModel<DenseLinear>>();
  model->config = c;
  TensorLoader load(source, c.layers * tensors_of_layer(c) + 2 + (c.tied_embeddings ? 0 : 1), progress);
  model->embedding = std::make_shared<const std::vector<float>>(
      load.read("model.embed_tokens.weight", c.vocab_size, c.hidden_size));
  for (std::int64_t i = 0; i < c.layers && load.status().ok(); ++i)
    change(model->layers.emplace_back(load_layer(load, c, i)));
  model->final_norm = load.read("model.norm.weight", 1, c.hidden_size);
  if (c.tied_embeddings) {
    if (load.status().ok()) model->head = DenseLinear(model->embedding, c.vocab_size, c.hidden_size);
  } else {
    model->head = load.linear("lm_head", c.vocab_size, c.hidden_size, false);
  }
  if (!load.status().ok()) return load.status();
  if (Status s = validate(*model); !s.ok()) return s.with_prefix(source.path());
  LoadedModel loaded;
  loaded.model = std::move(model);
  loaded.fingerprint = load.fingerprint();
  return loaded;
}

}  // namespace detail

/// Reads all weights into fp32. Peak memory is the model's size in fp32; errors name the file and the tensor.
[[nodiscard]] inline Result<LoadedModel> load_model(TensorSource& source, const LoadProgress& progress = {}) {
  return detail::load_all(source, progress, [](LlamaLayer<DenseLinear>&) {});
}

/// Reads all weights once, for the fingerprint, and keeps the embedding and the norms; the blocks' linear
/// layers are read again by read_block, one block at a time, from `source`, which must outlive it. A head of
/// its own is not kept. Peak memory is that of the embedding and a block, or the head, in fp32. Errors as
/// load_model().
[[nodiscard]] inline Result<LoadedModel> load_model_by_blocks(TensorSource& source,
                                                              const LoadProgress& progress = {}) {
  Result<LoadedModel> loaded = detail::load_all(source, progress, detail::drop_weights);
  if (!loaded.ok()) return loaded;
  if (!loaded->model->config.tied_embeddings) {
    auto model = std::make_shared<LlamaModel<DenseLinear>>(*loaded->model);
    model->head = DenseLinear::without_weights(model->head.rows(), model->head.cols());
    loaded->model = std::move(model);
  }
  loaded->read_block = [&source,
                        c = loaded->model->config](std::int64_t index) -> Result<LlamaLayer<DenseLinear>> {
    detail::TensorLoader load(source, detail::tensors_of_layer(c), {});
    LlamaLayer<DenseLinear> layer = detail::load_layer(load, c, index);
    if (!load.status().ok()) return load.status();
    return layer;
  };
  return loaded;
}

}  // namespace prefillshare::examples
