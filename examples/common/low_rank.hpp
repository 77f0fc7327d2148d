// SPDX-License-Identifier: Apache-2.0
//
// common/low_rank.hpp - deltas of low rank, as training makes them and files keep them.
// Layer: examples (host only).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace prefillshare::examples {

/// What is added to one linear layer's weights: scale * B A.
struct LowRankDelta {
  std::string name;       // of the layer: "model.layers.3.mlp.up_proj"
  std::int64_t rank = 0;  //
  float scale = 1.0F;     // alpha / rank
  std::vector<float> a;   // [rank][K]
  std::vector<float> b;   // [N][rank]
};

}  // namespace prefillshare::examples
