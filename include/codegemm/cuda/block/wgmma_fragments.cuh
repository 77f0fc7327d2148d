// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/block/wgmma_fragments.cuh - packed weights in shared memory as the register operand of wgmma,
// which is that of four mma.sync one below the other.
// Layer: cuda/block (device).
#pragma once

#include <cstdint>

#include <cuda_fp16.h>

#include <codegemm/cuda/block/centroid_table.cuh>
#include <codegemm/cuda/block/intrinsics.cuh>
#include <codegemm/cuda/block/tile_layout.hpp>

namespace codegemm::cuda::detail {

// The fragment of 16 rows x 16 k that a warp multiplies in a step: rows r and r + 8, k 2 q, 2 q + 1 and 8
// more. fetch() brings codes and scales, lookup() the centroids of these, finish() makes weights of both.
template <class Config, PairType Type>
struct WgmmaFragments {
  using Table = CentroidTable<Config::kVecLen, Config::kCodebooks>;
  static constexpr int V = Config::kVecLen;
  static constexpr int kCodebooks = Config::kCodebooks;
  static constexpr int kLaneSpan = Config::kSets / kCodebooks * V;
  static constexpr int kRowBytes = Config::kSets * Config::kCodeBytes;
  static constexpr bool kRowScale = Config::kScaleSteps == 5;
  static constexpr bool kFixedScale = !kRowScale && Config::kScaleSteps > 0;
  static_assert(kLaneSpan == 4 || kLaneSpan == 8 || kLaneSpan == 16 || kLaneSpan == 32,
                "codegemm: a lane of a Config must own 4, 8, 16 or 32 columns");

  // Eight values of a centroid are a row of ldmatrix, which brings a fragment in one instruction a codebook.
  static constexpr bool kRows = V >= 8 && Config::kCodeBytes == 1;

  struct Codes {
    unsigned rows[2][2];    // [half][row]; with ldmatrix the first alone
    unsigned scales[2][2];  // [half][row], each twice
  };
  struct Pairs {
    unsigned values[kCodebooks][4];  // [codebook][half * 2 + row]
    unsigned scales[2][2];           // as in Codes
  };

  const char* table = nullptr;
  const std::uint16_t* codebooks = nullptr;
  int bits = 0;
  int steps = 0;  // of scales
  int r = 0;
  int q = 0;
  unsigned lane_bytes = 0;
  unsigned scale_pairs[2] = {};  // of rows r and r + 8, each twice
  // With ldmatrix lane 8 i + j names row j of the i-th 8 x 8 matrix: rows 8 on are the odd ones, k 8 on the
  // upper two.
  int place_of_row = 0;         // of the row that the lane loads codes of, where no row is flipped
  int last_of_row = 0;          // of the third of three bytes
  unsigned stream_of_lane = 0;  // from the codes of a step to those that the lane reads
  unsigned select = 0;          // the byte permute that makes the address of byte 0
  int vector_of_lane = 0;       // without ldmatrix: which vector of eight columns the lane's pair is in

  __device__ __forceinline__ void begin(const char* table_memory, int code_bits, int scale_steps, int lane) {
    table = table_memory;
    bits = code_bits;
    steps = scale_steps;
    r = lane / 4;
    q = lane % 4;
    int row = r;
    if constexpr (kRows) {
      const int half = lane / 16;
      // A code of the other half is in another packed lane, another byte, or another plane of the table.
      row = lane % 16;
      if (kLaneSpan == 8) row = row_slot(half, row);
      stream_of_lane = kLaneSpan == 8 ? static_cast<unsigned>(half * 16) : 0U;
      select = 0x7604U + (kLaneSpan > 8 && V == 8 ? static_cast<unsigned>(half * kCodebooks) << 4 : 0U);
      lane_bytes = static_cast<unsigned>(lane % Table::kCopies * Table::kEntryBytes +
                                         (V == 16 ? half * Table::kPlaneBytes : 0));
    } else {
      lane_bytes = static_cast<unsigned>(lane) * 4U % static_cast<unsigned>(Table::kPlaneBytes);
      vector_of_lane = 2 * q % (kLaneSpan < 8 ? kLaneSpan : 8) / V;
      select = 0x7604U + (static_cast<unsigned>(vector_of_lane * kCodebooks) << 4);
    }
    place_of_row = spread(stream_offset(kRowBytes, row, 0));
    if constexpr (kRowBytes == 3) last_of_row = spread(stream_offset(3, row, 2) - stream_offset(3, 0, 2));
  }

  // Step `step` of a slab, known when compiling. `codes` and `scales` are the row tile's.
  __device__ __forceinline__ void fetch(const char* codes, const char* scales, int step, Codes& out) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int owner = kLaneSpan >= 16  ? 16 * step / kLaneSpan
                        : kLaneSpan == 8 ? 2 * step + half
                                         : 4 * step + 2 * half + q / 2;
      const bool next = kLaneSpan < 16 || half == 0;
      if (next) {
        const int group = 1 << Config::kScaleSteps % 5;
        const bool goes_on =
            kFixedScale && kLaneSpan >= 8 && (16 * step + 8 * half) % (kLaneSpan * group) != 0;
        if (!kRowScale && !goes_on) load_scales(scales, owner);
      }
      if constexpr (!kRows) {
        if (next) load_rows(codes, owner, out.rows[half]);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (!kRows && !next) out.rows[half][e] = out.rows[0][e];
        out.scales[half][e] = scale_pairs[e];
      }
    }
    if constexpr (kRows) {
      out.rows[0][0] = load_row(codes + stream_of_lane, kLaneSpan == 8 ? 2 * step : 16 * step / kLaneSpan);
    }
  }

  __device__ __forceinline__ void lookup(const Codes& codes, int step, Pairs& out) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        out.scales[half][e] = codes.scales[half][e];
        if constexpr (!kRows) {
          const int vector = (16 * step + 8 * half) % kLaneSpan / V;  // of lane 0
#pragma unroll
          for (int c = 0; c < kCodebooks; ++c)
            out.values[c][half * 2 + e] = pair(codes.rows[half][e], vector, c, half);
        }
      }
    }
    if constexpr (kRows) {
      const int vector = kLaneSpan == 8 ? 0 : 16 * step % kLaneSpan / V;
      const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(table));
#pragma unroll
      for (int c = 0; c < kCodebooks; ++c) {
        const unsigned byte = static_cast<unsigned>(vector * kCodebooks + c) << 4;
        load_matrices_of_constants(shared + __byte_perm(codes.rows[0][0], lane_bytes, select + byte) +
                                       static_cast<unsigned>(Table::plane(c * Table::kPieces, bits)),
                                   out.values[c]);
      }
    }
  }

  __device__ __forceinline__ void finish(const Pairs& pairs, unsigned (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned scale = pairs.scales[i / 2][i % 2];
      if constexpr (Type == PairType::kHalf) {
        unsigned sum = pairs.values[0][i];
#pragma unroll
        for (int c = 1; c < kCodebooks; ++c) sum = add_pairs(sum, pairs.values[c][i]);
        a[i] = kRowScale ? sum : scale_pair(sum, *reinterpret_cast<const __half2*>(&scale));
      } else {
        float2 sum = unpack_pair(pairs.values[0][i]);
#pragma unroll
        for (int c = 1; c < kCodebooks; ++c) {
          const float2 more = unpack_pair(pairs.values[c][i]);
          sum.x += more.x, sum.y += more.y;
        }
        a[i] = scale_pair_bf16(sum, kRowScale ? 1.0F : unpack_pair(scale).x);
      }
    }
  }

 private:
  // From a slab's first byte of a lane to byte `offset` of its stream. Bits of the offset are bits of this:
  // rows are flipped in it as they are in row_slot().
  [[nodiscard]] static __host__ __device__ constexpr int spread(int offset) {
    return offset / 16 * kHalfLineStride + offset % 16;
  }
  // The same for this thread's row in packed lane `owner`, and there `byte` of the row: 0 or, of three, 2.
  [[nodiscard]] __device__ __forceinline__ const char* place(const char* codes, int owner, int byte) const {
    const int flips = kRows ? row_slot(owner, 0) : row_slot(owner, 0) & 7;
    const int first = stream_offset(kRowBytes, 0, byte);
    const int flip = spread(stream_offset(kRowBytes, flips, byte) - first);
    return codes + owner * 16 + spread(first) + ((byte == 0 ? place_of_row : last_of_row) ^ flip);
  }

  // Bytes of a row's codes in packed lane `owner` of the slab.
  __device__ __forceinline__ void load_rows(const char* codes, int owner, unsigned (&rows)[2]) const {
    unsigned words[2];
    if constexpr (kRowBytes == 4) {
      const uint2 two = *reinterpret_cast<const uint2*>(place(codes, owner, 0));
      words[0] = two.x, words[1] = two.y;
    } else if constexpr (kRowBytes == 1) {
      const unsigned both = *reinterpret_cast<const unsigned short*>(place(codes, owner, 0));
      words[0] = both, words[1] = both >> 8;
    } else {
      const unsigned both = *reinterpret_cast<const unsigned*>(place(codes, owner, 0));
      words[0] = both & 0xFFFFU, words[1] = both >> 16;
      if constexpr (kRowBytes == 3) {
        const unsigned last = *reinterpret_cast<const unsigned short*>(place(codes, owner, 2));
        words[0] |= last << 16, words[1] |= (last & 0xFF00U) << 8;
      }
    }
    const bool swapped = owner % 2 == 1;
    rows[0] = swapped ? words[1] : words[0];
    rows[1] = swapped ? words[0] : words[1];
  }

  // Those of the row that this lane names, of packed lane `owner` and, where a lane has eight columns, for
  // k 8 on of the one after it.
  [[nodiscard]] __device__ __forceinline__ unsigned load_row(const char* codes, int owner) const {
    const char* const at = place(codes, owner, 0);
    if constexpr (kRowBytes == 4) return *reinterpret_cast<const unsigned*>(at);
    if constexpr (kRowBytes == 1) return *reinterpret_cast<const unsigned char*>(at);
    unsigned row = *reinterpret_cast<const unsigned short*>(at);
    if constexpr (kRowBytes == 3) {
      const unsigned last = *reinterpret_cast<const unsigned char*>(place(codes, owner, 2));
      row |= last << 16;
    }
    return row;
  }

  // Without a branch, which would keep the compiler from running products at the same time: a tile without
  // scales has other data at this place, which is not used.
  __device__ __forceinline__ void load_scales(const char* scales, int owner) {
    const int log2_lanes = kFixedScale ? Config::kScaleSteps : min(steps, 4);
    const int group = owner >> log2_lanes << log2_lanes;
    const auto* const of_tile = reinterpret_cast<const unsigned short*>(scales);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const unsigned both = of_tile[scale_offset(log2_lanes, group, r + 8 * e)] * 0x10001U;
      scale_pairs[e] = kFixedScale || steps < 5 ? both : 0x3C003C00U;  // 1
    }
  }

  [[nodiscard]] __device__ __forceinline__ unsigned pair(unsigned row, int vector, int c, int half) const {
    const int p = vector * kCodebooks + c;
    if constexpr (Config::kCodeBytes == 1) {
      const unsigned at = __byte_perm(row, lane_bytes, select + (static_cast<unsigned>(p) << 4));
      return Table::lookup_pair(table, at, Table::plane(c, bits));
    } else {
      const unsigned code = row >> (16 * (vector_of_lane * kCodebooks + p)) & 0xFFFFU;
      const std::uint16_t* const centroid = codebooks + ((static_cast<unsigned>(c) << bits) + code) * V;
      return __ldg(reinterpret_cast<const unsigned*>(centroid) + (8 * half + 2 * q) % V / 2);
    }
  }
};

}  // namespace codegemm::cuda::detail
