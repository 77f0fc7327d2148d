// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/block/half_layout.hpp - where a block keeps Psumbooks of fp16 numbers.
// Layer: cuda/block (host + device, no CUDA headers).
#pragma once

#include <cstddef>

namespace codegemm::cuda {

/// Activations that a HalfPsumbook covers.
inline constexpr int kHalfActivations = 512;
/// Bytes of a HalfPsumbook. It lies kWindowStart behind a multiple of that in the shared window: the byte of
/// a code and the byte of a lane are an address then, and what is to be added is part of the instruction.
inline constexpr std::size_t kHalfTableBytes = 65536;
/// What the system has of the shared window at most, before the block's own. There a block's first table
/// begins, then comes a second, then what else the block keeps.
inline constexpr std::size_t kWindowStart = 1024;
/// A granule's activations as HalfPsumbook::stage() leaves them.
inline constexpr std::size_t kHalfStagedBytes = 1296;
/// What a block keeps of a row that it normalizes: each warp's sum of squares.
inline constexpr std::size_t kSquaresBytes = 128;
/// The barrier of the copy of its activations, before these.
inline constexpr std::size_t kRowBarrierBytes = 16;

}  // namespace codegemm::cuda
