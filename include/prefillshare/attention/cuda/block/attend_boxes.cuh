// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/block/attend_boxes.cuh - attend() for warps with keys of their own, whose tiles
// Hopper's copy engine brings: copies of threads wait in one queue with all other loads and stores of a
// multiprocessor, which then stand behind tiles that the memory has not sent yet.
// Layer: attention/cuda/block (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/intrinsics.cuh>
#include <prefillshare/attention/cuda/block/attend.cuh>
#include <prefillshare/attention/cuda/block/page_boxes.cuh>

namespace prefillshare::cuda {

/// Blocks of this shape can have boxes: each warp has 16 keys of a tile, which it alone multiplies.
template <class Shape>
inline constexpr bool kHasBoxes = !Shape::kQueriesInShared && Shape::kWarpsN == Shape::kWarps &&
                                  Shape::kSlice == kBoxKeys && Shape::kRowChunks * 8 % kBoxColumns == 0;

/// Bytes of the barriers of a block's stages, one a warp and stage.
template <class Shape>
inline constexpr int kBoxBarrierBytes = Shape::kWarps* Shape::kStages * 8;

#if __CUDA_ARCH__ < 900
/// Nothing, where there is no copy engine, and for the host's compiler.
template <class Shape>
class BoxBarriers {};
#else
/// The barriers of a warp's stages, and which time round each is.
template <class Shape>
class BoxBarriers {
 public:
  /// Those of all warps are at byte address `first` of shared memory. All threads; the block meets.
  __device__ __forceinline__ void init(unsigned first) {
    mine_ = first + threadIdx.x / 32U * static_cast<unsigned>(Shape::kStages) * 8U;
    if (threadIdx.x == 0) {
      for (unsigned i = 0; i < kBoxBarrierBytes<Shape>; i += 8) {
        codegemm::cuda::detail::init_barrier(first + i, 1);
      }
      codegemm::cuda::detail::publish_barriers();
    }
    __syncthreads();
  }
  /// Of a stage.
  [[nodiscard]] __device__ __forceinline__ unsigned at(unsigned stage) const { return mine_ + stage * 8U; }
  /// Until what was asked for last is there; does not count it as seen.
  __device__ __forceinline__ void peek(unsigned stage) const {
    codegemm::cuda::detail::wait_for_phase(at(stage), phases_ >> stage & 1U);
  }
  /// The same, once for what was asked for.
  __device__ __forceinline__ void wait(unsigned stage) {
    peek(stage);
    phases_ ^= 1U << stage;
  }

 private:
  unsigned mine_ = 0;
  unsigned phases_ = 0;  // a bit a stage
};

/// After a block's last access to shared memory by threads, before it meets and asks for boxes there.
__device__ __forceinline__ void leave_to_boxes() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

namespace detail {

// A warp's 16 keys of each tile.
template <class Shape>
struct BoxLoader {
  static constexpr unsigned kStageBytes = 2 * Shape::kTileBytes;
  static constexpr unsigned kHalfBytes = kTileKeys * kBoxColumns * 2;  // the boxes' columns of a tile
  static constexpr int kBoxes = Shape::kRowChunks * 8 / kBoxColumns;   // beside each other

  const KvSource& kv;
  const PageMaps& maps;
  const std::int32_t* pages;
  unsigned shared;
  int kv_head;
  int begin;  // of this warp's keys in the first tile
  int end;
  // Lane l's are of tiles l and l + 32 from a multiple of 32 on, so that 32 are looked up at once and long
  // before; -1: this warp has no key of it.
  int page = -1;
  int page_ahead = -1;

  [[nodiscard]] __device__ __forceinline__ int look_up(int tile) const {
    const int key = begin + tile * kTileKeys;
    return key < end ? __ldg(pages + page_of(kv, key)) : -1;
  }
  __device__ __forceinline__ void look_up_first() {
    page = look_up(static_cast<int>(threadIdx.x) % 32);
    page_ahead = look_up(static_cast<int>(threadIdx.x) % 32 + 32);
  }
  // The tiles are asked for one after the other. All lanes.
  __device__ __forceinline__ void ask(int tile, unsigned stage, unsigned barrier) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (tile > 0 && tile % 32 == 0) {
      page = page_ahead;
      page_ahead = look_up(tile + 32 + lane);
    }
    const int of_tile = __shfl_sync(0xFFFFFFFFU, page, tile % 32);
    if (lane == 0 && of_tile >= 0) ask_page(begin + tile * kTileKeys, of_tile, stage, barrier);
  }
  // The warp's keys from `key` on, which are in this page. One lane.
  __device__ __forceinline__ void ask_page(int key, int of_key, unsigned stage, unsigned barrier) const {
    CODEGEMM_ASSERT(of_key < kv.pages);
    const int slot = key - page_of(kv, key) * kv.page_size;
    codegemm::cuda::detail::arrive_and_expect(barrier, 2U * kBoxKeys * Shape::kRowChunks * 16U);
    const unsigned to = shared + stage * kStageBytes + threadIdx.x / 32U * (kBoxKeys * kBoxColumns * 2U);
#pragma unroll
    for (int half = 0; half < kBoxes; ++half) {
      const unsigned at = to + static_cast<unsigned>(half) * kHalfBytes;
      codegemm::cuda::detail::copy_box_4(at, &maps.k, half * kBoxColumns, kv_head, slot, of_key, barrier);
      codegemm::cuda::detail::copy_box_4(at + static_cast<unsigned>(Shape::kTileBytes), &maps.v,
                                         half * kBoxColumns, kv_head, slot, of_key, barrier);
    }
  }
  // Where 16 bytes of a key of a tile lie, in its stage.
  [[nodiscard]] static __device__ __forceinline__ unsigned place(int row, int chunk) {
    return static_cast<unsigned>(chunk / 8) * kHalfBytes +
           static_cast<unsigned>(row * 128 + ((chunk ^ row) & 7) * 16);
  }
  // Values past the end count nothing, but not if they are no numbers. The tile starts at first_key.
  __device__ __forceinline__ void clear_values(unsigned stage, int first_key) const {
    constexpr int kChunks = Shape::kRowChunks;
    const unsigned values = shared + stage * kStageBytes + static_cast<unsigned>(Shape::kTileBytes);
    const int first_row = static_cast<int>(threadIdx.x) / 32 * kBoxKeys;
    for (int i = static_cast<int>(threadIdx.x) % 32; i < kBoxKeys * kChunks; i += 32) {
      const int row = first_row + i / kChunks;
      if (first_key + row >= end) store_shared16(values + place(row, i % kChunks), uint4{});
    }
  }
};

}  // namespace detail

/// What attend() does where all rows see all keys and keys.begin is a multiple of kBoxKeys. Before shared
/// memory is written again the block's threads call leave_to_boxes() and meet.
template <class Shape>
__device__ __forceinline__ void attend_boxes(AttendState<Shape>& state, unsigned shared,
                                             BoxBarriers<Shape>& barriers, const KvSource& kv,
                                             const PageMaps& maps, const std::int32_t* pages, int kv_head,
                                             const QueryRows& rows, const KeyRange& keys, float scale_log2,
                                             const AwaitNewest& await) {
  constexpr int kChunks = Shape::kRowChunks;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int tiles = (keys.end - keys.begin + kTileKeys - 1) / kTileKeys;
  detail::BoxLoader<Shape> loader{kv, maps, pages, shared, kv_head, keys.begin + warp * kBoxKeys, keys.end};
  detail::Queries<Shape> queries;
  state.clear();
  loader.look_up_first();
#pragma unroll
  for (unsigned s = 0; s < Shape::kAhead; ++s) {
    if (static_cast<int>(s) < tiles) loader.ask(static_cast<int>(s), s, barriers.at(s));
  }
  if (await.waits) {
    // The newest key may have been read before it was written.
    const int at = await.newest - keys.begin;
    const bool is_mine = at >= 0 && await.newest < keys.end && at / kTileKeys < Shape::kAhead &&
                         at % kTileKeys / kBoxKeys == warp;
    const int number = is_mine ? detail::page_of(kv, await.newest) : 0;
    const int page = is_mine ? __ldg(pages + number) : 0;
    codegemm::cuda::detail::wait_for_previous_kernel();
    codegemm::cuda::detail::allow_next_kernel();
    if (is_mine) {
      const std::int64_t from = page * kv.page_stride +
                                (await.newest - number * kv.page_size) * kv.token_stride +
                                kv_head * kv.head_stride + lane * 8;
      uint4 k = {};
      uint4 v = {};
      if (lane < kChunks) {
        k = __ldcg(reinterpret_cast<const uint4*>(kv.k + from));
        v = __ldcg(reinterpret_cast<const uint4*>(kv.v + from));
      }
      const auto stage = static_cast<unsigned>(at / kTileKeys);
      barriers.peek(stage);
      if (lane < kChunks) {
        const unsigned to = shared + stage * loader.kStageBytes + loader.place(at % kTileKeys, lane);
        detail::store_shared16(to, k);
        detail::store_shared16(to + static_cast<unsigned>(Shape::kTileBytes), v);
      }
    }
  }
  queries.load(rows, shared);
  unsigned stage = 0;
  unsigned next_stage = Shape::kStages - 1;
  for (int t = 0; t < tiles; ++t) {
    const int first_key = keys.begin + t * kTileKeys;
    if (first_key + warp * kBoxKeys < keys.end) barriers.wait(stage);
    if (first_key + kTileKeys > keys.end) loader.clear_values(stage, first_key);
    __syncwarp();
    if (t + Shape::kStages <= tiles) {
      loader.ask(t + Shape::kStages - 1, next_stage, barriers.at(next_stage));
    }
    detail::attend_tile<true>(
        state, queries, shared + stage * loader.kStageBytes, first_key, keys.end,
        [&](int, int) { return keys.end; }, scale_log2);
    next_stage = stage;
    stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
  }
  state.finish(kv.v_scale);
}
#endif

}  // namespace prefillshare::cuda
