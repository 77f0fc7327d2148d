// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/gather_tile.cuh - which Psumbook a configuration has, and how a warp holds and sums a
// tile.
// Layer: cuda/kernels (device).
#pragma once

#include <cstdint>

#include <cuda_fp16.h>

#include <codegemm/cuda/block/half_psumbook.cuh>
#include <codegemm/cuda/block/intrinsics.cuh>
#include <codegemm/cuda/block/psumbook.cuh>

namespace codegemm::cuda {

/// Whether a configuration's Psumbook is a HalfPsumbook.
template <class Config>
inline constexpr bool kHalfPsumbook = requires {
  requires Config::kHalf;
};

namespace detail {

// A configuration with fewer warps, for blocks of few row tiles: what every warp does before its first
// look-up is then done by fewer of them, and issued sooner.
template <class Config>
struct Narrow : Config {
  static constexpr int kThreads = 640;
};

// The Psumbook of a configuration.
template <class Config, int Tokens, bool Half = kHalfPsumbook<Config>>
struct BookOf {
  using Type = Psumbook<Config::kVecLen, Config::kCodebooks, Config::kSets, Tokens>;
  static constexpr int kStagedBytes = 0;  // of a granule's activations
  [[nodiscard]] static constexpr int bytes(int bits) { return Type::bytes(bits); }
};
template <class Config, int Tokens>
struct BookOf<Config, Tokens, true> {
  using Type = HalfPsumbook<Config::kVecLen, Config::kCodebooks, Tokens>;
  static constexpr int kStagedBytes = Type::kStagedBytes;
  [[nodiscard]] static constexpr int bytes(int) { return Type::kBytes; }
};

// A tile as a lane holds it. Steps < 0: the number of scales is known at run time only.
template <int Sets, int Steps>
struct TileRegisters {
  static constexpr int kScales = Steps >= 0 && Steps < 5 ? 16 >> (Steps < 4 ? Steps : 4) : 0;
  uint4 codes[Sets];
  unsigned scale_bits[kScales == 0 ? 1 : (kScales + 1) / 2];

  __device__ __forceinline__ void load(const unsigned char* tile, int lane) {
#pragma unroll
    for (int p = 0; p < Sets; ++p) codes[p] = load_once(tile + (p * 32 + lane) * 16);
    const unsigned char* const scales = tile + Sets * 512 + lane * kScales * 2;
    if constexpr (kScales == 1) {
      scale_bits[0] = __ldg(reinterpret_cast<const unsigned short*>(scales));
    } else if constexpr (kScales == 8) {
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(scales));
      scale_bits[0] = four.x, scale_bits[1] = four.y, scale_bits[2] = four.z, scale_bits[3] = four.w;
    } else {
#pragma unroll
      for (int i = 0; i < kScales / 2; ++i)
        scale_bits[i] = __ldg(reinterpret_cast<const unsigned*>(scales) + i);
    }
  }
};

template <int Steps, int N>
__device__ __forceinline__ float reduce_with(float (&sums)[N], const unsigned* scale_bits) {
  constexpr int kScales = Steps < 5 ? 16 >> (Steps < 4 ? Steps : 4) : 0;
  __half scales[kScales == 0 ? 1 : kScales];
#pragma unroll
  for (int i = 0; i < kScales; ++i) {
    scales[i] = __ushort_as_half(static_cast<unsigned short>(scale_bits[i / 2] >> (i % 2 * 16)));
  }
  if constexpr (N == 16) {
    return reduce_rows<Steps>(sums, scales);
  } else {
    return reduce_summed_rows<Steps>(sums, scales);
  }
}

// What one of the two kinds of Psumbooks has alone.
template <class Book, int Tokens, bool Half>
[[nodiscard]] __device__ __forceinline__ auto no_segments() {
  if constexpr (Half) {
    return 0;
  } else {
    struct {
      typename Book::Segments of[Tokens];
    } out = {};
    return out;
  }
}
template <class Book, bool Half>
[[nodiscard]] __device__ __forceinline__ auto no_words() {
  if constexpr (Half) {
    return typename Book::Words{};
  } else {
    return 0;
  }
}
template <class Book, int Steps, bool Half>
[[nodiscard]] __device__ __forceinline__ auto ones_of() {
  if constexpr (Half) {
    return Book::template ones<Steps>();
  } else {
    return 0;
  }
}
template <class Book, int Steps, bool Half>
[[nodiscard]] __host__ __device__ constexpr int sums_of() {
  if constexpr (Half) {
    return Book::template kSums<Steps>;
  } else {
    return 16;
  }
}

// The same, where the steps are known at run time only and the scales still lie in memory.
template <int Steps>
__device__ __forceinline__ float reduce_from(float (&sums)[16], const unsigned char* scales, int lane) {
  TileRegisters<1, Steps> tile;
  constexpr int kScales = TileRegisters<1, Steps>::kScales;
  if constexpr (kScales == 1) {
    tile.scale_bits[0] = __ldg(reinterpret_cast<const unsigned short*>(scales) + lane);
  } else {
#pragma unroll
    for (int i = 0; i < kScales / 2; ++i) {
      tile.scale_bits[i] = __ldg(reinterpret_cast<const unsigned*>(scales) + lane * (kScales / 2) + i);
    }
  }
  return reduce_with<Steps>(sums, tile.scale_bits);
}

template <int Steps>
__device__ __forceinline__ float reduce_tile(float (&sums)[16], const unsigned* scale_bits,
                                             const unsigned char* scales, int lane, int steps) {
  if constexpr (Steps >= 0) {
    return reduce_with<Steps>(sums, scale_bits);
  } else {
    switch (steps) {
      case 0: return reduce_from<0>(sums, scales, lane);
      case 1: return reduce_from<1>(sums, scales, lane);
      case 2: return reduce_from<2>(sums, scales, lane);
      case 3: return reduce_from<3>(sums, scales, lane);
      case 4: return reduce_from<4>(sums, scales, lane);
      default: return reduce_from<5>(sums, scales, lane);
    }
  }
}

}  // namespace detail

}  // namespace codegemm::cuda
