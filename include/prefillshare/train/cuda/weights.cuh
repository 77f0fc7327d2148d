// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/weights.cuh - where the weights of a decoder lie on the device: matrices one after
// the other in what products read, vectors in fp32.
// Layer: train/cuda (host, needs nvcc).
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <prefillshare/model/block_reader.hpp>
#include <prefillshare/model/dense_linear.hpp>
#include <prefillshare/model/llama.hpp>
#include <prefillshare/train/cuda/kernels/elementwise.cuh>
#include <prefillshare/train/cuda/kernels/heads.cuh>
#include <prefillshare/train/cuda/train_stream.cuh>

namespace prefillshare::cuda {

/// Whether a model can be trained on the GPU. kUnsupported with the numbers.
[[nodiscard]] inline Status check_trainable(const LlamaModel<DenseLinear>& model) {
  if (Status s = prefillshare::validate(model); !s.ok()) return s;
  const ModelConfig& c = model.config;
  if (c.hidden_size % 8 != 0 || c.intermediate_size % 8 != 0 || c.head_dim > detail::kHeadMost ||
      c.hidden_size > detail::kNormWidth) {
    return codegemm::error(StatusCode::kUnsupported, "hidden_size ", c.hidden_size, ", intermediate_size ",
                           c.intermediate_size, ", head_dim ", c.head_dim,
                           ": to train on a GPU the sizes must be multiples of 8, hidden_size at most ",
                           detail::kNormWidth, " and head_dim at most ", detail::kHeadMost);
  }
  Status wrong;
  for_each_linear(model, [&](const std::string& name, const DenseLinear& layer) {
    const bool may = c.attention_bias &&
                     (name.ends_with("q_proj") || name.ends_with("k_proj") || name.ends_with("v_proj"));
    const bool must = may;
    if (!wrong.ok() || layer.bias().empty() == !must) return;
    wrong = codegemm::error(StatusCode::kUnsupported, name, layer.bias().empty() ? " lacks" : " has",
                            " a bias; to train on a GPU q_proj, k_proj and v_proj have one "
                            "with attention_bias, and no other layer");
  });
  return wrong;
}

namespace detail {

/// Offsets in elements. Matrices: embedding, then q, k, v, o, gate, up, down of each block, then the head
/// unless it is tied. Vectors: both norms of each block, both head norms of each block, the final norm.
class WeightsLayout {
 public:
  explicit WeightsLayout(const ModelConfig& c) : c_(c) {}

  [[nodiscard]] std::int64_t q() const { return c_.q_size() * c_.hidden_size; }
  [[nodiscard]] std::int64_t kv() const { return c_.kv_size() * c_.hidden_size; }
  [[nodiscard]] std::int64_t wide() const { return c_.intermediate_size * c_.hidden_size; }
  [[nodiscard]] std::int64_t qkv_width() const { return c_.q_size() + 2 * c_.kv_size(); }
  [[nodiscard]] std::int64_t block_size() const { return 2 * q() + 2 * kv() + 3 * wide(); }
  [[nodiscard]] std::int64_t table() const { return c_.vocab_size * c_.hidden_size; }
  [[nodiscard]] std::int64_t block(std::int64_t i) const { return table() + i * block_size(); }
  /// Layer `which` of block i, by BlockLinear.
  [[nodiscard]] std::int64_t linear(std::int64_t i, int which) const {
    const std::int64_t sizes[] = {q(), kv(), kv(), q(), wide(), wide()};
    std::int64_t at = block(i);
    for (int before = 0; before < which; ++before) at += sizes[before];
    return at;
  }
  [[nodiscard]] std::int64_t head() const { return c_.tied_embeddings ? 0 : block(c_.layers); }
  [[nodiscard]] std::int64_t matrices() const {
    return block(c_.layers) + (c_.tied_embeddings ? 0 : table());
  }

  [[nodiscard]] std::int64_t norm(std::int64_t i, int which) const {
    return (2 * i + which) * c_.hidden_size;
  }
  [[nodiscard]] std::int64_t head_norms() const { return norm(c_.layers, 0); }
  [[nodiscard]] std::int64_t head_norm(std::int64_t i, int which) const {
    return head_norms() + (2 * i + which) * c_.head_dim;
  }
  [[nodiscard]] std::int64_t final_norm() const {
    return c_.qk_norm ? head_norm(c_.layers, 0) : head_norms();
  }
  [[nodiscard]] std::int64_t vectors() const { return final_norm() + c_.hidden_size; }
  [[nodiscard]] std::int64_t bias(std::int64_t i) const { return i * qkv_width(); }
  [[nodiscard]] std::int64_t biases() const { return c_.attention_bias ? bias(c_.layers) : 0; }

  /// body(name without ".weight", values, offset) for each norm.
  template <class Body>
  void for_each_vector(const LlamaModel<DenseLinear>& m, Body&& body) const {
    for (std::size_t i = 0; i < m.layers.size(); ++i) {
      const auto at = static_cast<std::int64_t>(i);
      const std::string prefix = codegemm::concat("model.layers.", i, ".");
      body(prefix + "input_layernorm", m.layers[i].input_norm, norm(at, 0));
      body(prefix + "post_attention_layernorm", m.layers[i].post_attention_norm, norm(at, 1));
      if (!c_.qk_norm) continue;
      body(prefix + "self_attn.q_norm", m.layers[i].q_norm, head_norm(at, 0));
      body(prefix + "self_attn.k_norm", m.layers[i].k_norm, head_norm(at, 1));
    }
    body(std::string("model.norm"), m.final_norm, final_norm());
  }
  /// body(name, layer, offset of its matrix, offset of its bias) for each linear layer that has a place.
  template <class Body>
  void for_each_matrix(const LlamaModel<DenseLinear>& m, Body&& body) const {
    std::int64_t number = 0;
    for_each_linear(m, [&](const std::string& name, const DenseLinear& layer) {
      const std::int64_t i = number / 7;
      const auto which = static_cast<int>(number % 7);
      ++number;
      if (name == "lm_head") {
        if (!c_.tied_embeddings) body(name, layer, head(), std::int64_t{0});
        return;
      }
      const std::int64_t in_bias[] = {0, c_.q_size(), c_.q_size() + c_.kv_size(), 0, 0, 0, 0};
      body(name, layer, linear(i, which), bias(i) + in_bias[which]);
    });
  }

 private:
  ModelConfig c_;
};

/// One block's weights, merged along N as products use them. Vectors may be null where the config has none.
template <class S>
struct DeviceBlockWeights {
  const float* input_norm = nullptr;           // [hidden]
  const float* post_attention_norm = nullptr;  // [hidden]
  const float* q_norm = nullptr;               // [head_dim]
  const float* k_norm = nullptr;               // [head_dim]
  const float* qkv_bias = nullptr;             // [q + 2 kv]
  const S* qkv = nullptr;                      // [q + 2 kv][hidden]
  const S* o = nullptr;                        // [hidden][q]
  const S* gate_up = nullptr;                  // [2 * intermediate][hidden]
  const S* down = nullptr;                     // [hidden][intermediate]
};

/// A model's weights as a pass reads them; the memory is somebody else's.
template <class S>
struct DeviceWeightsView {
  const ModelConfig* config = nullptr;
  const S* matrices = nullptr;     // WeightsLayout::matrices()
  const float* vectors = nullptr;  // WeightsLayout::vectors()
  const float* biases = nullptr;   // WeightsLayout::biases(), or null

  [[nodiscard]] DeviceBlockWeights<S> block(std::int64_t i) const {
    const WeightsLayout at(*config);
    DeviceBlockWeights<S> out;
    out.input_norm = vectors + at.norm(i, 0);
    out.post_attention_norm = vectors + at.norm(i, 1);
    if (config->qk_norm) {
      out.q_norm = vectors + at.head_norm(i, 0);
      out.k_norm = vectors + at.head_norm(i, 1);
    }
    if (config->attention_bias) out.qkv_bias = biases + at.bias(i);
    out.qkv = matrices + at.linear(i, 0);
    out.o = matrices + at.linear(i, 3);
    out.gate_up = matrices + at.linear(i, 4);
    out.down = matrices + at.linear(i, 6);
    return out;
  }
  [[nodiscard]] const S* embedding() const { return matrices; }
  [[nodiscard]] const S* head() const { return matrices + WeightsLayout(*config).head(); }
  [[nodiscard]] const float* final_norm() const { return vectors + WeightsLayout(*config).final_norm(); }
};

/// All matrices of a dense model but those whose names are in `skipped`, in fp32 on the device. Blocks come
/// from `read` where there is one, each freed before the next. kNullPointer for a layer without weights.
[[nodiscard]] inline Status upload_matrices(const LlamaModel<DenseLinear>& model, float* to,
                                            const BlockReader& read = {},
                                            const std::set<std::string>& skipped = {}) {
  const WeightsLayout at(model.config);
  Status status;
  const auto upload = [&](std::int64_t offset, const float* from, std::int64_t size) {
    status = codegemm::cuda::cuda_status(
        cudaMemcpy(to + offset, from, static_cast<std::size_t>(size) * sizeof(float), cudaMemcpyHostToDevice),
        "cudaMemcpy");
  };
  upload(0, model.embedding->data(), at.table());
  LlamaLayer<DenseLinear> block;  // as it was read
  std::int64_t at_hand = -1;
  std::int64_t number = 0;
  at.for_each_matrix(model,
                     [&](const std::string& name, const DenseLinear& own, std::int64_t offset, std::int64_t) {
                       const std::int64_t i = number++;
                       if (!status.ok() || skipped.count(name) > 0) return;
                       const DenseLinear* layer = &own;
                       if (read && i < 7 * model.config.layers) {
                         if (at_hand != i / 7) {
                           Result<LlamaLayer<DenseLinear>> next = read(i / 7);
                           if (!next.ok()) {
                             status = next.status();
                             return;
                           }
                           block = *std::move(next);
                           at_hand = i / 7;
                         }
                         const DenseLinear* const parts[] = {&block.q,    &block.k,  &block.v,   &block.o,
                                                             &block.gate, &block.up, &block.down};
                         layer = parts[i % 7];
                       }
                       if (layer->weights().data == nullptr) {
                         status = codegemm::error(StatusCode::kNullPointer, name, " has no weights");
                         return;
                       }
                       upload(offset, layer->weights().data, own.rows() * own.cols());
                     });
  // cudaMemcpy from pageable memory may return before the device has the last of it, and what reads it runs
  // in another stream.
  if (status.ok()) {
    static_cast<void>(
        status = codegemm::cuda::cuda_status(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize"));
  }
  return status;
}
[[nodiscard]] inline std::vector<float> merged_vectors(const LlamaModel<DenseLinear>& model) {
  const WeightsLayout at(model.config);
  std::vector<float> out(static_cast<std::size_t>(at.vectors()));
  at.for_each_vector(model, [&](const std::string&, const std::vector<float>& values, std::int64_t offset) {
    std::copy(values.begin(), values.end(), out.begin() + offset);
  });
  return out;
}
[[nodiscard]] inline std::vector<float> merged_biases(const LlamaModel<DenseLinear>& model) {
  const WeightsLayout at(model.config);
  std::vector<float> out(static_cast<std::size_t>(at.biases()));
  if (out.empty()) return out;
  at.for_each_matrix(model,
                     [&](const std::string&, const DenseLinear& layer, std::int64_t, std::int64_t offset) {
                       std::copy(layer.bias().begin(), layer.bias().end(), out.begin() + offset);
                     });
  return out;
}

/// to = from, rounded; `size` is a multiple of 8.
template <class S>
void round_to(TrainStream& ts, const float* from, S* to, std::int64_t size) {
  RoundArgs args;
  args.from = from;
  args.to = to;
  args.size = size;
  ts.start(round_kernel<S>, args, (size / 8 + kElementThreads - 1) / kElementThreads, kElementThreads);
}

}  // namespace detail

/// The weights of a model that is not trained, on the device. S: TrainStorage.
template <TrainStorage S>
class DeviceFrozenWeights {
 public:
  /// A copy of `model`, whose blocks come from `read` where there is one. kUnsupported as check_trainable(),
  /// kNullPointer for a layer without weights, kOutOfMemory, kCudaError, errors of `read`.
  [[nodiscard]] static Result<DeviceFrozenWeights> create(const LlamaModel<DenseLinear>& model,
                                                          const Device& device, cudaStream_t stream,
                                                          const BlockReader& read = {}) {
    if (Status s = check_trainable(model); !s.ok()) return s;
    Result<detail::TrainStream> ts = detail::TrainStream::create(device, stream);
    if (!ts.ok()) return ts.status();
    const detail::WeightsLayout at(model.config);
    DeviceFrozenWeights out;
    out.config_ = std::make_unique<ModelConfig>(model.config);
    DeviceArray<float> source;
    detail::Allocations memory;
    memory.make(source, at.matrices());
    memory.make(out.matrices_, at.matrices());
    memory.copy<float>(out.vectors_, detail::merged_vectors(model));
    memory.copy<float>(out.biases_, detail::merged_biases(model));
    if (Status s = memory.finish(); !s.ok()) return s.with_prefix("DeviceFrozenWeights");
    if (Status s = detail::upload_matrices(model, source.data(), read); !s.ok()) return s;
    detail::round_to(*ts, source.data(), out.matrices_.data(), at.matrices());
    ts->synchronize();
    if (Status s = ts->take(); !s.ok()) return s;
    return out;
  }

  [[nodiscard]] const ModelConfig& config() const noexcept { return *config_; }  ///< of the model
  /// What passes read; valid as long as this lives.
  [[nodiscard]] detail::DeviceWeightsView<S> view() const {
    return {config_.get(), matrices_.data(), vectors_.data(), biases_.data()};
  }

 private:
  DeviceFrozenWeights() = default;

  std::unique_ptr<ModelConfig> config_;  // keeps its address
  DeviceArray<S> matrices_;
  DeviceArray<float> vectors_;
  DeviceArray<float> biases_;
};

}  // namespace prefillshare::cuda
