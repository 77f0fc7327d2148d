// SPDX-License-Identifier: Apache-2.0
//
// common/chooser.hpp - greedy tokens for the calls of a server, by their ids.
// Layer: examples (host only).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <common/sampler.hpp>
#include <common/unwrap.hpp>

namespace prefillshare::examples {

/// Greedy, with the penalty that keeps a small model from repeating itself. Calls come one after the other: a
/// new id begins anew.
class GreedyChooser {
 public:
  [[nodiscard]] std::int32_t operator()(std::uint64_t id, std::span<float> logits) {
    if (id != id_) chosen_.clear();
    id_ = id;
    chosen_.push_back(unwrap(sampler_.sample(logits, chosen_)));
    return chosen_.back();
  }

 private:
  static SamplerOptions options() {
    SamplerOptions out;
    out.repetition_penalty = 1.1F;
    return out;
  }
  Sampler sampler_ = unwrap(Sampler::create(options()));
  std::uint64_t id_ = 0;
  std::vector<std::int32_t> chosen_;
};

}  // namespace prefillshare::examples
