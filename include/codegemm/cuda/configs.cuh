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
//   kPassTokens         tokens in one pass over the weights, 1 or 2; 32 KiB of shared memory for each set and
//                       token (kHalf: 16 KiB)
//   kHalf               (or none) true: the Psumbook is a HalfPsumbook, see there what it serves
// Up to how many tokens a regime is used lies in crossovers.hpp.
//
// The kernels of DefaultConfigs take nvcc minutes, in each file that calls gemm.cuh's functions. A program of
// several files may compile them once, side by side, as cmake/cuda_kernels/*.cu do: each includes a header of
// codegemm/cuda/regimes and instantiates its kernels, by CODEGEMM_GATHER_KERNELS() and so on. The other files
// define CODEGEMM_PRECOMPILED_CUDA and compile in seconds. Configurations that a program lists itself compile
// as ever. A new row of DefaultConfigs does, too, until it stands in the lists for the preprocessor as well.
#pragma once

#include <codegemm/base/config_list.hpp>

namespace codegemm::cuda {

/// Vectors of V weights, M codebooks of 256 centroids, one scale for 2^ScaleSteps lanes of four columns, or
/// for a row (5).
template <int V, int M, int ScaleSteps>
struct GatherTuned {
  /// @{ See the head of this file.
  static constexpr int kVecLen = V, kCodebooks = M, kCodeBits = 8, kSets = 4, kScaleSteps = ScaleSteps;
  static constexpr int kThreads = 1024, kPassTokens = 2;
  static constexpr bool kHalf = true;  /// @}
};
using GatherM1V4G128 = GatherTuned<4, 1, 3>;  ///< 8 lanes of 16 weights share a scale
using GatherM2V8G128 = GatherTuned<8, 2, 3>;  ///< 8 lanes of 16 weights share a scale
using GatherM1V4G32 = GatherTuned<4, 1, 1>;   ///< 2 lanes of 16 weights share a scale
using GatherM1V4Row = GatherTuned<4, 1, 5>;   ///< m1v4g-1
using GatherM2V8Row = GatherTuned<8, 2, 5>;   ///< m2v8g-1, AQLM's 2x8

/// Any v, b and g.
template <int Codebooks, int Sets>
struct GatherAny {
  /// @{ See the head of this file.
  static constexpr int kVecLen = 0, kCodebooks = Codebooks, kCodeBits = 0, kSets = Sets, kScaleSteps = -1;
  static constexpr int kThreads = 512, kPassTokens = 1;  /// @}
};

/// Best first. A program that needs few formats passes a shorter list and compiles faster.
using GatherConfigs = config_list<GatherM1V4G128, GatherM2V8G128, GatherM1V4G32, GatherM1V4Row, GatherM2V8Row,
                                  GatherAny<1, 1>, GatherAny<1, 2>, GatherAny<1, 4>, GatherAny<2, 2>,
                                  GatherAny<2, 4>, GatherAny<3, 3>, GatherAny<4, 4>>;

/// Members of a fused configuration, for mma.sync and wgmma alike:
///   kVecLen, kCodebooks, kSets  as above, v and m fixed; kSets / m * v is a multiple of 4
///   kCodeBytes   1, or 2 where b > 8: such codebooks stay in global memory
///   kScaleSteps  PackedLayout::scale_steps, or 0: any, slower. 1 is for wgmma alone: in mma.sync it would be
///                no faster than 0, which such a format needs beside it
template <int V, int M, int ScaleSteps, int Sets = 4>
struct Fused {
  /// @{ See above.
  static constexpr int kVecLen = V, kCodebooks = M, kCodeBytes = 1, kSets = Sets, kScaleSteps = ScaleSteps;
  /// @}
};
/// For codes of more than 8 bits, which take two bytes: at most two of a row in a lane.
template <int V, int Sets, int M = 1>
struct FusedWide {
  /// @{ See above.
  static constexpr int kVecLen = V, kCodebooks = M, kCodeBytes = 2, kSets = Sets, kScaleSteps = 0;  /// @}
};

using FusedM1V4G128 = Fused<4, 1, 3>;   ///< as GatherM1V4G128
using FusedM2V8G128 = Fused<8, 2, 3>;   ///< as GatherM2V8G128
using FusedM1V4G32 = Fused<4, 1, 1>;    ///< as GatherM1V4G32, wgmma alone
using FusedM1V4 = Fused<4, 1, 0>;       ///< any g
using FusedM2V8 = Fused<8, 2, 0>;       ///< any g
using FusedM1V8Wide = FusedWide<8, 2>;  ///< AQLM's 1x16

/// Best first; the formats of the paper, and AQLM's with codes of 16 bits.
using FusedConfigs =
    config_list<FusedM1V4G128, FusedM2V8G128, FusedM1V4G32, FusedM1V4, FusedM2V8, FusedM1V8Wide>;
/// The same but FusedM1V4G32 for the preprocessor: DO(WITH, each).
#define CODEGEMM_FUSED_CONFIGS(DO, WITH)                                                                     \
  DO(WITH, FusedM1V4G128)                                                                                    \
  DO(WITH, FusedM2V8G128)                                                                                    \
  DO(WITH, FusedM1V4)                                                                                        \
  DO(WITH, FusedM2V8)                                                                                        \
  DO(WITH, FusedM1V8Wide)

/// The rest of what a lane of packed weights can be with b <= 8: a program whose formats are among them puts
/// these into its list.
using MoreFusedConfigs =
    config_list<Fused<2, 1, 0>, Fused<2, 2, 0>, Fused<4, 2, 0>, Fused<4, 3, 0, 3>, Fused<4, 4, 0>,
                Fused<8, 1, 0, 2>, Fused<8, 3, 0, 3>, Fused<8, 4, 0>, Fused<16, 1, 0, 1>, Fused<16, 2, 0, 2>,
                Fused<16, 3, 0, 3>, Fused<16, 4, 0>>;

/// The same with 8 < b <= 16. Three codebooks and more, and two of v = 2, have no kernel: dequantize() serves
/// them.
using MoreWideConfigs = config_list<FusedWide<2, 2>, FusedWide<4, 2>, FusedWide<4, 2, 2>, FusedWide<8, 2, 2>,
                                    FusedWide<16, 1>, FusedWide<16, 2, 2>>;

/// What gemm.cuh dispatches over. A program that needs few formats passes a struct with shorter lists;
/// without kSwiGlu it has what is here.
struct DefaultConfigs {
  using Gather = GatherConfigs;  ///< for few tokens
  using Fused = FusedConfigs;    ///< for more
  /// Whether products may end in Activation::kSwiGlu. Without it half of the kernels are not compiled.
  static constexpr bool kSwiGlu = true;
};

}  // namespace codegemm::cuda
