// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/piece_sums.cuh - sums of a product that several clusters make in pieces of K.
// Layer: cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/intrinsics.cuh>
#include <codegemm/cuda/block/piece_schedule.hpp>
#include <codegemm/cuda/block/wgmma.cuh>
#include <codegemm/cuda/kernels/fused_wgmma_args.cuh>
#include <codegemm/cuda/kernels/warpgroup_output.cuh>

#if CODEGEMM_HAS_WGMMA
namespace codegemm::cuda::detail {

// The warpgroups that multiply meet.
template <int Groups>
__device__ __forceinline__ void wait_for_multipliers() {
  asm volatile("bar.sync 1, %0;" ::"n"(Groups * 128) : "memory");
}

// Sums from number 4 * first on come to the front, as many as one of kMostEvenPieces shares or more. By
// halves, so that registers are named when compiling.
template <int By, int Sums>
__device__ __forceinline__ void move_share(float (&d)[Sums], int first) {
  if constexpr (By > 0 && By * 4 * kMostEvenPieces >= Sums) {
    const bool moves = (first & By) != 0;
#pragma unroll
    for (int e = 0; e < By * 4; ++e) d[e] = moves ? d[e + By * 4] : d[e];
    move_share<By / 2>(d, first);
  }
}

// The sums d of a thread that multiplies go to the same thread of another cluster by way of global memory,
// and come in by way of the stages of x, which are done with then: registers would hold few of them at a
// time, and each of the few blocks that do this sees the whole latency.
template <int TokenTile>
struct PieceSums {
  static constexpr int kFours = TokenTile / 8;  // numbers of 16 bytes of a thread: each of eight tokens

  const FusedWgmmaArgs& a;
  int cluster;
  int rank;   // of the block
  int group;  // warpgroup, 0 or 1
  const char* x_memory;

  [[nodiscard]] __device__ __forceinline__ int slot_of(int of_cluster) const {
    return (of_cluster * 2 + rank) * 2 + group;
  }
  [[nodiscard]] __device__ __forceinline__ float4* partials_of(int slot) const {
    return a.partials + static_cast<std::int64_t>(slot) * (kFours * 128) + threadIdx.x % 128;
  }
  [[nodiscard]] static __device__ __forceinline__ bool leads() { return threadIdx.x % 128 == 0; }
  [[nodiscard]] static __device__ __forceinline__ bool in_first_warp() { return threadIdx.x % 128 < 32; }
  static __device__ __forceinline__ float4 four(const float (&d)[TokenTile / 2], int e) {
    return make_float4(d[e * 4], d[e * 4 + 1], d[e * 4 + 2], d[e * 4 + 3]);
  }
  static __device__ __forceinline__ void add_four(float (&d)[TokenTile / 2], int e, const char* from) {
    const float4 more = *reinterpret_cast<const float4*>(from);
    d[e * 4] += more.x, d[e * 4 + 1] += more.y, d[e * 4 + 2] += more.z, d[e * 4 + 3] += more.w;
  }
  // Where a thread's number `i` comes in: bytes from x_memory on.
  [[nodiscard]] static __device__ __forceinline__ unsigned place(int i) {
    return static_cast<unsigned>(i) * 4096U + (threadIdx.x - 128U) * 16U;
  }

  // Of a piece that does not end its product.
  __device__ __forceinline__ void hand_over(const float (&d)[TokenTile / 2]) const {
    const int slot = slot_of(cluster);
    float4* const to = partials_of(slot);
#pragma unroll
    for (int e = 0; e < kFours; ++e) __stcg(to + e * 128, four(d, e));
    wait_for_warpgroup(group);
    if (leads()) detail::hand_over(a.handed_over + slot);
  }

  // Of the piece that does, whose first slab of the product is `slab`: adds from the piece just before on
  // down.
  __device__ __forceinline__ void add(float (&d)[TokenTile / 2], int slab) const {
    const unsigned x_at = static_cast<unsigned>(__cvta_generic_to_shared(x_memory));
    const int first = a.schedule.first_slab(cluster) - slab;  // of the product
    int before = cluster;
    wait_for_multipliers<2>();
    do {
      --before;
      const int slot = slot_of(before);
      if (in_first_warp()) take_hand_over(a.handed_over + slot, leads());
      wait_for_warpgroup(group);
      const float4* const from = partials_of(slot);
#pragma unroll
      for (int e = 0; e < kFours; ++e) copy_16_bytes(x_at + place(e), from + e * 128);
      commit_copies();
      wait_for_copies<0>();
#pragma unroll
      for (int e = 0; e < kFours; ++e) add_four(d, e, x_memory + place(e));
    } while (a.schedule.first_slab(before) > first);
  }

  // Of even pieces: this cluster's share of the tokens, whose number is returned, comes to the front of d
  // and is added up, own sums first, then those of the first piece on.
  __device__ __forceinline__ int share(float (&d)[TokenTile / 2]) const {
    switch (a.schedule.even_pieces) {
      case 2: return share_of<2>(d);
      case 4: return share_of<4>(d);
      default: return share_of<kMostEvenPieces>(d);
    }
  }

 private:
  // A warp's sums go to the same warp of other blocks, so that it waits for none of its own block.
  template <int Count>
  __device__ __forceinline__ int share_of(float (&d)[TokenTile / 2]) const {
    const int own = cluster % Count;
    if constexpr (Count <= kFours) {
      constexpr int kShare = kFours / Count;
      const int first = cluster - own;
      float4* const to = partials_of(slot_of(cluster));
#pragma unroll
      for (int e = 0; e < kFours; ++e) {
        if (e / kShare != own) __stcg(to + e * 128, four(d, e));
      }
      __syncwarp();
      const int warp = static_cast<int>(threadIdx.x) % 128 / 32;
      const int other = static_cast<int>(threadIdx.x) % 32;
      const bool waits = other < Count && other != own;
      auto* const flags = reinterpret_cast<unsigned char*>(a.handed_over) + warp;
      constexpr int kOfSlot = kMostEvenPieces * 4;
      if (waits) detail::hand_over(flags + slot_of(cluster) * kOfSlot + other * 4);
      __syncwarp();
      take_hand_over(flags + slot_of(first + (waits ? other : 0)) * kOfSlot + own * 4, waits);
      move_share<kFours / 2>(d, own * kShare);
      float4 in[Count - 1][kShare];
#pragma unroll
      for (int i = 0; i < Count - 1; ++i) {
        const float4* const from =
            partials_of(slot_of(first + i + (i >= own ? 1 : 0))) + own * (kShare * 128);
#pragma unroll
        for (int e = 0; e < kShare; ++e) in[i][e] = load_handed_over(from + e * 128);
      }
#pragma unroll
      for (int i = 0; i < Count - 1; ++i) {
#pragma unroll
        for (int e = 0; e < kShare; ++e) {
          const float4 more = in[i][e];
          d[e * 4] += more.x, d[e * 4 + 1] += more.y, d[e * 4 + 2] += more.z, d[e * 4 + 3] += more.w;
        }
      }
    }
    return own;
  }
};

}  // namespace codegemm::cuda::detail
#endif
