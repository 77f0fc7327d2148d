// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/block/tile_pairs.cuh - what a thread of a fused product loads: codes and scales of rows r and
// r + 8 of a packed tile, activations, and centroids from global memory.
// Layer: cuda/block (device).
#pragma once

#include <cstdint>

#include <cuda_fp16.h>

#include <codegemm/cuda/block/tile_layout.hpp>

namespace codegemm::cuda {
namespace detail {

// 4 * Fours values of a token's row, `valid` of them there, the rest 0.
template <int Fours>
__device__ __forceinline__ void load_fours(const std::uint16_t* from, int valid, bool aligned,
                                           unsigned (&words)[Fours * 2]) {
  if (aligned && valid == 4 * Fours) {
    if constexpr (Fours == 2) {
      const uint4 four = *reinterpret_cast<const uint4*>(from);
      words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    } else {
      const uint2 two = *reinterpret_cast<const uint2*>(from);
      words[0] = two.x, words[1] = two.y;
    }
    return;
  }
#pragma unroll
  for (int w = 0; w < Fours * 2; ++w) {
    const unsigned low = w * 2 < valid ? from[w * 2] : 0U;
    const unsigned high = w * 2 + 1 < valid ? from[w * 2 + 1] : 0U;
    words[w] = low | high << 16;
  }
}

// A centroid in global memory.
template <int V>
__device__ __forceinline__ void load_centroid(const std::uint16_t* from, unsigned (&pairs)[V / 2]) {
  if constexpr (V >= 8) {
#pragma unroll
    for (int i = 0; i < V / 8; ++i) {
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(from) + i);
      pairs[i * 4] = four.x, pairs[i * 4 + 1] = four.y, pairs[i * 4 + 2] = four.z, pairs[i * 4 + 3] = four.w;
    }
  } else if constexpr (V == 4) {
    const uint2 two = __ldg(reinterpret_cast<const uint2*>(from));
    pairs[0] = two.x, pairs[1] = two.y;
  } else {
    pairs[0] = __ldg(reinterpret_cast<const unsigned*>(from));
  }
}

// A value of weights that lie in global memory, or (Staged) of a copy of them in shared memory.
template <class T, bool Staged>
[[nodiscard]] __device__ __forceinline__ T load_weights(const unsigned char* from) {
  const T* const at = reinterpret_cast<const T*>(from);
  if constexpr (Staged) {
    return *at;
  } else {
    return __ldg(at);
  }
}

// Codes of rows r and r + 8 in one lane of the packed layout: the parts of 4, 2 and 1 bytes of a row.
template <int RowBytes>
struct PairCodes {
  static_assert(RowBytes >= 1 && RowBytes <= 4, "codegemm: a lane of a Config must have 1 to 4 bytes a row");
  unsigned words[RowBytes >= 3 ? 2 : 1];

  template <bool Staged = false>
  __device__ __forceinline__ void load(const unsigned char* tiles, unsigned offset, unsigned offset_of_last) {
    if constexpr (RowBytes == 4) {
      const uint2 two = load_weights<uint2, Staged>(tiles + offset);
      words[0] = two.x, words[1] = two.y;
    } else if constexpr (RowBytes == 1) {
      words[0] = load_weights<unsigned short, Staged>(tiles + offset);
    } else {
      words[0] = load_weights<unsigned, Staged>(tiles + offset);
      if constexpr (RowBytes == 3) words[1] = load_weights<unsigned short, Staged>(tiles + offset_of_last);
    }
  }
  // How to take the bytes of a row out, for the first or the second slot of the pair.
  [[nodiscard]] static __device__ __forceinline__ unsigned selector(bool second) {
    constexpr unsigned kFirst = RowBytes == 4   ? 0x3210U
                                : RowBytes == 3 ? 0x0410U
                                : RowBytes == 2 ? 0x0010U
                                                : 0U;
    constexpr unsigned kSecond = RowBytes == 4   ? 0x7654U
                                 : RowBytes == 3 ? 0x0532U
                                 : RowBytes == 2 ? 0x0032U
                                                 : 1U;
    return second ? kSecond : kFirst;
  }
  [[nodiscard]] __device__ __forceinline__ unsigned row(unsigned selector) const {
    return __byte_perm(words[0], words[RowBytes >= 3 ? 1 : 0], selector);
  }
};

// The scales of rows r and r + 8 of a lane's own group, for weights.
struct WeightScales {
  unsigned short bits[2];

  // `offset` is that of row r; `second` bytes on lies row r + 8.
  template <bool Staged = false>
  __device__ __forceinline__ void load(const unsigned char* tiles, unsigned offset, unsigned second) {
    bits[0] = load_weights<unsigned short, Staged>(tiles + offset);
    bits[1] = load_weights<unsigned short, Staged>(tiles + (offset + second));
  }
};

// The scales of rows 2 q, 2 q + 1, 2 q + 8 and 2 q + 9, the columns of a fragment of sums. In
// scale_offset()'s order rows 2 q and 2 q + 1 are neighbours, and rows 2 q + 8 and 2 q + 9 lie in the next
// lane.
template <int Steps>
struct SumScales {
  static_assert(Steps >= 2 && Steps <= 4, "codegemm: kScaleSteps of a fused Config must be 0 or 2 to 5");
  unsigned words[2];

  // `offset` is that of row 2 q for the group whose first lane has bit 3 clear.
  template <bool Staged = false>
  __device__ __forceinline__ void load(const unsigned char* tiles, unsigned offset) {
    if constexpr (Steps == 3) {
      const uint2 two = load_weights<uint2, Staged>(tiles + (offset & ~7U));
      words[0] = two.x, words[1] = two.y;
    } else {
      words[0] = load_weights<unsigned, Staged>(tiles + (offset & ~3U));
      words[1] = load_weights<unsigned, Staged>(tiles + (offset & ~3U) + (Steps == 2 ? 8 : 16));
    }
  }
  // [rows 2 q + 8 e + i]. `odd`: bit 3 of the group's first lane, which swaps neighbours.
  __device__ __forceinline__ void unpack(bool odd, float (&scale)[2][2]) const {
    const float2 first = __half22float2(*reinterpret_cast<const __half2*>(&words[0]));
    const float2 second = __half22float2(*reinterpret_cast<const __half2*>(&words[1]));
    if constexpr (Steps == 4) {  // pairs (2 q, 2 q + 8) and (2 q + 1, 2 q + 9)
      scale[0][0] = first.x, scale[1][0] = first.y, scale[0][1] = second.x, scale[1][1] = second.y;
    } else {
      scale[0][0] = odd ? first.y : first.x, scale[0][1] = odd ? first.x : first.y;
      scale[1][0] = odd ? second.y : second.x, scale[1][1] = odd ? second.x : second.y;
    }
  }
};

}  // namespace detail
}  // namespace codegemm::cuda
