// SPDX-License-Identifier: Apache-2.0
//
// examples/common/layer_pace.hpp - how long the rest of a run over a model's layers takes.
#pragma once

#include <algorithm>
#include <cstdint>

namespace prefillshare::examples {

/// The time left is extrapolated from this run: a layer's own work by its cost, what lies between layers (the
/// model is run on the calibration text) by their number. Times are seconds since the run began.
class LayerPace {
 public:
  /// One layer more to do.
  void expect(double cost) {
    cost_left_ += cost;
    ++layers_left_;
  }
  /// The next layer was done by an earlier run.
  void found(double cost) { begun(cost); }
  /// Work on the next layer begins.
  void begin(double now, double cost) {
    between_ += now - last_;
    last_ = now;
    working_ = true;
    cost_ = cost;
    begun(cost);
  }
  /// It is done.
  void end(double now) {
    inside_ += now - last_;
    last_ = now;
    done_ += cost_;
    working_ = false;
  }

  /// Negative as long as no layer was done by this run: nothing is known then.
  [[nodiscard]] double seconds_left(double now) const {
    if (!(done_ > 0.0)) return -1.0;
    const double pace = inside_ / done_;
    const double of_this = working_ ? std::max(0.0, pace * cost_ - (now - last_)) : 0.0;
    return of_this + pace * std::max(0.0, cost_left_) +
           between_ / static_cast<double>(begun_) * static_cast<double>(layers_left_);
  }

 private:
  void begun(double cost) {
    cost_left_ -= cost;
    --layers_left_;
    ++begun_;
  }

  double cost_left_ = 0.0;  // of layers that are not begun
  std::int64_t layers_left_ = 0;
  std::int64_t begun_ = 0;  // found ones too: the model is run to them
  double last_ = 0.0;       // when a layer was begun or done
  bool working_ = false;
  double cost_ = 0.0;  // of the layer at hand
  double done_ = 0.0;  // cost that this run has done
  double inside_ = 0.0;
  double between_ = 0.0;
};

}  // namespace prefillshare::examples
