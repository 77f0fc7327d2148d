// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/block/page_loader.cuh - K and V from pages into shared memory, asynchronously.
// Layer: attention/cuda/block (device).
#pragma once

#include <cstdint>

#include <codegemm/base/macros.hpp>
#include <codegemm/cuda/block/wgmma.cuh>
#include <prefillshare/attention/cuda/block/tensor_core.cuh>

namespace prefillshare::cuda {

/// Keys are taken in tiles of this many, from the first key of a range on.
inline constexpr int kTileKeys = 64;

/// How a block of threads shares out a tile: kWarpsM warps along the query rows, kWarpsN along the keys, and
/// kRowTiles times 16 query rows a warp. Shared memory holds kStages tiles of K and V, each row padded by 16
/// bytes, so that the eight rows of a matrix that ldmatrix reads lie in different banks. Fp8: K and V are
/// e4m3 and become Type, exactly, between shared memory and the products. Wgmma: where the compiler has
/// Hopper's products, the four warps multiply 64 rows each time, and 64 columns of all rows of a tile lie
/// together instead, 128 bytes a row, in the 128-byte swizzle: of row r, 16 bytes number c are at place
/// c ^ (r % 8).
template <ScalarType Type, int HeadDim, int WarpsM, int WarpsN, int RowTiles, int Stages, bool Fp8 = false,
          bool Wgmma = false>
struct AttendShape {
  static_assert(HeadDim % 16 == 0, "prefillshare: AttendShape HeadDim must be a multiple of 16");
  static constexpr ScalarType kType = Type;               ///< of the queries and of the products
  static constexpr bool kFp8 = Fp8;                       ///< the cache is e4m3, else of kType
  static constexpr int kHeadDim = HeadDim;                ///< elements of a head
  static constexpr int kWarpsM = WarpsM;                  ///< warps beside each other along the query rows
  static constexpr int kWarpsN = WarpsN;                  ///< warps beside each other along the keys
  static constexpr int kRowTiles = RowTiles;              ///< of 16 query rows, of a warp
  static constexpr int kStages = Stages;                  ///< tiles of keys under way
  static constexpr int kWarps = WarpsM * WarpsN;          ///< of a block
  static constexpr int kThreads = 32 * kWarps;            ///< of a block
  static constexpr int kWarpRows = 16 * RowTiles;         ///< query rows of a warp
  static constexpr int kRows = kWarpRows * WarpsM;        ///< query rows of a block
  static constexpr int kWarpKeys = kTileKeys / WarpsN;    ///< keys of a tile that one warp multiplies
  static constexpr int kSlice = kTileKeys / kWarps;       ///< keys of a tile that one warp loads
  static constexpr bool kQueriesInShared = RowTiles > 1;  ///< else in registers
  /// Tiles that are asked for before the first is multiplied. Where each warp has its own keys of a tile
  /// items are long, and the last stage is left to the products' pace.
  static constexpr int kAhead = WarpsN == kWarps ? Stages - 1 : Stages;
  /// Decoding waits for memory, so that there is time to multiply by what bf16 leaves of a weight, too.
  static constexpr bool kExactWeights = Type == ScalarType::kBFloat16 && RowTiles == 1;
  static constexpr bool kWgmma = Wgmma && CODEGEMM_HAS_WGMMA != 0;  ///< never for the host's compiler
  static_assert(!Wgmma || (!Fp8 && WarpsM == 4 && WarpsN == 1 && RowTiles <= 2),
                "prefillshare: AttendShape with Wgmma is of one warpgroup and keys of 16 bits");
  static constexpr int kRowChunks = HeadDim * (Fp8 ? 1 : 2) / 16;  ///< of 16 bytes, of a row of K or V
  /// Of a row of K or V in shared memory: padded, so that rows lie in different banks.
  static constexpr int kRowBytes = kRowChunks * 16 + 16;
  static constexpr int kQueryRowBytes = HeadDim * 2 + 16;                    ///< the same of Q
  static constexpr int kColumnTiles = (HeadDim + 63) / 64;                   ///< of 64 columns, with kWgmma
  static constexpr unsigned kColumnTileBytes = kTileKeys * 128;              ///< of one of K or of V
  static constexpr int kPaddedTileBytes = kTileKeys * kRowBytes;             ///< without kWgmma
  static constexpr int kSwizzledTileBytes = kColumnTiles * kTileKeys * 128;  ///< with it
  static constexpr int kTileBytes = kWgmma ? kSwizzledTileBytes : kPaddedTileBytes;  ///< of K or of V
  static constexpr int kQueriesAt = kStages * 2 * kTileBytes;  ///< bytes, from the beginning of shared memory
  /// Of a block, the same for the host's compiler as on the device.
  static constexpr int shared_bytes(bool wgmma) {
    const int tiles = kStages * 2 * (wgmma ? kSwizzledTileBytes : kPaddedTileBytes);
    if (!kQueriesInShared) return tiles;
    return tiles + kRows * (wgmma ? kColumnTiles * 128 : kQueryRowBytes);
  }
  /// Of a block.
  static constexpr int kSharedBytes = !Wgmma || shared_bytes(false) > shared_bytes(true) ? shared_bytes(false)
                                                                                         : shared_bytes(true);
  /// Where 16 bytes of a row of a tile lie, in bytes from its beginning.
  [[nodiscard]] static __device__ __forceinline__ constexpr unsigned place(int row, int chunk) {
    if constexpr (kWgmma) {
      return static_cast<unsigned>(chunk / 8) * kColumnTileBytes +
             static_cast<unsigned>(row * 128 + ((chunk ^ row) & 7) * 16);
    } else {
      return static_cast<unsigned>(row * kRowBytes + chunk * 16);
    }
  }
  static_assert(kSlice % 8 == 0 && kSlice <= 32, "prefillshare: AttendShape needs 2, 4 or 8 warps");
};

/// Where one K/V head's rows lie. Strides in units of 2 bytes: of one element, or two of fp8.
struct KvSource {
  const std::uint16_t* k = nullptr;  ///< K, as bits
  const std::uint16_t* v = nullptr;  ///< V, as bits
  std::int64_t page_stride = 0;      ///< from a page to the next
  std::int64_t token_stride = 0;     ///< from a slot to the next
  std::int64_t head_stride = 0;      ///< from a head to the next
  unsigned page_magic = 0;           ///< see page_of()
  int page_size = 0;                 ///< tokens
  int pages = 0;                     ///< in the pool
  float v_scale = 1.0F;              ///< of fp8: what a stored V is multiplied by
};

/// ceil(2^32 / size): key * magic / 2^32 is key / size for every key below 2^26 and size from 2 to 64.
[[nodiscard]] CODEGEMM_HOST_DEVICE inline unsigned magic_of(int page_size) {
  return page_size == 1 ? 0U
                        : static_cast<unsigned>((0x100000000ULL + static_cast<unsigned>(page_size) - 1U) /
                                                static_cast<unsigned>(page_size));
}

namespace detail {

[[nodiscard]] __device__ __forceinline__ int page_of(const KvSource& kv, int key) {
  return kv.page_size == 1 ? key : static_cast<int>(__umulhi(static_cast<unsigned>(key), kv.page_magic));
}

// One warp's copies. Lane l looks up the page of key l of the warp's slice a tile ahead of the copy, since
// the copy's address waits for it.
template <class Shape>
struct PageLoader {
  int key = 0;    // this lane's
  int slot = 0;   // the key's page in the sequence
  int page = -1;  // and in memory; -1: past the end

  static constexpr std::int64_t kZeros = -1;
  static constexpr std::int64_t kNothing = -2;

  // Of the tile at tile_key. pages: of the sequence, key 0 lies in the first. Keys from `end` on become
  // zeros.
  __device__ __forceinline__ void look_up(const KvSource& kv, const std::int32_t* pages, int tile_key,
                                          int end) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    key = tile_key + warp * Shape::kSlice + lane % Shape::kSlice;
    slot = page_of(kv, key);
    page = key < end ? __ldg(pages + slot) : -1;
  }

  // Of the tile looked up last, into the stage at byte address `stage` of shared memory. Where kLeavesOut,
  // key `missing` is not copied: nothing is written where it belongs.
  template <bool kLeavesOut = false>
  __device__ __forceinline__ void copy(const KvSource& kv, int head, unsigned stage, int missing = -1) const {
    constexpr int kChunks = Shape::kRowChunks;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    CODEGEMM_ASSERT(page < kv.pages);
    std::int64_t mine = kZeros;
    if (page >= 0) {
      mine = page * kv.page_stride + (key - slot * kv.page_size) * kv.token_stride + head * kv.head_stride;
    }
    if (kLeavesOut && key == missing) mine = kNothing;
#pragma unroll
    for (int i = 0; i < Shape::kSlice * kChunks / 32; ++i) {
      const int row = (i * 32 + lane) / kChunks;
      const int column = (i * 32 + lane) % kChunks;
      const std::int64_t from = __shfl_sync(0xFFFFFFFFU, mine, row);
      if (kLeavesOut && from == kNothing) continue;
      const bool there = from >= 0;
      const std::int64_t at = (there ? from : 0) + column * 8;
      const unsigned to = stage + Shape::place(warp * Shape::kSlice + row, column);
      copy_or_zero(to, kv.k + at, there);
      copy_or_zero(to + static_cast<unsigned>(Shape::kTileBytes), kv.v + at, there);
    }
  }
  // Row `row` of the tile in `stage`: the element at `from` of K and V. The warp that copies this row's tile.
  __device__ __forceinline__ static void copy_row(const KvSource& kv, std::int64_t from, int row,
                                                  unsigned stage) {
    constexpr int kChunks = Shape::kRowChunks;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (static_cast<int>(threadIdx.x) / 32 != row / Shape::kSlice || lane >= kChunks) return;
    const unsigned to = stage + Shape::place(row, lane);
    copy_16(to, kv.k + from + lane * 8);
    copy_16(to + static_cast<unsigned>(Shape::kTileBytes), kv.v + from + lane * 8);
  }
};

}  // namespace detail
}  // namespace prefillshare::cuda
