// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/adamw.hpp - Adam with decoupled weight decay, and the learning rate over the steps.
// Layer: train (host only).
// See: Loshchilov and Hutter, Decoupled Weight Decay Regularization (arXiv 1711.05101), algorithm 2.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <span>
#include <vector>

#include <Eigen/Core>

#include <prefillshare/train/tensor.hpp>
#include <prefillshare/train/trainable_linear.hpp>

namespace prefillshare {

/// The numbers of Loshchilov and Hutter's AdamW.
struct AdamWOptions {
  double beta1 = 0.9;         ///< of the mean gradient
  double beta2 = 0.999;       ///< of the mean square
  double epsilon = 1e-8;      ///< added to the root
  double weight_decay = 0.1;  ///< of the learning rate; acts on matrices only
};

/// How the learning rate goes down.
enum class RateSchedule : std::uint8_t {
  kConstant,
  kCosine,  ///< falls to zero along half a cosine
};

/// The learning rate of step `step` (from 0) of `steps`, as a share of the highest: a linear warm-up over the
/// first `warmup` share of the steps, then the schedule.
[[nodiscard]] inline double rate_share(RateSchedule schedule, std::int64_t step, std::int64_t steps,
                                       double warmup) {
  const auto rising = static_cast<std::int64_t>(std::ceil(warmup * static_cast<double>(steps)));
  if (step < rising) return static_cast<double>(step + 1) / static_cast<double>(rising);
  if (schedule == RateSchedule::kConstant) return 1.0;
  const auto left = static_cast<double>(std::max<std::int64_t>(1, steps - rising));
  return 0.5 * (1.0 + std::cos(std::numbers::pi * static_cast<double>(step - rising) / left));
}

/// The optimizer's state: two moments of every parameter. Elementwise, so its bits do not depend on the
/// workers.
template <TrainScalar T>
class AdamW {
 public:
  /// Moments of zero for each of these parameters, in their order.
  explicit AdamW(const ParameterList<T>& parameters, const AdamWOptions& options = {}) : options_(options) {
    for (const Parameter<T>& p : parameters) {
      first_.emplace_back(p.value.size());
      second_.emplace_back(p.value.size());
    }
  }

  /// One update with the gradients that the parameters hold. `scales`, empty or one for each parameter,
  /// multiply the rate.
  void update(ParameterList<T>& parameters, double rate, std::span<const double> scales, Executor& executor) {
    ++steps_;
    const double correct1 = 1.0 - std::pow(options_.beta1, static_cast<double>(steps_));
    const double correct2 = 1.0 - std::pow(options_.beta2, static_cast<double>(steps_));
    const auto b1 = static_cast<T>(options_.beta1);
    const auto b2 = static_cast<T>(options_.beta2);
    const auto epsilon = static_cast<T>(options_.epsilon);
    const auto root = static_cast<T>(1.0 / std::sqrt(correct2));
    for (std::size_t i = 0; i < first_.size(); ++i) {
      Parameter<T>& p = parameters[i];
      const double own = scales.empty() ? rate : rate * scales[i];
      const auto size = static_cast<T>(own / correct1);
      const auto shrink = static_cast<T>(p.decay ? 1.0 - own * options_.weight_decay : 1.0);
      detail::for_elements(p.value.size(), executor, [&](std::int64_t at, std::int64_t count) {
        detail::TrainArray<T> value(p.value.data() + at, count);
        const detail::TrainConstArray<T> g(p.gradient.data() + at, count);
        detail::TrainArray<T> m(first_[i].data() + at, count);
        detail::TrainArray<T> v(second_[i].data() + at, count);
        m = m * b1 + g * (T{1} - b1);
        v = v * b2 + g.square() * (T{1} - b2);
        value = value * shrink - m * size / (v.sqrt() * root + epsilon);
      });
    }
  }

  /// Updates so far; what a resumed run sets back.
  [[nodiscard]] std::int64_t steps() const noexcept { return steps_; }
  void set_steps(std::int64_t steps) noexcept { steps_ = steps; }  ///< what steps() returns from now on
  /// The moments, parameter by parameter.
  [[nodiscard]] std::vector<Tensor<T>>& first() noexcept { return first_; }
  [[nodiscard]] std::vector<Tensor<T>>& second() noexcept { return second_; }  ///< mean squares

 private:
  AdamWOptions options_;
  std::int64_t steps_ = 0;
  std::vector<Tensor<T>> first_;
  std::vector<Tensor<T>> second_;
};

}  // namespace prefillshare
