// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/adamw.cuh - the end of a step on the GPU: the gradient's norm, a check that all is
// finite, and one update of all parameters.
// Layer: train/cuda (host, needs nvcc).
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>

#include <prefillshare/train/adamw.hpp>
#include <prefillshare/train/cuda/kernels/optimizer.cuh>
#include <prefillshare/train/cuda/trainable.cuh>

namespace prefillshare::cuda {

/// AdamW over all parameters of a DeviceTrainable. The same formula as AdamW, in fp32.
class DeviceAdamW {
 public:
  /// Moments of zero. kOutOfMemory, kCudaError.
  [[nodiscard]] static Result<DeviceAdamW> create(std::int64_t size, const AdamWOptions& options) {
    DeviceAdamW out(options);
    detail::Allocations memory;
    memory.zeros(out.first_, size);
    memory.zeros(out.second_, size);
    memory.make(out.parts_, detail::kSquareParts);
    memory.zeros(out.state_, 1);
    if (Status s = memory.finish(); !s.ok()) return s.with_prefix("DeviceAdamW");
    return out;
  }

  /// Puts one update into the stream: of nothing where a loss or the gradient is not finite. `clip`: highest
  /// norm of the gradient, 0: none. losses: those of the step, device memory. `shares`: what the rate of each
  /// four parameters is multiplied by, [size / 4], device memory; null: 1.
  template <TrainStorage S>
  void update(DeviceTrainable<S>& model, double rate, double clip, const float* losses,
              std::int64_t loss_count, detail::TrainStream& ts, const float* shares = nullptr) {
    detail::SquaresArgs squares;
    squares.values = model.gradients();
    squares.parts = parts_.data();
    squares.size = model.size();
    ts.start(detail::squares_kernel<0>, squares, detail::kSquareParts, detail::kOptimizerThreads);
    detail::FinishStepArgs finish;
    finish.parts = parts_.data();
    finish.losses = losses;
    finish.state = state_.data();
    finish.loss_count = loss_count;
    finish.count = detail::kSquareParts;
    finish.clip = clip;
    ts.start(detail::finish_step_kernel<0>, finish, 1, detail::kOptimizerThreads);
    ++steps_;
    const double correct1 = 1.0 - std::pow(options_.beta1, static_cast<double>(steps_));
    const double correct2 = 1.0 - std::pow(options_.beta2, static_cast<double>(steps_));
    detail::AdamWArgs args;
    args.values = model.values();
    args.gradients = model.gradients();
    args.first = first_.data();
    args.second = second_.data();
    args.low = model.low();
    args.state = state_.data();
    args.shares = shares;
    args.size = model.size();
    args.decayed = model.decayed();
    args.beta1 = static_cast<float>(options_.beta1);
    args.beta2 = static_cast<float>(options_.beta2);
    args.epsilon = static_cast<float>(options_.epsilon);
    args.root = static_cast<float>(1.0 / std::sqrt(correct2));
    args.rate = static_cast<float>(rate / correct1);
    args.shrink = static_cast<float>(1.0 - rate * options_.weight_decay);
    constexpr std::int64_t kBlock = 4 * detail::kOptimizerThreads;
    ts.start(detail::adamw_kernel<S>, args, (model.size() + kBlock - 1) / kBlock, detail::kOptimizerThreads);
    model.refresh(ts);
  }
  /// The last update changed nothing: it is not counted.
  void take_back() noexcept { --steps_; }

  [[nodiscard]] std::int64_t steps() const noexcept { return steps_; }   ///< updates so far
  void set_steps(std::int64_t steps) noexcept { steps_ = steps; }        ///< what steps() returns from now on
  [[nodiscard]] float* first() const noexcept { return first_.data(); }  ///< mean gradients, device memory
  [[nodiscard]] float* second() const noexcept { return second_.data(); }  ///< mean squares, device memory
  /// Of the last update, device memory.
  [[nodiscard]] const detail::StepState* state() const noexcept { return state_.data(); }

 private:
  explicit DeviceAdamW(const AdamWOptions& options) : options_(options) {}

  AdamWOptions options_;
  std::int64_t steps_ = 0;
  DeviceArray<float> first_;
  DeviceArray<float> second_;
  DeviceArray<double> parts_;
  DeviceArray<detail::StepState> state_;
};

}  // namespace prefillshare::cuda
