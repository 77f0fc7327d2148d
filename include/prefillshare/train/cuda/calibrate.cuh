// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/calibrate.cuh - runs a model over calibration tokens block by block on the GPU,
// while its linear layers are replaced.
// Layer: train/cuda (host, needs nvcc and cuBLAS).
// See: prefillshare/model/calibrate.hpp
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/quantize/cuda/corrected.cuh>
#include <prefillshare/model/calibrate.hpp>
#include <prefillshare/train/cuda/kernels/gram.cuh>
#include <prefillshare/train/cuda/pass.cuh>

namespace prefillshare::cuda {

/// CalibrationRun on the GPU, in fp32: the same order, the same H, C and corrected weights up to the order of
/// sums. A BlockFinisher is not asked. One thread, one stream.
class DeviceCalibrationRun {
 public:
  /// Sequences of up to context_length tokens, none empty, computed pass_tokens at once. `stream` must
  /// outlive it. `read` and errors as CalibrationRun::create(); kUnsupported as check_trainable();
  /// kCudaError.
  [[nodiscard]] static Result<DeviceCalibrationRun> create(
      std::shared_ptr<const LlamaModel<DenseLinear>> model,
      const std::vector<std::vector<std::int32_t>>& sequences, const CalibrationRunOptions& options,
      std::int64_t pass_tokens, const Device& device, cudaStream_t stream, BlockReader read = {}) {
    if (model == nullptr) return codegemm::error(StatusCode::kNullPointer, "DeviceCalibrationRun: no model");
    if (Status s = check_trainable(*model); !s.ok()) return s;
    const ModelConfig& c = model->config;
    if (sequences.empty())
      return codegemm::error(StatusCode::kInvalidArgument, "DeviceCalibrationRun: no sequences");
    std::int64_t longest = pass_tokens;
    for (const auto& tokens : sequences) {
      if (!tokens.empty() && std::ssize(tokens) <= c.context_length) {
        longest = std::max(longest, std::ssize(tokens));
        continue;
      }
      return codegemm::error(StatusCode::kInvalidArgument, "DeviceCalibrationRun: a sequence of ",
                             tokens.size(), " tokens, must be in 1..", c.context_length);
    }
    Result<DeviceTrainPass<float>> pass = DeviceTrainPass<float>::create(
        c, longest, std::min(longest, c.context_length), Activations::kRecomputed, device, stream);
    if (!pass.ok()) return pass.status();
    Result<codegemm::cuda::DeviceCorrection> correction =
        codegemm::cuda::DeviceCorrection::create(device, stream);
    if (!correction.ok()) return correction.status();
    try {
      DeviceCalibrationRun out(std::move(model), *std::move(pass), *std::move(correction), options);
      if (Status s = out.take(sequences, longest); !s.ok()) return s;
      out.read_ = std::move(read);
      return out;
    } catch (const std::bad_alloc&) {
      return codegemm::error(StatusCode::kOutOfMemory, "DeviceCalibrationRun: no memory for the tokens");
    }
  }

  /// Blocks replaced so far.
  [[nodiscard]] std::int64_t blocks_done() const noexcept { return done_; }

  /// As CalibrationRun::next_block(); kCudaError, after which the run cannot go on.
  template <LayerReplacer Replacer>
  [[nodiscard]] Status next_block(Replacer& replacer) {
    if (done_ >= model_->config.layers) {
      return codegemm::error(StatusCode::kInvalidArgument, "DeviceCalibrationRun: all ", done_,
                             " blocks are done");
    }
    try {
      return run_block(replacer);
    } catch (const std::bad_alloc&) {
      return codegemm::error(StatusCode::kOutOfMemory, "DeviceCalibrationRun: no memory for block ", done_);
    }
  }

 private:
  using Layer = LlamaLayer<DenseLinear>;
  enum Inputs : std::size_t { kQkv, kO, kGateUp, kDown };

  /// One block's weights in fp32, merged as products read them.
  struct Block {
    DeviceArray<float> matrices;  // qkv, o, gate_up, down
    DeviceArray<float> vectors;   // both norms, both head norms, bias of qkv
  };

  DeviceCalibrationRun(std::shared_ptr<const LlamaModel<DenseLinear>> model, DeviceTrainPass<float> pass,
                       codegemm::cuda::DeviceCorrection correction, const CalibrationRunOptions& options)
      : model_(std::move(model)),
        pass_(std::move(pass)),
        correction_(std::move(correction)),
        options_(options) {}

  [[nodiscard]] const ModelConfig& c() const noexcept { return model_->config; }
  [[nodiscard]] std::int64_t width(Inputs inputs) const {
    return inputs == kDown ? c().intermediate_size : inputs == kO ? c().q_size() : c().hidden_size;
  }

  [[nodiscard]] Status take(const std::vector<std::vector<std::int32_t>>& sequences, std::int64_t rows) {
    const auto h = static_cast<std::size_t>(c().hidden_size);
    std::vector<float> hidden;
    batches_.emplace_back();
    for (const auto& tokens : sequences) {
      for (const std::int32_t token : tokens) {
        if (token < 0 || token >= c().vocab_size) {
          return codegemm::error(StatusCode::kInvalidArgument, "DeviceCalibrationRun: token ", token,
                                 ", the vocabulary has ", c().vocab_size);
        }
        const float* const from = model_->embedding->data() + static_cast<std::size_t>(token) * h;
        hidden.insert(hidden.end(), from, from + h);
      }
      if (std::ssize(batches_.back().tokens) + std::ssize(tokens) > rows) batches_.emplace_back();
      DeviceLossBatch<float>& batch = batches_.back();
      batch.segments.push_back({std::ssize(tokens), 0});
      batch.tokens.insert(batch.tokens.end(), tokens.begin(), tokens.end());
      tokens_ += std::ssize(tokens);
    }
    const std::int64_t widest = std::max({c().intermediate_size, c().q_size(), c().hidden_size});
    const detail::WeightsLayout at(c());
    detail::Allocations memory;
    memory.copy<float>(hidden_, hidden);
    if (options_.correct) memory.copy<float>(dense_hidden_, hidden);
    for (Block* block : {&replaced_, &dense_}) {
      memory.make(block->matrices, at.block_size());
      memory.make(block->vectors, 2 * c().hidden_size + 2 * c().head_dim + at.qkv_width());
    }
    memory.make(inputs_, rows * widest);
    memory.make(gram_, widest * widest);
    memory.make(cross_, widest * widest);
    return memory.finish().with_prefix("DeviceCalibrationRun");
  }

  template <class Replacer>
  Status run_block(Replacer& replacer) {
    Layer layer;
    if (read_) {
      Result<Layer> block = read_(done_);
      if (!block.ok()) return block.status();
      layer = *std::move(block);
    } else {
      layer = model_->layers[static_cast<std::size_t>(done_)];
    }
    if (Status s = upload(layer, dense_); !s.ok()) return s;
    if (Status s = upload(layer, replaced_); !s.ok()) return s;
    const std::string prefix = codegemm::concat("model.layers.", done_, ".");
    const std::pair<Inputs, std::vector<std::pair<std::string, DenseLinear*>>> steps[] = {
        {kQkv,
         {{"self_attn.q_proj", &layer.q}, {"self_attn.k_proj", &layer.k}, {"self_attn.v_proj", &layer.v}}},
        {kO, {{"self_attn.o_proj", &layer.o}}},
        {kGateUp, {{"mlp.gate_proj", &layer.gate}, {"mlp.up_proj", &layer.up}}},
        {kDown, {{"mlp.down_proj", &layer.down}}}};
    for (const auto& [inputs, parts] : steps) {
      if (Status s = replace(inputs, prefix, parts, replacer); !s.ok()) return s;
      if (Status s = upload(layer, replaced_); !s.ok()) return s;
    }
    if (Status s = advance(replaced_, hidden_.data()); !s.ok()) return s;
    if (options_.correct) {
      if (Status s = advance(dense_, dense_hidden_.data()); !s.ok()) return s;
    }
    ++done_;
    return {};
  }

  template <class Replacer>
  Status replace(Inputs inputs, const std::string& prefix,
                 const std::vector<std::pair<std::string, DenseLinear*>>& parts, Replacer& replacer) {
    std::vector<std::optional<DenseLinear>> found;
    bool all = true;
    for (const auto& [name, linear] : parts) {
      Result<std::optional<DenseLinear>> replacement = replacer.find(prefix + name, *linear);
      if (!replacement.ok()) return replacement.status().with_prefix(prefix + name);
      all = all && replacement->has_value();
      found.push_back(*std::move(replacement));
    }
    std::vector<float> gram;
    if (!all) {
      if (Status s = measure(inputs, gram); !s.ok()) return s;
      if (options_.correct) {
        if (Status s =
                correction_.prepare(gram_.data(), cross_.data(), width(inputs), options_.correction_damping);
            !s.ok())
          return s.with_prefix(prefix + parts.front().first);
      }
    }
    for (std::size_t i = 0; i < parts.size(); ++i) {
      DenseLinear& linear = *parts[i].second;
      const std::string name = prefix + parts[i].first;
      if (!found[i].has_value()) {
        const std::int64_t k = linear.cols();
        const MatrixView<const float> view(gram.data(), k, k);
        DenseLinear target = linear;
        if (options_.correct) {
          Result<std::vector<float>> weights = corrected(inputs, i, linear);
          if (!weights.ok()) return weights.status().with_prefix(name);
          target = DenseLinear(std::make_shared<const std::vector<float>>(*std::move(weights)), linear.rows(),
                               k, std::vector<float>(linear.bias().begin(), linear.bias().end()));
        }
        Result<DenseLinear> made = replacer.make(name, target, view);
        if (!made.ok()) return made.status().with_prefix(name);
        found[i] = *std::move(made);
      }
      if (found[i]->rows() != linear.rows() || found[i]->cols() != linear.cols()) {
        return codegemm::error(StatusCode::kShapeMismatch, name, " is ", linear.rows(), " x ", linear.cols(),
                               ", its replacement ", found[i]->rows(), " x ", found[i]->cols());
      }
      linear = *std::move(found[i]);
    }
    return {};
  }

  /// Layer `part` of those with these inputs, after correction_.prepare().
  [[nodiscard]] Result<std::vector<float>> corrected(Inputs inputs, std::size_t part,
                                                     const DenseLinear& linear) {
    constexpr int kFirst[] = {0, 3, 4, 6};  // of a block's layers
    const detail::WeightsLayout at(c());
    const float* const weights =
        dense_.matrices.data() + at.linear(0, kFirst[inputs] + static_cast<int>(part)) - at.block(0);
    const std::int64_t size = linear.rows() * linear.cols();
    if (static_cast<std::int64_t>(corrected_.size()) < size) {
      detail::Allocations memory;
      memory.make(corrected_, size);
      if (Status s = memory.finish(); !s.ok()) return s;
    }
    if (Status s = correction_.correct(weights, linear.rows(), corrected_.data()); !s.ok()) return s;
    std::vector<float> out(static_cast<std::size_t>(size));
    detail::TrainStream& ts = pass_.train_stream();
    ts.copy(out.data(), corrected_.data(), out.size() * sizeof(float), cudaMemcpyDeviceToHost);
    ts.synchronize();
    if (Status s = ts.take(); !s.ok()) return s;
    return out;
  }

  [[nodiscard]] Status upload(const Layer& layer, Block& block) {
    detail::TrainStream& ts = pass_.train_stream();
    std::int64_t at = 0;
    for (const DenseLinear* linear :
         {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
      const std::int64_t size = linear->rows() * linear->cols();
      ts.copy(block.matrices.data() + at, linear->weights().data,
              static_cast<std::size_t>(size) * sizeof(float), cudaMemcpyHostToDevice);
      at += size;
    }
    std::vector<float> vectors;
    const auto add = [&](const auto& values, std::int64_t size) {
      vectors.insert(vectors.end(), values.begin(), values.end());
      vectors.resize(vectors.size() + static_cast<std::size_t>(size - std::ssize(values)));
    };
    add(layer.input_norm, c().hidden_size);
    add(layer.post_attention_norm, c().hidden_size);
    add(layer.q_norm, c().head_dim);
    add(layer.k_norm, c().head_dim);
    add(layer.q.bias(), c().q_size());
    add(layer.k.bias(), c().kv_size());
    add(layer.v.bias(), c().kv_size());
    ts.copy(block.vectors.data(), vectors.data(), vectors.size() * sizeof(float), cudaMemcpyHostToDevice);
    ts.synchronize();
    return ts.take();
  }
  [[nodiscard]] detail::DeviceBlockWeights<float> weights(const Block& block) const {
    const detail::WeightsLayout at(c());
    detail::DeviceBlockWeights<float> out;
    const float* const vectors = block.vectors.data();
    const std::int64_t h = c().hidden_size;
    out.input_norm = vectors;
    out.post_attention_norm = vectors + h;
    if (c().qk_norm) {
      out.q_norm = vectors + 2 * h;
      out.k_norm = vectors + 2 * h + c().head_dim;
    }
    if (c().attention_bias) out.qkv_bias = vectors + 2 * h + 2 * c().head_dim;
    out.qkv = block.matrices.data();
    out.o = out.qkv + at.linear(0, 3) - at.block(0);
    out.gate_up = out.qkv + at.linear(0, 4) - at.block(0);
    out.down = out.qkv + at.linear(0, 6) - at.block(0);
    return out;
  }
  [[nodiscard]] static const float* choose(const DeviceBlockInputs<float>& all, Inputs inputs) {
    const float* const of[] = {all.qkv, all.o, all.gate_up, all.down};
    return of[inputs];
  }

  /// H of the inputs that layers have now and, to correct weights, C with those of the dense model, means
  /// over the tokens: in gram_ and cross_, H on the host too.
  [[nodiscard]] Status measure(Inputs inputs, std::vector<float>& gram) {
    detail::TrainStream& ts = pass_.train_stream();
    const std::int64_t k = width(inputs);
    const auto bytes = static_cast<std::size_t>(k * k) * sizeof(float);
    ts.zero(gram_.data(), bytes);
    ts.zero(cross_.data(), bytes);
    std::int64_t first = 0;
    for (const DeviceLossBatch<float>& batch : batches_) {
      const std::int64_t rows = std::ssize(batch.tokens);
      const Result<DeviceBlockInputs<float>> now =
          pass_.run_block(weights(replaced_), batch, hidden_.data() + first * c().hidden_size);
      if (!now.ok()) return now.status();
      const float* const x = choose(*now, inputs);
      ts.tn(x, x, gram_.data(), rows, k, k);
      if (options_.correct) {
        ts.copy(inputs_.data(), x, static_cast<std::size_t>(rows * k) * sizeof(float),
                cudaMemcpyDeviceToDevice);
        const Result<DeviceBlockInputs<float>> dense =
            pass_.run_block(weights(dense_), batch, dense_hidden_.data() + first * c().hidden_size);
        if (!dense.ok()) return dense.status();
        ts.tn(choose(*dense, inputs), inputs_.data(), cross_.data(), rows, k, k);
      }
      first += rows;
    }
    gram.resize(static_cast<std::size_t>(k * k));
    detail::MeanGramArgs mean;
    mean.gram = gram_.data();
    mean.cross = cross_.data();
    mean.size = k;
    mean.scale = 1.0F / static_cast<float>(tokens_);
    ts.start(detail::mean_gram_kernel<0>, mean, (k * k + detail::kGramThreads - 1) / detail::kGramThreads,
             detail::kGramThreads);
    ts.copy(gram.data(), gram_.data(), bytes, cudaMemcpyDeviceToHost);
    ts.synchronize();
    return ts.take();
  }

  [[nodiscard]] Status advance(const Block& block, float* hidden) {
    detail::TrainStream& ts = pass_.train_stream();
    std::int64_t first = 0;
    for (const DeviceLossBatch<float>& batch : batches_) {
      float* const at = hidden + first * c().hidden_size;
      const Result<DeviceBlockInputs<float>> done = pass_.run_block(weights(block), batch, at);
      if (!done.ok()) return done.status();
      ts.copy(at, done->out, batch.tokens.size() * static_cast<std::size_t>(c().hidden_size) * sizeof(float),
              cudaMemcpyDeviceToDevice);
      first += std::ssize(batch.tokens);
    }
    ts.synchronize();
    return ts.take();
  }

  std::shared_ptr<const LlamaModel<DenseLinear>> model_;
  BlockReader read_;  // may be empty
  DeviceTrainPass<float> pass_;
  codegemm::cuda::DeviceCorrection correction_;
  CalibrationRunOptions options_;
  std::vector<DeviceLossBatch<float>> batches_;
  std::int64_t tokens_ = 0;
  std::int64_t done_ = 0;
  DeviceArray<float> hidden_;        // [tokens][hidden], behind the blocks replaced so far
  DeviceArray<float> dense_hidden_;  // the same of the dense model
  Block replaced_, dense_;
  DeviceArray<float> inputs_, gram_, cross_, corrected_;
};

}  // namespace prefillshare::cuda
