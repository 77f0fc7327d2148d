// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/block_pool.hpp - the numbers of the KV blocks, who is free and how often each is held.
// Layer: kv (host only).
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/status.hpp>
#include <prefillshare/kv/try_allocate.hpp>

namespace prefillshare {

/// The number of a KV block, from 0; the same number names the block's place in every layer of a storage.
using BlockId = std::int32_t;
inline constexpr BlockId kNoBlock = -1;  ///< no block

/// Hands out block numbers and counts the holders of each. Knows nothing of what lies in a block.
/// All memory is taken by create(); every other call is O(1) and allocates nothing. The free list lies in
/// the entries themselves: a block released last is handed out first (its memory may still be in a cache),
/// and a fresh pool hands out 0, 1, 2, ... - the order depends on the calls alone.
/// Externally synchronized. A number out of range or released too often is a broken invariant.
class BlockPool {
 public:
  BlockPool() = default;  // an empty pool

  /// kInvalidArgument for a count that is negative or does not fit BlockId; kOutOfMemory.
  [[nodiscard]] static codegemm::Result<BlockPool> create(std::int64_t blocks) {
    if (blocks < 0 || blocks >= std::numeric_limits<BlockId>::max()) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "BlockPool: ", blocks,
                             " blocks, expected 0 to ", std::numeric_limits<BlockId>::max() - 1);
    }
    BlockPool pool;
    if (!detail::try_allocate([&] { pool.entries_.resize(static_cast<std::size_t>(blocks)); })) {
      return codegemm::error(codegemm::StatusCode::kOutOfMemory, "BlockPool: no memory for ", blocks,
                             " entries");
    }
    for (std::int64_t i = 0; i < blocks; ++i) {
      pool.entries_[static_cast<std::size_t>(i)].next_free =
          i + 1 < blocks ? static_cast<BlockId>(i + 1) : kNoBlock;
    }
    pool.first_free_ = blocks > 0 ? 0 : kNoBlock;
    pool.free_ = blocks;
    return pool;
  }

  /// A block held once, by the caller. kExhausted when none is free.
  [[nodiscard]] codegemm::Result<BlockId> allocate() {
    if (first_free_ == kNoBlock) {
      return codegemm::error(codegemm::StatusCode::kExhausted, "BlockPool: all ", blocks(),
                             " blocks are held");
    }
    const BlockId block = first_free_;
    Entry& entry = at(block);
    CODEGEMM_ASSERT(entry.holders == 0);
    first_free_ = entry.next_free;
    entry.next_free = kNoBlock;
    entry.holders = 1;
    --free_;
    return block;
  }

  /// One more holder of a block that is held.
  void retain(BlockId block) {
    Entry& entry = at(block);
    CODEGEMM_ASSERT(entry.holders > 0);
    ++entry.holders;
  }

  /// One holder less; the block is free again when it was the last.
  void release(BlockId block) {
    Entry& entry = at(block);
    CODEGEMM_ASSERT(entry.holders > 0);
    if (--entry.holders > 0) return;
    entry.next_free = first_free_;
    first_free_ = block;
    ++free_;
  }

  /// Of the pool.
  [[nodiscard]] std::int64_t blocks() const noexcept { return static_cast<std::int64_t>(entries_.size()); }
  [[nodiscard]] std::int64_t free_blocks() const noexcept { return free_; }  ///< held by nobody
  /// How many hold the block; 0 when it is free.
  [[nodiscard]] int ref_count(BlockId block) const { return at(block).holders; }
  /// A block of this pool.
  [[nodiscard]] bool contains(BlockId block) const noexcept { return block >= 0 && block < blocks(); }

  /// Walks the free list: every entry unheld, none twice, as many as free_blocks() says. O(blocks).
  [[nodiscard]] codegemm::Status check_invariants() const {
    std::int64_t walked = 0;
    for (BlockId block = first_free_; block != kNoBlock; block = at(block).next_free) {
      if (!contains(block) || at(block).holders != 0 || ++walked > free_) {
        return codegemm::error(codegemm::StatusCode::kCorruptData, "BlockPool: free list broken at block ",
                               block, " after ", walked, " of ", free_, " entries");
      }
    }
    std::int64_t unheld = 0;
    for (const Entry& entry : entries_) unheld += entry.holders == 0 ? 1 : 0;
    if (walked != free_ || unheld != free_) {
      return codegemm::error(codegemm::StatusCode::kCorruptData, "BlockPool: ", free_, " free blocks, but ",
                             walked, " in the free list and ", unheld, " unheld");
    }
    return {};
  }

 private:
  struct Entry {
    std::int32_t holders = 0;
    BlockId next_free = kNoBlock;
  };

  [[nodiscard]] Entry& at(BlockId block) {
    CODEGEMM_ASSERT(contains(block));
    return entries_[static_cast<std::size_t>(block)];
  }
  [[nodiscard]] const Entry& at(BlockId block) const {
    CODEGEMM_ASSERT(contains(block));
    return entries_[static_cast<std::size_t>(block)];
  }

  std::vector<Entry> entries_;
  BlockId first_free_ = kNoBlock;
  std::int64_t free_ = 0;
};

}  // namespace prefillshare
