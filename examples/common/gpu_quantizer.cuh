// SPDX-License-Identifier: Apache-2.0
//
// common/gpu_quantizer.cuh - a model quantized, distilled and judged on a GPU.
// Layer: examples (host, needs nvcc and cuBLAS).
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <codegemm/quantize/cuda/calibrated.cuh>
#include <common/perplexity.hpp>
#include <common/text_quantizer.hpp>
#include <common/unwrap.hpp>
#include <prefillshare/train/cuda/calibrate.cuh>
#include <prefillshare/train/cuda/distiller.cuh>

namespace prefillshare::examples {

/// The first GPU and a stream. Throws UserError.
class GpuQuantizer {
 public:
  using Sequences = std::vector<std::vector<std::int32_t>>;
  using Model = LlamaModel<DenseLinear>;

  GpuQuantizer() : device_(unwrap(codegemm::cuda::query_device(0))) {
    cudaStream_t stream = nullptr;
    check(codegemm::cuda::cuda_status(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking),
                                      "cudaStreamCreate"));
    stream_.reset(stream);
    layers_ = std::make_unique<codegemm::cuda::DeviceQuantizer>(
        unwrap(codegemm::cuda::DeviceQuantizer::create(device_, stream)));
  }

  [[nodiscard]] const codegemm::cuda::Device& device() const noexcept { return device_; }

  /// For quantize_on_sequences(); valid as long as this lives.
  [[nodiscard]] QuantizeBackend backend() {
    QuantizeBackend out;
    out.name = "a GPU";
    out.quantize = [this](MatrixView<const float> weights, MatrixView<const float> gram,
                          codegemm::Format format, const codegemm::CalibratedOptions& options,
                          Executor& executor, codegemm::CalibratedReport* report) {
      return layers_->quantize_calibrated(weights, gram, format, options, executor, report);
    };
    out.calibrate = [this](const LoadedModel& loaded, const Sequences& sequences,
                           const CalibrationRunOptions& options, LayerQuantizer& quantizer, Executor&) {
      if (quantizer.finishes()) throw UserError("blocks are tuned on the host only");
      calibrate(loaded, sequences, options, quantizer, loaded.model->config.layers);
    };
    return out;
  }

  /// Runs the model's first `blocks` blocks on the sequences, their layers replaced.
  template <LayerReplacer Replacer>
  void calibrate(const LoadedModel& loaded, const Sequences& sequences, const CalibrationRunOptions& options,
                 Replacer& replacer, std::int64_t blocks) {
    auto run = unwrap(cuda::DeviceCalibrationRun::create(loaded.model, sequences, options, kPassTokens,
                                                         device_, stream_.get(), loaded.read_block));
    while (run.blocks_done() < blocks) check(run.next_block(replacer));
  }

  /// What distill() did, in nats a token on the sequences that it was judged by.
  struct Distilled {
    double before = 0.0;
    double after = 0.0;
    std::int64_t codes_moved = 0;
  };
  /// Trains codebooks, scales and norms, and codes where `moves` says so, on what `dense` says about
  /// `sequences`, and with a share of labels on what they say themselves, in bf16. `layers` becomes the
  /// result, its norms replaced.
  Distilled distill(const LoadedModel& dense, QuantizedLayers& layers, const Sequences& sequences,
                    const Sequences& judged, const TrainOptions& options, const cuda::CodeMoveOptions& moves,
                    double label_share, const std::function<void(const TrainProgress&)>& progress) {
    using S = __nv_bfloat16;
    std::map<std::string, codegemm::QuantizedMatrix> matrices;
    for (std::size_t i = 0; i < layers.names.size(); ++i)
      matrices.emplace(layers.names[i], std::move(layers.matrices[i]));
    auto student = unwrap(TrainableModel<float>::codebooks(dense.model, matrices));
    matrices.clear();  // the student has its own
    auto teacher = std::make_shared<const cuda::DeviceFrozenWeights<S>>(
        unwrap(cuda::DeviceFrozenWeights<S>::create(*dense.model, device_, stream_.get(), dense.read_block)));
    auto distiller =
        unwrap(cuda::DeviceDistiller<S>::create(student, std::move(teacher), sequences, options, device_,
                                                stream_.get(), cuda::Activations::kKept, moves, label_share));
    Distilled out;
    out.before = unwrap(distiller.divergence(judged));
    check(distiller.run(progress));
    out.after = unwrap(distiller.divergence(judged));
    out.codes_moved = distiller.codes_moved();
    matrices = student.matrices();
    for (std::size_t i = 0; i < layers.names.size(); ++i)
      layers.matrices[i] = std::move(matrices.at(layers.names[i]));
    for (const Parameter<float>& p : student.parameters()) {
      if (!p.name.ends_with("norm.weight")) continue;
      layers.norms[p.name].assign(p.value.span().begin(), p.value.span().end());
    }
    return out;
  }

  /// score_windows() in fp32 on the GPU.
  [[nodiscard]] PerplexitySums score(const LoadedModel& model, const Sequences& windows) {
    PerplexitySums sums;
    if (windows.empty()) return sums;
    const Frozen weights = upload(model);
    for (const std::vector<std::int32_t>& window : windows) {
      cuda::DeviceLossBatch<float> batch = second_half(window);
      for (const float loss : losses_of(weights, batch)) {
        sums.loss += static_cast<double>(loss);
        sums.squares += static_cast<double>(loss) * static_cast<double>(loss);
        ++sums.tokens;
      }
    }
    return sums;
  }
  /// How far the model's next-token distributions are from the dense one's where score() looks: the mean
  /// Kullback-Leibler divergence in nats, in fp32.
  [[nodiscard]] double divergence(const LoadedModel& model, const LoadedModel& dense,
                                  const Sequences& windows) {
    if (windows.empty()) return 0.0;
    const Frozen weights = upload(model);
    const Frozen teacher = upload(dense);
    auto hidden = unwrap(codegemm::cuda::DeviceArray<float>::create(
        windows.front().size() * static_cast<std::size_t>(weights.config().hidden_size)));
    double sum = 0.0;
    std::int64_t tokens = 0;
    for (const std::vector<std::int32_t>& window : windows) {
      cuda::DeviceLossBatch<float> batch = second_half(window);
      check(judge_of(weights.config(), std::ssize(window)).hidden(teacher.view(), batch, hidden.data()));
      batch.teacher = hidden.data();
      batch.teacher_head = teacher.view().head();
      for (const float loss : losses_of(weights, batch)) {
        sum += static_cast<double>(loss);
        ++tokens;
      }
    }
    return sum / static_cast<double>(tokens);
  }

  /// The dense model with its layers as their codes say, and their norms. Blocks are made when they are read;
  /// `layers` and the executor must outlive what is returned.
  [[nodiscard]] static LoadedModel with_layers(const LoadedModel& dense, const QuantizedLayers& layers,
                                               Executor& executor) {
    auto model = std::make_shared<Model>(*dense.model);
    const auto take = [&](const std::string& name, std::vector<float>& norm) {
      const auto found = layers.norms.find(name + ".weight");
      if (found != layers.norms.end()) norm = found->second;
    };
    for (std::size_t i = 0; i < model->layers.size(); ++i) {
      const std::string prefix = codegemm::concat("model.layers.", i, ".");
      take(prefix + "input_layernorm", model->layers[i].input_norm);
      take(prefix + "post_attention_layernorm", model->layers[i].post_attention_norm);
      take(prefix + "self_attn.q_norm", model->layers[i].q_norm);
      take(prefix + "self_attn.k_norm", model->layers[i].k_norm);
    }
    take("model.norm", model->final_norm);
    LoadedModel out;
    out.read_block = [model, &layers, &executor](std::int64_t index) -> Result<LlamaLayer<DenseLinear>> {
      LlamaLayer<DenseLinear> block = model->layers[static_cast<std::size_t>(index)];
      std::size_t at = static_cast<std::size_t>(index) * kBlockLinears;
      for (DenseLinear* layer : {&block.q, &block.k, &block.v, &block.o, &block.gate, &block.up, &block.down})
        *layer = dequantized(layers.matrices[at++], *layer, executor);
      return block;
    };
    out.model = std::move(model);
    return out;
  }

 private:
  static constexpr std::int64_t kPassTokens = 8192;

  using Frozen = cuda::DeviceFrozenWeights<float>;

  [[nodiscard]] Frozen upload(const LoadedModel& model) {
    return unwrap(Frozen::create(*model.model, device_, stream_.get(), model.read_block));
  }
  /// What predicts the tokens of a window's second half.
  [[nodiscard]] static cuda::DeviceLossBatch<float> second_half(const std::vector<std::int32_t>& window) {
    const auto length = std::ssize(window);
    cuda::DeviceLossBatch<float> batch;
    batch.tokens = window;
    batch.segments.push_back({length, 0});
    for (std::int64_t i = length / 2; i + 1 < length; ++i) {
      batch.loss_rows.push_back(static_cast<std::int32_t>(i));
      batch.labels.push_back(window[static_cast<std::size_t>(i + 1)]);
    }
    return batch;
  }
  /// A pass over windows of `length` tokens.
  [[nodiscard]] cuda::DeviceTrainPass<float>& judge_of(const ModelConfig& config, std::int64_t length) {
    if (judge_ == nullptr || judge_->max_rows() < length) {
      judge_ = nullptr;
      judge_ = std::make_unique<cuda::DeviceTrainPass<float>>(unwrap(cuda::DeviceTrainPass<float>::create(
          config, length, length, cuda::Activations::kRecomputed, device_, stream_.get())));
      losses_ = unwrap(codegemm::cuda::DeviceArray<float>::create(static_cast<std::size_t>(length)));
    }
    return *judge_;
  }
  /// Of each of the batch's labels; waits.
  [[nodiscard]] std::vector<float> losses_of(const Frozen& weights,
                                             const cuda::DeviceLossBatch<float>& batch) {
    auto& judge = judge_of(weights.config(), std::ssize(batch.tokens));
    check(judge.evaluate(weights.view(), batch, losses_.data()));
    std::vector<float> losses(batch.labels.size());
    auto& ts = judge.train_stream();
    ts.copy(losses.data(), losses_.data(), losses.size() * sizeof(float), cudaMemcpyDeviceToHost);
    ts.synchronize();
    check(ts.take());
    return losses;
  }

  struct DestroyStream {
    void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
  };

  codegemm::cuda::Device device_;
  std::unique_ptr<std::remove_pointer_t<cudaStream_t>, DestroyStream> stream_;
  std::unique_ptr<codegemm::cuda::DeviceQuantizer> layers_;
  std::unique_ptr<cuda::DeviceTrainPass<float>> judge_;  // of score() and divergence()
  codegemm::cuda::DeviceArray<float> losses_;
};

}  // namespace prefillshare::examples
