// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/cuda/kernels/page_copy.cuh - copies scattered pages to scattered pages, in this GPU's
// memory or a peer's.
// Layer: serve/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <prefillshare/kv/block_pool.hpp>

namespace prefillshare::cuda {

inline constexpr int kPageCopyThreads = 512;
inline constexpr int kPageCopyWords = 4;    // of 16 bytes, that a thread has under way
inline constexpr int kPageCopyPages = 480;  // of a launch: numbers travel as arguments, below 4 KB

/// Everything that page_copy_kernel reads, by value. Page i of `from` at from + numbers[i] pages.
struct PageCopyArgs {
  const uint4* from = nullptr;
  uint4* to = nullptr;
  std::int64_t page_words = 0;  // of 16 bytes
  int pages = 0;
  BlockId from_pages[kPageCopyPages];
  BlockId to_pages[kPageCopyPages];
};

/// Few blocks with much under way each: the rest of the GPU goes on computing.
template <int>  // a template: one definition, however many files include this
__global__ void __launch_bounds__(kPageCopyThreads) page_copy_kernel(const __grid_constant__ PageCopyArgs a) {
  constexpr std::int64_t kTile = std::int64_t{kPageCopyThreads} * kPageCopyWords;
  const std::int64_t tiles = (a.page_words + kTile - 1) / kTile;  // of a page
  for (std::int64_t i = blockIdx.x; i < tiles * a.pages; i += gridDim.x) {
    const std::int64_t page = i / tiles;
    const std::int64_t at = (i - page * tiles) * kTile + threadIdx.x;
    const uint4* const from = a.from + a.from_pages[page] * a.page_words;
    uint4* const to = a.to + a.to_pages[page] * a.page_words;
    uint4 words[kPageCopyWords];
#pragma unroll
    for (int j = 0; j < kPageCopyWords; ++j) {
      if (at + j * kPageCopyThreads < a.page_words) words[j] = __ldcs(from + at + j * kPageCopyThreads);
    }
#pragma unroll
    for (int j = 0; j < kPageCopyWords; ++j) {
      if (at + j * kPageCopyThreads < a.page_words) __stcs(to + at + j * kPageCopyThreads, words[j]);
    }
  }
}

}  // namespace prefillshare::cuda
