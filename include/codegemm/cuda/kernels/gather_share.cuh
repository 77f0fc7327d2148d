// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/gather_share.cuh - what becomes of the sums of a gather block's rows.
// Layer: cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/kernels/gather_args.cuh>
#include <codegemm/cuda/kernels/output.cuh>

namespace codegemm::cuda::detail {

// The rows that a block ends with: of a cluster those whose sums were pushed to it, else all of its own.
template <class Config, int Tokens, bool Cluster>
struct GatherShare {
  const GatherArgs& a;
  char* table;            // the block's shared memory, see GatherArgs
  const float* row_sums;  // without a cluster
  int tile0;
  int tiles;
  int half;  // of SwiGLU's
  int rank;
  int ranks;
  int splits;
  bool gated;  // SwiGLU
  int size;    // some of these rows do not exist

  // Row i of the share, or -1; with SwiGLU these are of the first half.
  [[nodiscard]] __device__ __forceinline__ int row_of(int i) const {
    constexpr int kWarps = Config::kThreads / 32;
    const int first_row = (tile0 - half * a.rows.half_tiles) * 16;
    if constexpr (Cluster) {
      const int slot = static_cast<int>(static_cast<unsigned>(i) / 16U);
      const int turn = static_cast<int>(static_cast<unsigned>(slot) * a.most_inverse >> 16);  // slot / most
      const int w = rank + turn * ranks;
      const int index = w + (slot - turn * a.most) * kWarps;
      return w < kWarps && index < tiles ? first_row + index * 16 + (i & 15) : -1;
    } else {
      return first_row + i;
    }
  }

  // Calls fn(token, row, sum, sum of the row's partner) for all rows of it.
  template <class Fn>
  __device__ __forceinline__ void for_each(Fn&& fn) const {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < size; i += Config::kThreads) {
      const int row = row_of(i);
      if (row < 0) continue;
#pragma unroll
      for (int t = 0; t < Tokens; ++t) {
        float sum = 0.0F;
        float partner = 0.0F;
        if constexpr (Cluster) {
          const float* const pushed = reinterpret_cast<const float*>(table + a.pushed_at) + i;
          float of[kMostRanks];  // on their way together
#pragma unroll
          for (int s = 0; s < kMostRanks; ++s)
            of[s] = s < ranks ? pushed[(s * Tokens + t) * a.slots * 16] : 0.0F;
#pragma unroll
          for (int s = 0; s < kMostRanks; ++s) {
            if (s < splits) {
              sum += of[s];
            } else {
              partner += of[s];
            }
          }
        } else {
          sum = row_sums[t * a.rows.tiles_per_block * 16 + i];
        }
        fn(t, row, sum, partner);
      }
    }
  }

  // All sums are there. With several groups each block writes its own to `partials`, and the last to come, by
  // `counters`, adds them up.
  __device__ __forceinline__ void finish(const Output& out) const {
    const auto store = [&](int t, int row, float sum, float partner) {
      if (gated) {
        store_gated(out, t, row, sum, partner);
      } else if (row < out.rows) {
        store_output(out, t, row, sum);
      }
    };
    const int groups = static_cast<int>(gridDim.z);
    if (groups == 1) {
      for_each(store);
      return;
    }
    const std::int64_t padded_rows = static_cast<std::int64_t>(a.row_tiles) * 16;
    for_each([&](int t, int row, float sum, float partner) {
      float* const to = a.partials + (static_cast<std::int64_t>(blockIdx.z) * Tokens + t) * padded_rows + row;
      *to = sum;
      if (gated) to[a.out.half_rows] = partner;
    });
    __threadfence();
    __syncthreads();
    unsigned& arrived = *reinterpret_cast<unsigned*>(table);  // nobody gathers any more
    if (threadIdx.x == 0) {
      unsigned* const counter = a.counters + blockIdx.y * gridDim.x + blockIdx.x;
      arrived = atomicAdd(counter, 1U);
      if (arrived == gridDim.z - 1) *counter = 0;  // as it was found
    }
    __syncthreads();
    if (arrived != gridDim.z - 1) return;
    __threadfence();
    for_each([&](int t, int row, float, float) {
      float sum = 0.0F;
      float partner = 0.0F;
#pragma unroll 8
      for (int g = 0; g < groups; ++g) {
        const float* const from =
            a.partials + (static_cast<std::int64_t>(g) * Tokens + t) * padded_rows + row;
        sum += __ldcg(from);
        if (gated) partner += __ldcg(from + a.out.half_rows);
      }
      store(t, row, sum, partner);
    });
  }
};

}  // namespace codegemm::cuda::detail
