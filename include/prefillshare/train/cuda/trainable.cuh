// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/trainable.cuh - what is trained of a model, on the device: fp32 parameters and
// gradients in one array each, and the weights that products read, made of them.
// Layer: train/cuda (host, needs nvcc).
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <prefillshare/train/cuda/composed.cuh>
#include <prefillshare/train/cuda/weights.cuh>
#include <prefillshare/train/trainable_model.hpp>

namespace prefillshare::cuda {

namespace detail {

/// Where a block's gradients are added; null where none is wanted. As DeviceBlockWeights.
struct DeviceBlockGradients {
  float* qkv_bias = nullptr;
  float* qkv = nullptr;
  float* o = nullptr;
  float* gate_up = nullptr;
  float* down = nullptr;
};

}  // namespace detail

/// The parameters of a TrainableModel on the device, of whichever kind. Parameters lie one after the other,
/// those that weight decay acts on first. S: TrainStorage.
template <TrainStorage S>
class DeviceTrainable {
 public:
  /// A copy of `model`'s parameters; its dense model is read too, but for the weights of layers of codes, and
  /// nothing is kept of either.
  /// kUnsupported as check_trainable(), kOutOfMemory, kCudaError.
  [[nodiscard]] static Result<DeviceTrainable> create(const TrainableModel<float>& model,
                                                      const Device& device, cudaStream_t stream) {
    const LlamaModel<DenseLinear>& source = *model.source();
    if (Status s = check_trainable(source); !s.ok()) return s;
    Result<detail::TrainStream> ts = detail::TrainStream::create(device, stream);
    if (!ts.ok()) return ts.status();
    DeviceTrainable out(source.config);
    if (Status s = out.place(model); !s.ok()) return s;
    if (Status s = out.allocate(source); !s.ok()) return s.with_prefix("DeviceTrainable");
    if (Status s = out.compose(model, *ts); !s.ok()) return s;
    if (Status s = out.upload(model, *ts); !s.ok()) return s;
    return out;
  }

  [[nodiscard]] const ModelConfig& config() const noexcept { return *config_; }  ///< of the model
  [[nodiscard]] std::int64_t size() const noexcept { return size_; }  ///< numbers in parameters and gradients
  /// Weight decay acts on so many of them, the first.
  [[nodiscard]] std::int64_t decayed() const noexcept { return decayed_; }
  [[nodiscard]] float* values() const noexcept { return values_.data(); }        ///< [size()], device memory
  [[nodiscard]] float* gradients() const noexcept { return gradients_.data(); }  ///< [size()], device memory
  /// Where the optimizer puts the first decayed() values in S, or null: then refresh() is to be called.
  [[nodiscard]] S* low() const noexcept { return full_ ? matrices_.data() : nullptr; }
  /// Where parameter i of the TrainableModel begins.
  [[nodiscard]] std::int64_t offset(std::size_t i) const { return offsets_[i]; }

  /// Takes the values of `model`, which has the same parameters, and waits. kCudaError.
  [[nodiscard]] Status upload(const TrainableModel<float>& model, detail::TrainStream& ts) {
    std::size_t i = 0;
    for (const Parameter<float>& p : model.parameters())
      ts.copy(values_.data() + offsets_[i++], p.value.data(), p.value.span().size_bytes(),
              cudaMemcpyHostToDevice);
    refresh(ts, true);
    ts.synchronize();
    return ts.take();
  }
  /// Gives the values to `model`, and waits. kCudaError.
  [[nodiscard]] Status download(TrainableModel<float>& model, detail::TrainStream& ts) const {
    std::size_t i = 0;
    for (Parameter<float>& p : model.parameters())
      ts.copy(p.value.data(), values_.data() + offsets_[i++], p.value.span().size_bytes(),
              cudaMemcpyDeviceToHost);
    ts.synchronize();
    return ts.take();
  }
  /// Gives the gradients to `model`, and waits. kCudaError.
  [[nodiscard]] Status download_gradients(TrainableModel<float>& model, detail::TrainStream& ts) const {
    std::size_t i = 0;
    for (Parameter<float>& p : model.parameters())
      ts.copy(p.gradient.data(), gradients_.data() + offsets_[i++], p.gradient.span().size_bytes(),
              cudaMemcpyDeviceToHost);
    ts.synchronize();
    return ts.take();
  }

  /// Gives the codes to `model`, which has the same layers of codes, and waits. kCudaError.
  [[nodiscard]] Status download_codes(TrainableModel<float>& model, detail::TrainStream& ts) const {
    for (std::size_t i = 0; i < code_names_.size(); ++i) {
      const detail::CodesTask& task = codes_.tasks()[i];
      std::vector<std::uint16_t> codes(static_cast<std::size_t>(task.rows) *
                                       static_cast<std::size_t>(task.m * (task.cols / task.v)));
      ts.copy(codes.data(), codes_.codes(i), codes.size() * sizeof(std::uint16_t), cudaMemcpyDeviceToHost);
      ts.synchronize();
      if (Status s = ts.take(); !s.ok()) return s;
      if (Status s = model.set_codes(code_names_[i], codes); !s.ok()) return s;
    }
    return {};
  }
  /// The layers of codes. After a change of codes, codes_changed() makes what is made of them.
  [[nodiscard]] const detail::CodesLayers& code_layers() const noexcept { return codes_; }

  /// What is not trained any more needs none. Nothing that writes them may be called then.
  void free_gradients() {
    gradients_ = {};
    composed_gradients_ = {};
  }

  // In the stream; failures are the stream's.

  /// Before each step.
  void zero_gradients(detail::TrainStream& ts) {
    ts.zero(gradients_.data(), gradients_.bytes());
    ts.zero(composed_gradients_.data(), composed_gradients_.bytes());
  }
  /// After a step's passes: the gradients of weights that are made of parameters go on to these.
  void collect(detail::TrainStream& ts) {
    low_rank_.pull_back(ts);
    codes_.pull_back(ts);
  }
  /// After an update: the weights that products read. With `all` also those that the optimizer writes.
  void refresh(detail::TrainStream& ts, bool all = false) {
    if (full_ && all) detail::round_to(ts, values_.data(), matrices_.data(), decayed_);
    low_rank_.template materialize<S>(ts);
    codes_.template materialize<S>(ts);
  }

  /// After codes were exchanged: which weights each centroid has, and the weights.
  void codes_changed(detail::TrainStream& ts) {
    codes_.list(ts);
    codes_.template materialize<S>(ts);
  }

  // What a pass reads and writes.

  /// Valid as long as this lives.
  [[nodiscard]] detail::DeviceWeightsView<S> view() const {
    return {config_.get(), matrices_.data(),
            norms_trained_ ? values_.data() + vectors_at_ : frozen_vectors_.data(),
            full_ ? values_.data() + biases_at_ : frozen_biases_.data()};
  }
  /// Null where the embedding is not trained.
  [[nodiscard]] float* embedding_gradient() const { return full_ ? gradients_.data() : nullptr; }
  /// Null where the head is not trained.
  [[nodiscard]] float* head_gradient() const {
    if (!full_ && !head_composed_) return nullptr;
    return matrix_gradients() + layout().head();
  }
  /// [vectors], null where norms are not trained: in the order of WeightsLayout.
  [[nodiscard]] float* vector_gradients() const {
    return norms_trained_ ? gradients_.data() + vectors_at_ : nullptr;
  }
  /// Matrices and bias of a block.
  [[nodiscard]] detail::DeviceBlockGradients block_gradients(std::int64_t i) const {
    const detail::WeightsLayout at = layout();
    detail::DeviceBlockGradients out;
    if (full_ && config_->attention_bias) out.qkv_bias = gradients_.data() + biases_at_ + at.bias(i);
    float* const base = matrix_gradients();
    out.qkv = base + at.linear(i, 0);
    out.o = base + at.linear(i, 3);
    out.gate_up = base + at.linear(i, 4);
    out.down = base + at.linear(i, 6);
    return out;
  }

 private:
  explicit DeviceTrainable(const ModelConfig& config) : config_(std::make_unique<ModelConfig>(config)) {}

  [[nodiscard]] detail::WeightsLayout layout() const { return detail::WeightsLayout(*config_); }
  /// As WeightsLayout has them; without what lies before the blocks where the embedding is not trained.
  [[nodiscard]] float* matrix_gradients() const {
    return full_ ? gradients_.data() : composed_gradients_.data() - layout().table();
  }

  /// Which parameter lies where.
  [[nodiscard]] Status place(const TrainableModel<float>& model) {
    const LlamaModel<DenseLinear>& source = *model.source();
    const detail::WeightsLayout at = layout();
    full_ = !model.parameters().empty() && model.parameters().front().name == "model.embed_tokens.weight";
    std::map<std::string, std::int64_t> fixed;  // of parameters that have a place of their own
    if (full_) {
      size_ = decayed_ = at.matrices();
      fixed["model.embed_tokens.weight"] = 0;
      vectors_at_ = size_;
      biases_at_ = vectors_at_ + at.vectors();
      size_ = biases_at_ + at.biases();
      at.for_each_matrix(source, [&](const std::string& name, const DenseLinear& layer, std::int64_t matrix,
                                     std::int64_t bias) {
        fixed[name + ".weight"] = matrix;
        if (!layer.bias().empty()) fixed[name + ".bias"] = biases_at_ + bias;
      });
    } else {
      for (const Parameter<float>& p : model.parameters()) {
        if (p.name.ends_with("norm.weight")) {
          norms_trained_ = true;
          continue;
        }
        fixed[p.name] = size_;
        size_ += (p.value.size() + 7) / 8 * 8;
        if (p.decay) decayed_ = size_;
      }
      vectors_at_ = size_;
      if (norms_trained_) size_ += at.vectors();
    }
    norms_trained_ = norms_trained_ || full_;
    if (norms_trained_) {
      at.for_each_vector(source,
                         [&](const std::string& name, const std::vector<float>&, std::int64_t offset) {
                           fixed[name + ".weight"] = vectors_at_ + offset;
                         });
    }
    for (const Parameter<float>& p : model.parameters()) {
      const auto found = fixed.find(p.name);
      if (found == fixed.end() || p.decay != (found->second < decayed_)) {
        return codegemm::error(StatusCode::kUnsupported, "DeviceTrainable: no place for parameter ", p.name);
      }
      offsets_.push_back(found->second);
    }
    return {};
  }

  [[nodiscard]] Status allocate(const LlamaModel<DenseLinear>& source) {
    const detail::WeightsLayout at = layout();
    detail::Allocations memory;
    memory.zeros(values_, size_);  // what lies between parameters stays zero
    memory.zeros(gradients_, size_);
    memory.make(matrices_, at.matrices());
    if (!full_) memory.zeros(composed_gradients_, at.matrices() - at.table());
    if (!norms_trained_) memory.copy<float>(frozen_vectors_, detail::merged_vectors(source));
    if (!full_) memory.copy<float>(frozen_biases_, detail::merged_biases(source));
    return memory.finish();
  }

  /// The layers that are made of parameters, and the weights of all others.
  [[nodiscard]] Status compose(const TrainableModel<float>& model, detail::TrainStream& ts) {
    if (full_) return {};
    const LlamaModel<DenseLinear>& source = *model.source();
    const detail::WeightsLayout at = layout();
    const std::map<std::string, codegemm::QuantizedMatrix> codes = model.matrices();
    std::set<std::string> coded;  // the dense model need not have these
    for (const auto& [name, matrix] : codes) coded.insert(name);
    DeviceArray<float> dense;
    detail::Allocations memory;
    memory.zeros(dense, at.matrices());
    if (Status s = memory.finish(); !s.ok()) return s.with_prefix("DeviceTrainable");
    if (Status s = detail::upload_matrices(source, dense.data(), {}, coded); !s.ok()) return s;
    detail::round_to(ts, dense.data(), matrices_.data(), at.matrices());
    ts.synchronize();
    if (Status s = ts.take(); !s.ok()) return s;

    std::map<std::string, std::size_t> number;
    for (const Parameter<float>& p : model.parameters()) number.emplace(p.name, number.size());
    Status status;
    bool keep_dense = false;
    at.for_each_matrix(
        source, [&](const std::string& name, const DenseLinear& layer, std::int64_t matrix, std::int64_t) {
          if (!status.ok()) return;
          const auto parameter = [&](const char* part) { return offsets_[number.at(name + part)]; };
          if (number.count(name + ".lora_A.weight") > 0) {
            detail::LowRankTask task;
            const std::int64_t a = parameter(".lora_A.weight");
            const std::int64_t b = parameter(".lora_B.weight");
            task.weight = dense.data() + matrix;
            task.a = values_.data() + a;
            task.b = values_.data() + b;
            task.out = matrices_.data() + matrix;
            task.dw = matrix_gradients() + matrix;
            task.da = gradients_.data() + a;
            task.db = gradients_.data() + b;
            task.scale = model.low_rank_scale();
            task.rows = static_cast<std::int32_t>(layer.rows());
            task.cols = static_cast<std::int32_t>(layer.cols());
            task.rank =
                static_cast<std::int32_t>(model.parameters()[number.at(name + ".lora_A.weight")].shape[0]);
            low_rank_.add(task);
            keep_dense = true;
          } else if (const auto found = codes.find(name); found != codes.end()) {
            detail::CodesTask task;
            const std::int64_t books = parameter(".codebooks");
            const std::int64_t scales = parameter(".scales");
            task.books = values_.data() + books;
            task.scales = values_.data() + scales;
            task.out = matrices_.data() + matrix;
            task.dw = matrix_gradients() + matrix;
            task.dscales = gradients_.data() + scales;
            status = codes_.add(task, found->second, gradients_.data() + books);
            code_names_.push_back(name);
            if (name == "lm_head") head_composed_ = true;
          }
        });
    if (!status.ok()) return status;
    if (keep_dense) dense_ = std::move(dense);
    if (Status s = low_rank_.upload(); !s.ok()) return s;
    if (Status s = codes_.upload(); !s.ok()) return s;
    codes_.list(ts);
    ts.synchronize();
    return ts.take();
  }

  std::unique_ptr<ModelConfig> config_;  // keeps its address
  bool full_ = false;                    // all weights are parameters
  bool norms_trained_ = false;
  bool head_composed_ = false;
  std::int64_t size_ = 0;
  std::int64_t decayed_ = 0;
  std::int64_t vectors_at_ = 0;
  std::int64_t biases_at_ = 0;
  std::vector<std::int64_t> offsets_;  // by parameter of the TrainableModel
  DeviceArray<float> values_;
  DeviceArray<float> gradients_;
  DeviceArray<S> matrices_;                // what products read
  DeviceArray<float> composed_gradients_;  // of matrices behind the embedding, where they are no parameters
  DeviceArray<float> frozen_vectors_;
  DeviceArray<float> frozen_biases_;
  DeviceArray<float> dense_;  // what deltas are added to
  detail::LowRankLayers low_rank_;
  detail::CodesLayers codes_;
  std::vector<std::string> code_names_;  // of their layers
};

}  // namespace prefillshare::cuda
