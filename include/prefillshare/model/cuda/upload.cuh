// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/upload.cuh - models in host memory to the device, a layer at a time.
// Layer: model/cuda (host, needs nvcc and cuBLAS).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include <codegemm/pack.hpp>
#include <prefillshare/model/cuda/dense_linear.cuh>
#include <prefillshare/model/cuda/llama.cuh>
#include <prefillshare/model/llama.hpp>

namespace prefillshare::cuda {

namespace detail {

[[nodiscard]] inline std::vector<float> merged_bias(std::span<const std::span<const float>> parts) {
  std::vector<float> out;
  for (const std::span<const float> part : parts) out.insert(out.end(), part.begin(), part.end());
  return out;
}

// An uploader that tells what is added to the residual stream from the rest: ParallelUploader.
template <class Uploader, class HostLinear>
concept SumsParts = requires(const Uploader& upload, std::span<const HostLinear* const> parts) {
  upload.summed(parts);
};

}  // namespace detail

/// Makes device layers out of dense ones. T: __half or __nv_bfloat16.
template <class T>
class DenseUploader {
 public:
  using Linear = DeviceDenseLinear<T>;  ///< what is made

  /// All layers that are made use this handle.
  explicit DenseUploader(std::shared_ptr<Cublas> cublas) : cublas_(std::move(cublas)) {}

  /// Merges `parts` along N: host layers with weights() of fp32 and bias(), as DenseLinear. Errors as
  /// DeviceDenseLinear::create().
  template <class HostLinear>
  [[nodiscard]] Result<Linear> operator()(std::span<const HostLinear* const> parts) const {
    std::vector<std::span<const float>> weights;
    std::vector<std::span<const float>> bias;
    std::int64_t rows = 0;
    for (const HostLinear* part : parts) {
      weights.emplace_back(part->weights().data, static_cast<std::size_t>(part->rows() * part->cols()));
      bias.push_back(part->bias());
      rows += part->rows();
    }
    auto on_device = detail::upload_rounded<T>(weights);
    if (!on_device.ok()) return on_device.status();
    return Linear::create(cublas_, std::make_shared<const DeviceArray<T>>(std::move(on_device).value()), rows,
                          parts[0]->cols(), detail::merged_bias(bias));
  }

 private:
  std::shared_ptr<Cublas> cublas_;
};

/// Makes device layers out of those of codes: the same codes, codebooks and scales.
template <class T, class Configs = codegemm::cuda::DefaultConfigs>
class CodeGemmUploader {
 public:
  using Linear = DeviceCodeGemmLinear<T, Configs>;  ///< what is made

  /// Merges `parts` along N: host layers with weights() packed for the CPU and bias(), as CodeGemmLinear.
  /// Rows of all but the last must be a multiple of 16. Errors as codegemm::unpack() and
  /// DeviceCodeGemmLinear::create().
  template <class HostLinear>
  [[nodiscard]] Result<Linear> operator()(std::span<const HostLinear* const> parts) const {
    std::vector<codegemm::QuantizedMatrix> canonical;
    std::vector<std::span<const float>> bias;
    for (const HostLinear* part : parts) {
      auto matrix = codegemm::unpack(part->weights());
      if (!matrix.ok()) return matrix.status();
      canonical.push_back(std::move(matrix).value());
      bias.push_back(part->bias());
    }
    std::vector<codegemm::QuantizedMatrixView> views;
    for (const codegemm::QuantizedMatrix& matrix : canonical) views.push_back(matrix.view());
    return Linear::create(views, detail::merged_bias(bias));
  }
};

/// Builds a DeviceLlama a layer at a time, so that a loader needs host memory for one layer only.
template <class Uploader, class HeadUploader = Uploader>
class DeviceLlamaBuilder {
 public:
  using Model = DeviceLlama<typename Uploader::Linear, typename HeadUploader::Linear>;  ///< what is built
  using Scalar = typename Model::Scalar;                                                ///< of activations

  /// Layers are made by `upload`, the head by `upload_head`.
  DeviceLlamaBuilder(const ModelConfig& config, Uploader upload, HeadUploader upload_head)
      : upload_(std::move(upload)), upload_head_(std::move(upload_head)) {
    model_.config = config;
  }

  /// embedding: [vocab][hidden]; final_norm: [hidden].
  [[nodiscard]] Status set_ends(std::span<const float> embedding, std::span<const float> final_norm) {
    auto table = detail::upload_rounded<Scalar>(std::span(&embedding, 1));
    if (!table.ok()) return table.status();
    model_.embedding = std::make_shared<const DeviceArray<Scalar>>(std::move(table).value());
    return copy(model_.final_norm, final_norm);
  }
  /// The next layer; `layer` may be freed then.
  template <class HostLinear>
  [[nodiscard]] Status add_layer(const LlamaLayer<HostLinear>& layer) {
    DeviceLlamaLayer<typename Uploader::Linear> out;
    if (Status s = copy(out.input_norm, layer.input_norm); !s.ok()) return s;
    if (Status s = copy(out.post_attention_norm, layer.post_attention_norm); !s.ok()) return s;
    if (Status s = copy(out.q_norm, layer.q_norm); !s.ok()) return s;
    if (Status s = copy(out.k_norm, layer.k_norm); !s.ok()) return s;
    const auto take = [&](auto& to, auto made) -> Status {
      if (!made.ok()) return made.status().with_prefix(codegemm::concat("layer ", model_.layers.size()));
      to = std::move(made).value();
      return {};
    };
    using Parts = std::span<const HostLinear* const>;
    const auto make = [&](auto& to, auto... parts) {
      const std::array<const HostLinear*, sizeof...(parts)> of = {parts...};
      return take(to, upload_(Parts(of)));
    };
    // What is added to the residual stream: where several GPUs have a part of it, their products are summed.
    const auto make_added = [&](auto& to, const HostLinear* part) {
      if constexpr (detail::SumsParts<Uploader, HostLinear>) {
        return take(to, upload_.summed(Parts(&part, 1)));
      } else {
        return take(to, upload_(Parts(&part, 1)));
      }
    };
    if (Status s = make(out.qkv, &layer.q, &layer.k, &layer.v); !s.ok()) return s;
    if (Status s = make_added(out.o, &layer.o); !s.ok()) return s;
    if (Status s = make(out.gate_up, &layer.gate, &layer.up); !s.ok()) return s;
    if (Status s = make_added(out.down, &layer.down); !s.ok()) return s;
    model_.layers.push_back(std::move(out));
    return {};
  }
  /// The head. A tied dense head shares the table: pass set_head(model.embedding) instead.
  template <class HostLinear>
  [[nodiscard]] Status add_head(const HostLinear& head) {
    const HostLinear* const one = &head;
    auto made = upload_head_(std::span<const HostLinear* const>(&one, 1));
    if (!made.ok()) return made.status().with_prefix("lm_head");
    model_.head = std::move(made).value();
    return {};
  }
  /// A head that is on the device already.
  void set_head(typename HeadUploader::Linear head) { model_.head = std::move(head); }
  /// The embedding table on the device, after set_ends().
  [[nodiscard]] const std::shared_ptr<const DeviceArray<Scalar>>& embedding() const noexcept {
    return model_.embedding;
  }

  /// The model, checked. The builder is empty then.
  [[nodiscard]] Result<std::shared_ptr<const Model>> finish() {
    auto frequencies = upload_rope(model_.config.rope);
    if (!frequencies.ok()) return frequencies.status();
    model_.rope_frequencies = std::move(frequencies).value();
    if (Status s = validate(model_); !s.ok()) return s;
    return std::shared_ptr<const Model>(std::make_shared<Model>(std::move(model_)));
  }

 private:
  [[nodiscard]] static Status copy(DeviceArray<float>& to, std::span<const float> from) {
    auto made = DeviceArray<float>::copy_of(from);
    if (!made.ok()) return made.status();
    to = std::move(made).value();
    return {};
  }

  Uploader upload_;
  HeadUploader upload_head_;
  Model model_;
};

/// A whole model from the host, each linear layer by `upload`, the head by `upload_head`.
template <class HostLinear, class Uploader, class HeadUploader>
[[nodiscard]] auto upload(const LlamaModel<HostLinear>& model, const Uploader& upload_layer,
                          const HeadUploader& upload_head)
    -> Result<std::shared_ptr<const typename DeviceLlamaBuilder<Uploader, HeadUploader>::Model>> {
  DeviceLlamaBuilder<Uploader, HeadUploader> builder(model.config, upload_layer, upload_head);
  if (Status s = builder.set_ends(*model.embedding, model.final_norm); !s.ok()) return s;
  for (const LlamaLayer<HostLinear>& layer : model.layers) {
    if (Status s = builder.add_layer(layer); !s.ok()) return s;
  }
  if (Status s = builder.add_head(model.head); !s.ok()) return s;
  return builder.finish();
}

}  // namespace prefillshare::cuda
