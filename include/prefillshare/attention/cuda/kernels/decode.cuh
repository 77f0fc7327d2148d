// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/kernels/decode.cuh - one query token a sequence over its pages, keys split
// evenly over all blocks.
// Layer: attention/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/base/macros.hpp>
#include <codegemm/cuda/block/intrinsics.cuh>
#include <prefillshare/attention/cuda/block/attend.cuh>

namespace prefillshare::cuda {

/// K/V heads are dealt to blocks in step: block s * lanes + i has head lanes * j + i of what superblock s has
/// of heads lanes * j .. lanes * j + lanes - 1, so that neighbours in memory are read at about the same time.
///
/// A range of keys and the queries that see all of it: the private tail of a sequence, or pages that a group
/// of sequences shares. Its work is numbered [heads / lanes][row tile][tile of keys] from work_begin on.
struct alignas(16) KeyFamily {
  int work_begin = 0;
  int tiles = 0;      // of keys; 0: no work
  int key_begin = 0;  // positions in the sequence
  int key_end = 0;
  int page_begin = 0;  // in the table's indices
  int first_token = 0;
  int rows = 0;  // query rows a K/V head
  int row_tiles = 0;
  int item_begin = 0;  // items (family, heads / lanes, row tile) before its own
  int shared = -1;     // of a tail: the family of its sequence's shared pages, or -1
  int padding[2] = {};
};
static_assert(sizeof(KeyFamily) == 48, "KeyFamily is read as three vectors of 16 bytes");

/// The numbers of the work that a superblock has: [at, end) of one kind, from family `number` on.
struct alignas(16) BlockStart {
  int at = 0;
  int end = 0;
  int number = 0;
  int first = 0;  // superblock's number among those for tails, or for shared pages, times 2; plus 1 for these
  KeyFamily family;
};
static_assert(sizeof(BlockStart) == 64, "BlockStart is read as four vectors of 16 bytes");

/// Kinds of work: a sequence's own keys, and shared ones for few, some or many query rows.
enum class WorkKind { kTail, kFewRows, kSomeRows, kManyRows };

[[nodiscard]] CODEGEMM_HOST_DEVICE constexpr WorkKind shared_kind(int rows) {
  return rows <= 32 ? WorkKind::kFewRows : rows <= 64 ? WorkKind::kSomeRows : WorkKind::kManyRows;
}
/// Query rows of an item of each kind.
[[nodiscard]] CODEGEMM_HOST_DEVICE constexpr int rows_of(WorkKind kind) {
  return kind == WorkKind::kTail       ? 16
         : kind == WorkKind::kFewRows  ? 32
         : kind == WorkKind::kSomeRows ? 64
                                       : 128;
}
inline constexpr int kTailRows = rows_of(WorkKind::kTail);
inline constexpr int kManyRows = rows_of(WorkKind::kManyRows);

/// What prepare() leaves for the kernels of one sort, tails or shared pages.
struct DecodeWork {
  int* quota = nullptr;           // [1]: numbers of the work for each superblock of this kind
  KeyFamily* families = nullptr;  // [count]
};

/// Sums of each part of an item: part (superblock, item, lane) is number (superblock + item) * lanes + lane,
/// which no two have in common, since the next part is of the next superblock, the next item or both.
struct DecodePartials {
  float* out = nullptr;   // [parts][rows of an item][head_dim]
  float2* top = nullptr;  // [parts][rows of an item]: largest scaled score, base 2, and the sum of weights
  int rows = 0;           // of an item
};

/// Everything that the kernel reads, by value. Pointers are to device memory.
struct DecodeArgs {
  KvSource kv;
  const std::uint16_t* q = nullptr;  // [sequences][q_stride]
  std::int64_t q_stride = 0;
  const std::int32_t* indices = nullptr;
  const BlockStart* starts = nullptr;  // [superblocks]
  const KeyFamily* families[2] = {};   // of tails, of shared pages
  DecodePartials partials[2];          // the same
  void* out = nullptr;                 // [sequences][out_stride]
  std::int64_t out_stride = 0;
  ScalarType out_type = ScalarType::kHalf;
  int kv_heads = 0;
  int group = 0;  // query heads of a K/V head
  int lanes = 1;  // a divisor of kv_heads
  float scale_log2 = 0.0F;
  bool overlap = false;  // what prepare() left and the table are older than the kernel before
};

namespace detail {

template <class T>
[[nodiscard]] __device__ __forceinline__ T load_record(const T* from) {
  T out;
#pragma unroll
  for (unsigned i = 0; i < sizeof(T) / 16; ++i) {
    reinterpret_cast<int4*>(&out)[i] = reinterpret_cast<const int4*>(from)[i];
  }
  return out;
}

// The sums of warps that had different keys of the same rows, through shared memory: to the output if the
// item is whole, else to part `part`. All threads, after a barrier.
template <class Shape>
__device__ __forceinline__ void store_keys_split(const AttendState<Shape>& state, char* shared,
                                                 const DecodeArgs& a, const DecodePartials& partials,
                                                 const QueryRows& rows, bool whole, int part) {
  constexpr int kPitch = Shape::kHeadDim + 8;  // floats; the padding spreads rows over the banks
  static_assert(Shape::kWarps * 16 * (kPitch + 2) * 4 <= Shape::kSharedBytes,
                "prefillshare: AttendShape has too few stages for its warps' sums");
  float* const sums = reinterpret_cast<float*>(shared);                                // [warps][16][kPitch]
  float2* const tops = reinterpret_cast<float2*>(sums + Shape::kWarps * 16 * kPitch);  // [warps][16]
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int count = min(Shape::kRows, rows.rows - rows.first_row);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = lane / 4 + 8 * h;
    if (warp_row<Shape>() + row >= count) continue;
    if (lane % 4 == 0) tops[warp * 16 + row] = make_float2(state.top[0][h] * a.scale_log2, state.sum[0][h]);
#pragma unroll
    for (int n = 0; n < Shape::kHeadDim / 8; ++n) {
      *reinterpret_cast<float2*>(sums + (warp * 16 + row) * kPitch + n * 8 + lane % 4 * 2) =
          make_float2(state.out[0][n][2 * h], state.out[0][n][2 * h + 1]);
    }
  }
  __syncthreads();
  constexpr int kQuads = Shape::kHeadDim / 4;
  for (int i = static_cast<int>(threadIdx.x); i < count * kQuads; i += Shape::kThreads) {
    const int row = i / kQuads;
    const int column = i % kQuads * 4;
    const int first = row / 16 * Shape::kWarpsN * 16 + row % 16;  // of the first warp that had the row
    float top = -INFINITY;
#pragma unroll
    for (int w = 0; w < Shape::kWarpsN; ++w) top = fmaxf(top, tops[first + w * 16].x);
    float4 out = {};
    float sum = 0.0F;
#pragma unroll
    for (int w = 0; w < Shape::kWarpsN; ++w) {
      const float2 t = tops[first + w * 16];
      const float factor = t.x == -INFINITY ? 0.0F : exp2_fast(t.x - top);
      const float4 s = *reinterpret_cast<const float4*>(sums + (first + w * 16) * kPitch + column);
      sum += factor * t.y;
      out.x += factor * s.x;
      out.y += factor * s.y;
      out.z += factor * s.z;
      out.w += factor * s.w;
    }
    if (whole) {
      const float inverse = 1.0F / sum;
      const int token = (rows.first_row + row) / rows.group;
      const std::int64_t at =
          (rows.first_token + token) * a.out_stride +
          static_cast<std::int64_t>(rows.first_head + rows.first_row + row - token * rows.group) *
              Shape::kHeadDim +
          column;
      store_pair(a.out, at, a.out_type, out.x * inverse, out.y * inverse);
      store_pair(a.out, at + 2, a.out_type, out.z * inverse, out.w * inverse);
    } else {
      const std::int64_t at = static_cast<std::int64_t>(part) * partials.rows + row;
      *reinterpret_cast<float4*>(partials.out + at * Shape::kHeadDim + column) = out;
      if (column == 0) partials.top[at] = make_float2(top, sum);
    }
  }
}

// Rows of different warps, always to part `part`.
template <class Shape>
__device__ __forceinline__ void store_rows_split(const AttendState<Shape>& state, const DecodeArgs& a,
                                                 const DecodePartials& partials, const QueryRows& rows,
                                                 int part) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row<Shape>() + r * 16 + lane / 4 + 8 * h;
      if (rows.first_row + row >= rows.rows) continue;
      const std::int64_t at = static_cast<std::int64_t>(part) * partials.rows + row;
      if (lane % 4 == 0) partials.top[at] = make_float2(state.top[r][h] * a.scale_log2, state.sum[r][h]);
#pragma unroll
      for (int n = 0; n < Shape::kHeadDim / 8; ++n) {
        *reinterpret_cast<float2*>(partials.out + at * Shape::kHeadDim + n * 8 + lane % 4 * 2) =
            make_float2(state.out[r][n][2 * h], state.out[r][n][2 * h + 1]);
      }
    }
  }
}

// Where in the work a block is.
struct DecodeItem {
  int item = 0;  // in the family
  int tile = 0;  // of keys, the first
  int count = 0;
  int kv_head = 0;
  int row_tile = 0;
  int part = 0;

  __device__ __forceinline__ void find(const KeyFamily& family, const BlockStart& start, int at, int lanes,
                                       int lane) {
    const int offset = at - family.work_begin;
    item = offset / family.tiles;
    tile = offset - item * family.tiles;
    count = min(family.tiles - tile, start.end - at);
    const int head_group = item / family.row_tiles;
    kv_head = head_group * lanes + lane;
    row_tile = item - head_group * family.row_tiles;
    part = (start.first / 2 + family.item_begin + item) * lanes + lane;
  }
};

// Brings the first keys of a block's work into the second-level cache.
template <int HeadDim>
__device__ __forceinline__ void prefetch_keys(const DecodeArgs& a, const BlockStart& start, int lane) {
  const KeyFamily& family = start.family;
  DecodeItem item;
  item.find(family, start, start.at, a.lanes, lane);
  const int key = family.key_begin + item.tile * kTileKeys + static_cast<int>(threadIdx.x);
  if (static_cast<int>(threadIdx.x) >= item.count * kTileKeys || key >= family.key_end) return;
  const int slot = page_of(a.kv, key);
  const std::int64_t at = a.indices[family.page_begin + slot] * a.kv.page_stride +
                          (key - slot * a.kv.page_size) * a.kv.token_stride + item.kv_head * a.kv.head_stride;
  codegemm::cuda::detail::prefetch_l2(a.kv.k + at, HeadDim * 2);
  codegemm::cuda::detail::prefetch_l2(a.kv.v + at, HeadDim * 2);
}

// Tiles of keys of one item, in the shape that its kind asks for.
template <class Shape, WorkKind Kind>
__device__ __forceinline__ void decode_item(const DecodeArgs& a, const KeyFamily& family,
                                            const DecodeItem& item, char* shared_memory) {
  const DecodePartials& partials = a.partials[Kind == WorkKind::kTail ? 0 : 1];
  QueryRows rows;
  rows.q = a.q;
  rows.stride = a.q_stride;
  rows.first_token = family.first_token;
  rows.first_head = item.kv_head * a.group;
  rows.group = a.group;
  rows.first_row = item.row_tile * Shape::kRows;
  rows.rows = family.rows;
  KeyRange keys;
  keys.begin = family.key_begin + item.tile * kTileKeys;
  keys.end = min(family.key_end, keys.begin + item.count * kTileKeys);
  keys.whole = keys.end;
  int limit[Shape::kRowTiles][2];
#pragma unroll
  for (int r = 0; r < Shape::kRowTiles; ++r) limit[r][0] = limit[r][1] = keys.end;
  AttendState<Shape> state;
  attend(state, static_cast<unsigned>(__cvta_generic_to_shared(shared_memory)), a.kv,
         a.indices + family.page_begin, item.kv_head, rows, keys, limit, a.scale_log2);
  if constexpr (Shape::kWarpsN > 1) {
    __syncthreads();
    const bool whole = Kind == WorkKind::kTail && family.shared < 0 && item.count == family.tiles;
    store_keys_split(state, shared_memory, a, partials, rows, whole, item.part);
  } else {
    store_rows_split(state, a, partials, rows, item.part);
  }
}

}  // namespace detail

/// Each block takes its numbers of the work, which may end one item and begin another; items that one block
/// has wholly, of sequences that share nothing, go to the output at once, the rest to decode_merge_kernel.
template <class Tail, class Few, class Some, class Many, bool Shares>
__global__ void __launch_bounds__(Tail::kThreads, 2) decode_kernel(const __grid_constant__ DecodeArgs a) {
  static_assert(Tail::kThreads == Few::kThreads && Tail::kThreads == Some::kThreads &&
                    Tail::kThreads == Many::kThreads && Tail::kSharedBytes == Few::kSharedBytes &&
                    Tail::kSharedBytes == Some::kSharedBytes && Tail::kSharedBytes == Many::kSharedBytes,
                "prefillshare: decode_kernel's shapes share one launch");
  static_assert(Tail::kRows == kTailRows && Few::kRows == rows_of(WorkKind::kFewRows) &&
                    Some::kRows == rows_of(WorkKind::kSomeRows) && Many::kRows == kManyRows,
                "prefillshare: decode_kernel's shapes have the rows that prepare() counts on");
  extern __shared__ __align__(128) char shared_memory[];
  const int superblock = static_cast<int>(blockIdx.x) / a.lanes;
  const int lane = static_cast<int>(blockIdx.x) - superblock * a.lanes;
  BlockStart start;
  if (a.overlap) {
    start = detail::load_record(a.starts + superblock);
    if (start.at < start.end) detail::prefetch_keys<Tail::kHeadDim>(a, start, lane);
  }
  codegemm::cuda::detail::wait_for_previous_kernel();
  codegemm::cuda::detail::allow_next_kernel();
  if (!a.overlap) start = detail::load_record(a.starts + superblock);
  if (start.at >= start.end) return;
  const bool is_shared = Shares && start.first % 2 != 0;
  KeyFamily family = start.family;
  int number = start.number;
  int at = start.at;
  while (true) {
    detail::DecodeItem item;
    item.find(family, start, at, a.lanes, lane);
    const WorkKind kind = is_shared ? shared_kind(family.rows) : WorkKind::kTail;
    if (kind == WorkKind::kTail) {
      detail::decode_item<Tail, WorkKind::kTail>(a, family, item, shared_memory);
    } else if constexpr (Shares) {
      if (kind == WorkKind::kFewRows) {
        detail::decode_item<Few, WorkKind::kFewRows>(a, family, item, shared_memory);
      } else if (kind == WorkKind::kSomeRows) {
        detail::decode_item<Some, WorkKind::kSomeRows>(a, family, item, shared_memory);
      } else {
        detail::decode_item<Many, WorkKind::kManyRows>(a, family, item, shared_memory);
      }
    }
    at += item.count;
    if (at >= start.end) return;
    if (at == family.work_begin + family.tiles * family.row_tiles * (a.kv_heads / a.lanes)) {
      do {
        family = detail::load_record(a.families[is_shared ? 1 : 0] + ++number);
      } while (family.tiles == 0);
    }
    __syncthreads();  // before shared memory is written again
  }
}

}  // namespace prefillshare::cuda
