// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/trainer.cuh - fine-tunes a decode module on the base's cache, on the GPU.
// Layer: train/cuda (host, needs nvcc and cuBLAS).
// See: PrefillShare (arXiv 2602.12029) sections 3.2 and A; prefillshare/train/trainer.hpp
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <prefillshare/train/cuda/adamw.cuh>
#include <prefillshare/train/cuda/device_step.cuh>
#include <prefillshare/train/cuda/examples.cuh>
#include <prefillshare/train/trainer.hpp>

namespace prefillshare::cuda {

/// Trainer on the GPU: the same steps on the same examples, options and texts, with weights and activations
/// in S (__nv_bfloat16, or float to check it), and parameters, moments and sums in fp32. The TrainableModel
/// on the host gets the parameters in save() and download(); its state files are Trainer's, but name S,
/// since a run goes on to the same bits on the same card and storage only. One read back from the device a
/// step.
template <TrainStorage S>
class DeviceTrainer {
 public:
  /// Goes on from `model`, which must outlive the trainer, as must the stream. `base` may be shared by
  /// trainers. Errors as Trainer::create(); kUnsupported as check_trainable(); kCudaError.
  [[nodiscard]] static Result<DeviceTrainer> create(TrainableModel<float>& model,
                                                    std::shared_ptr<const DeviceFrozenWeights<S>> base,
                                                    std::vector<TrainingExample> examples,
                                                    const TrainOptions& options, const std::string& run,
                                                    const Device& device, cudaStream_t stream,
                                                    Activations activations = Activations::kKept) {
    if (base == nullptr) return codegemm::error(StatusCode::kNullPointer, "Trainer: no base");
    if (Status s = prefillshare::detail::check_train_options(options); !s.ok()) return s;
    if (Status s = check_compatible(base->config(), model.config()); !s.ok()) return s;
    const ModelConfig& c = model.config();
    const std::int64_t most = std::min({options.max_tokens, c.context_length, base->config().context_length});
    if (examples.empty()) return codegemm::error(StatusCode::kInvalidArgument, "Trainer: no examples");
    for (std::size_t i = 0; i < examples.size(); ++i) {
      if (Status s = prefillshare::validate(examples[i], most, c.vocab_size); !s.ok())
        return s.with_prefix(codegemm::concat("example ", i));
    }
    Result<DeviceExamples<S>> passes =
        DeviceExamples<S>::create(c, std::move(base), most, options.pass_tokens, activations, device, stream);
    if (!passes.ok()) return passes.status();
    Result<DeviceTrainable<S>> weights = DeviceTrainable<S>::create(model, device, stream);
    if (!weights.ok()) return weights.status();
    Result<DeviceAdamW> optimizer = DeviceAdamW::create(weights->size(), options.adam);
    if (!optimizer.ok()) return optimizer.status();
    Result<detail::DeviceStepper> stepper = detail::DeviceStepper::create();
    if (!stepper.ok()) return stepper.status();
    try {
      DeviceTrainer out(model, *std::move(passes), *std::move(weights), *std::move(optimizer),
                        *std::move(stepper), options);
      out.run_ = prefillshare::detail::run_of(run, examples, options) +
                 (std::is_same_v<S, float> ? ", on a GPU in fp32" : ", on a GPU in bf16");
      out.examples_ = std::move(examples);
      out.order_ =
          prefillshare::detail::ExampleOrder(static_cast<std::int64_t>(out.examples_.size()), options);
      return out;
    } catch (const std::bad_alloc&) {
      return codegemm::error(StatusCode::kOutOfMemory, "Trainer: no memory for the order of the examples");
    }
  }

  /// Off: passes are launched kernel by kernel and none is captured; the same bits. For trainers in several
  /// threads of a process: what one of them makes or frees (a cuBLAS handle waits for the whole device) may
  /// invalidate what another one captures at that moment. The card is kept busy by the others then.
  void use_graphs(bool on) noexcept { passes_.use_graphs(on); }

  /// Steps done, those of an earlier run included.
  [[nodiscard]] std::int64_t steps_done() const noexcept { return optimizer_.steps(); }
  [[nodiscard]] bool done() const noexcept { return steps_done() >= options_.steps; }  ///< all steps are done
  /// The weights on the device, as they are.
  [[nodiscard]] const DeviceTrainable<S>& weights() const noexcept { return weights_; }

  /// One step; waits for it. Errors as Trainer::step().
  [[nodiscard]] Result<TrainProgress> step() {
    const std::int64_t number = steps_done();
    if (done())
      return codegemm::error(StatusCode::kInvalidArgument, "Trainer: all ", number, " steps are done");
    try {
      const std::vector<std::size_t> chosen = order_.of_step(number);
      std::int64_t targets = 0;
      std::int64_t tokens = 0;
      for (const std::size_t i : chosen) {
        targets += static_cast<std::int64_t>(examples_[i].target.size());
        tokens += examples_[i].tokens();
      }
      const auto taken = stepper_.take(
          weights_, optimizer_, options_, targets, tokens, passes_.train_stream(), [&](float scale) {
            return passes_.backward(weights_, examples_, chosen, options_.sharing, scale, visited_);
          });
      if (!taken.ok()) return taken.status();
      if (!taken->finite) return what_is_not_finite(number, targets);
      return taken->progress;
    } catch (const std::bad_alloc&) {
      return codegemm::error(StatusCode::kOutOfMemory, "Trainer: no memory for a step of ", options_.batch,
                             " examples");
    }
  }

  /// All steps that are left, saving as Trainer::run() does.
  [[nodiscard]] Status run(const std::string& path, std::int64_t save_every,
                           const std::function<void(const TrainProgress&)>& progress = {}) {
    return prefillshare::detail::run_steps(*this, path, save_every, progress);
  }

  /// The parameters as they are, to the model on the host. kCudaError.
  [[nodiscard]] Status download() { return weights_.download(*model_, passes_.train_stream()); }

  /// All that a resumed run needs, as Trainer::save(); the model on the host has the parameters then.
  [[nodiscard]] Status save(const std::string& path) {
    try {
      AdamW<float> moments(model_->parameters(), options_.adam);
      if (Status s = download(); !s.ok()) return s;
      if (Status s = copy_moments(moments, cudaMemcpyDeviceToHost); !s.ok()) return s;
      moments.set_steps(optimizer_.steps());
      return save_state(path, run_, model_->parameters(), moments);
    } catch (const std::bad_alloc&) {
      return codegemm::error(StatusCode::kOutOfMemory, "Trainer: no memory for the state of ",
                             model_->parameter_count(), " parameters");
    }
  }
  /// Goes on from a saved state of the same run. Errors of load_state(), kCudaError.
  [[nodiscard]] Status load(const std::string& path) {
    try {
      AdamW<float> moments(model_->parameters(), options_.adam);
      if (Status s = load_state(path, run_, model_->parameters(), moments); !s.ok()) return s;
      if (Status s = weights_.upload(*model_, passes_.train_stream()); !s.ok()) return s;
      if (Status s = copy_moments(moments, cudaMemcpyHostToDevice); !s.ok()) return s;
      optimizer_.set_steps(moments.steps());
      return {};
    } catch (const std::bad_alloc&) {
      return codegemm::error(StatusCode::kOutOfMemory, "Trainer: no memory for the state of ",
                             model_->parameter_count(), " parameters");
    }
  }

  /// Mean loss over the target tokens of other examples, as Trainer::evaluate().
  [[nodiscard]] Result<double> evaluate(std::span<const TrainingExample> examples, double sharing) {
    return passes_.evaluate(weights_.view(), examples, sharing);
  }

  /// The weights without their gradients, to be used when the trainer is gone; nothing else may be called
  /// then.
  [[nodiscard]] DeviceTrainable<S> take_weights() {
    weights_.free_gradients();
    return std::move(weights_);
  }

 private:
  DeviceTrainer(TrainableModel<float>& model, DeviceExamples<S> passes, DeviceTrainable<S> weights,
                DeviceAdamW optimizer, detail::DeviceStepper stepper, const TrainOptions& options)
      : model_(&model),
        passes_(std::move(passes)),
        weights_(std::move(weights)),
        optimizer_(std::move(optimizer)),
        stepper_(std::move(stepper)),
        options_(options) {}

  /// Why a step was not taken, as Trainer::step() says it.
  [[nodiscard]] Status what_is_not_finite(std::int64_t number, std::int64_t targets) {
    const Result<std::vector<float>> losses = passes_.download_losses(targets);
    if (!losses.ok()) return losses.status();
    std::size_t at = 0;
    for (const std::size_t example : visited_) {
      for (std::size_t t = 0; t < examples_[example].target.size(); ++t, ++at) {
        if (std::isfinite((*losses)[at])) continue;
        return codegemm::error(StatusCode::kInvalidArgument, "the loss became ", (*losses)[at], " in step ",
                               number + 1, ", example ", example, ", target token ", t,
                               "; the parameters are those after ", number, " steps");
      }
    }
    std::vector<float> gradient;
    detail::TrainStream& ts = passes_.train_stream();
    std::size_t i = 0;
    for (const Parameter<float>& p : model_->parameters()) {
      gradient.resize(static_cast<std::size_t>(p.value.size()));
      ts.copy(gradient.data(), weights_.gradients() + weights_.offset(i++), gradient.size() * sizeof(float),
              cudaMemcpyDeviceToHost);
      ts.synchronize();
      if (Status s = ts.take(); !s.ok()) return s;
      double sum = 0.0;
      for (const float g : gradient) sum += static_cast<double>(g) * static_cast<double>(g);
      if (std::isfinite(sum)) continue;
      return codegemm::error(StatusCode::kInvalidArgument, "the gradient of ", p.name,
                             " is not finite in step ", number + 1, "; the parameters are those after ",
                             number, " steps");
    }
    return codegemm::error(StatusCode::kInvalidArgument, "the gradient is not finite in step ", number + 1,
                           "; the parameters are those after ", number, " steps");
  }

  [[nodiscard]] Status copy_moments(AdamW<float>& host, cudaMemcpyKind kind) {
    detail::TrainStream& ts = passes_.train_stream();
    for (std::size_t i = 0; i < model_->parameters().size(); ++i) {
      const auto copy = [&](Tensor<float>& on_host, float* on_device) {
        float* const there = on_device + weights_.offset(i);
        if (kind == cudaMemcpyDeviceToHost) {
          ts.copy(on_host.data(), there, on_host.span().size_bytes(), kind);
        } else {
          ts.copy(there, on_host.data(), on_host.span().size_bytes(), kind);
        }
      };
      copy(host.first()[i], optimizer_.first());
      copy(host.second()[i], optimizer_.second());
    }
    ts.synchronize();
    return ts.take();
  }

  TrainableModel<float>* model_;
  DeviceExamples<S> passes_;
  DeviceTrainable<S> weights_;
  DeviceAdamW optimizer_;
  detail::DeviceStepper stepper_;
  TrainOptions options_;
  std::string run_;
  std::vector<TrainingExample> examples_;
  prefillshare::detail::ExampleOrder order_;
  std::vector<std::size_t> visited_;  // examples of the step in the order of their losses
};

}  // namespace prefillshare::cuda
