// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/allocator_core.hpp - what KvAllocator does, on the states of its sequences.
// Layer: kv (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/status.hpp>
#include <prefillshare/kv/block_cache.hpp>
#include <prefillshare/kv/block_pool.hpp>
#include <prefillshare/kv/prefix_tree.hpp>
#include <prefillshare/kv/sequence.hpp>
#include <prefillshare/kv/sequence_table.hpp>
#include <prefillshare/kv/stats.hpp>
#include <prefillshare/kv/storage.hpp>
#include <prefillshare/kv/tenant.hpp>
#include <prefillshare/kv/tier_cache.hpp>
#include <prefillshare/kv/try_allocate.hpp>

namespace prefillshare::detail {

/// The work behind BasicKvAllocator, which has checked the handles, holds the lock and documents the calls.
template <KvStorage Storage, BlockHash Hash, EvictionPolicy Eviction>
class AllocatorCore {
 public:
  using Cache = BlockCache<Hash, Eviction>;
  using Status = codegemm::Status;

  /// May throw std::bad_alloc.
  AllocatorCore(Storage& storage, Cache cache)
      : storage_(&storage),
        cache_(std::move(cache)),
        key_tokens_(static_cast<std::size_t>(storage.shape().block_tokens)) {}

  [[nodiscard]] Storage& storage() const noexcept { return *storage_; }
  [[nodiscard]] Cache& cache() noexcept { return cache_; }
  [[nodiscard]] const Cache& cache() const noexcept { return cache_; }
  [[nodiscard]] SequenceTable& sequences() noexcept { return sequences_; }
  [[nodiscard]] const SequenceTable& sequences() const noexcept { return sequences_; }
  [[nodiscard]] int block_tokens() const noexcept { return static_cast<int>(key_tokens_.size()); }

  template <class... Parts>
  [[nodiscard]] static Status refuse(codegemm::StatusCode code, const char* call, const Parts&... parts) {
    return codegemm::error(code, "KvAllocator::", call, ": ", parts...);
  }
  [[nodiscard]] static Status no_memory(const char* call) {
    return refuse(codegemm::StatusCode::kOutOfMemory, call, "no memory");
  }

  [[nodiscard]] codegemm::Result<SequenceState*> open(const CacheKey& key, TenantId tenant) {
    SequenceState* const base = sequences_.idle(block_tokens());
    if (base == nullptr) return no_memory("open");
    auto root = cache_.acquire_root(key);
    if (!root.ok()) return root.status();
    start(*base, /*is_fork=*/false, tenant);
    base->root = *root;
    return base;
  }

  void close(SequenceState& state) noexcept {
    shrink(state, 0);
    for (; !state.arriving.empty(); state.arriving.pop_back()) {
      cache_.abandon(state.arriving.back(), state.tenant);
    }
    state.arriving_tokens.clear();
    if (!state.is_fork) cache_.release_root(state.root);
    --cache_.ledger().stats(state.tenant).sequences;
    sequences_.stop(state);
  }

  [[nodiscard]] codegemm::Result<std::int64_t> extend(SequenceState& state,
                                                      std::span<const std::int32_t> tokens) {
    const std::size_t size = key_tokens_.size();
    const std::size_t full_blocks = (state.tail.size() + tokens.size()) / size;
    if (!try_reserve(state.blocks, state.blocks.size() + full_blocks)) return no_memory("extend");
    const std::int64_t old_length = state.length;
    std::span<const std::int32_t> rest = tokens;
    bool goes_on = true;
    if (!state.tail.empty() && full_blocks > 0) {  // a block whose tokens lie in two places
      const std::size_t used = state.tail.size();
      std::copy(state.tail.begin(), state.tail.end(), key_tokens_.begin());
      std::copy_n(rest.begin(), size - used, key_tokens_.begin() + static_cast<std::ptrdiff_t>(used));
      const BlockId found = tree().find(tree().query(parent_of_next(state), key_tokens_));
      goes_on = found != kNoBlock && may_hold(state, found);
      if (goes_on) {
        cache_.hold(found, state.tenant);
        cache_.drop(state.blocks.back(), state.tenant);
        state.blocks.back() = found;
        state.tail.clear();
        rest = rest.subspan(size - used);
        state.length += static_cast<std::int64_t>(size - used);
      }
    }
    if (goes_on && state.tail.empty()) {
      tree().walk(parent_of_next(state), rest, [&](BlockId found) {
        if (!may_hold(state, found)) return false;
        cache_.hold(found, state.tenant);
        state.blocks.push_back(found);
        state.length += static_cast<std::int64_t>(size);
        return true;
      });
    }
    TenantStats& tenant = cache_.ledger().stats(state.tenant);
    const std::int64_t found = state.length - old_length;
    stats_.hit_tokens += found;
    stats_.miss_tokens += std::ssize(tokens) - found;
    tenant.hit_tokens += found;
    tenant.miss_tokens += std::ssize(tokens) - found;
    return found;
  }

  [[nodiscard]] Status reserve(SequenceState& state, std::int64_t extra_tokens, const char* call) {
    using codegemm::StatusCode;
    if (extra_tokens <= state.reserved) return {};
    const std::int64_t room = pool().blocks() * block_tokens() - state.length;
    const std::int64_t needed = blocks_for(state.length + std::min(extra_tokens, room));
    const std::int64_t used = state.length % block_tokens();  // of the last block
    const bool copies = state.reserved == 0 && used > 0 && cache_.shared(state.blocks.back());
    const std::int64_t fresh = needed - std::ssize(state.blocks) + (copies ? 1 : 0);
    if (extra_tokens > room || fresh > cache_.available()) {
      return refuse(StatusCode::kExhausted, call, extra_tokens, " tokens after ", state.length,
                    " need more than the ", pool().free_blocks(), " free and ", cache_.eviction().size(),
                    " cached blocks of ", pool().blocks());
    }
    if (Status status = check_quota(state.tenant, fresh, call); !status.ok()) return status;
    if (!try_reserve(state.blocks, static_cast<std::size_t>(needed))) return no_memory(call);
    if (Status status = make_room(fresh, call); !status.ok()) return status;
    if (copies) {
      auto copy = copy_of(state.blocks.back(), static_cast<int>(used), state.tenant);
      if (!copy.ok()) return copy.status();
      cache_.drop(state.blocks.back(), state.tenant);
      state.blocks.back() = *copy;
    }
    while (std::ssize(state.blocks) < needed) state.blocks.push_back(cache_.take(state.tenant));
    state.reserved = extra_tokens;
    return {};
  }

  /// No more tokens than are reserved.
  void commit(SequenceState& state, std::span<const std::int32_t> tokens) {
    while (!tokens.empty()) {
      const std::size_t count = std::min(tokens.size(), key_tokens_.size() - state.tail.size());
      state.tail.insert(state.tail.end(), tokens.begin(),
                        tokens.begin() + static_cast<std::ptrdiff_t>(count));
      tokens = tokens.subspan(count);
      if (state.tail.size() == key_tokens_.size()) publish(state);
      state.length += static_cast<std::int64_t>(count);
      state.reserved -= static_cast<std::int64_t>(count);
    }
  }

  [[nodiscard]] codegemm::Result<SequenceState*> fork(const SequenceState& from) {
    SequenceState* const fresh = sequences_.idle(block_tokens());
    if (fresh == nullptr) return no_memory("fork");
    const std::int64_t count = blocks_for(from.length);
    if (!try_reserve(fresh->blocks, static_cast<std::size_t>(count))) return no_memory("fork");
    const std::int64_t used = from.length % block_tokens();
    BlockId last = kNoBlock;
    if (used > 0) {
      last = from.blocks[static_cast<std::size_t>(count - 1)];
      if (from.reserved > 0) {
        if (cache_.available() == 0) {
          return refuse(codegemm::StatusCode::kExhausted, "fork", "no block of ", pool().blocks(),
                        " is left to copy the parent's last ", used, " tokens to");
        }
        if (Status status = check_quota(from.tenant, 1, "fork"); !status.ok()) return status;
        if (Status status = make_room(1, "fork"); !status.ok()) return status;
        auto copy = copy_of(last, static_cast<int>(used), from.tenant);
        if (!copy.ok()) return copy.status();
        last = *copy;
      } else {
        cache_.hold(last, from.tenant);
      }
    }
    start(*fresh, /*is_fork=*/true, from.tenant);
    const std::int64_t full = used > 0 ? count - 1 : count;
    for (std::int64_t i = 0; i < full; ++i) {
      cache_.hold(from.blocks[static_cast<std::size_t>(i)], from.tenant);
      fresh->blocks.push_back(from.blocks[static_cast<std::size_t>(i)]);
    }
    if (used > 0) fresh->blocks.push_back(last);
    fresh->length = from.length;
    fresh->base_length = from.is_fork ? from.base_length : from.length;
    return fresh;
  }

  /// Of a base sequence: back to `length` tokens, the last of which may lie within a block of the tree.
  void truncate_base(SequenceState& state, std::int64_t length) {
    const auto used = static_cast<std::size_t>(length % block_tokens());
    if (length / block_tokens() < state.length / block_tokens()) {
      state.tail.clear();
      if (used > 0) {
        const auto block_tokens_of =
            tree().tokens(state.blocks[static_cast<std::size_t>(length / block_tokens())]);
        state.tail.assign(block_tokens_of.begin(),
                          block_tokens_of.begin() + static_cast<std::ptrdiff_t>(used));
      }
    } else {
      state.tail.resize(used);
    }
    shrink(state, length);
  }

  /// Cuts the sequence to `length` tokens with nothing reserved. The last block goes first, so that the
  /// eviction policy hears of children before their parents.
  void shrink(SequenceState& state, std::int64_t length) {
    const std::int64_t keep = blocks_for(length);
    while (std::ssize(state.blocks) > keep) {
      cache_.drop(state.blocks.back(), state.tenant);
      state.blocks.pop_back();
    }
    state.length = length;
    state.reserved = 0;
  }

  /// Begins to bring back what the tiers have next of `tokens`; how many tokens that is.
  [[nodiscard]] codegemm::Result<std::int64_t> start_load(SequenceState& state,
                                                          std::span<const std::int32_t> tokens) {
    const TierCache* const tiers = cache_.tiers();
    if (tiers == nullptr || !state.tail.empty()) return std::int64_t{0};
    const std::size_t size = key_tokens_.size();
    const std::size_t count = tokens.size() / size;
    struct Found {
      std::int32_t entry;
      std::uint64_t serial;
    };
    std::vector<Found> entries;
    const bool allocated = try_allocate([&] {
      entries.reserve(count);
      state.arriving.reserve(count);
      state.arriving_tokens.reserve(count * size);
      state.blocks.reserve(state.blocks.size() + count);
    });
    if (!allocated) return no_memory("start_load");
    const TreeNode parent = parent_of_next(state);
    tiers->walk(tree().hash_of(parent), tree().serial_of(parent), tokens, tree(), [&](std::int32_t entry) {
      entries.push_back({entry, tiers->serial(entry)});
    });
    const std::int64_t wanted = std::ssize(entries);
    if (wanted == 0) return std::int64_t{0};
    if (wanted > cache_.available()) {
      return refuse(codegemm::StatusCode::kExhausted, "start_load", wanted, " blocks of ", pool().blocks(),
                    " are wanted, and ", cache_.available(), " can be had");
    }
    if (Status status = check_quota(state.tenant, wanted, "start_load"); !status.ok()) return status;
    if (Status status = make_room(wanted, "start_load"); !status.ok()) return status;
    for (std::size_t i = 0; i < entries.size(); ++i) {
      // Making room may have dropped an entry that nobody read yet: what comes after it cannot be used.
      const auto block = tokens.subspan(i * size, size);
      if (!tiers->still_holds(entries[i].entry, entries[i].serial)) break;
      const BlockId target = cache_.take(state.tenant);
      if (Status status = cache_.copy_in(entries[i].entry, target); !status.ok()) {
        cache_.drop(target, state.tenant);
        if (state.arriving.empty()) return status.with_prefix("KvAllocator::start_load");
        break;
      }
      state.arriving.push_back(target);
      state.arriving_tokens.insert(state.arriving_tokens.end(), block.begin(), block.end());
    }
    for (std::size_t i = state.arriving.size(); i-- > 0;) cache_.touch(entries[i].entry);
    return std::ssize(state.arriving_tokens);
  }

  /// Takes what has arrived into the sequence, up to the first block that failed; how many tokens that is.
  [[nodiscard]] codegemm::Result<std::int64_t> finish_load(SequenceState& state) {
    using Arrival = typename Cache::Arrival;
    const auto under_way = std::count_if(state.arriving.begin(), state.arriving.end(), [&](BlockId block) {
      return cache_.arrival(block) == Arrival::kUnderWay;
    });
    if (under_way > 0) {
      return refuse(codegemm::StatusCode::kExhausted, "finish_load", under_way, " of ", state.arriving.size(),
                    " blocks are under way");
    }
    const std::size_t size = key_tokens_.size();
    std::size_t good = 0;
    while (good < state.arriving.size() && cache_.arrival(state.arriving[good]) == Arrival::kArrived) {
      const auto tokens = std::span<const std::int32_t>(state.arriving_tokens).subspan(good * size, size);
      state.blocks.push_back(
          cache_.arrive(parent_of_next(state), tokens, state.arriving[good], state.tenant));
      state.length += static_cast<std::int64_t>(size);
      ++good;
    }
    for (std::size_t i = good; i < state.arriving.size(); ++i)
      cache_.abandon(state.arriving[i], state.tenant);
    state.arriving.clear();
    state.arriving_tokens.clear();
    const auto loaded = static_cast<std::int64_t>(good * size);
    stats_.loaded_tokens += loaded;
    return loaded;
  }

  /// Begins to copy down the full blocks of a base sequence, last first: in each tier a block is to be older
  /// than those before it, and dropped before them.
  [[nodiscard]] std::int64_t offload(const SequenceState& state) {
    const std::int64_t before = cache_.tiers()->copies_under_way();
    for (std::int64_t i = state.length / block_tokens(); i-- > 0;) {
      if (!cache_.copy_out(state.blocks[static_cast<std::size_t>(i)])) break;
    }
    return cache_.tiers()->copies_under_way() - before;
  }

  template <class Visit>
  void for_each_cached(Visit&& visit) const {
    for (BlockId block = 0; block < pool().blocks(); ++block) {
      if (!tree().contains(block)) continue;
      visit(0, tree().hash_of(tree().parent(block)), tree().hash(block));
    }
    if (cache_.tiers() != nullptr) cache_.tiers()->for_each_readable(visit);
  }

  [[nodiscard]] KvStats stats() const {
    KvStats stats = stats_;
    stats.total_blocks = pool().blocks();
    stats.free_blocks = pool().free_blocks();
    stats.cached_blocks = cache_.eviction().size();
    stats.moving_blocks = cache_.moving_blocks();
    stats.in_use_blocks = stats.total_blocks - stats.free_blocks - stats.cached_blocks - stats.moving_blocks;
    stats.shared_blocks = cache_.shared_blocks();
    stats.private_blocks = stats.in_use_blocks - stats.shared_blocks;
    stats.tree_blocks = tree().size();
    stats.sequences = sequences_.open();
    stats.evicted_blocks = cache_.evicted_blocks();
    stats.refused_copies = cache_.refused_copies();
    if (const TierCache* const tiers = cache_.tiers(); tiers != nullptr) {
      stats.offloaded_blocks = tiers->offloaded_blocks();
      stats.failed_copies = tiers->failed_copies();
    }
    stats.bytes_per_block = storage_->bytes_per_block();
    stats.bytes_in_use = stats.in_use_blocks * stats.bytes_per_block;
    stats.bytes_shared = stats.shared_blocks * stats.bytes_per_block;
    stats.bytes_private = stats.private_blocks * stats.bytes_per_block;
    stats.bytes_cached = stats.cached_blocks * stats.bytes_per_block;
    return stats;
  }

  /// The node that the block at length() of a base sequence comes after.
  [[nodiscard]] TreeNode parent_of_next(const SequenceState& state) const {
    const std::int64_t full = state.length / block_tokens();
    return full == 0 ? state.root : TreeNode::of_block(state.blocks[static_cast<std::size_t>(full - 1)]);
  }
  [[nodiscard]] std::int64_t blocks_for(std::int64_t tokens) const noexcept {
    return tokens / block_tokens() + (tokens % block_tokens() != 0 ? 1 : 0);
  }

 private:
  [[nodiscard]] const BlockPool& pool() const noexcept { return cache_.pool(); }
  [[nodiscard]] const PrefixTree<Hash>& tree() const noexcept { return cache_.tree(); }

  void start(SequenceState& state, bool is_fork, TenantId tenant) {
    sequences_.start(state, is_fork, tenant);
    ++cache_.ledger().stats(tenant).sequences;
  }
  [[nodiscard]] bool may_hold(const SequenceState& state, BlockId block) const {
    return cache_.ledger().room(state.tenant) > 0 || cache_.ledger().holds(state.tenant, block) > 0;
  }
  [[nodiscard]] Status check_quota(TenantId tenant, std::int64_t fresh, const char* call) {
    if (fresh <= 0 || fresh <= cache_.ledger().room(tenant)) return {};
    TenantStats& stats = cache_.ledger().stats(tenant);
    ++stats.refusals;
    return refuse(codegemm::StatusCode::kExhausted, call, fresh, " blocks more than the ",
                  stats.in_use_blocks, " in use exceed the quota of tenant ", tenant, " (", stats.name, "), ",
                  stats.max_blocks);
  }
  [[nodiscard]] Status make_room(std::int64_t blocks, const char* call) {
    if (cache_.make_room(blocks)) return {};
    return refuse(codegemm::StatusCode::kExhausted, call, blocks, " blocks are wanted, ",
                  pool().free_blocks(), " are free, and ", cache_.leaving_blocks(),
                  " will be when their copies are done: poll()");
  }

  /// Puts the block that the tail has just filled into the tree, or the tree's equal in its place.
  void publish(SequenceState& state) {
    BlockId& own = state.blocks[static_cast<std::size_t>(state.length / block_tokens())];
    const BlockId kept = cache_.publish(parent_of_next(state), state.tail, own, state.tenant);
    stats_.merged_blocks += kept != own ? 1 : 0;
    own = kept;
    state.tail.clear();
  }

  /// After make_room(1): a block of the caller's own with the first `tokens` slots of `block`.
  [[nodiscard]] codegemm::Result<BlockId> copy_of(BlockId block, int tokens, TenantId tenant) {
    const BlockId copy = cache_.take(tenant);
    if (Status status = storage_->copy_block(copy, block, tokens); !status.ok()) {
      cache_.drop(copy, tenant);
      return status;
    }
    ++stats_.copied_blocks;
    return copy;
  }

  Storage* storage_;
  Cache cache_;
  std::vector<std::int32_t> key_tokens_;  // [block_tokens], for a block whose tokens lie in two places
  SequenceTable sequences_;
  KvStats stats_;  // the counters of lookups, loads, merges and copies
};

}  // namespace prefillshare::detail
