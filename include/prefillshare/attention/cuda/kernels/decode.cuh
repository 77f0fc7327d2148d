// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/kernels/decode.cuh - one query token a sequence over its pages, keys split
// evenly over all blocks.
// Layer: attention/cuda/kernels (device).
#pragma once

#include <type_traits>

#include <codegemm/cuda/block/intrinsics.cuh>
#include <prefillshare/attention/cuda/block/attend.cuh>
#include <prefillshare/attention/cuda/kernels/decode_store.cuh>
#include <prefillshare/attention/cuda/kernels/decode_work.cuh>

namespace prefillshare::cuda {

namespace detail {

// In place of BoxBarriers.
struct NoBoxes {};

// Tiles of keys of one item, in the shape that its kind asks for.
template <class Shape, WorkKind Kind, DecodeSort Sort, class Barriers>
__device__ __forceinline__ void decode_item(const DecodeArgs& a, const KeyFamily& family,
                                            const DecodeItem& item, bool waits, char* shared_memory,
                                            Barriers& barriers) {
  const DecodePartials& partials = a.partials[Kind == WorkKind::kTail ? 0 : 1];
  QueryRows rows = query_rows_of(a, family.first_token, item.kv_head);
  rows.first_row = item.row_tile * Shape::kRows;
  rows.rows = family.rows;
  KeyRange keys;
  keys.begin = family.key_begin + item.tile * kTileKeys;
  keys.end = min(family.key_end, keys.begin + item.count * kTileKeys);
  keys.whole = keys.end;
  const int of_first = family.key_end - family.rows / a.group + 1;  // keys that the family's first token sees
  constexpr bool kCausal = Sort == DecodeSort::kCausal;
  if constexpr (kCausal) keys.whole = min(keys.end, of_first + rows.first_row / a.group);
  const auto limit = [&](int r, int h) {
    const int row = rows.first_row + tile_row<Shape>(r) + h * 8 + static_cast<int>(threadIdx.x) % 32 / 4;
    return kCausal ? min(keys.end, of_first + row / a.group) : keys.end;
  };
  AttendState<Shape> state;
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(shared_memory));
  const std::int32_t* const pages = a.indices + family.page_begin;
  const AwaitNewest await{waits, Kind == WorkKind::kTail || family.shared >= 0 ? family.key_end - 1 : -1};
  if constexpr (std::is_same_v<Barriers, NoBoxes>) {
    attend(state, shared, a.kv, pages, item.kv_head, rows, keys, limit, a.scale_log2, await);
  } else {
#if __CUDA_ARCH__ >= 900
    attend_boxes(state, shared, barriers, a.kv, a.maps, pages, item.kv_head, rows, keys, a.scale_log2, await);
#endif
  }
  if constexpr (Shape::kWarpsN > 1) {
    __syncthreads();
    const bool is_alone = Kind == WorkKind::kTail && family.shared < 0;
    const bool whole = is_alone && item.count == family.tiles;
    store_keys_split(state, shared_memory, a, partials, rows, whole, item.part);
    if constexpr (Sort == DecodeSort::kAlone) {
      if (is_alone && !whole && a.arrivals != nullptr) {
        merge_if_last<Shape>(a, family, rows, item.item, item.kv_head % a.lanes);
      }
    }
  } else {
    store_rows_split(state, a, partials, rows, item.part);
  }
#if __CUDA_ARCH__ >= 900
  if constexpr (!std::is_same_v<Barriers, NoBoxes>) leave_to_boxes();
#endif
}

}  // namespace detail

#if CUDART_VERSION >= 12040
#define PREFILLSHARE_DECODE_BOUNDS __launch_bounds__(Tail::kThreads) __maxnreg__(kDecodeRegisters<Sort>)
#else  // as many as two blocks may have
#define PREFILLSHARE_DECODE_BOUNDS __launch_bounds__(Tail::kThreads, 2)
#endif

/// Each block takes its numbers of the work, which may end one item and begin another. Items of sequences
/// that share nothing go to the output, those of several blocks through the one that ends last, if those are
/// few; what else there is of a row is put together by decode_merge_kernel. Boxes: the copy engine brings the
/// tiles, see attend_boxes(); of sequences alone, on compute capability 9.0.
template <class Tail, class Few, class Some, class Many, DecodeSort Sort, bool Boxes>
__global__ void PREFILLSHARE_DECODE_BOUNDS decode_kernel(const __grid_constant__ DecodeArgs a) {
  static_assert(
      Tail::kThreads == Few::kThreads && Tail::kThreads == Some::kThreads && Tail::kThreads == Many::kThreads,
      "prefillshare: decode_kernel's shapes share one launch");
  static_assert(!Boxes || Sort == DecodeSort::kAlone,
                "prefillshare: decode_kernel takes shared keys without boxes");
  static_assert(Tail::kRows == kTailRows && Few::kRows == rows_of(WorkKind::kFewRows) &&
                    Some::kRows == rows_of(WorkKind::kSomeRows) && Many::kRows == kManyRows,
                "prefillshare: decode_kernel's shapes have the rows that prepare() counts on");
  extern __shared__ __align__(1024) char decode_memory[];  // of the 128-byte swizzle
  const int superblock = static_cast<int>(blockIdx.x) / a.lanes;
  const int lane = static_cast<int>(blockIdx.x) - superblock * a.lanes;
  bool waits = a.overlap;
#if __CUDA_ARCH__ >= 900
  if constexpr (Boxes) {
    if (threadIdx.x == 0) {
      codegemm::cuda::detail::prefetch_map(&a.maps.k);
      codegemm::cuda::detail::prefetch_map(&a.maps.v);
    }
  }
#endif
  if (!waits) {
    codegemm::cuda::detail::wait_for_previous_kernel();
    codegemm::cuda::detail::allow_next_kernel();
  }
  const BlockStart start = detail::load_record(a.starts + superblock);
  if (start.at >= start.end) {
    // No block of the next kernel may find this grid ended while the one before still runs.
    if (waits) codegemm::cuda::detail::wait_for_previous_kernel();
    if (start.has_empty != 0) detail::store_empty<Tail::kHeadDim>(a);
    return;
  }
  std::conditional_t<Boxes, BoxBarriers<Tail>, detail::NoBoxes> barriers;
#if __CUDA_ARCH__ >= 900
  if constexpr (Boxes) {
    barriers.init(static_cast<unsigned>(__cvta_generic_to_shared(decode_memory)) + Tail::kSharedBytes);
  }
#endif
  const bool is_shared = Sort != DecodeSort::kAlone && start.is_shared != 0;
  KeyFamily family = start.family;
  int number = start.number;
  int at = start.at;
  while (true) {
    detail::DecodeItem item;
    item.find(family, start, at, a.lanes, lane);
    const WorkKind kind =
        is_shared ? shared_kind(family.rows, Sort == DecodeSort::kSharedFew) : WorkKind::kTail;
    if (Sort != DecodeSort::kCausal && kind == WorkKind::kTail) {
      detail::decode_item<Tail, WorkKind::kTail, Sort>(a, family, item, waits, decode_memory, barriers);
    } else if constexpr (Sort != DecodeSort::kAlone) {
      if (kind == WorkKind::kFewRows) {
        detail::decode_item<Few, WorkKind::kFewRows, Sort>(a, family, item, waits, decode_memory, barriers);
      } else if (kind == WorkKind::kSomeRows) {
        detail::decode_item<Some, WorkKind::kSomeRows, Sort>(a, family, item, waits, decode_memory, barriers);
      } else if constexpr (Sort != DecodeSort::kSharedFew) {
        detail::decode_item<Many, WorkKind::kManyRows, Sort>(a, family, item, waits, decode_memory, barriers);
      }
    }
    waits = false;
    at += item.count;
    if (at >= start.end) break;
    if (at == family.work_begin + family.tiles * family.row_tiles * (a.kv_heads / a.lanes)) {
      do {
        family = detail::load_record(a.families[is_shared ? 1 : 0] + ++number);
      } while (family.tiles == 0);
    }
    __syncthreads();  // before shared memory is written again
  }
  if (start.has_empty != 0) detail::store_empty<Tail::kHeadDim>(a);
}
#undef PREFILLSHARE_DECODE_BOUNDS

}  // namespace prefillshare::cuda
