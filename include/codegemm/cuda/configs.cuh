// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/configs.cuh - all tile configurations of the GPU kernels: the one file to edit.
// Layer: cuda (host + device).
//
// A new row is tested and timed with no further edit: tests and benchmarks go over the same list as the
// dispatch. Members of a gather configuration:
//   kVecLen, kCodeBits  0: known at run time only (slower to build the Psumbook)
//   kCodebooks          m
//   kSets               columns that a lane owns in a granule, as PackedLayout::sets; a multiple of
//                       kCodebooks
//   kScaleSteps         log2 of the lanes that share a scale; 5: one scale a row; -1: known at run time only
//   kThreads            of a block
//   kMaxTokens          tokens in one pass over the weights; 32 KiB of shared memory for each set and token
#pragma once

#include <codegemm/base/config_list.hpp>

namespace codegemm::cuda {

struct GatherM1V4G128 {
  static constexpr int kVecLen = 4, kCodebooks = 1, kCodeBits = 8, kSets = 4, kScaleSteps = 3;
  static constexpr int kThreads = 1024, kMaxTokens = 1;
};
struct GatherM2V8G128 {
  static constexpr int kVecLen = 8, kCodebooks = 2, kCodeBits = 8, kSets = 4, kScaleSteps = 3;
  static constexpr int kThreads = 1024, kMaxTokens = 1;
};
struct GatherM1V4G32 {
  static constexpr int kVecLen = 4, kCodebooks = 1, kCodeBits = 8, kSets = 4, kScaleSteps = 1;
  static constexpr int kThreads = 1024, kMaxTokens = 1;
};

/// Any v, b and g.
template <int Codebooks, int Sets>
struct GatherAny {
  static constexpr int kVecLen = 0, kCodebooks = Codebooks, kCodeBits = 0, kSets = Sets, kScaleSteps = -1;
  static constexpr int kThreads = 512, kMaxTokens = 1;
};

/// Best first. A program that needs few formats passes a shorter list and compiles faster.
using GatherConfigs =
    config_list<GatherM1V4G128, GatherM2V8G128, GatherM1V4G32, GatherAny<1, 1>, GatherAny<1, 2>,
                GatherAny<1, 4>, GatherAny<2, 2>, GatherAny<2, 4>, GatherAny<3, 3>, GatherAny<4, 4>>;

}  // namespace codegemm::cuda
