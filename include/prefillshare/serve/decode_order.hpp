// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/decode_order.hpp - whose weights a decode step reads, where several modules have answers
// under way.
// Layer: serve (host only).
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace prefillshare {

/// The module with the most answers under way, for BasicDecodeWorker::step_module(). A step takes about as
/// long for many answers as for one, since it reads all weights of its module; while one module is served,
/// answers of the others gather for a step that is worth more. Who had the last step keeps its turn until
/// another module has more than `hold` answers more: between equals turn and turn about would end all of them
/// late, and what follows would hang on who was first by a hair. Every step that a module has waited counts
/// as `patience` answers, so that each has its turn.
class LargestBatchFirst {
 public:
  /// patience: 0 lets a lone answer wait for as long as others have more.
  explicit LargestBatchFirst(double patience = 0.002, double hold = 2.0) : patience_(patience), hold_(hold) {}

  /// active: the answers of each module, as BasicDecodeWorker::active() tells. Whose step is next;
  /// active.size() where there are none.
  [[nodiscard]] std::size_t next(std::span<const std::int64_t> active) {
    waited_.resize(active.size(), 0.0);
    std::size_t best = active.size();
    double most = 0.0;
    for (std::size_t module = 0; module < active.size(); ++module) {
      if (active[module] == 0) {
        waited_[module] = 0.0;
        continue;
      }
      const double worth =
          static_cast<double>(active[module]) + patience_ * waited_[module] + (module == last_ ? hold_ : 0.0);
      waited_[module] += 1.0;
      if (worth <= most) continue;
      most = worth;
      best = module;
    }
    if (best < active.size()) waited_[best] = 0.0;
    last_ = best;
    return best;
  }

 private:
  double patience_;
  double hold_;
  std::size_t last_ = std::numeric_limits<std::size_t>::max();  // whose step was the last one
  std::vector<double> waited_;  // steps since the module had one, or nothing to do
};

}  // namespace prefillshare
