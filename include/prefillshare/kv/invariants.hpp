// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/invariants.hpp - recounts an allocator from its sequences and its tree.
// Layer: kv (host only).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include <codegemm/base/status.hpp>
#include <prefillshare/kv/block_pool.hpp>
#include <prefillshare/kv/prefix_tree.hpp>
#include <prefillshare/kv/sequence.hpp>
#include <prefillshare/kv/stats.hpp>
#include <prefillshare/kv/tenant.hpp>
#include <prefillshare/kv/tier_cache.hpp>

namespace prefillshare::detail {

/// See KvAllocator::check_invariants().
template <class Core>
[[nodiscard]] codegemm::Status check_invariants(const Core& core) {
  const auto broken = [](const auto&... parts) {
    return codegemm::error(codegemm::StatusCode::kCorruptData, "KvAllocator: ", parts...);
  };
  const auto& cache = core.cache();
  const BlockPool& pool = cache.pool();
  const auto& tree = cache.tree();
  const auto& eviction = cache.eviction();
  const KvStats stats = core.stats();
  const std::int64_t block_tokens = core.block_tokens();

  // Every sequence by itself, counting users on the way.
  std::vector<int> users(static_cast<std::size_t>(pool.blocks()), 0);
  std::vector<std::int32_t> last_user(users.size(), -1);
  std::vector<std::int64_t> held_roots;
  std::int64_t open = 0;
  const TenantLedger& ledger = cache.ledger();
  std::vector<std::int64_t> tenant_sequences(static_cast<std::size_t>(ledger.tenants()), 0);
  std::vector<std::vector<std::int32_t>> holds(tenant_sequences.size(),
                                               std::vector<std::int32_t>(users.size(), 0));
  for (const auto& entry : core.sequences().states()) {
    const SequenceState& state = *entry;
    if (!state.is_open) {
      if (!state.blocks.empty() || state.length != 0 || state.reserved != 0) {
        return broken("closed sequence ", state.index, " holds blocks");
      }
      if (!state.arriving.empty()) return broken("closed sequence ", state.index, " waits for blocks");
      continue;
    }
    ++open;
    const std::int64_t capacity = state.length + state.reserved;
    if (state.length < 0 || state.reserved < 0 ||
        static_cast<std::int64_t>(state.blocks.size()) != (capacity + block_tokens - 1) / block_tokens) {
      return broken("sequence ", state.index, " has ", state.blocks.size(), " blocks for ", state.length,
                    " + ", state.reserved, " tokens");
    }
    const std::int64_t partial = state.length % block_tokens;
    if (state.is_fork ? state.base_length > state.length || !state.tail.empty()
                      : static_cast<std::int64_t>(state.tail.size()) != partial) {
      return broken("sequence ", state.index, " has a wrong tail or base length");
    }
    if (!state.is_fork) {
      if (!state.root.is_root()) return broken("base sequence ", state.index, " has no root");
      const auto root = static_cast<std::size_t>(state.root.root());
      if (held_roots.size() <= root) held_roots.resize(root + 1, 0);
      ++held_roots[root];
    }
    ++tenant_sequences[static_cast<std::size_t>(state.tenant)];
    for (const BlockId block : state.arriving) {
      if (!pool.contains(block) || tree.contains(block) || pool.ref_count(block) != 1) {
        return broken("sequence ", state.index, " waits for block ", block, ", which is not its own");
      }
      ++users[static_cast<std::size_t>(block)];
      ++holds[static_cast<std::size_t>(state.tenant)][static_cast<std::size_t>(block)];
    }
    for (std::size_t i = 0; i < state.blocks.size(); ++i) {
      const BlockId block = state.blocks[i];
      if (!pool.contains(block)) return broken("sequence ", state.index, " holds block ", block);
      if (std::exchange(last_user[static_cast<std::size_t>(block)], state.index) == state.index) {
        return broken("sequence ", state.index, " holds block ", block, " twice");
      }
      ++users[static_cast<std::size_t>(block)];
      ++holds[static_cast<std::size_t>(state.tenant)][static_cast<std::size_t>(block)];
      const auto index = static_cast<std::int64_t>(i);
      if (state.reserved > 0 && index >= state.length / block_tokens && pool.ref_count(block) != 1) {
        return broken("sequence ", state.index, " has reserved tokens in shared block ", block);
      }
      if (!state.is_fork && index < state.length / block_tokens) {
        const TreeNode parent = i == 0 ? state.root : TreeNode::of_block(state.blocks[i - 1]);
        if (!tree.contains(block) || tree.parent(block) != parent) {
          return broken("full block ", block, " of base sequence ", state.index,
                        " is not in its place in the tree");
        }
      }
      // A fork's own tokens are never in the tree. The block in which its base ended may be, filled by the
      // base later, as long as the fork has not gone on.
      const bool has_own =
          state.is_fork && capacity > state.base_length && index >= state.base_length / block_tokens;
      if (has_own && tree.contains(block)) {
        return broken("block ", block, " of fork ", state.index, " is decode-private and in the tree");
      }
    }
  }

  // Then the blocks: free, cached or in use, each counted by all who hold it.
  std::int64_t free = 0;
  std::int64_t cached = 0;
  std::int64_t in_use = 0;
  std::int64_t shared = 0;
  std::int64_t moving = 0;
  for (BlockId block = 0; block < pool.blocks(); ++block) {
    const int by_sequences = users[static_cast<std::size_t>(block)];
    const int held = by_sequences + (tree.contains(block) ? 1 : 0) + (cache.copy_holds(block) ? 1 : 0);
    if (pool.ref_count(block) != held) {
      return broken("block ", block, " has ref count ", pool.ref_count(block), ", held by ", held);
    }
    const bool is_moving = cache.leaving(block) || cache.orphan(block);
    if (is_moving && (by_sequences > 0 || cache.orphan(block) == tree.contains(block))) {
      return broken("block ", block, " is moving and in another state too");
    }
    const bool is_cached = tree.contains(block) && by_sequences == 0 && !is_moving;
    moving += is_moving ? 1 : 0;
    if (eviction.contains(block) != is_cached)
      return broken("block ", block, " is kept wrongly for eviction");
    free += held == 0 ? 1 : 0;
    cached += is_cached ? 1 : 0;
    in_use += by_sequences > 0 ? 1 : 0;
    shared += by_sequences > 1 ? 1 : 0;
  }
  if (free != pool.free_blocks() || cached != eviction.size() ||
      free + cached + in_use + moving != pool.blocks() || moving != stats.moving_blocks ||
      in_use != stats.in_use_blocks || shared != stats.shared_blocks || open != stats.sequences) {
    return broken(free, " free + ", cached, " cached + ", in_use, " in use (", shared, " shared) of ",
                  pool.blocks(), " blocks, ", open, " sequences; statistics: ", stats.free_blocks, " + ",
                  stats.cached_blocks, " + ", stats.in_use_blocks, " (", stats.shared_blocks, "), ",
                  stats.sequences);
  }
  if (const BlockId victim = eviction.victim(); victim != kNoBlock) {
    std::int64_t below = 0;  // those that are leaving already may still be there
    for (BlockId block = 0; block < pool.blocks(); ++block) {
      const bool is_child = tree.contains(block) && tree.parent(block) == TreeNode::of_block(victim);
      below += is_child && !cache.leaving(block) ? 1 : 0;
    }
    if (below != 0) return broken("the next victim, block ", victim, ", is not a leaf");
  }
  if (eviction.evictable() > eviction.size() ||
      (eviction.victim() == kNoBlock) != (eviction.evictable() == 0)) {
    return broken(eviction.evictable(), " of ", eviction.size(), " cached blocks can go, the next is block ",
                  eviction.victim());
  }
  for (std::size_t t = 0; t < holds.size(); ++t) {
    const TenantStats& tenant = ledger.stats(static_cast<std::int32_t>(t));
    std::int64_t used = 0;
    std::int64_t used_twice = 0;
    for (std::size_t block = 0; block < users.size(); ++block) {
      if (holds[t][block] != ledger.holds(static_cast<std::int32_t>(t), static_cast<BlockId>(block))) {
        return broken("tenant ", t, "'s holds on block ", block, " are counted wrongly");
      }
      used += holds[t][block] > 0 ? 1 : 0;
      used_twice += holds[t][block] > 1 ? 1 : 0;
    }
    if (used != tenant.in_use_blocks || used_twice != tenant.shared_blocks ||
        used - used_twice != tenant.private_blocks || tenant_sequences[t] != tenant.sequences) {
      return broken("tenant ", t, " uses ", used, " blocks, not ", tenant.in_use_blocks);
    }
  }
  if (codegemm::Status status = pool.check_invariants(); !status.ok()) return status;
  if (cache.tiers() == nullptr) return tree.check_invariants(held_roots);
  if (codegemm::Status status = cache.tiers()->check_invariants(); !status.ok()) return status;
  cache.tiers()->for_each_root([&](TreeNode root) {
    const auto index = static_cast<std::size_t>(root.root());
    if (held_roots.size() <= index) held_roots.resize(index + 1, 0);
    ++held_roots[index];
  });
  return tree.check_invariants(held_roots);
}

}  // namespace prefillshare::detail
