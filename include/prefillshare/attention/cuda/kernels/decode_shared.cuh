// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/kernels/decode_shared.cuh - one query token a sequence over pages that sequences
// share, and over their own, on Hopper's asynchronous tensor cores.
// Layer: attention/cuda/kernels (device).
// See: FlashAttention-3 (arXiv 2407.08608) section 3.2 for the overlap.
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/intrinsics.cuh>
#include <prefillshare/attention/cuda/block/attend_products.cuh>
#include <prefillshare/attention/cuda/block/page_boxes.cuh>
#include <prefillshare/attention/cuda/block/page_loader.cuh>
#include <prefillshare/attention/cuda/block/tile_ring.cuh>
#include <prefillshare/attention/cuda/block/wgmma_multiplier.cuh>
#include <prefillshare/attention/cuda/kernels/decode_work.cuh>

namespace prefillshare::cuda {

/// What a block of decode_shared_kernel holds in shared memory: a tile of 64 query rows, a ring of tiles of K
/// or V, 64 keys each, all swizzled as in PrefillWgmmaShape, and barriers. Half of a multiprocessor's, so that
/// the next call's keys come while this one multiplies. Offsets are bytes from the beginning.
template <ScalarType Type, int HeadDim>
struct SharedDecodeShape {
  static_assert(HeadDim % kBoxColumns == 0 && HeadDim <= 128,
                "prefillshare: SharedDecodeShape HeadDim must be 64 or 128");
  static constexpr ScalarType kType = Type;                                         ///< of the cache
  static constexpr int kHeadDim = HeadDim;                                          ///< elements of a head
  static constexpr int kMultipliers = 128;                                          ///< threads that multiply
  static constexpr int kThreads = kMultipliers + 32;                                ///< and a warp that loads
  static constexpr int kRows = rows_of(WorkKind::kSomeRows);                        ///< query rows of a block
  static constexpr int kKeys = kTileKeys;                                           ///< keys of a tile
  static constexpr bool kExactWeights = Type == ScalarType::kBFloat16;              ///< see AttendShape
  static constexpr int kColumnTiles = HeadDim / kBoxColumns;                        ///< of 64 columns
  static constexpr unsigned kColumnTileBytes = kKeys * 128;                         ///< of one
  static constexpr unsigned kTileBytes = kColumnTiles * kColumnTileBytes;           ///< of a tile
  static constexpr int kSlots = 768 / HeadDim;                                      ///< tiles of the ring
  static constexpr unsigned kQueriesAt = 0;                                         ///< the tile of queries
  static constexpr unsigned kBarriersAt = kTileBytes * (1 + kSlots);                ///< two a slot
  static constexpr int kSharedBytes = static_cast<int>(kBarriersAt) + 16 * kSlots;  ///< of a block
  static constexpr int kTileBoxes = kKeys / kBoxKeys;  ///< of a tile's 64 columns
  /// Of a thread: two blocks and two of decode_merge_kernel are on a multiprocessor, or two blocks alone where
  /// weights are exact.
  static constexpr int kRegisters = kExactWeights ? 192 : 152;
  static_assert(kRows == kKeys, "prefillshare: SharedDecodeShape has one size of tiles");

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
  /// Where 16 bytes of a row of a tile lie.
  [[nodiscard]] static __device__ constexpr unsigned place(int row, int chunk) {
    return static_cast<unsigned>(chunk / 8) * kColumnTileBytes +
           static_cast<unsigned>(row * 128 + ((chunk ^ row) & 7) * 16);
  }
};

#if CODEGEMM_HAS_WGMMA
namespace detail {

// The items of a block one after the other, found alike by those who load and those who multiply.
struct DecodeCursor {
  KeyFamily family;
  DecodeItem item;

  __device__ __forceinline__ DecodeCursor(const DecodeArgs& a, const BlockStart& start, int lane)
      : family(start.family), start_(start), at_(start.at), number_(start.number), lane_(lane) {
    item.find(family, start_, at_, a.lanes, lane_);
  }
  // Of shared keys, not of a sequence's own.
  [[nodiscard]] __device__ __forceinline__ bool is_shared() const { return start_.first % 2 != 0; }
  [[nodiscard]] __device__ __forceinline__ int first_key() const {
    return family.key_begin + item.tile * kTileKeys;
  }
  [[nodiscard]] __device__ __forceinline__ int end() const {
    return min(family.key_end, first_key() + item.count * kTileKeys);
  }
  // False after the last.
  __device__ __forceinline__ bool next(const DecodeArgs& a) {
    at_ += item.count;
    if (at_ >= start_.end) return false;
    if (at_ == family.work_begin + family.tiles * family.row_tiles * (a.kv_heads / a.lanes)) {
      do {
        family = load_record(a.families[is_shared() ? 1 : 0] + ++number_);
      } while (family.tiles == 0);
    }
    item.find(family, start_, at_, a.lanes, lane_);
    return true;
  }

 private:
  const BlockStart& start_;
  int at_;
  int number_;
  int lane_;
};

// The warp that loads: tiles of K and V in the order in which they are multiplied, K0, K1, V0, K2, V1, ... A
// lane has every 32nd box of an item, whose page it looks up 32 boxes ahead. Asserts nothing, see
// load_prefill().
template <class Shape>
__device__ __forceinline__ void load_shared(const DecodeArgs& a, const BlockStart& start, int head_lane,
                                            unsigned shared) {
  constexpr int kBoxes = Shape::kTileBoxes;
  constexpr int kTilesAhead = 32 / kBoxes;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  RingPlace<Shape> place;
  DecodeCursor cursor(a, start, head_lane);
  do {
    const int first = cursor.first_key();
    const int end = cursor.end();
    const std::int32_t* const pages = a.indices + cursor.family.page_begin;
    const auto page_at = [&](int box) {
      const int key = first + box * kBoxKeys;
      return key < end ? __ldg(pages + page_of(a.kv, key)) : -1;
    };
    const auto ask = [&](const CUtensorMap& map, int tile, int page) {
      codegemm::cuda::detail::wait_for_phase(shared + Shape::free_at(place.slot), place.phase ^ 1U);
      if (lane / kBoxes == tile % kTilesAhead) {
        const unsigned full = shared + Shape::full_at(place.slot);
        if (page >= 0) {
          codegemm::cuda::detail::arrive_and_expect(full, kBoxKeys * Shape::kHeadDim * 2U);
          const int box = lane % kBoxes;
          const int key = first + tile * kTileKeys + box * kBoxKeys;
          const int slot = key - page_of(a.kv, key) * a.kv.page_size;
          const unsigned to =
              shared + Shape::tile_at(place.slot) + static_cast<unsigned>(box * kBoxKeys * 128);
#pragma unroll
          for (int c = 0; c < Shape::kColumnTiles; ++c) {
            codegemm::cuda::detail::copy_box_4(to + static_cast<unsigned>(c) * Shape::kColumnTileBytes, &map,
                                               c * kBoxColumns, cursor.item.kv_head, slot, page, full);
          }
        } else {
          codegemm::cuda::detail::arrive(full);
        }
      }
      __syncwarp();
      place.next();
    };
    int before = -1;
    int now = page_at(lane);
    int ahead = page_at(32 + lane);
    const int tiles = cursor.item.count;
    if (a.early_tiles > 0 && lane >= Shape::kSlots / 2 * kBoxes && now >= 0) {
      const int key = first + lane * kBoxKeys;
      const int slot = key - page_of(a.kv, key) * a.kv.page_size;
#pragma unroll
      for (int c = 0; c < Shape::kColumnTiles; ++c) {
        codegemm::cuda::detail::prefetch_box_4(&a.maps.k, c * kBoxColumns, cursor.item.kv_head, slot, now);
        codegemm::cuda::detail::prefetch_box_4(&a.maps.v, c * kBoxColumns, cursor.item.kv_head, slot, now);
      }
    }
    for (int t = 0; t <= tiles; ++t) {
      if (t > 0 && t % kTilesAhead == 0) {
        before = now;
        now = ahead;
        ahead = page_at((t / kTilesAhead + 1) * 32 + lane);
      }
      if (t < tiles) ask(a.maps.k, t, now);
      if (t > 0) ask(a.maps.v, t - 1, t % kTilesAhead == 0 ? before : now);
    }
  } while (cursor.next(a));
}

// What a block's multiplying threads have to fetch of an item by themselves: its queries, and the newest key,
// which the kernel before may have written after the copy engine read it.
template <class Shape>
struct ItemInputs {
  static constexpr int kChunks = Shape::kHeadDim / 8;  // of 16 bytes in a row

  int newest = -1;  // the key, -1: it is not among the item's or was there before
  uint4 row = {};   // 16 bytes of it: K of the first kChunks threads, V of the next

  __device__ __forceinline__ void fetch(const DecodeArgs& a, const DecodeCursor& cursor, unsigned shared) {
    const KeyFamily& family = cursor.family;
    const int item_rows = cursor.is_shared() ? Shape::kRows : kTailRows;
    QueryRows rows;
    rows.q = a.q;
    rows.stride = a.q_stride;
    rows.first_token = family.first_token;
    rows.first_head = cursor.item.kv_head * a.group;
    rows.group = a.group;
    const int first_row = cursor.item.row_tile * item_rows;
    const int count = min(item_rows, family.rows - first_row);
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < Shape::kRows * kChunks / Shape::kMultipliers; ++i) {
      const int row_at = (i * Shape::kMultipliers + thread) / kChunks;
      const int chunk = thread % kChunks;
      const bool there = row_at < count;
      copy_or_zero(shared + Shape::kQueriesAt + Shape::place(row_at, chunk),
                   query_row(rows, there ? first_row + row_at : 0, Shape::kHeadDim) + chunk * 8, there);
    }
    end_copy_group();
    newest = -1;
    if (a.overlap && (!cursor.is_shared() || family.shared >= 0) && cursor.end() == family.key_end) {
      newest = family.key_end - 1;
      if (thread < 2 * kChunks) {
        const int number = page_of(a.kv, newest);
        const std::int64_t from = a.indices[family.page_begin + number] * a.kv.page_stride +
                                  (newest - number * a.kv.page_size) * a.kv.token_stride +
                                  cursor.item.kv_head * a.kv.head_stride + thread % kChunks * 8;
        row = __ldcg(reinterpret_cast<const uint4*>((thread < kChunks ? a.kv.k : a.kv.v) + from));
      }
    }
  }
  // K, or V, of the newest key into a tile that is there, whose first key is `first`.
  __device__ __forceinline__ void mend(unsigned tile, int first, bool of_values) const {
    const int thread = static_cast<int>(threadIdx.x) - (of_values ? kChunks : 0);
    if (newest >= 0 && thread >= 0 && thread < kChunks) {
      store_shared16(tile + Shape::place(newest - first, thread), row);
    }
  }
};

// The warpgroup that multiplies. While a tile's softmax runs, the values of the tile before are multiplied.
template <class Shape>
__device__ __forceinline__ void multiply_shared(const DecodeArgs& a, const BlockStart& start, int head_lane,
                                                unsigned shared) {
  using codegemm::cuda::detail::wgmma_fence;
  using codegemm::cuda::detail::wgmma_wait;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const std::uint64_t queries = codegemm::cuda::detail::describe_tokens(shared + Shape::kQueriesAt);
  const auto keys_at = [&](const RingPlace<Shape>& of) {
    return codegemm::cuda::detail::describe_tokens(shared + Shape::tile_at(of.slot));
  };
  const auto wait_for_tile = [&](const RingPlace<Shape>& of) {
    codegemm::cuda::detail::wait_for_phase(shared + Shape::full_at(of.slot), of.phase);
  };
  const auto release = [&](const RingPlace<Shape>& of) {
    if (lane == 0) codegemm::cuda::detail::arrive(shared + Shape::free_at(of.slot));
  };
  // All of the warpgroup, with what its threads have written for products to read.
  const auto meet = [] {
    publish_to_products();
    wait_for_turn<Shape::kMultipliers>(1);
  };
  RingPlace<Shape> place;
  WgmmaMultiplier<Shape> m;
  DecodeCursor cursor(a, start, head_lane);
  ItemInputs<Shape> inputs;
  if (a.overlap) {
    codegemm::cuda::detail::wait_for_previous_kernel();
    codegemm::cuda::detail::allow_next_kernel();
  }
  inputs.fetch(a, cursor, shared);
  for (bool more = true; more;) {
    const int tiles = cursor.item.count;
    const int first = cursor.first_key();
    const int end = cursor.end();
    const int last_first = first + (tiles - 1) * kTileKeys;
    wait_for_copies<0>();
    meet();
    m.clear();
    const auto await_keys = [&](const RingPlace<Shape>& of, int tile) {
      wait_for_tile(of);
      if (inputs.newest >= 0 && tile + 1 == tiles) {
        inputs.mend(shared + Shape::tile_at(of.slot), last_first, false);
        meet();
      }
    };
    const auto mask = [&](int tile) {
      const int limit = end - first - tile * kTileKeys;
      if (limit < kTileKeys) m.mask(limit - lane % 4 * 2, limit - lane % 4 * 2);
    };
    await_keys(place, 0);
    wgmma_fence();
    m.multiply_keys(queries, keys_at(place));
    wgmma_wait<0>();
    hold(m.score);
    release(place);
    place.next();
    mask(0);
    m.weigh(a.scale_log2);
    m.round_weights();
    for (int t = 1; t < tiles; ++t) {
      const RingPlace<Shape> of_keys = place;
      place.next();
      await_keys(of_keys, t);
      wait_for_tile(place);
      wgmma_fence();
      m.multiply_keys(queries, keys_at(of_keys));
      m.multiply_values(describe_values(shared + Shape::tile_at(place.slot), Shape::kColumnTileBytes));
      wgmma_wait<1>();
      hold(m.score);
      release(of_keys);
      mask(t);
      m.weigh(a.scale_log2);
      // See multiply_prefill(): the wait stays behind the weights.
      __syncwarp(__ballot_sync(0xFFFFFFFFU, !(m.sum[0] + m.sum[1] < 0.0F)));
      wgmma_wait<0>();
      hold(m.out);
      release(place);
      place.next();
      m.rescale();
      m.round_weights();
    }
    wait_for_tile(place);
    // Values past the end count nothing, but not if they are no numbers.
    const unsigned values = shared + Shape::tile_at(place.slot);
    if (end < last_first + kTileKeys) {
      constexpr int kChunks = Shape::kHeadDim / 8;
      for (int i = static_cast<int>(threadIdx.x) + (end - last_first) * kChunks; i < kTileKeys * kChunks;
           i += Shape::kMultipliers) {
        store_shared16(values + Shape::place(i / kChunks, i % kChunks), uint4{});
      }
    }
    inputs.mend(values, last_first, true);
    meet();  // all have read the queries, too
    wgmma_fence();
    m.multiply_values(describe_values(values, Shape::kColumnTileBytes));
    const DecodePartials& partials = a.partials[cursor.is_shared() ? 1 : 0];
    const int item_rows = cursor.is_shared() ? Shape::kRows : kTailRows;
    const int rows = cursor.family.rows - cursor.item.row_tile * item_rows;  // of the item, or more
    const std::int64_t first_at = static_cast<std::int64_t>(cursor.item.part) * partials.rows;
    more = cursor.next(a);
    if (more) inputs.fetch(a, cursor, shared);
    wgmma_wait<0>();
    hold(m.out);
    release(place);
    place.next();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = m.sum[h];
      sum += __shfl_xor_sync(0xFFFFFFFFU, sum, 1);
      sum += __shfl_xor_sync(0xFFFFFFFFU, sum, 2);
      const int row = warp * 16 + lane / 4 + 8 * h;
      if (row >= min(item_rows, rows)) continue;
      const std::int64_t at = first_at + row;
      if (lane % 4 == 0) partials.top[at] = make_float2(m.top[h] * a.scale_log2, sum);
      float* const out = partials.out + at * Shape::kHeadDim + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < Shape::kHeadDim / 8; ++n) {
        *reinterpret_cast<float2*>(out + n * 8) = make_float2(m.out[n * 4 + 2 * h], m.out[n * 4 + 2 * h + 1]);
      }
    }
  }
}

}  // namespace detail
#endif

#if CUDART_VERSION >= 12040
#define PREFILLSHARE_SHARED_BOUNDS __launch_bounds__(Shape::kThreads) __maxnreg__(Shape::kRegisters)
#else
#define PREFILLSHARE_SHARED_BOUNDS __launch_bounds__(Shape::kThreads, 2)
#endif

/// What decode_kernel computes where sequences share pages, always into parts that decode_merge_kernel puts
/// together. Built for compute
/// capability 9.0a alone; elsewhere it traps.
template <class Shape>
__global__ void PREFILLSHARE_SHARED_BOUNDS decode_shared_kernel(const __grid_constant__ DecodeArgs a) {
#if CODEGEMM_HAS_WGMMA
  extern __shared__ __align__(1024) char decode_shared_memory[];
  const int superblock = static_cast<int>(blockIdx.x) / a.lanes;
  const int head_lane = static_cast<int>(blockIdx.x) - superblock * a.lanes;
  if (!a.overlap) {
    codegemm::cuda::detail::wait_for_previous_kernel();
    codegemm::cuda::detail::allow_next_kernel();
  }
  const BlockStart start = detail::load_record(a.starts + superblock);
  if (start.at >= start.end) {
    // No block of the next kernel may find this grid ended while the one before still runs.
    if (a.overlap) codegemm::cuda::detail::wait_for_previous_kernel();
    return;
  }
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(decode_shared_memory));
  if (threadIdx.x == 0) {
    codegemm::cuda::detail::prefetch_map(&a.maps.k);
    codegemm::cuda::detail::prefetch_map(&a.maps.v);
    for (int i = 0; i < Shape::kSlots; ++i) {
      codegemm::cuda::detail::init_barrier(shared + Shape::full_at(i), Shape::kTileBoxes);
      codegemm::cuda::detail::init_barrier(shared + Shape::free_at(i), Shape::kMultipliers / 32);
    }
    codegemm::cuda::detail::publish_barriers();
  }
  __syncthreads();
  if (__shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) / Shape::kMultipliers, 0) != 0) {
    detail::load_shared<Shape>(a, start, head_lane, shared);
  } else {
    detail::multiply_shared<Shape>(a, start, head_lane, shared);
  }
#else
  static_cast<void>(a);
  __trap();
#endif
}
#undef PREFILLSHARE_SHARED_BOUNDS

}  // namespace prefillshare::cuda
