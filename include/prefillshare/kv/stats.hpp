// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/stats.hpp - what an allocator can say of itself.
// Layer: kv (host only).
#pragma once

#include <cstdint>

namespace prefillshare {

/// A snapshot. total_blocks = free_blocks + cached_blocks + in_use_blocks + moving_blocks and
/// in_use_blocks = shared_blocks + private_blocks, always.
struct KvStats {
  std::int64_t total_blocks = 0;   ///< of the pool
  std::int64_t free_blocks = 0;    ///< hold nothing
  std::int64_t cached_blocks = 0;  ///< in the prefix tree, used by no sequence: may be evicted
  std::int64_t in_use_blocks = 0;  ///< used by one sequence or more
  /// Used by no sequence, free when the copy that reads or fills them is done.
  std::int64_t moving_blocks = 0;
  std::int64_t shared_blocks = 0;   ///< of those in use, used by two sequences or more
  std::int64_t private_blocks = 0;  ///< of these, used by exactly one
  std::int64_t tree_blocks = 0;     ///< in the prefix tree, used or not
  std::int64_t sequences = 0;       ///< open

  std::int64_t bytes_per_block = 0;  ///< of the storage
  std::int64_t bytes_in_use = 0;     ///< of in_use_blocks
  std::int64_t bytes_shared = 0;     ///< of shared_blocks
  std::int64_t bytes_private = 0;    ///< of private_blocks
  std::int64_t bytes_cached = 0;     ///< of cached_blocks

  // Counted from the allocator's beginning.
  std::int64_t hit_tokens = 0;        ///< looked up by open() or extend() and found
  std::int64_t miss_tokens = 0;       ///< looked up and not found
  std::int64_t loaded_tokens = 0;     ///< brought back from a lower tier
  std::int64_t evicted_blocks = 0;    ///< cached blocks given up for room
  std::int64_t merged_blocks = 0;     ///< committed blocks returned, since the tree had their equal
  std::int64_t copied_blocks = 0;     ///< copied on write
  std::int64_t offloaded_blocks = 0;  ///< copied to a lower tier
  std::int64_t refused_copies = 0;    ///< evicted with no copy, since no slot or queue place was to be had
  std::int64_t failed_copies = 0;     ///< to or from a lower tier, or between two
};

}  // namespace prefillshare
