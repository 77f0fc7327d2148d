// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/device_step.cuh - one step of training on the GPU, whatever the loss is.
// Layer: train/cuda (host, needs nvcc and cuBLAS).
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <utility>

#include <cuda_runtime.h>

#include <prefillshare/train/cuda/adamw.cuh>
#include <prefillshare/train/cuda/train_stream.cuh>
#include <prefillshare/train/cuda/trainable.cuh>
#include <prefillshare/train/trainer.hpp>

namespace prefillshare::cuda::detail {

/// Steps of one run, and how fast they go.
class DeviceStepper {
 public:
  [[nodiscard]] static Result<DeviceStepper> create() {
    void* state = nullptr;
    const cudaError_t code = cudaMallocHost(&state, sizeof(StepState));
    if (code != cudaSuccess) static_cast<void>(cudaGetLastError());
    DeviceStepper out;
    out.state_.reset(static_cast<StepState*>(state));
    if (Status s = codegemm::cuda::cuda_status(code, "cudaMallocHost"); !s.ok()) return s;
    return out;
  }

  /// What a step came to.
  struct Outcome {
    TrainProgress progress;
    double loss = 0.0;    // summed over the targets
    bool finite = false;  // else the parameters are as before, and the step does not count
  };
  /// Gradients by passes(scale), which gives where the losses of all `targets` lie on the device; then an
  /// update; waits. `tokens` are those that the step read.
  template <TrainStorage S, class Passes>
  [[nodiscard]] Result<Outcome> take(DeviceTrainable<S>& weights, DeviceAdamW& optimizer,
                                     const TrainOptions& options, std::int64_t targets, std::int64_t tokens,
                                     TrainStream& ts, Passes&& passes, const float* shares = nullptr) {
    if (steps_ == 0) start_ = Clock::now();
    const std::int64_t number = optimizer.steps();
    weights.zero_gradients(ts);
    const Result<const float*> losses = passes(1.0F / static_cast<float>(targets));
    if (!losses.ok()) return losses.status();
    weights.collect(ts);
    Outcome out;
    out.progress.rate = options.rate * rate_share(options.schedule, number, options.steps, options.warmup);
    optimizer.update(weights, out.progress.rate, options.clip, *losses, targets, ts, shares);
    ts.copy(state_.get(), optimizer.state(), sizeof(StepState), cudaMemcpyDeviceToHost);
    ts.synchronize();
    if (Status s = ts.take(); !s.ok()) return s;
    out.loss = state_->loss;
    out.finite = state_->finite != 0;
    if (!out.finite) {
      optimizer.take_back();
      return out;
    }
    tokens_ += tokens;
    ++steps_;
    out.progress.step = number + 1;
    out.progress.steps = options.steps;
    out.progress.loss = out.loss / static_cast<double>(targets);
    const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
    out.progress.tokens_per_second = seconds > 0.0 ? static_cast<double>(tokens_) / seconds : 0.0;
    out.progress.seconds_left =
        seconds / static_cast<double>(steps_) * static_cast<double>(options.steps - out.progress.step);
    return out;
  }

 private:
  using Clock = std::chrono::steady_clock;
  struct FreeHost {
    void operator()(void* p) const { cudaFreeHost(p); }
  };

  DeviceStepper() = default;

  std::unique_ptr<StepState, FreeHost> state_;  // page-locked
  std::int64_t steps_ = 0;                      // of this run
  std::int64_t tokens_ = 0;
  Clock::time_point start_;
};

}  // namespace prefillshare::cuda::detail
