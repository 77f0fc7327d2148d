// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/train/gpu_training.cuh - what the tests of training on the GPU share: variants of a
// small decoder, a batch for both sides, models to train.
#pragma once

#include <cstdint>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <cuda_bf16.h>

#include <prefillshare/train/cuda/pass.cuh>
#include <prefillshare/train/trainable_model.hpp>
#include <support/tiny_training.hpp>

#include "../gpu_model.cuh"

namespace prefillshare::test {

using codegemm::test::gpu_or_skip;
using codegemm::test::require_ok;
using cuda::Device;
using cuda::DeviceFrozenWeights;
using cuda::DeviceLossBatch;

struct Variant {
  const char* name;
  ModelConfig config;
  std::vector<std::pair<std::int64_t, std::int64_t>> segments;  // rows, prefix
};

[[nodiscard]] inline ModelConfig config_of(std::int64_t hidden, std::int64_t heads, std::int64_t kv_heads,
                                           std::int64_t head_dim) {
  ModelConfig c = tiny_config();
  c.vocab_size = 203;
  c.hidden_size = hidden;
  c.intermediate_size = 136;
  c.heads = heads;
  c.kv_heads = kv_heads;
  c.head_dim = head_dim;
  c.rope.head_dim = static_cast<int>(head_dim);
  return c;
}

[[nodiscard]] inline std::vector<Variant> variants() {
  ModelConfig plain = tiny_config();
  plain.rope.scaling = RopeScaling::kLinear;
  plain.rope.factor = 2.0;
  ModelConfig qwen = config_of(48, 6, 2, 24);
  qwen.tied_embeddings = false;
  qwen.attention_bias = qwen.qk_norm = true;
  ModelConfig gguf = config_of(32, 4, 4, 16);
  gguf.rope.layout = RopeLayout::kInterleaved;
  ModelConfig smol = config_of(72, 6, 2, 64);  // on tensor cores in bf16
  ModelConfig wide = config_of(1096, 4, 2, 128);
  wide.tied_embeddings = false;
  wide.qk_norm = true;
  return {{"tied, linear scaling", plain, {{4, 5}, {7, 0}}},
          {"biases, head norms, untied", qwen, {{40, 33}, {7, 0}, {1, 12}}},
          {"interleaved, no GQA", gguf, {{9, 3}, {70, 0}}},
          {"head size 64", smol, {{150, 70}, {41, 0}, {1, 130}, {23, 1}}},
          {"head size 128, wide, head norms", wide, {{37, 90}, {70, 0}}}};
}

/// The same rows for both: constants as prefixes, losses at some rows.
struct Problem {
  LossBatch<double> batch;
  std::vector<std::vector<double>> keys, values;  // of each segment, [layers][prefix][kv]
  std::int64_t prefix_rows = 0;

  Problem(const Variant& v, std::uint64_t seed) {
    const ModelConfig& c = v.config;
    Rng rng(seed);
    std::int64_t rows = 0;
    keys.resize(v.segments.size());
    values.resize(v.segments.size());
    for (std::size_t i = 0; i < v.segments.size(); ++i) {
      const auto [count, prefix] = v.segments[i];
      for (auto* x : {&keys[i], &values[i]}) {
        for (const float value : rng.normals(c.layers * prefix * c.kv_size()))
          x->push_back(static_cast<double>(__bfloat162float(__float2bfloat16(value))));
      }
      batch.segments.push_back({rows, count, prefix, prefix, keys[i].data(), values[i].data()});
      rows += count;
      prefix_rows += prefix;
    }
    batch.tokens = random_tokens(rng, rows, c.vocab_size);
    batch.tokens[static_cast<std::size_t>(rows) - 1] = batch.tokens[0];  // one that occurs twice
    for (std::int64_t row = 0; row < rows; row += 1 + rng.below(3)) batch.loss_rows.push_back(row);
    batch.labels = random_tokens(rng, std::ssize(batch.loss_rows), c.vocab_size);
  }

  template <class S>
  [[nodiscard]] DeviceLossBatch<S> on_device(const ModelConfig& c,
                                             codegemm::cuda::DeviceArray<S>& memory) const {
    DeviceLossBatch<S> out;
    out.tokens = batch.tokens;
    out.labels = batch.labels;
    for (const std::int64_t row : batch.loss_rows) out.loss_rows.push_back(static_cast<std::int32_t>(row));
    const std::int64_t width = c.kv_size();
    std::vector<S> cache(static_cast<std::size_t>(c.layers * prefix_rows * 2 * width));
    std::int64_t first = 0;
    for (std::size_t i = 0; i < batch.segments.size(); ++i) {
      const Segment<double>& s = batch.segments[i];
      out.segments.push_back({s.count, s.prefix});
      for (std::int64_t layer = 0; layer < c.layers; ++layer) {
        for (std::int64_t t = 0; t < s.prefix; ++t) {
          S* const to = cache.data() + (layer * prefix_rows + first + t) * 2 * width;
          for (std::int64_t d = 0; d < width; ++d) {
            const auto from = static_cast<std::size_t>((layer * s.prefix + t) * width + d);
            to[d] = static_cast<S>(static_cast<float>(keys[i][from]));
            to[width + d] = static_cast<S>(static_cast<float>(values[i][from]));
          }
        }
      }
      first += s.prefix;
    }
    memory = codegemm::cuda::DeviceArray<S>::copy_of(cache).value();
    out.prefixes = {memory.data(), prefix_rows};
    return out;
  }
};

enum class Kind { kFull, kLowRank, kCodebooks };

template <class T>
[[nodiscard]] TrainableModel<T> trainable(const std::shared_ptr<const LlamaModel<DenseLinear>>& model,
                                          Kind kind) {
  if (kind == Kind::kFull) return TrainableModel<T>::full(model).value();
  if (kind == Kind::kCodebooks)
    return TrainableModel<T>::codebooks(model, random_matrices(*model, 77)).value();
  auto out = TrainableModel<T>::low_rank(model, LowRankOptions{11, 5.5, 3}).value();
  Rng rng(78);
  for (Parameter<T>& p : out.parameters()) {
    for (T& x : p.value.span()) x += static_cast<T>(0.1F * rng.normal());
  }
  return out;
}

/// The model with no weights in its blocks' linear layers but in that one.
[[nodiscard]] inline std::shared_ptr<const LlamaModel<DenseLinear>> without_weights(
    const LlamaModel<DenseLinear>& model, const std::string& but = {}) {
  const auto out = std::make_shared<LlamaModel<DenseLinear>>(model);
  for_each_linear(*out, [&](const std::string& name, DenseLinear& layer) {
    if (name == "lm_head" || name == but) return;
    layer = DenseLinear::without_weights(layer.rows(), layer.cols(),
                                         std::vector<float>(layer.bias().begin(), layer.bias().end()));
  });
  return out;
}

template <class S>
[[nodiscard]] std::shared_ptr<const DeviceFrozenWeights<S>> on_device(const LlamaModel<DenseLinear>& base,
                                                                      const Device& device,
                                                                      cudaStream_t stream) {
  auto made = DeviceFrozenWeights<S>::create(base, device, stream);
  require_ok(made.status());
  return std::make_shared<const DeviceFrozenWeights<S>>(std::move(made).value());
}

}  // namespace prefillshare::test
