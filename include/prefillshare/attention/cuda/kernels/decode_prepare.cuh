// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/kernels/decode_prepare.cuh - deals out the work of a decode step, from the
// lengths as they are on the device now.
// Layer: attention/cuda/kernels (device).
#pragma once

#include <climits>
#include <cstdint>

#include <codegemm/cuda/block/intrinsics.cuh>
#include <prefillshare/attention/cuda/kernels/decode_work.cuh>

namespace prefillshare::cuda {

/// Everything that the kernel reads, by value. Pointers are to device memory.
struct DecodePrepareArgs {
  const std::int32_t* indptr = nullptr;         // [sequences + 1]
  const std::int32_t* last_page_len = nullptr;  // [sequences]
  const std::int32_t* group_indptr = nullptr;   // [groups + 1]
  const std::int32_t* shared_pages = nullptr;   // [groups]
  BlockStart* starts = nullptr;                 // [superblocks]
  KeyFamily* tails = nullptr;                   // [sequences]
  KeyFamily* shared = nullptr;                  // [groups]
  unsigned* arrivals = nullptr;                 // [items of tails][lanes], see DecodeArgs
  int sequences = 0;
  int groups = 0;
  int page_size = 0;
  int kv_heads = 0;
  int group = 0;  // query heads of a K/V head
  int lanes = 0;
  int superblocks = 0;
  int min_tiles = 0;
  int many_rows_cost = 0;  // of a tile of many rows, in percent of one of few
  int tail_item_cost = 0;  // of each item of a tail beside its tiles, the same
  int min_shared_sequences = 0;
  int min_shared_tokens = 0;
  bool few = false;  // see shared_kind()
  // Group g is sequence g of the table, and what else is called a sequence is one of its last tokens.
  bool causal = false;
};

inline constexpr int kPrepareThreads = 256;
/// Tiles that about half of the superblocks have more than the others, where all would have kStaggeredQuota
/// or more: when they end, the next call's blocks in the others' places have asked for their first keys.
inline constexpr int kStaggeredTiles = 3;
inline constexpr int kStaggeredQuota = 32;  ///< the same

namespace detail {

// The sum of `value` over the threads before this one; `total` of all of them.
__device__ __forceinline__ int sum_before(int value, int& total, int (&warp_sums)[kPrepareThreads / 32]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xFFFFFFFFU, sum, static_cast<unsigned>(step));
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kPrepareThreads / 32; ++w) {
    if (w < warp) before += warp_sums[w];
    total += warp_sums[w];
  }
  return before + sum - value;
}

[[nodiscard]] __device__ __forceinline__ int tokens_of(const DecodePrepareArgs& a, int sequence) {
  const int pages = a.indptr[sequence + 1] - a.indptr[sequence];
  return pages > 0 ? (pages - 1) * a.page_size + a.last_page_len[sequence] : 0;
}

// The work of one kind.
struct DecodeWork {
  int tiles = 0;
  int items = 0;
  int cost = 100;  // of a tile on average, in percent
  int item_cost = 0;

  // What `quota` tiles in a row take at most, items being of their average length.
  [[nodiscard]] __device__ __forceinline__ unsigned long long time_of(int quota) const {
    if (tiles == 0) return 0;
    const int length = max(1, tiles / max(1, items));
    const int touched = quota % length == 0 ? quota / length : (quota + length - 2) / length + 1;
    return static_cast<unsigned long long>(quota) * static_cast<unsigned>(cost) +
           static_cast<unsigned long long>(touched) * static_cast<unsigned>(item_cost);
  }
};

// Numbers the families' work; each item is to cost item_cost beside its tiles.
__device__ inline DecodeWork number_work(KeyFamily* families, int count, const DecodePrepareArgs& a,
                                         int item_cost, int (&warp_sums)[kPrepareThreads / 32]) {
  const int head_groups = a.kv_heads / a.lanes;
  int all = 0;
  int items = 0;
  int many = 0;
  for (int first = 0; first < count; first += kPrepareThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    const int row_tiles = i < count ? families[i].row_tiles * head_groups : 0;
    const int mine = i < count ? families[i].tiles * row_tiles : 0;
    int total = 0;
    const int before = sum_before(mine, total, warp_sums);
    int total_items = 0;
    const int items_before = sum_before(row_tiles, total_items, warp_sums);
    if (i < count) {
      families[i].work_begin = all + before;
      families[i].item_begin = items + items_before;
    }
    const bool is_many = mine > 0 && shared_kind(families[i].rows, a.few) == WorkKind::kManyRows;
    int total_many = 0;
    sum_before(is_many ? mine : 0, total_many, warp_sums);
    all += total;
    items += total_items;
    many += total_many;
  }
  DecodeWork out;
  out.tiles = all;
  out.items = items;
  out.item_cost = item_cost;
  if (all > 0) out.cost = 100 + static_cast<int>(std::int64_t{a.many_rows_cost - 100} * many / all);
  return out;
}

// What a superblock has at most.
[[nodiscard]] __device__ __forceinline__ int quota_of(int all, int superblocks, int least) {
  return superblocks > 0 ? max(least, (all + superblocks - 1) / superblocks) : least;
}

// How `all` is dealt out to so many superblocks, in `quota`, `longer` and `extra`: as many to each and the
// rest to the last, which seldom cuts an item that need not be cut; where there are many, see
// kStaggeredTiles.
[[nodiscard]] __device__ __forceinline__ KeyFamily deal_of(int all, int superblocks, int least) {
  KeyFamily out;
  out.quota = quota_of(all, superblocks, least);
  if (superblocks > 1 && out.quota >= max(kStaggeredQuota, least + kStaggeredTiles)) {
    const int half = superblocks / 2;
    out.quota = (all - half * kStaggeredTiles) / superblocks;
    const int rest = all - out.quota * superblocks;
    out.extra = static_cast<std::int16_t>((rest + half - 1) / half);
    out.longer = static_cast<std::int16_t>((rest + out.extra - 1) / out.extra);
  }
  return out;
}

// Says where each superblock starts that gets some of `all`, the first of them being number `first` of the
// grid.
__device__ inline void deal_out(const DecodePrepareArgs& a, KeyFamily* families, int count, int all,
                                int first, const KeyFamily& deal, unsigned shared, unsigned has_empty) {
  const int head_groups = a.kv_heads / a.lanes;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = static_cast<int>(threadIdx.x) / 32; i < count; i += kPrepareThreads / 32) {
    KeyFamily family = load_record(families + i);
    __syncwarp();
    family.quota = deal.quota;
    family.longer = deal.longer;
    family.extra = deal.extra;
    if (lane == 0) families[i] = family;
    const int end = family.work_begin + family.tiles * family.row_tiles * head_groups;
    // The superblocks that begin in this family.
    const int before = family.work_begin == 0 ? 0 : deal.superblock_of(family.work_begin - 1) + 1;
    for (int b = before + lane; deal.first_of(b) < end; b += 32) {
      a.starts[first + b] = BlockStart{deal.first_of(b),
                                       min(all, deal.first_of(b + 1)),
                                       i,
                                       static_cast<unsigned>(b),
                                       shared,
                                       has_empty,
                                       family};
    }
  }
}

}  // namespace detail

/// One block. Of a template's kind so that any number of files may include it.
template <int>
__global__ void __launch_bounds__(kPrepareThreads)
    decode_prepare_kernel(const __grid_constant__ DecodePrepareArgs a) {
  __shared__ int warp_sums[kPrepareThreads / 32];
  __shared__ unsigned long long best;  // the longer and the shorter time, in percent of a tile's, superblocks
  __shared__ unsigned has_empty;
  codegemm::cuda::detail::wait_for_previous_kernel();
  codegemm::cuda::detail::allow_next_kernel();
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < a.sequences; i += kPrepareThreads) a.tails[i].shared = -1;
  if (thread == 0) {
    best = ULLONG_MAX;
    has_empty = 0;
  }
  const int items = a.causal ? 0 : a.sequences * a.kv_heads * ((a.group + kTailRows - 1) / kTailRows);
  for (int i = thread; i < items; i += kPrepareThreads) a.arrivals[i] = 0;
  __syncthreads();
  for (int g = thread; g < a.groups; g += kPrepareThreads) {
    const int first = max(0, min(a.group_indptr[g], a.sequences));
    const int count = max(0, min(a.group_indptr[g + 1], a.sequences) - first);
    KeyFamily family;
    if (count > 0) {
      const int owner = a.causal ? g : first;
      const int all = detail::tokens_of(a, owner);
      const int pages = a.causal ? 0 : min(a.shared_pages[g], a.indptr[first + 1] - a.indptr[first]);
      // Whole pages, so that each family begins with a page.
      const int tokens = a.causal ? all : max(0, min(pages, all / a.page_size) * a.page_size);
      if (tokens > 0 && tokens >= a.min_shared_tokens && count >= a.min_shared_sequences) {
        family.key_end = tokens;
        family.tiles = (tokens + kTileKeys - 1) / kTileKeys;
        family.rows = count * a.group;
        const int rows = rows_of(shared_kind(family.rows, a.few));
        if (a.causal) family.shared = 0;
        family.row_tiles = (family.rows + rows - 1) / rows;
        for (int i = first; i < first + count; ++i) a.tails[i].shared = g;
      }
      family.page_begin = a.indptr[owner];
    }
    family.first_token = first;
    a.shared[g] = family;
  }
  __syncthreads();
  for (int i = thread; i < a.sequences; i += kPrepareThreads) {
    KeyFamily family;
    family.shared = a.tails[i].shared;
    family.first_token = i;
    if (a.causal) {
      a.tails[i] = family;
      continue;
    }
    family.key_begin = family.shared < 0 ? 0 : a.shared[family.shared].key_end;
    family.key_end = detail::tokens_of(a, i);
    family.tiles = max(0, (family.key_end - family.key_begin + kTileKeys - 1) / kTileKeys);
    family.page_begin = a.indptr[i];
    family.rows = a.group;
    family.row_tiles = (a.group + kTailRows - 1) / kTailRows;
    a.tails[i] = family;
    if (family.tiles == 0 && family.shared < 0) has_empty = 1;
    if (family.tiles == 0 && family.shared >= 0) a.shared[family.shared].shared = 0;
  }
  __syncthreads();
  const auto tails = detail::number_work(a.tails, a.sequences, a, a.tail_item_cost, warp_sums);
  const auto shared = detail::number_work(a.shared, a.groups, a, 0, warp_sums);
  for (int i = thread; i < a.superblocks; i += kPrepareThreads) {
    BlockStart start;
    start.has_empty = has_empty;
    a.starts[i] = start;
  }
  __syncthreads();
  // The two kinds run side by side: so many superblocks for each that both end at about the same time.
  const int least = shared.tiles == 0 ? 0 : 1;
  const int most = shared.tiles == 0 ? 0 : max(1, a.superblocks - (tails.tiles == 0 ? 0 : 1));
  for (int n = least + thread; n <= most; n += kPrepareThreads) {
    const unsigned long long of_shared = shared.time_of(detail::quota_of(shared.tiles, n, a.min_tiles));
    const unsigned long long of_tails =
        tails.time_of(detail::quota_of(tails.tiles, a.superblocks - n, a.min_tiles));
    const unsigned long long longer = max(of_shared, of_tails);
    const unsigned long long shorter = min(min(of_shared, of_tails), (1ULL << 20) - 1);
    atomicMin(&best, ((longer << 20) + shorter) * 1024 + static_cast<unsigned>(n));
  }
  __syncthreads();
  // Blocks start in their order: those that take longer first, and those without work last.
  const int superblocks_shared = static_cast<int>(best % 1024);
  const int superblocks_tails = a.superblocks - superblocks_shared;
  const KeyFamily deal_shared = detail::deal_of(shared.tiles, superblocks_shared, a.min_tiles);
  const KeyFamily deal_tails = detail::deal_of(tails.tiles, superblocks_tails, a.min_tiles);
  const auto longest = [](const KeyFamily& deal) { return deal.quota + deal.extra; };
  const bool tails_first = tails.time_of(longest(deal_tails)) > shared.time_of(longest(deal_shared));
  const auto used = [](const KeyFamily& deal, int all) {
    return all > 0 ? deal.superblock_of(all - 1) + 1 : 0;
  };
  const int before_shared = tails_first ? used(deal_tails, tails.tiles) : 0;
  const int before_tails = tails_first ? 0 : used(deal_shared, shared.tiles);
  detail::deal_out(a, a.shared, a.groups, shared.tiles, before_shared, deal_shared, 1, has_empty);
  detail::deal_out(a, a.tails, a.sequences, tails.tiles, before_tails, deal_tails, 0, has_empty);
}

}  // namespace prefillshare::cuda
