// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/trainable_model.hpp - a decoder with parameters: all weights, low-rank deltas, or the
// codebooks, scales and norms of a quantized model.
// Layer: train (host only).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/quantize/additive.hpp>
#include <codegemm/quantized_matrix.hpp>
#include <prefillshare/model/dense_linear.hpp>
#include <prefillshare/model/llama.hpp>
#include <prefillshare/train/trainable_linear.hpp>

namespace prefillshare {

/// Deltas of low rank (LoRA) beside frozen weights.
struct LowRankOptions {
  std::int64_t rank = 8;   ///< of each delta
  double alpha = 16.0;     ///< the delta is alpha / rank * B A
  std::uint64_t seed = 1;  ///< of A; B is zero at first
};

/// What is trained of a model, in T. Made of a dense model, which it reads and never changes; dense() gives
/// the model with the parameters as they are. Blocks are materialized one at a time: what block() returns
/// is valid until the next call.
template <TrainScalar T>
class TrainableModel {
 public:
  /// All weights, norms and biases, and the embedding table. kOutOfMemory, and what validate() finds.
  [[nodiscard]] static Result<TrainableModel> full(std::shared_ptr<const LlamaModel<DenseLinear>> model) {
    return make(std::move(model), [](TrainableModel& out) {
      const LlamaModel<DenseLinear>& m = *out.model_;
      out.embedding_ = &out.add("model.embed_tokens.weight", *m.embedding,
                                {m.config.vocab_size, m.config.hidden_size}, true);
      for_each_linear(m, [&](const std::string& name, const DenseLinear& layer) {
        if (name == "lm_head" && m.config.tied_embeddings) return;
        out.linears_.push_back(TrainableLinear<T>::full(layer, name, out.parameters_));
      });
      out.add_norms();
      return Status();
    });
  }

  /// Deltas of rank options.rank on the seven linear layers of each block; all else stays. kInvalidArgument
  /// for a rank below 1 or above hidden_size.
  [[nodiscard]] static Result<TrainableModel> low_rank(std::shared_ptr<const LlamaModel<DenseLinear>> model,
                                                       const LowRankOptions& options) {
    return make(std::move(model), [&](TrainableModel& out) {
      const LlamaModel<DenseLinear>& m = *out.model_;
      if (options.rank < 1 || options.rank > m.config.hidden_size) {
        return error(StatusCode::kInvalidArgument, "TrainableModel: rank ", options.rank, ", must be in 1..",
                     m.config.hidden_size);
      }
      out.low_rank_scale_ = static_cast<T>(options.alpha / static_cast<double>(options.rank));
      codegemm::detail::SplitMix random(options.seed);
      for_each_linear(m, [&](const std::string& name, const DenseLinear& layer) {
        if (name == "lm_head") return;
        std::vector<float> a(static_cast<std::size_t>(options.rank * layer.cols()));
        const double bound = std::sqrt(3.0 / static_cast<double>(layer.cols()));
        for (float& x : a) x = static_cast<float>((2.0 * random.uniform() - 1.0) * bound);
        out.linears_.push_back(
            TrainableLinear<T>::low_rank(layer, name, options.rank, out.low_rank_scale_, a, out.parameters_));
      });
      out.set_plain();
      return Status();
    });
  }

  /// The quantized layers of `matrices` by their names ("model.layers.0.mlp.up_proj"), with their codebooks
  /// and scales as parameters, and all norms. Layers that are not among them, the embedding and biases stay
  /// as the dense model has them. kShapeMismatch names the layer; kNotFound for a name that the model lacks.
  [[nodiscard]] static Result<TrainableModel> codebooks(
      std::shared_ptr<const LlamaModel<DenseLinear>> model,
      const std::map<std::string, codegemm::QuantizedMatrix>& matrices) {
    return make(std::move(model), [&](TrainableModel& out) {
      std::size_t used = 0;
      Status wrong;
      for_each_linear(*out.model_, [&](const std::string& name, const DenseLinear& layer) {
        if (name == "lm_head" && out.model_->config.tied_embeddings) return;
        const auto at = matrices.find(name);
        if (at == matrices.end()) {
          out.linears_.emplace_back(layer);
          return;
        }
        ++used;
        const codegemm::QuantizedMatrix& q = at->second;
        if (q.rows() != layer.rows() || q.cols() != layer.cols()) {
          wrong = error(StatusCode::kShapeMismatch, name, " is ", layer.rows(), " x ", layer.cols(),
                        ", its quantized matrix ", q.rows(), " x ", q.cols());
          out.linears_.emplace_back(layer);
          return;
        }
        out.linears_.push_back(TrainableLinear<T>::codebooks(q, layer, name, out.parameters_));
      });
      if (wrong.ok() && used != matrices.size()) {
        wrong = error(StatusCode::kNotFound, "TrainableModel: ", matrices.size(), " quantized layers, only ",
                      used, " of them are names of the model's layers");
      }
      out.add_norms();
      out.set_plain();
      return wrong;
    });
  }

  [[nodiscard]] const ModelConfig& config() const noexcept { return model_->config; }  ///< of the model
  /// The dense model that it was made of, as it was.
  [[nodiscard]] const std::shared_ptr<const LlamaModel<DenseLinear>>& source() const noexcept {
    return model_;
  }
  /// Of deltas: alpha / rank; 0 where there are none.
  [[nodiscard]] T low_rank_scale() const noexcept { return low_rank_scale_; }
  [[nodiscard]] ParameterList<T>& parameters() noexcept { return parameters_; }  ///< all that is trained
  /// All that is trained.
  [[nodiscard]] const ParameterList<T>& parameters() const noexcept { return parameters_; }
  /// Numbers in parameters().
  [[nodiscard]] std::int64_t parameter_count() const noexcept {
    std::int64_t count = 0;
    for (const Parameter<T>& p : parameters_) count += p.value.size();
    return count;
  }
  /// Other codes, [N][m][K / v], for a quantized layer. kNotFound; kInvalidArgument for codes that it cannot
  /// have.
  [[nodiscard]] Status set_codes(const std::string& name, std::span<const std::uint16_t> codes) {
    Status out = error(StatusCode::kNotFound, "TrainableModel: no quantized layer ", name);
    std::size_t at = 0;
    for_each_linear(*model_, [&](const std::string& own, const DenseLinear&) {
      const std::size_t i = at++;
      if (own != name || i >= linears_.size() || linears_[i].codes() == nullptr) return;
      out = Status();
      if (!linears_[i].codes()->set_codes(codes))
        out = error(StatusCode::kInvalidArgument, "TrainableModel: ", codes.size(),
                    " codes are not those of ", name);
    });
    return out;
  }
  /// Before each step.
  void zero_gradients() noexcept {
    for (Parameter<T>& p : parameters_) p.gradient.zero();
  }

  // What a pass over the model asks for.

  /// [vocab][hidden]
  [[nodiscard]] const T* embedding() const noexcept {
    return embedding_ != nullptr ? embedding_->value.data() : frozen_embedding_.data();
  }
  /// Null where the embedding is not trained.
  [[nodiscard]] T* embedding_gradient() noexcept {
    return embedding_ != nullptr ? embedding_->gradient.data() : nullptr;
  }
  [[nodiscard]] const T* final_norm() const noexcept { return norm_value(final_norm_); }  ///< [hidden]
  /// [hidden], or null.
  [[nodiscard]] T* final_norm_gradient() noexcept { return norm_gradient(final_norm_); }

  /// The output layer's weights, [vocab][hidden].
  template <class Store = StoreExactly>
  [[nodiscard]] LinearWeights<T> head(detail::Products<T>& products, const Store& store = {}) {
    const ModelConfig& c = config();
    if (c.tied_embeddings) return {MatrixView<const T>(embedding(), c.vocab_size, c.hidden_size), nullptr};
    if (has_head()) return materialize(linears_.back(), head_scratch_, products, store);
    return {MatrixView<const T>(frozen_head_.data(), c.vocab_size, c.hidden_size), nullptr};
  }
  /// Where the output layer's gradients are added.
  [[nodiscard]] LinearGradients<T> head_gradients() {
    if (config().tied_embeddings) return {embedding_gradient(), nullptr};
    if (has_head()) return linears_.back().gradients(grown(head_gradient_, linears_.back()));
    return {};
  }
  /// After a pass: the output layer's gradients go on to its parameters.
  void collect_head(detail::Products<T>& products) {
    if (has_head()) linears_.back().pull_back(head_gradient_.data(), products);
  }

  /// The weights of one block; valid until the next block is asked for.
  template <class Store = StoreExactly>
  [[nodiscard]] BlockWeights<T> block(std::int64_t index, detail::Products<T>& products,
                                      const Store& store = {}) {
    BlockWeights<T> out;
    const Norms& norms = norms_[static_cast<std::size_t>(index)];
    out.input_norm = norm_value(norms[0]);
    out.post_attention_norm = norm_value(norms[1]);
    out.q_norm = norm_value(norms[2]);
    out.k_norm = norm_value(norms[3]);
    for (std::size_t i = 0; i < kBlockLinears; ++i)
      out.linears[i] = materialize(linear(index, i), scratch_[i], products, store);
    return out;
  }
  /// Where that block's gradients are added.
  [[nodiscard]] BlockGradients<T> block_gradients(std::int64_t index) {
    BlockGradients<T> out;
    Norms& norms = norms_[static_cast<std::size_t>(index)];
    out.input_norm = norm_gradient(norms[0]);
    out.post_attention_norm = norm_gradient(norms[1]);
    out.q_norm = norm_gradient(norms[2]);
    out.k_norm = norm_gradient(norms[3]);
    for (std::size_t i = 0; i < kBlockLinears; ++i) {
      TrainableLinear<T>& layer = linear(index, i);
      out.linears[i] = layer.gradients(grown(gradient_[i], layer));
    }
    return out;
  }
  /// Makes the parameters' gradients of what the backward pass added to block_gradients(index).
  void collect(std::int64_t index, detail::Products<T>& products) {
    for (std::size_t i = 0; i < kBlockLinears; ++i) linear(index, i).pull_back(gradient_[i].data(), products);
  }

  // What came out.

  /// The model with its parameters as they are, deltas merged, codes looked up. kOutOfMemory.
  [[nodiscard]] Result<std::shared_ptr<const LlamaModel<DenseLinear>>> dense(Executor& executor) const {
    try {
      detail::Products<T> products(executor);
      auto out = std::make_shared<LlamaModel<DenseLinear>>(*model_);
      const auto copy = [](const T* from, std::vector<float>& to) {
        for (std::size_t i = 0; i < to.size(); ++i) to[i] = static_cast<float>(from[i]);
      };
      if (embedding_ != nullptr) {
        auto table = std::make_shared<std::vector<float>>(out->embedding->size());
        copy(embedding(), *table);
        out->embedding = std::move(table);
      }
      copy(final_norm(), out->final_norm);
      for (std::size_t i = 0; i < out->layers.size(); ++i) {
        LlamaLayer<DenseLinear>& layer = out->layers[i];
        copy(norm_value(norms_[i][0]), layer.input_norm);
        copy(norm_value(norms_[i][1]), layer.post_attention_norm);
        copy(norm_value(norms_[i][2]), layer.q_norm);
        copy(norm_value(norms_[i][3]), layer.k_norm);
      }
      std::size_t at = 0;
      for_each_linear(*out, [&](const std::string&, DenseLinear& layer) {
        if (at < linears_.size()) layer = linears_[at].dense(products);
        ++at;
      });
      if (config().tied_embeddings)
        out->head = DenseLinear(out->embedding, config().vocab_size, config().hidden_size);
      return std::shared_ptr<const LlamaModel<DenseLinear>>(std::move(out));
    } catch (const std::bad_alloc&) {
      return error(StatusCode::kOutOfMemory, "TrainableModel: no memory for the dense model");
    }
  }

  /// The quantized layers with codebooks and scales as they are, in fp16, by name.
  [[nodiscard]] std::map<std::string, codegemm::QuantizedMatrix> matrices() const {
    std::map<std::string, codegemm::QuantizedMatrix> out;
    std::size_t at = 0;
    for_each_linear(*model_, [&](const std::string& name, const DenseLinear&) {
      if (at < linears_.size() && linears_[at].codes() != nullptr)
        out.emplace(name, linears_[at].codes()->matrix());
      ++at;
    });
    return out;
  }

 private:
  struct Norm {
    Tensor<T> frozen;
    Parameter<T>* trained = nullptr;
  };
  using Norms = std::array<Norm, 4>;  // input, post_attention, q, k

  TrainableModel() = default;

  template <class Fill>
  static Result<TrainableModel> make(std::shared_ptr<const LlamaModel<DenseLinear>>&& model, Fill&& fill) {
    if (model == nullptr) return error(StatusCode::kNullPointer, "TrainableModel: no model");
    if (Status s = validate(*model); !s.ok()) return s;
    try {
      TrainableModel out;
      out.model_ = std::move(model);
      out.norms_.resize(out.model_->layers.size());
      if (Status s = fill(out); !s.ok()) return s;
      return out;
    } catch (const std::bad_alloc&) {
      return error(StatusCode::kOutOfMemory, "TrainableModel: no memory for parameters and gradients");
    }
  }

  Parameter<T>& add(const std::string& name, const std::vector<float>& values,
                    std::vector<std::int64_t> shape, bool decay) {
    Parameter<T>& p = detail::add_parameter(parameters_, name, std::move(shape), decay);
    std::copy(values.begin(), values.end(), p.value.data());
    return p;
  }

  /// visit(name, values, where) for each norm that the model has.
  template <class Visit>
  void for_each_norm(Visit&& visit) {
    for (std::size_t i = 0; i < norms_.size(); ++i) {
      const LlamaLayer<DenseLinear>& layer = model_->layers[i];
      const std::string prefix = codegemm::concat("model.layers.", i, ".");
      visit(prefix + "input_layernorm.weight", layer.input_norm, norms_[i][0]);
      visit(prefix + "post_attention_layernorm.weight", layer.post_attention_norm, norms_[i][1]);
      if (layer.q_norm.empty()) continue;
      visit(prefix + "self_attn.q_norm.weight", layer.q_norm, norms_[i][2]);
      visit(prefix + "self_attn.k_norm.weight", layer.k_norm, norms_[i][3]);
    }
    visit(std::string("model.norm.weight"), model_->final_norm, final_norm_);
  }
  void add_norms() {
    for_each_norm([&](const std::string& name, const std::vector<float>& values, Norm& norm) {
      norm.trained = &add(name, values, {static_cast<std::int64_t>(values.size())}, false);
    });
  }

  /// Embedding, norms and head as the dense model has them, where they are no parameters.
  void set_plain() {
    frozen_embedding_ = detail::FrozenValues<T>(model_->embedding);
    if (!config().tied_embeddings && !has_head())
      frozen_head_ = detail::FrozenValues<T>(model_->head.shared_weights());
    for_each_norm([&](const std::string&, const std::vector<float>& values, Norm& norm) {
      if (norm.trained != nullptr) return;
      norm.frozen.resize(static_cast<std::int64_t>(values.size()));
      std::copy(values.begin(), values.end(), norm.frozen.data());
    });
  }

  static const T* norm_value(const Norm& norm) noexcept {
    if (norm.trained != nullptr) return norm.trained->value.data();
    return norm.frozen.empty() ? nullptr : norm.frozen.data();
  }
  static T* norm_gradient(Norm& norm) noexcept {
    return norm.trained != nullptr ? norm.trained->gradient.data() : nullptr;
  }

  [[nodiscard]] TrainableLinear<T>& linear(std::int64_t block, std::size_t i) {
    return linears_[static_cast<std::size_t>(block) * kBlockLinears + i];
  }
  [[nodiscard]] bool has_head() const noexcept { return linears_.size() % kBlockLinears == 1; }
  template <class Store>
  static LinearWeights<T> materialize(const TrainableLinear<T>& layer, Tensor<T>& scratch,
                                      detail::Products<T>& products, const Store& store) {
    const LinearWeights<T> out = layer.materialize(grown(scratch, layer), products);
    if (layer.composed()) store(scratch.data(), layer.rows() * layer.cols());
    return out;
  }
  static T* grown(Tensor<T>& scratch, const TrainableLinear<T>& layer) {
    const std::int64_t size = layer.composed() ? layer.rows() * layer.cols() : 0;
    if (scratch.size() < size) scratch.resize(size);
    return scratch.data();
  }

  std::shared_ptr<const LlamaModel<DenseLinear>> model_;
  ParameterList<T> parameters_;
  T low_rank_scale_{0};
  Parameter<T>* embedding_ = nullptr;
  detail::FrozenValues<T> frozen_embedding_;
  detail::FrozenValues<T> frozen_head_;
  std::vector<Norms> norms_;
  Norm final_norm_;
  std::vector<TrainableLinear<T>> linears_;  // seven a block, then the head unless it is tied or frozen
  std::array<Tensor<T>, kBlockLinears> scratch_;
  std::array<Tensor<T>, kBlockLinears> gradient_;
  Tensor<T> head_scratch_;
  Tensor<T> head_gradient_;
};

}  // namespace prefillshare
