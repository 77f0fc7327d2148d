// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/kernels/decode_shared.cuh - one query token a sequence over pages that
// sequences share, and over their own, on Hopper's asynchronous tensor cores.
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

/// What a block of decode_shared_kernel holds in shared memory: a tile of 64 query rows, a ring of tiles of
/// K or V, 64 keys each, all swizzled as in PrefillWgmmaShape, notes of items, and barriers. Less than half
/// of a multiprocessor's, so that the next call's keys come while this one multiplies, and with room for
/// some of decode_merge_kernel's blocks. Offsets are bytes from the beginning.
template <ScalarType Type, int HeadDim>
struct SharedDecodeShape {
  static_assert(HeadDim % kBoxColumns == 0 && HeadDim <= 128,
                "prefillshare: SharedDecodeShape HeadDim must be 64 or 128");
  static constexpr ScalarType kType = Type;                                ///< of the cache
  static constexpr int kHeadDim = HeadDim;                                 ///< elements of a head
  static constexpr int kMultipliers = 128;                                 ///< threads that multiply
  static constexpr int kThreads = kMultipliers + 32;                       ///< and a warp that loads
  static constexpr int kRows = rows_of(WorkKind::kSomeRows);               ///< query rows of a block
  static constexpr int kKeys = kTileKeys;                                  ///< keys of a tile
  static constexpr bool kExactWeights = Type == ScalarType::kBFloat16;     ///< see AttendShape
  static constexpr int kColumnTiles = HeadDim / kBoxColumns;               ///< of 64 columns
  static constexpr unsigned kColumnTileBytes = kKeys * 128;                ///< of one
  static constexpr unsigned kTileBytes = kColumnTiles * kColumnTileBytes;  ///< of a tile
  static constexpr int kSlots = 640 / HeadDim;                             ///< tiles of the ring
  static constexpr int kNotes = 8;            ///< of items: more than the ring can have tiles of
  static constexpr unsigned kNoteBytes = 48;  ///< of one
  static constexpr unsigned kQueriesAt = 0;   ///< the tile of queries
  static constexpr unsigned kNotesAt = kTileBytes * (1 + kSlots);                   ///< notes of items
  static constexpr unsigned kBarriersAt = kNotesAt + kNoteBytes * kNotes;           ///< two a slot
  static constexpr int kSharedBytes = static_cast<int>(kBarriersAt) + 16 * kSlots;  ///< of a block
  static constexpr int kTileBoxes = kKeys / kBoxKeys;  ///< of a tile's 64 columns
  /// Of a thread: two blocks and two of decode_merge_kernel are on a multiprocessor, or two blocks alone
  /// where weights are exact.
  static constexpr int kRegisters = kExactWeights ? 192 : 152;
  static_assert(kRows == kKeys, "prefillshare: SharedDecodeShape has one size of tiles");
  static_assert(kSlots < 2 * kNotes, "prefillshare: SharedDecodeShape has too few notes");

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
  /// The note of a block's item.
  [[nodiscard]] static __device__ constexpr unsigned note_at(int item) {
    return kNotesAt + kNoteBytes * (static_cast<unsigned>(item) % kNotes);
  }
  /// Named barrier, of all threads: it is there. Those before are the block's and the multipliers'.
  [[nodiscard]] static __device__ constexpr int noted(int item) { return 2 + item % kNotes; }
  /// Where 16 bytes of a row of a tile lie.
  [[nodiscard]] static __device__ constexpr unsigned place(int row, int chunk) {
    return static_cast<unsigned>(chunk / 8) * kColumnTileBytes +
           static_cast<unsigned>(row * 128 + ((chunk ^ row) & 7) * 16);
  }
};

#if CODEGEMM_HAS_WGMMA
namespace detail {

// What those who multiply have to know of an item. The warp that loads has found it when they come to it.
struct alignas(16) ItemNote {
  int tiles = 0;
  int last_keys = 0;  // keys of the last tile
  int kv_head = 0;
  int first_token = 0;
  int first_row = 0;
  int rows = 0;  // from first_row on, at most those of an item
  int part = 0;
  int is_shared = 0;     // 1: of shared keys, not of a sequence's own
  int newest_page = -1;  // of the key that the kernel before may have written after the copy engine read it,
                         // the item's last; -1: there is none
  int newest_slot = 0;
  int is_last = 0;  // 1: of the block's items
  int unused = 0;
};

// The warp that loads: goes through the block's items and for each brings tiles of K and V in the order in
// which they are multiplied, K0, K1, V0, K2, V1, ... A lane has every 32nd box of an item, whose page it
// looks up 32 boxes ahead. Asserts nothing, see load_prefill().
template <class Shape>
__device__ __forceinline__ void load_shared(const DecodeArgs& a, const BlockStart& start, int head_lane,
                                            unsigned shared) {
  constexpr int kBoxes = Shape::kTileBoxes;
  constexpr int kTilesAhead = 32 / kBoxes;
  static_assert(sizeof(ItemNote) == Shape::kNoteBytes);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool is_shared = start.is_shared != 0;
  const int item_rows = is_shared ? Shape::kRows : kTailRows;
  RingPlace<Shape> place;
  KeyFamily family = start.family;
  int family_number = start.number;
  int at = start.at;
  for (int number = 0; at < start.end; ++number) {
    if (at >= family.work_begin + family.tiles * family.row_tiles * (a.kv_heads / a.lanes)) {
      do {
        family = load_record(a.families[is_shared ? 1 : 0] + ++family_number);
      } while (family.tiles == 0);
    }
    DecodeItem item;
    item.find(family, start, at, a.lanes, head_lane);
    at += item.count;
    const int first = family.key_begin + item.tile * kTileKeys;
    const int end = min(family.key_end, first + item.count * kTileKeys);
    const std::int32_t* const pages = a.indices + family.page_begin;
    const auto page_at = [&](int box) {
      const int key = first + box * kBoxKeys;
      return key < end ? __ldg(pages + page_of(a.kv, key)) : -1;
    };
    int before = -1;
    int now = page_at(lane);
    int ahead = page_at(32 + lane);
    const int tiles = item.count;
    if (lane == 0) {
      ItemNote note;
      note.tiles = tiles;
      note.last_keys = end - first - (tiles - 1) * kTileKeys;
      note.kv_head = item.kv_head;
      note.first_token = family.first_token;
      note.first_row = item.row_tile * item_rows;
      note.rows = min(item_rows, family.rows - note.first_row);
      note.part = item.part;
      note.is_shared = is_shared ? 1 : 0;
      if (a.overlap && (!is_shared || family.shared >= 0) && end == family.key_end) {
        const int page = page_of(a.kv, end - 1);
        note.newest_page = __ldg(pages + page);
        note.newest_slot = end - 1 - page * a.kv.page_size;
      }
      note.is_last = at >= start.end ? 1 : 0;
      const auto* const words = reinterpret_cast<const uint4*>(&note);
#pragma unroll
      for (unsigned i = 0; i < sizeof(note) / 16; ++i) {
        store_shared16(shared + Shape::note_at(number) + i * 16, words[i]);
      }
    }
    __syncwarp();
    give_turn<Shape::kThreads>(Shape::noted(number));
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
                                               c * kBoxColumns, item.kv_head, slot, page, full);
          }
        } else {
          codegemm::cuda::detail::arrive(full);
        }
      }
      __syncwarp();
      place.next();
    };
    for (int t = 0; t <= tiles; ++t) {
      if (t > 0 && t % kTilesAhead == 0) {
        before = now;
        now = ahead;
        ahead = page_at((t / kTilesAhead + 1) * 32 + lane);
      }
      if (t < tiles) ask(a.maps.k, t, now);
      if (t > 0) ask(a.maps.v, t - 1, t % kTilesAhead == 0 ? before : now);
    }
  }
}

// What a block's multiplying threads fetch of an item by themselves, after the kernel before: its queries,
// and the newest key.
template <class Shape>
struct ItemInputs {
  static constexpr int kChunks = Shape::kHeadDim / 8;  // of 16 bytes in a row

  ItemNote note;
  uint4 row = {};  // 16 bytes of the newest key: K of the first kChunks threads, V of the next

  // Item `number` of the block.
  __device__ __forceinline__ void fetch(const DecodeArgs& a, int number, unsigned shared) {
    wait_for_turn<Shape::kThreads>(Shape::noted(number));
    auto* const words = reinterpret_cast<unsigned*>(&note);
#pragma unroll
    for (unsigned i = 0; i < sizeof(note) / 16; ++i) {
      unsigned four[4];
      load_words(four, shared + Shape::note_at(number) + i * 16);
#pragma unroll
      for (unsigned e = 0; e < 4; ++e) words[i * 4 + e] = four[e];
    }
    const QueryRows rows = query_rows_of(a, note.first_token, note.kv_head);
    const int thread = static_cast<int>(threadIdx.x);
    const int chunk = thread % kChunks;
#pragma unroll
    for (int i = 0; i < Shape::kRows * kChunks / Shape::kMultipliers; ++i) {
      const int at = (i * Shape::kMultipliers + thread) / kChunks;
      const bool there = at < note.rows;
      copy_or_zero(shared + Shape::kQueriesAt + Shape::place(at, chunk),
                   query_row(rows, there ? note.first_row + at : 0, Shape::kHeadDim) + chunk * 8, there);
    }
    end_copy_group();
    if (note.newest_page >= 0 && thread < 2 * kChunks) {
      const std::int64_t from = note.newest_page * a.kv.page_stride + note.newest_slot * a.kv.token_stride +
                                note.kv_head * a.kv.head_stride + chunk * 8;
      row = __ldcg(reinterpret_cast<const uint4*>((thread < kChunks ? a.kv.k : a.kv.v) + from));
    }
  }
  // K, or V, of the newest key into the last tile, which is there.
  __device__ __forceinline__ void mend(unsigned tile, bool of_values) const {
    const int thread = static_cast<int>(threadIdx.x) - (of_values ? kChunks : 0);
    if (note.newest_page >= 0 && thread >= 0 && thread < kChunks) {
      store_shared16(tile + Shape::place(note.last_keys - 1, thread), row);
    }
  }
};

// The warpgroup that multiplies. While a tile's softmax runs, the values of the tile before are multiplied.
template <class Shape>
__device__ __forceinline__ void multiply_shared(const DecodeArgs& a, unsigned shared) {
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
  ItemInputs<Shape> inputs;
  if (a.overlap) {
    codegemm::cuda::detail::wait_for_previous_kernel();
    codegemm::cuda::detail::allow_next_kernel();
  }
  inputs.fetch(a, 0, shared);
  bool is_last = false;
  for (int number = 0; !is_last; ++number) {
    const int tiles = inputs.note.tiles;
    const int last_keys = inputs.note.last_keys;
    wait_for_copies<0>();
    meet();
    m.clear();
    const auto await_keys = [&](const RingPlace<Shape>& of, int tile) {
      wait_for_tile(of);
      if (inputs.note.newest_page >= 0 && tile + 1 == tiles) {
        inputs.mend(shared + Shape::tile_at(of.slot), false);
        meet();
      }
    };
    const auto mask = [&](int tile) {
      if (tile + 1 == tiles && last_keys < kTileKeys) {
        m.mask(last_keys - lane % 4 * 2, last_keys - lane % 4 * 2);
      }
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
    if (last_keys < kTileKeys) {
      constexpr int kChunks = Shape::kHeadDim / 8;
      for (int i = static_cast<int>(threadIdx.x) + last_keys * kChunks; i < kTileKeys * kChunks;
           i += Shape::kMultipliers) {
        store_shared16(values + Shape::place(i / kChunks, i % kChunks), uint4{});
      }
    }
    inputs.mend(values, true);
    meet();  // all have read the queries, too
    wgmma_fence();
    m.multiply_values(describe_values(values, Shape::kColumnTileBytes));
    const DecodePartials& partials = a.partials[inputs.note.is_shared];
    const int rows = inputs.note.rows;
    const std::int64_t first_at = static_cast<std::int64_t>(inputs.note.part) * partials.rows;
    is_last = inputs.note.is_last != 0;
    if (!is_last) inputs.fetch(a, number + 1, shared);
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
      if (row >= rows) continue;
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
/// together. Built for compute capability 9.0a alone; elsewhere it traps.
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
    detail::multiply_shared<Shape>(a, shared);
  }
#else
  static_cast<void>(a);
  __trap();
#endif
}
#undef PREFILLSHARE_SHARED_BOUNDS

}  // namespace prefillshare::cuda
