// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/tuning.hpp - what a call may tune, and the measured crossover of the two
// decode paths.
// Layer: attention (host only, no CUDA headers).
#pragma once

#include <cstdint>

namespace prefillshare::cuda {

/// Which way decode() takes for sequences that share their first pages.
enum class SharedPath {
  kAuto,    ///< by the crossover below, for each group of sequences by itself
  kAlways,  ///< whatever the sizes
  kNever,   ///< every sequence reads all of its pages
};

/// The crossover, measured on an H200 by the suite kv-gpu with 2 to 64 sequences of 4 and 8 query heads a K/V
/// head: from here on sharing gains; below, it costs up to four tenths or gains less than half.
inline constexpr int kMinSharedSequences = 2;
/// The same for the tokens they share.
inline constexpr int kMinSharedTokens = 2048;

/// Choices of one call; the defaults fit an H200.
struct DecodeTuning {
  SharedPath shared = SharedPath::kAuto;           ///< which way
  int min_shared_sequences = kMinSharedSequences;  ///< for kAuto
  int min_shared_tokens = kMinSharedTokens;        ///< for kAuto
  int min_tiles = 2;  ///< tiles of 64 keys that a block gets at least, 1 to 1024: fewer parts to merge
  /// Time of a shared tile with more than 64 query rows, in percent of other tiles', 100 to 1000.
  int many_rows_cost = 130;
  /// Time that each sequence's own keys take of a head beside their tiles', the same way, 0 to 1000; where
  /// there are shared ones beside them.
  int tail_item_cost = 100;
  int lanes = 0;  ///< K/V heads read side by side, a divisor of all of them; 0: chosen
};

/// Which kernel prefill takes.
enum class PrefillKernel {
  kAuto,   ///< kWgmma on compute capability 9.0, kMma elsewhere
  kMma,    ///< mma.sync, compute capability 8.0 and above
  kWgmma,  ///< wgmma, compute capability 9.0 alone
};

/// Choices of one call.
struct PrefillTuning {
  PrefillKernel kernel = PrefillKernel::kAuto;  ///< which one
};

}  // namespace prefillshare::cuda
