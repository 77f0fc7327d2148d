// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/examples.cuh - training examples through passes on the GPU, each behind the base's
// cache of its prompt.
// Layer: train/cuda (host, needs nvcc and cuBLAS).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include <prefillshare/train/cuda/base.cuh>
#include <prefillshare/train/cuda/pass.cuh>
#include <prefillshare/train/examples.hpp>

namespace prefillshare::cuda {

/// A frozen base and the passes of modules that read its cache. One thread, one stream. S: TrainStorage.
template <TrainStorage S>
class DeviceExamples {
 public:
  /// For modules of config `c`, examples of up to `most` tokens, passes of pass_tokens rows. Errors of
  /// DeviceFrozenBase and DeviceTrainPass.
  [[nodiscard]] static Result<DeviceExamples> create(const ModelConfig& c,
                                                     std::shared_ptr<const DeviceFrozenWeights<S>> base,
                                                     std::int64_t most, std::int64_t pass_tokens,
                                                     Activations activations, const Device& device,
                                                     cudaStream_t stream) {
    const std::int64_t rows = std::max(pass_tokens, most);
    Result<DeviceFrozenBase<S>> frozen =
        DeviceFrozenBase<S>::create(std::move(base), most, rows, device, stream);
    if (!frozen.ok()) return frozen.status();
    Result<DeviceTrainPass<S>> pass = DeviceTrainPass<S>::create(c, rows, most, activations, device, stream);
    if (!pass.ok()) return pass.status();
    return DeviceExamples(*std::move(frozen), *std::move(pass), c, pass_tokens);
  }

  /// As DeviceTrainer's.
  void use_graphs(bool on) noexcept {
    base_.use_graphs(on);
    pass_.use_graphs(on);
  }

  /// Adds the gradients of scale * (the sum of losses) of examples[chosen] to the model's. Gives the losses
  /// of their target tokens, device memory until the next call, in the order of the examples in `visited`.
  /// Puts the work into the stream. Errors of DeviceFrozenBase::run() and DeviceTrainPass::run();
  /// kOutOfMemory.
  [[nodiscard]] Result<const float*> backward(DeviceTrainable<S>& model,
                                              std::span<const TrainingExample> examples,
                                              const std::vector<std::size_t>& chosen, double sharing,
                                              float scale, std::vector<std::size_t>& visited) {
    visited.clear();
    return for_passes(examples, chosen, sharing, &visited,
                      [&](float* losses) { return pass_.run(model, batch_, scale, losses); });
  }

  /// Mean loss of these weights over the target tokens, reading `sharing` of each prompt from the base;
  /// waits. kInvalidArgument with the number of an example that validate() refuses; others as backward().
  [[nodiscard]] Result<double> evaluate(const detail::DeviceWeightsView<S>& weights,
                                        std::span<const TrainingExample> examples, double sharing) {
    std::int64_t targets = 0;
    for (std::size_t i = 0; i < examples.size(); ++i) {
      if (Status s = prefillshare::validate(examples[i], pass_.max_context(), c_.vocab_size); !s.ok())
        return s.with_prefix(codegemm::concat("example ", i));
      targets += static_cast<std::int64_t>(examples[i].target.size());
    }
    if (targets == 0) return 0.0;
    try {
      std::vector<std::size_t> all(examples.size());
      std::iota(all.begin(), all.end(), std::size_t{0});
      const Result<const float*> done = for_passes(examples, all, sharing, nullptr, [&](float* losses) {
        return pass_.evaluate(weights, batch_, losses);
      });
      if (!done.ok()) return done.status();
      const Result<std::vector<float>> losses = download_losses(targets);
      if (!losses.ok()) return losses.status();
      double sum = 0.0;
      for (const float loss : *losses) sum += static_cast<double>(loss);
      return sum / static_cast<double>(targets);
    } catch (const std::bad_alloc&) {
      return codegemm::error(StatusCode::kOutOfMemory, "Trainer: no memory for ", examples.size(),
                             " examples");
    }
  }

  /// The first losses of the last call, on the host; waits. kCudaError.
  [[nodiscard]] Result<std::vector<float>> download_losses(std::int64_t count) {
    std::vector<float> out(static_cast<std::size_t>(count));
    detail::TrainStream& ts = train_stream();
    ts.copy(out.data(), losses_.data(), out.size() * sizeof(float), cudaMemcpyDeviceToHost);
    ts.synchronize();
    if (Status s = ts.take(); !s.ok()) return s;
    return out;
  }

  /// For DeviceTrainable and DeviceAdamW.
  [[nodiscard]] detail::TrainStream& train_stream() noexcept { return pass_.train_stream(); }

 private:
  DeviceExamples(DeviceFrozenBase<S> base, DeviceTrainPass<S> pass, const ModelConfig& c,
                 std::int64_t pass_tokens)
      : c_(c), pass_tokens_(pass_tokens), base_(std::move(base)), pass_(std::move(pass)) {}

  /// Calls body(where losses go) for each pass, with its examples in batch_ behind the base's cache.
  template <class Body>
  [[nodiscard]] Result<const float*> for_passes(std::span<const TrainingExample> examples,
                                                const std::vector<std::size_t>& chosen, double sharing,
                                                std::vector<std::size_t>* visited, Body&& body) {
    std::vector<std::int64_t> rows;
    std::int64_t targets = 0;
    rows.reserve(chosen.size());
    for (const std::size_t i : chosen) {
      rows.push_back(example_rows(examples[i], sharing));
      targets += static_cast<std::int64_t>(examples[i].target.size());
    }
    if (Status s = reserve_losses(targets); !s.ok()) return s;
    std::int64_t done = 0;
    for (const std::vector<std::size_t>& pack : pack_by_length(rows, pass_tokens_)) {
      batch_.clear();
      prompts_.clear();
      for (const std::size_t at : pack) {
        append(examples[chosen[at]], sharing);
        if (visited != nullptr) visited->push_back(chosen[at]);
      }
      const Result<DevicePrefixView<S>> prefixes = base_.run(prompts_);
      if (!prefixes.ok()) return prefixes.status();
      batch_.prefixes = *prefixes;
      if (Status s = body(losses_.data() + done); !s.ok()) return s;
      done += std::ssize(batch_.labels);
    }
    return static_cast<const float*>(losses_.data());
  }

  /// As append_example().
  void append(const TrainingExample& e, double sharing) {
    const std::int64_t prompt = std::ssize(e.prompt);
    const std::int64_t target = std::ssize(e.target);
    const std::int64_t shared = shared_tokens(prompt, sharing);
    const std::int64_t first = std::ssize(batch_.tokens);
    prompts_.emplace_back(e.prompt.data(), static_cast<std::size_t>(shared));
    batch_.segments.push_back({prompt - shared + target - 1, shared});
    batch_.tokens.insert(batch_.tokens.end(), e.prompt.begin() + shared, e.prompt.end());
    batch_.tokens.insert(batch_.tokens.end(), e.target.begin(), e.target.end() - 1);
    for (std::int64_t i = 0; i < target; ++i)
      batch_.loss_rows.push_back(static_cast<std::int32_t>(first + prompt - shared - 1 + i));
    batch_.labels.insert(batch_.labels.end(), e.target.begin(), e.target.end());
  }

  [[nodiscard]] Status reserve_losses(std::int64_t targets) {
    if (static_cast<std::int64_t>(losses_.size()) >= targets) return {};
    train_stream().synchronize();
    if (Status s = train_stream().take(); !s.ok()) return s;
    losses_ = {};
    detail::Allocations memory;
    memory.make(losses_, targets + targets / 2);
    return memory.finish();
  }

  ModelConfig c_;
  std::int64_t pass_tokens_ = 0;
  DeviceFrozenBase<S> base_;
  DeviceTrainPass<S> pass_;
  DeviceLossBatch<S> batch_;  // of the pass at hand
  std::vector<std::span<const std::int32_t>> prompts_;
  DeviceArray<float> losses_;
};

}  // namespace prefillshare::cuda
