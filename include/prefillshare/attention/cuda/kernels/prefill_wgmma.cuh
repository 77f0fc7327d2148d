// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/kernels/prefill_wgmma.cuh - many query tokens of each sequence over its pages,
// causal, on Hopper's asynchronous tensor cores.
// Layer: attention/cuda/kernels (device).
// See: FlashAttention-3 (arXiv 2407.08608) sections 3.1 and 3.2 for the two overlaps.
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/intrinsics.cuh>
#include <prefillshare/attention/cuda/block/tile_ring.cuh>
#include <prefillshare/attention/cuda/block/wgmma_multiplier.cuh>
#include <prefillshare/attention/cuda/block/wgmma_products.cuh>
#include <prefillshare/attention/cuda/kernels/prefill.cuh>

namespace prefillshare::cuda {

#if CODEGEMM_HAS_WGMMA
namespace detail {

// What a block takes in round `round`, which each warp finds by itself: who multiplies does it while the last
// products run. All lanes.
template <class Shape>
[[nodiscard]] __device__ __forceinline__ PrefillItem find_item(const PrefillArgs& a, int round) {
  // To and fro: who had the longest item of a round gets the shortest of the next.
  const int place = static_cast<int>(round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
  const int number = round * static_cast<int>(gridDim.x) + place;
  const PrefillTile found = find_tile(a, number / a.kv_heads, Shape::kRows);
  PrefillItem item;
  if (found.sequence < 0) return item;
  item.kv_head = number % a.kv_heads;
  item.sequence = found.sequence;
  item.first_query = a.query_indptr[found.sequence];
  const int queries = a.query_indptr[found.sequence + 1] - item.first_query;
  const int pages = a.indptr[found.sequence + 1] - a.indptr[found.sequence];
  const int context = pages > 0 ? (pages - 1) * a.kv.page_size + a.last_page_len[found.sequence] : 0;
  item.first_position = context - queries;
  item.rows = queries * a.group;
  item.first_row = found.tile * Shape::kRows;
  const int last_row = min(item.first_row + Shape::kRows, item.rows) - 1;
  item.keys = max(0, item.first_position + last_row / a.group + 1);
  return item;
}

// The warpgroup that loads: goes through the block's items and for each brings the queries, then tiles of K
// and V in the order in which they are multiplied: K0, K1, V0, K2, V1, ... Asserts nothing: a call in any
// branch of a kernel makes the compiler wait for each of its products.
template <class Shape>
__device__ __forceinline__ void load_prefill(const PrefillArgs& a, char* shared_memory) {
  TileLoader<Shape> loader(shared_memory);
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(shared_memory));
  const int row = static_cast<int>(threadIdx.x) % 128;  // of queries and of a tile
  unsigned phase = 0;                                   // of the queries' barrier
  const bool in_eights = a.kv.page_size % 8 == 0 && a.kv.token_stride < (1 << 24);
  const int step = in_eights ? static_cast<int>(a.kv.token_stride) : 0;
  for (int round = 0;; ++round, phase ^= 1U) {
    const PrefillItem item = find_item<Shape>(a, round);
    if (item.rows == 0) {
      wait_for_copies<0>();
      return;
    }
    codegemm::cuda::detail::wait_for_phase(shared + Shape::kQueriesFree, phase ^ 1U);
    const int query = item.first_row + row;
    std::int64_t from = -1;
    if (query < item.rows) {
      const int token = query / a.group;
      from = (std::int64_t{item.first_query} + token) * a.q_stride +
             static_cast<std::int64_t>(item.kv_head * a.group + query - token * a.group) * Shape::kHeadDim;
    }
    loader.copy_queries(a.q, from);

    // A page is looked up a tile ahead of its copy, since the copy's address waits for it.
    const std::int32_t* const table = a.indices + a.indptr[item.sequence];
    const auto page_at = [&](int key) { return key < item.keys ? __ldg(table + page_of(a.kv, key)) : -1; };
    const auto offset_at = [&](int key, int page) -> std::int64_t {
      if (page < 0) return -1;
      return page * a.kv.page_stride + (key - page_of(a.kv, key) * a.kv.page_size) * a.kv.token_stride +
             item.kv_head * a.kv.head_stride;
    };
    const int tiles = (item.keys + Shape::kKeys - 1) / Shape::kKeys;
    // Tiles that are not whole go by copies of threads, which clear what is missing.
    const int whole = item.keys / Shape::kKeys;
    const auto load_tile = [&](bool of_keys, int tile, int of_page) {
      const int key = tile * Shape::kKeys + row;
      if (Shape::kHeadDim % kBoxColumns == 0 && a.boxes && tile < whole) {
        loader.ask_tile(of_keys ? a.maps.k : a.maps.v, of_page, key - page_of(a.kv, key) * a.kv.page_size,
                        item.kv_head);
      } else {
        loader.copy_tile(of_keys ? a.kv.k : a.kv.v, offset_at(key, of_page), tile < whole ? step : 0);
      }
    };
    int page = page_at(row);
    int k_page = -1;
    for (int t = 0; t <= tiles; ++t) {
      const int v_page = k_page;
      if (t < tiles) {
        k_page = page;
        page = page_at((t + 1) * Shape::kKeys + row);
        load_tile(true, t, k_page);
      }
      if (t > 0) load_tile(false, t - 1, v_page);
    }
  }
}

// Row `row` of an item and the one 8 below, of this lane's columns, to the output.
template <class Shape>
__device__ __forceinline__ void store_prefill(const WgmmaMultiplier<Shape>& m, const PrefillArgs& a,
                                              const PrefillItem& item, int row) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float all = m.sum[h];
    all += __shfl_xor_sync(0xFFFFFFFFU, all, 1);
    all += __shfl_xor_sync(0xFFFFFFFFU, all, 2);
    const float inverse = all == 0.0F ? 0.0F : 1.0F / all;
    const int mine = row + 8 * h;
    const bool there = mine < item.rows;
    const int token = mine / a.group;
    const std::int64_t at =
        (std::int64_t{item.first_query} + token) * a.out_stride +
        static_cast<std::int64_t>(item.kv_head * a.group + mine - token * a.group) * Shape::kHeadDim;
    if (a.out_type == ScalarType::kFloat) {
#pragma unroll
      for (int n = 0; n < Shape::kHeadDim / 8; ++n) {
        if (!there) continue;
        store_pair(a.out, at + n * 8 + lane % 4 * 2, ScalarType::kFloat, m.out[n * 4 + 2 * h] * inverse,
                   m.out[n * 4 + 2 * h + 1] * inverse);
      }
      continue;
    }
    // Four lanes have two columns each of every eight: they swap, until each has all of one eight.
#pragma unroll
    for (int n = 0; n < Shape::kHeadDim / 8; n += 4) {
      unsigned words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float low = m.out[(n + i) * 4 + 2 * h] * inverse;
        const float high = m.out[(n + i) * 4 + 2 * h + 1] * inverse;
        words[i] = a.out_type == ScalarType::kHalf ? pack<ScalarType::kHalf>(low, high)
                                                   : pack<ScalarType::kBFloat16>(low, high);
      }
      transpose_words(words);
      if (!there) continue;
      *reinterpret_cast<uint4*>(static_cast<unsigned short*>(a.out) + at + (n + lane % 4) * 8) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// One of the two warpgroups that multiply, number `half`: 64 query rows of each item. While its softmax runs,
// the other's products and its own of values before keep the tensor cores busy.
template <class Shape>
__device__ __forceinline__ void multiply_prefill(const PrefillArgs& a, char* shared_memory, int half) {
  using codegemm::cuda::detail::wgmma_fence;
  using codegemm::cuda::detail::wgmma_wait;
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(shared_memory));
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) % 128 / 32;
  const std::uint64_t queries = codegemm::cuda::detail::describe_tokens(shared + Shape::kQueriesAt +
                                                                        static_cast<unsigned>(half) * 8192U);
  RingPlace<Shape> place;
  WgmmaMultiplier<Shape> m;
  const auto keys_at = [&](const RingPlace<Shape>& of) {
    return codegemm::cuda::detail::describe_tokens(shared + Shape::tile_at(of.slot));
  };
  const auto values_at = [&] {
    return describe_values(shared + Shape::tile_at(place.slot), Shape::kColumnTileBytes);
  };
  const auto wait_for_tile = [&](const RingPlace<Shape>& of) {
    codegemm::cuda::detail::wait_for_phase(shared + Shape::full_at(of.slot), of.phase);
  };
  const auto release = [&](unsigned barrier) {
    if (lane == 0) codegemm::cuda::detail::arrive(shared + barrier);
  };
  constexpr int kTurn = 1;  // the first of two named barriers
  PrefillItem next = find_item<Shape>(a, 0);
  for (int round = 0; next.rows != 0; ++round) {
    const PrefillItem item = next;
    codegemm::cuda::detail::wait_for_phase(shared + Shape::kQueriesFull, static_cast<unsigned>(round) & 1U);
    const int tiles = (item.keys + Shape::kKeys - 1) / Shape::kKeys;
    const int first_row = item.first_row + half * 64 + warp * 16;  // of the warp
    const int row = first_row + lane / 4;
    const int whole = item.first_position + first_row / a.group + 1;  // keys that all rows see
    const int columns = lane % 4 * 2;
    const int limit0 = min(item.keys, item.first_position + row / a.group + 1) - columns;
    const int limit1 = min(item.keys, item.first_position + (row + 8) / a.group + 1) - columns;
    const auto mask = [&](int tile) {
      const int first = tile * Shape::kKeys;
      if (first + Shape::kKeys > whole) m.mask(limit0 - first, limit1 - first);
    };
    m.clear();
    if (tiles > 0) {
      wait_for_tile(place);
      publish_to_products();
      wgmma_fence();
      m.multiply_keys(queries, keys_at(place));
      wgmma_wait<0>();
      hold(m.score);
      release(Shape::free_at(place.slot));
      place.next();
      if (tiles == 1) release(Shape::kQueriesFree);
      mask(0);
      m.weigh(a.scale_log2);
      m.round_weights();
      if (half == 1 && tiles > 1) give_turn<256>(kTurn);
      for (int t = 1; t < tiles; ++t) {
        const RingPlace<Shape> of_keys = place;
        place.next();
        wait_for_tile(of_keys);
        wait_for_tile(place);
        publish_to_products();
        wait_for_turn<256>(kTurn + half);
        wgmma_fence();
        m.multiply_keys(queries, keys_at(of_keys));
        m.multiply_values(values_at());
        if (half == 0 || t + 1 < tiles) give_turn<256>(kTurn + 1 - half);
        wgmma_wait<1>();
        hold(m.score);
        release(Shape::free_at(of_keys.slot));
        if (t + 1 == tiles) release(Shape::kQueriesFree);
        mask(t);
        m.weigh(a.scale_log2);
        // Weights are made while the products with values run: but for this branch, which no sum of weights
        // takes, the compiler moves the wait to before them.
        __syncwarp(__ballot_sync(0xFFFFFFFFU, !(m.sum[0] + m.sum[1] < 0.0F)));
        wgmma_wait<0>();
        hold(m.out);
        release(Shape::free_at(place.slot));
        place.next();
        m.rescale();
        m.round_weights();
      }
      wait_for_tile(place);
      publish_to_products();
      wgmma_fence();
      m.multiply_values(values_at());
      next = find_item<Shape>(a, round + 1);
      wgmma_wait<0>();
      hold(m.out);
      release(Shape::free_at(place.slot));
      place.next();
    } else {
      release(Shape::kQueriesFree);
      next = find_item<Shape>(a, round + 1);
    }
    store_prefill(m, a, item, row);
  }
}

}  // namespace detail
#endif

/// As many blocks as multiprocessors. An item is 128 query rows of a K/V head, row r being head r % group of
/// token r / group, so that the heads of a group share what is read; the items with the most keys come first.
/// One warpgroup loads, two multiply 64 rows each. Built for compute capability 9.0a alone; elsewhere it
/// traps.
template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    prefill_wgmma_kernel(const __grid_constant__ PrefillArgs a) {
#if CODEGEMM_HAS_WGMMA
  extern __shared__ __align__(1024) char prefill_memory[];
  codegemm::cuda::detail::allow_next_kernel();
  if (threadIdx.x == 0) Shape::init_barriers(static_cast<unsigned>(__cvta_generic_to_shared(prefill_memory)));
  __syncthreads();
  codegemm::cuda::detail::wait_for_previous_kernel();
  const int warpgroup = __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) / 128, 0);
  if (warpgroup == 0) {
    detail::shrink_registers<56>();
    detail::load_prefill<Shape>(a, prefill_memory);
  } else {
    detail::grow_registers<224>();
    detail::multiply_prefill<Shape>(a, prefill_memory, warpgroup - 1);
  }
#else
  static_cast<void>(a);
  __trap();
#endif
}

}  // namespace prefillshare::cuda
