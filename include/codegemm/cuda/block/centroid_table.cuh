// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/block/centroid_table.cuh - codebooks in shared memory, replicated so that no lookup has a
// bank conflict, and weights looked up straight into the fragments of a tensor-core product.
// Layer: cuda/block (device).
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <codegemm/cuda/block/tile_layout.hpp>

namespace codegemm::cuda {

/// What a pair of 16-bit weights is multiplied in.
enum class PairType : int { kHalf = 0, kBFloat16 = 1 };

/// Codebooks of a block, m = Codebooks of 2^b centroids with V values of 16 bits. Each of the Pieces of a
/// centroid is a *plane* of 128 bytes that holds as many copies of it as fit; a lane reads its own copy, so
/// that the lanes of a wavefront hit different banks whatever their codes are. (More than four planes: 64
/// bytes, and two lanes share a bank.) Entry (code, plane) lies at  plane / kPlanesOfRow * 2^b * 256 +
/// code * 256 + plane % kPlanesOfRow * kPlaneBytes: a code becomes an address by one byte permute.
template <int V, int Codebooks, int Pieces = V == 16 ? 2 : 1>
struct CentroidTable {
  static_assert(V == 2 || V == 4 || V == 8 || V == 16, "codegemm: CentroidTable V must be 2, 4, 8 or 16");
  static_assert(Codebooks >= 1 && Codebooks <= 4, "codegemm: CentroidTable Codebooks must be 1 to 4");

  static constexpr int kPieces = Pieces;                      ///< planes of a centroid
  static constexpr int kEntryBytes = 2 * V / Pieces;          ///< of a copy
  static constexpr int kPlanes = Codebooks * Pieces;          ///< planes of all codebooks
  static constexpr int kPlaneBytes = kPlanes > 4 ? 64 : 128;  ///< bytes of a plane
  static constexpr int kPlanesOfRow = 256 / kPlaneBytes;      ///< planes beside each other in 256 bytes
  static constexpr int kCopies = kPlaneBytes / kEntryBytes;   ///< copies of a centroid in its plane
  /// Rows of 256 bytes that one code takes.
  static constexpr int kRowSets = (kPlanes + kPlanesOfRow - 1) / kPlanesOfRow;

  /// Bytes of shared memory for codes of `bits` bits.
  [[nodiscard]] static __host__ __device__ constexpr int bytes(int bits) { return kRowSets * (256 << bits); }

  /// Byte offset of a plane for codes of 8 bits or less, whatever b is: tables of b < 8 have the same offsets
  /// within a row set.
  [[nodiscard]] static __device__ __forceinline__ int plane(int p, int bits) {
    return p / kPlanesOfRow * (256 << bits) + p % kPlanesOfRow * kPlaneBytes;
  }

  /// Threads 0 .. threads - 1 copy the codebooks, fp16 [Codebooks][2^bits][V], into the table; a barrier has
  /// to follow. kBFloat16: converted, rounding to nearest.
  static __device__ __forceinline__ void fill(char* table, const std::uint16_t* codebooks, int bits,
                                              PairType type, int thread, int threads) {
    constexpr int kWords = kEntryBytes / 4;
    constexpr int kPieces = kPlaneBytes / 16;  // 16 bytes each: 16 / kEntryBytes copies
    // A thread loads a centroid once and writes every other piece of its plane; eight lanes in a row write
    // different pieces, which are different banks.
    const int shares = (kPlanes << bits) * 2;
#pragma unroll 4
    for (int i = thread; i < shares; i += threads) {
      const int code = i / 2 / kPlanes;
      const int p = i / 2 % kPlanes;
      const std::uint16_t* const from =
          codebooks + ((p / Pieces << bits) + code) * V + p % Pieces * (V / Pieces);
      unsigned words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        words[w] = w < kWords ? __ldg(reinterpret_cast<const unsigned*>(from) + w) : words[w % kWords];
        if (w < kWords && type == PairType::kBFloat16) {
          const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[w]));
          const __nv_bfloat162 rounded = __floats2bfloat162_rn(pair.x, pair.y);
          words[w] = *reinterpret_cast<const unsigned*>(&rounded);
        }
      }
      char* const to = table + plane(p, bits) + code * 256;
#pragma unroll
      for (int j = 0; j < kPieces; j += 2) {
        *reinterpret_cast<uint4*>(to + (i + j) % kPieces * 16) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }

  /// What a lane adds to the address of whole centroids (read by lookup()).
  [[nodiscard]] static __device__ __forceinline__ unsigned lane_bytes(int lane) {
    return static_cast<unsigned>(lane % kCopies * kEntryBytes);
  }

  /// The address, from the table's start, of the centroid whose code is byte `byte` of `codes`.
  [[nodiscard]] static __device__ __forceinline__ unsigned address(unsigned codes, int byte,
                                                                   unsigned lane_bytes) {
    return __byte_perm(codes, lane_bytes, 0x7604U | (static_cast<unsigned>(byte) << 4));
  }

  /// V values of codebook `codebook` as V / 2 pairs.
  static __device__ __forceinline__ void lookup(const char* table, unsigned address, int codebook, int bits,
                                                unsigned (&pairs)[V / 2]) {
    const char* const at = table + address;
#pragma unroll
    for (int h = 0; h < Pieces; ++h) {
      const char* const entry = at + plane(codebook * Pieces + h, bits);
      if constexpr (kEntryBytes == 16) {
        const uint4 four = *reinterpret_cast<const uint4*>(entry);
        pairs[h * 4] = four.x, pairs[h * 4 + 1] = four.y, pairs[h * 4 + 2] = four.z,
                  pairs[h * 4 + 3] = four.w;
      } else if constexpr (kEntryBytes == 8) {
        const uint2 two = *reinterpret_cast<const uint2*>(entry);
        pairs[h * 2] = two.x, pairs[h * 2 + 1] = two.y;
      } else {
        pairs[h] = *reinterpret_cast<const unsigned*>(entry);
      }
    }
  }

  /// One pair of a centroid: pair q (0 .. 3) of the 8 values that a tensor-core fragment's lane group (lane =
  /// 4 r + q) wants, see fused_wgmma.cuh. `address` was made with lane_bytes = 4 * lane % kPlaneBytes.
  [[nodiscard]] static __device__ __forceinline__ unsigned lookup_pair(const char* table, unsigned address,
                                                                       int plane_bytes) {
    return *reinterpret_cast<const unsigned*>(table + address + plane_bytes);
  }
};

namespace detail {

// Products and sums of pairs of weights, fp16 or bf16. A bf16 product is made in fp32 from fp16 numbers and
// rounded once.
__device__ __forceinline__ unsigned add_pairs(unsigned a, unsigned b) {
  const __half2 sum = __hadd2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const unsigned*>(&sum);
}
__device__ __forceinline__ unsigned scale_pair(unsigned pair, __half2 scale) {
  const __half2 product = __hmul2(*reinterpret_cast<const __half2*>(&pair), scale);
  return *reinterpret_cast<const unsigned*>(&product);
}
__device__ __forceinline__ unsigned scale_pair_bf16(float2 pair, float scale) {
  const __nv_bfloat162 product = __floats2bfloat162_rn(pair.x * scale, pair.y * scale);
  return *reinterpret_cast<const unsigned*>(&product);
}
__device__ __forceinline__ float2 unpack_pair(unsigned pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// d = a b, or d += a b, with a 16 x 16 and b 16 x 8, fp32 sums.
template <PairType Type>
__device__ __forceinline__ void mma_pairs(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                          bool first) {
#define CODEGEMM_MMA(types, c)                                                                               \
  asm("mma.sync.aligned.m16n8k16.row.col." types                                                             \
      " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"                                           \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c(0)), "f"(c(1)), "f"(c(2)),       \
        "f"(c(3)))
#define CODEGEMM_ZERO(i) 0.0F
#define CODEGEMM_OLD(i) d[i]
  if constexpr (Type == PairType::kHalf) {
    if (first)
      CODEGEMM_MMA("f32.f16.f16.f32", CODEGEMM_ZERO);
    else
      CODEGEMM_MMA("f32.f16.f16.f32", CODEGEMM_OLD);
  } else {
    if (first)
      CODEGEMM_MMA("f32.bf16.bf16.f32", CODEGEMM_ZERO);
    else
      CODEGEMM_MMA("f32.bf16.bf16.f32", CODEGEMM_OLD);
  }
#undef CODEGEMM_MMA
#undef CODEGEMM_ZERO
#undef CODEGEMM_OLD
}

}  // namespace detail
}  // namespace codegemm::cuda
