// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/block/tile_ring.cuh - a ring of tiles of K and V in shared memory, filled from
// pages by one warpgroup and multiplied by others.
// Layer: attention/cuda/block (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/intrinsics.cuh>
#include <prefillshare/attention/cuda/block/page_boxes.cuh>
#include <prefillshare/attention/cuda/block/page_loader.cuh>
#include <prefillshare/attention/cuda/block/wgmma_products.cuh>

namespace prefillshare::cuda {

/// What a block that multiplies by wgmma holds in shared memory: a tile of queries, a ring of tiles of K
/// or V, and barriers. A tile is 128 rows; 64 columns of all rows lie together,
/// 128 bytes a row, in the 128-byte swizzle: of row r, 16 bytes number c are at place c ^ (r % 8). Offsets
/// are bytes from the beginning of shared memory.
template <ScalarType Type, int HeadDim>
struct PrefillWgmmaShape {
  static_assert(HeadDim == 64 || HeadDim == 96 || HeadDim == 128,
                "prefillshare: PrefillWgmmaShape HeadDim must be 64, 96 or 128");
  static constexpr ScalarType kType = Type;                                       ///< of the cache
  static constexpr int kHeadDim = HeadDim;                                        ///< elements of a head
  static constexpr int kThreads = 384;                                            ///< of a block
  static constexpr int kRows = 128;                                               ///< query rows of a block
  static constexpr int kKeys = 128;                                               ///< keys of a tile
  static constexpr bool kExactWeights = false;                                    ///< rounded to kType
  static constexpr unsigned kColumnTileBytes = 128 * 128;                         ///< 64 columns of a tile
  static constexpr unsigned kTileBytes = (HeadDim + 63) / 64 * kColumnTileBytes;  ///< of a tile
  static constexpr int kSlots = 6;                                                ///< tiles of the ring
  static constexpr unsigned kQueriesAt = 0;                                       ///< the tile of queries
  static constexpr unsigned kBarriersAt = kTileBytes * (1 + kSlots);              ///< see below
  static constexpr unsigned kQueriesFull = kBarriersAt + 16 * kSlots;             ///< barrier: the queries
  static constexpr unsigned kQueriesFree = kQueriesFull + 8;               ///< barrier: the other direction
  static constexpr int kSharedBytes = static_cast<int>(kQueriesFree) + 8;  ///< of a block

  /// The tile in a slot.
  [[nodiscard]] static __device__ constexpr unsigned tile_at(int slot) {
    return kTileBytes * static_cast<unsigned>(1 + slot);
  }
  /// Barrier: the tile is there.
  [[nodiscard]] static __device__ constexpr unsigned full_at(int slot) {
    return kBarriersAt + 16U * static_cast<unsigned>(slot);
  }
  /// Barrier: all have read it.
  [[nodiscard]] static __device__ constexpr unsigned free_at(int slot) { return full_at(slot) + 8U; }

#if CODEGEMM_HAS_WGMMA
  /// One thread; `shared` is the address of shared memory. The block meets after it.
  static __device__ __forceinline__ void init_barriers(unsigned shared) {
    constexpr unsigned kLoaders = 128;    // threads
    constexpr unsigned kMultipliers = 8;  // warps
    for (int i = 0; i <= kSlots; ++i) {   // the last pair are the queries'
      codegemm::cuda::detail::init_barrier(shared + full_at(i), kLoaders);
      codegemm::cuda::detail::init_barrier(shared + free_at(i), kMultipliers);
    }
    codegemm::cuda::detail::publish_barriers();
  }
#endif
};

/// 128 query rows of one K/V head.
struct PrefillItem {
  int rows = 0;            ///< of the sequence; 0: there are no more items
  int first_row = 0;       ///< of these
  int sequence = 0;        ///< whose they are
  int first_query = 0;     ///< token of the batch that the sequence begins with
  int first_position = 0;  ///< in the context, of the sequence's first query
  int keys = 0;            ///< that the last row sees
  int kv_head = 0;         ///< K/V head
};

#if CODEGEMM_HAS_WGMMA
namespace detail {

// A place in the ring, and which time round it is.
template <class Shape>
struct RingPlace {
  int slot = 0;
  unsigned phase = 0;

  __device__ __forceinline__ void next() {
    if (++slot == Shape::kSlots) {
      slot = 0;
      phase ^= 1U;
    }
  }
};

// One of the four warps that load: 32 rows of each tile. A barrier opens when the copies of all have arrived,
// so that this warp runs ahead as far as the ring is free. Who multiplies what it has waited for calls
// publish_to_products() first: here that would wait for all copies under way.
template <class Shape>
class TileLoader {
 public:
  __device__ __forceinline__ explicit TileLoader(const char* shared_memory)
      : shared_(static_cast<unsigned>(__cvta_generic_to_shared(shared_memory))) {}

  // Lane l's row begins at from + mine, all are zero where mine < 0. `to`: a tile.
  __device__ __forceinline__ void copy_rows(const std::uint16_t* from, std::int64_t mine, unsigned to) const {
    constexpr int kChunks = Shape::kHeadDim / 8;  // of 16 bytes in a row
    constexpr int kCopies = kChunks / 4;          // of a lane, in eight rows
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) % 128 / 32;
    unsigned base = shared_ + to + static_cast<unsigned>(warp) * 32U * 128U;
#pragma unroll 1
    for (int first = 0; first < 32; first += 8) {  // rolled up, since this warp has few registers
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int row = (i * 32 + lane) / kChunks;
        const int chunk = (i * 32 + lane) % kChunks;
        const std::int64_t at = __shfl_sync(0xFFFFFFFFU, mine, first + row);
        const bool there = at >= 0;
        copy_or_zero(base + static_cast<unsigned>(chunk / 8) * Shape::kColumnTileBytes +
                         static_cast<unsigned>(row * 128 + ((chunk ^ row) & 7) * 16),
                     from + (there ? at : 0) + chunk * 8, there);
      }
      base += 1024;
    }
  }
  // The same where no row is missing and each eight from a multiple of eight on lie `step` elements apart, as
  // those of a page do: a quarter of the instructions, which else are what the products wait for.
  __device__ __forceinline__ void copy_eights(const std::uint16_t* from, std::int64_t mine, int step,
                                              unsigned to) const {
    constexpr int kChunks = Shape::kHeadDim / 8;
    constexpr int kCopies = kChunks / 4;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) % 128 / 32;
    unsigned base = shared_ + to + static_cast<unsigned>(warp) * 32U * 128U;
#pragma unroll 1
    for (int first = 0; first < 32; first += 8) {
      const std::uint16_t* const eight = from + __shfl_sync(0xFFFFFFFFU, mine, first);
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int row = (i * 32 + lane) / kChunks;
        const int chunk = (i * 32 + lane) % kChunks;
        copy_16(base + static_cast<unsigned>(chunk / 8) * Shape::kColumnTileBytes +
                    static_cast<unsigned>(row * 128 + ((chunk ^ row) & 7) * 16),
                eight + (row * step + chunk * 8));
      }
      base += 1024;
    }
  }
  // Rows of K or V into the next place of the ring, when it is free. step: see copy_eights(); 0: they are as
  // copy_rows() takes them.
  __device__ __forceinline__ void copy_tile(const std::uint16_t* from, std::int64_t mine, int step) {
    codegemm::cuda::detail::wait_for_phase(shared_ + Shape::free_at(place_.slot), place_.phase ^ 1U);
    if (step > 0) {
      copy_eights(from, mine, step, Shape::tile_at(place_.slot));
    } else {
      copy_rows(from, mine, Shape::tile_at(place_.slot));
    }
    codegemm::cuda::detail::arrive_after_copies(shared_ + Shape::full_at(place_.slot));
    place_.next();
  }
  // The same by the copy engine, of a whole tile: this lane's row is at `slot` of `page`.
  __device__ __forceinline__ void ask_tile(const CUtensorMap& map, int page, int slot, int head) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) % 128 / 32;
    const unsigned full = shared_ + Shape::full_at(place_.slot);
    codegemm::cuda::detail::wait_for_phase(shared_ + Shape::free_at(place_.slot), place_.phase ^ 1U);
    if (lane % kBoxKeys == 0) {
      codegemm::cuda::detail::arrive_and_expect(full, kBoxKeys * Shape::kHeadDim * 2U);
      const unsigned to =
          shared_ + Shape::tile_at(place_.slot) + static_cast<unsigned>(warp * 32 + lane) * 128U;
#pragma unroll
      for (int half = 0; half < Shape::kHeadDim / kBoxColumns; ++half) {
        codegemm::cuda::detail::copy_box_4(to + static_cast<unsigned>(half) * Shape::kColumnTileBytes, &map,
                                           half * kBoxColumns, head, slot, page, full);
      }
    } else {
      codegemm::cuda::detail::arrive(full);
    }
    place_.next();
  }
  // When the queries before have been multiplied.
  __device__ __forceinline__ void copy_queries(const std::uint16_t* from, std::int64_t mine) const {
    copy_rows(from, mine, Shape::kQueriesAt);
    codegemm::cuda::detail::arrive_after_copies(shared_ + Shape::kQueriesFull);
  }

 private:
  unsigned shared_;
  RingPlace<Shape> place_;
};

}  // namespace detail
#endif

}  // namespace prefillshare::cuda
