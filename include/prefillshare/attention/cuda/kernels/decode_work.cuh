// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/kernels/decode_work.cuh - how the work of a decode step is numbered, cut and
// written down for its kernels.
// Layer: attention/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/base/macros.hpp>
#include <prefillshare/attention/cuda/block/attend_boxes.cuh>

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
  int item_begin = 0;       // items (family, heads / lanes, row tile) before its own
  int shared = -1;          // of a tail: the family of its sequence's shared pages, or -1; of these: 0 if a
                            // sequence ends with them, whose newest key they have, or -1
  int quota = 1;            // numbers of the work of a superblock, the same for all families of its kind
  std::int16_t longer = 0;  // so many superblocks, the first ones,
  std::int16_t extra = 0;   // have so many more

  /// The superblock that has number `work`.
  [[nodiscard]] CODEGEMM_HOST_DEVICE constexpr int superblock_of(int work) const {
    const int of_longer = longer * (quota + extra);
    return work < of_longer ? work / (quota + extra) : longer + (work - of_longer) / quota;
  }
  /// The first number of a superblock.
  [[nodiscard]] CODEGEMM_HOST_DEVICE constexpr int first_of(int superblock) const {
    return superblock * quota + (superblock < longer ? superblock : longer) * extra;
  }
};
static_assert(sizeof(KeyFamily) == 48, "KeyFamily is read as three vectors of 16 bytes");

/// The numbers of the work that a superblock has: [at, end) of one kind, from family `number` on.
struct alignas(16) BlockStart {
  int at = 0;
  int end = 0;
  int number = 0;
  unsigned superblock : 30 = 0;  // number among those of its kind
  unsigned is_shared : 1 = 0;    // the kind: shared pages, not tails
  unsigned has_empty : 1 = 0;    // there are sequences without keys
  KeyFamily family;
};
static_assert(sizeof(BlockStart) == 64, "BlockStart is read as four vectors of 16 bytes");

/// Kinds of work: a sequence's own keys, and shared ones for few, some or many query rows.
enum class WorkKind { kTail, kFewRows, kSomeRows, kManyRows };

/// What the work is: sequences alone; with shared pages beside their own, for at most kMostFewRows query rows
/// or any number; or several tokens of each sequence, which share its pages, each seeing those up to itself.
enum class DecodeSort { kAlone, kSharedFew, kShared, kCausal };

/// Registers of a thread of decode_kernel, two of whose blocks are on a multiprocessor. The rest of 216 are
/// those of one block of decode_merge_kernel, which then waits beside them.
template <DecodeSort Sort>
inline constexpr int kDecodeRegisters =
    Sort == DecodeSort::kAlone || Sort == DecodeSort::kSharedFew ? 216 : 255;

/// few: there is no kernel for many rows, see DecodeSort.
[[nodiscard]] CODEGEMM_HOST_DEVICE constexpr WorkKind shared_kind(int rows, bool few) {
  return rows <= 32 ? WorkKind::kFewRows : rows <= 64 || few ? WorkKind::kSomeRows : WorkKind::kManyRows;
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
inline constexpr int kMostFewRows = 256;  // of DecodeSort::kSharedFew, as tiles of kSomeRows

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
  // [items of tails][lanes]: how many of an item's parts are there, back at 0 when all were. Null:
  // decode_merge_kernel follows.
  unsigned* arrivals = nullptr;
  void* out = nullptr;  // [sequences][out_stride]
  std::int64_t out_stride = 0;
  ScalarType out_type = ScalarType::kHalf;
  PageMaps maps;  // of kv, where the kernel has boxes
  int sequences = 0;
  int kv_heads = 0;
  int group = 0;  // query heads of a K/V head
  int lanes = 1;  // a divisor of kv_heads
  float scale_log2 = 0.0F;
  // What prepare() left, the table and all keys but each sequence's newest are older than the kernel before.
  bool overlap = false;
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

// The query rows of a K/V head, from a token on.
[[nodiscard]] __device__ __forceinline__ QueryRows query_rows_of(const DecodeArgs& a, int first_token,
                                                                 int kv_head) {
  QueryRows out;
  out.q = a.q;
  out.stride = a.q_stride;
  out.first_token = first_token;
  out.first_head = kv_head * a.group;
  out.group = a.group;
  return out;
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
    part = (static_cast<int>(start.superblock) + family.item_begin + item) * lanes + lane;
  }
};

}  // namespace detail
}  // namespace prefillshare::cuda
