// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/row_copy.cuh - what a gather block needs of the activations, by copies into shared
// memory.
// Layer: cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/intrinsics.cuh>
#include <codegemm/cuda/block/psumbook.cuh>
#include <codegemm/cuda/kernels/gather_args.cuh>

namespace codegemm::cuda::detail {

// The activations of a block's granules, of `Columns` each, come by a copy a token to where the block's first
// table will be; or the whole row that it normalizes, and behind it RMSNorm's weights of these granules.
// Loads would stand in a line behind those of the first tiles. One thread copies, and what it needs for that
// is in its registers before the kernel in front ends.
template <int Tokens, int Columns>
struct RowCopy {
  int first = 0;                        // column of the granules
  int room = 0;                         // columns from a token to the next
  const std::uint16_t* from = nullptr;  // the copying thread's
  unsigned bytes = 0;                   // of a token, the same

#if __CUDA_ARCH__ >= 900
  // One warp; the block, or its cluster, meets before wait().
  __device__ __forceinline__ void prepare(const GatherArgs& a, unsigned table, unsigned barrier) {
    if (!a.copies_row || threadIdx.x % 32 != 0) return;
    const auto columns = static_cast<unsigned>(min(room, a.cols - first));
    init_barrier(barrier, 1);
    publish_barriers();
    if (a.normed.x == nullptr) {
      from = a.x + first;
      bytes = columns * 2U;
      arrive_and_expect(barrier, bytes * Tokens);
    } else {
      from = reinterpret_cast<const std::uint16_t*>(a.normed.x);
      bytes = static_cast<unsigned>(a.cols) * 4U;
      arrive_and_expect(barrier, bytes + columns * 4U);
      copy_bulk(table + bytes, a.normed.weight + first, columns * 4U, barrier);
    }
    asm volatile("" : "+l"(from), "+r"(bytes));  // not later
  }
  __device__ __forceinline__ void start(const GatherArgs& a, unsigned table, unsigned barrier) const {
    if (!a.copies_row || threadIdx.x % 32 != 0) return;
#pragma unroll
    for (int t = 0; t < Tokens; ++t)
      copy_bulk(table + static_cast<unsigned>(t * room) * 2U, from + t * a.x_stride, bytes, barrier);
  }
  __device__ __forceinline__ void wait(const GatherArgs& a, unsigned barrier) const {
    if (a.copies_row) wait_for_phase(barrier, 0);
  }
#endif

  // Where the activations are, after wait().
  [[nodiscard]] __device__ __forceinline__ Activations token(const GatherArgs& a, const char* table,
                                                             int t) const {
    const std::uint16_t* const row = a.copies_row
                                         ? reinterpret_cast<const std::uint16_t*>(table) - first + t * room
                                         : a.x + t * a.x_stride;
    return Activations{row, a.cols, a.x_type == ScalarType::kBFloat16};
  }
  [[nodiscard]] __device__ __forceinline__ NormedRow normed(const GatherArgs& a, const char* table) const {
    NormedRow out = a.normed;
    if (a.copies_row) {
      out.x = reinterpret_cast<const float*>(table);
      out.weight = out.x + a.cols - first;
    }
    return out;
  }
};

// Of a block whose first granule this is; none for a Psumbook of another kind.
template <class Book, int Tokens, bool Half>
[[nodiscard]] __device__ __forceinline__ auto row_copy_of(const GatherArgs& a, int granule0) {
  if constexpr (Half) {
    RowCopy<Tokens, Book::kActivations> out;
    out.first = granule0 * Book::kActivations;
    out.room = a.granules_per_block * Book::kActivations;
    return out;
  } else {
    return 0;
  }
}

}  // namespace codegemm::cuda::detail
