// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/block/ahead.cuh - memory that a later kernel reads, asked for into the second-level cache.
// Layer: cuda/block (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/intrinsics.cuh>

namespace codegemm::cuda {

/// What a kernel that leaves the memory idle asks for in the meantime.
struct Ahead {
  const void* data = nullptr;  ///< at a multiple of 16 bytes
  std::uint32_t bytes = 0;     ///< a multiple of 16; 0: nothing
};

inline constexpr int kAheadBlocks = 64;  ///< that a kernel of few blocks adds to ask for it

namespace detail {

// This block's share, number `part` of `parts`. All threads; nothing is waited for.
__device__ __forceinline__ void ask_ahead(const Ahead& ahead, int part, int parts) {
  constexpr unsigned kPiece = 4096;
  const auto* const data = static_cast<const char*>(ahead.data);
  const unsigned step = static_cast<unsigned>(parts) * blockDim.x;
  for (unsigned i = static_cast<unsigned>(part) * blockDim.x + threadIdx.x;
       i < (ahead.bytes + kPiece - 1) / kPiece; i += step) {
    prefetch_l2(data + std::uint64_t{i} * kPiece, min(kPiece, ahead.bytes - i * kPiece));
  }
}

}  // namespace detail
}  // namespace codegemm::cuda
