// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/allocator.hpp - shares one context's KV blocks between turns, sessions and decode modules.
// Layer: kv (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/status.hpp>
#include <prefillshare/kv/allocator_core.hpp>
#include <prefillshare/kv/block_cache.hpp>
#include <prefillshare/kv/block_pool.hpp>
#include <prefillshare/kv/cache_key.hpp>
#include <prefillshare/kv/events.hpp>
#include <prefillshare/kv/eviction.hpp>
#include <prefillshare/kv/invariants.hpp>
#include <prefillshare/kv/prefix_tree.hpp>
#include <prefillshare/kv/sequence.hpp>
#include <prefillshare/kv/shape.hpp>
#include <prefillshare/kv/stats.hpp>
#include <prefillshare/kv/storage.hpp>
#include <prefillshare/kv/tenant.hpp>
#include <prefillshare/kv/tier_cache.hpp>
#include <prefillshare/kv/try_allocate.hpp>

namespace prefillshare {

/// The lock of an allocator that one thread at a time calls.
struct NoLock {
  void lock() noexcept {}    ///< nothing
  void unlock() noexcept {}  ///< nothing
};

/// Decides which block holds which tokens. Every block is in exactly one state: free, cached (in the prefix
/// tree, used by no sequence, may be evicted), in use, or moving (see Tiers); nothing in use is ever evicted.
/// The numbers in the blocks are the caller's business: it writes them through its storage, the allocator
/// only copies a partly filled block when two that share it go different ways.
///
/// One turn of a session:
///   open(key, tokens)            the longest cached prefix is shared; length() says how much of it
///   reserve(base, n)             blocks for the n tokens that are missing, or kExhausted: try again later
///   (the engine writes KV at positions length() .. length() + n - 1)
///   commit(base, those tokens)   now they can be shared: full blocks enter the prefix tree
///   fork(base)                   a decode module's view, at no cost in blocks
///   append_private(fork, 1)      room for a token of its own; (the engine writes KV at length() - 1)
///   (drop the fork; reserve, write and commit what it generated: the base prefills just that)
///
/// Slots at and past length() may be written only after reserve() or append_private(), which see to it that
/// their block is held by this sequence alone. A commit whose full block is already in the tree takes the
/// tree's block and returns its own; that is sound because both hold the KV of the same tokens at the same
/// positions by the same producer, equal up to rounding where the engine's rounding depends on the batch.
///
/// Same calls, same blocks: no clock, no address, no random number enters a decision. Failed calls change
/// nothing but what was evicted in trying. The storage must outlive the allocator, and the allocator its
/// sequences.
///
/// Tiers. With a CopyEngine (KvOptions) a block that is evicted is first copied down, and is free when the
/// copy is done: reserve() then answers kExhausted, and can be met after poll() has seen the copies end. A
/// block that has a copy already (offload(), or it was loaded) is free at once. What open() does not find on
/// the device, start_load() brings back. A copy that fails or finds no slot costs cached content, never more.
///
/// Threads. With Lock = NoLock externally synchronized: no two calls at once, on the allocator or on its
/// sequences, closing a sequence included. With a mutex (ConcurrentKvAllocator) any thread may call at any
/// time, as long as a sequence is used by one thread at a time; pool(), tree(), eviction() and cache() are
/// then for when nobody else calls.
template <KvStorage Storage, BlockHash Hash = ChainHash, EvictionPolicy Eviction = LruEviction,
          class Lock = NoLock>
class BasicKvAllocator final : private detail::SequenceOwner {
  using Core = detail::AllocatorCore<Storage, Hash, Eviction>;
  using Status = codegemm::Status;
  using Tokens = std::span<const std::int32_t>;
  using Guard = std::lock_guard<Lock>;

 public:
  /// For all blocks of the storage. kInvalidArgument for an impossible shape or copy engine, kOutOfMemory.
  [[nodiscard]] static codegemm::Result<std::unique_ptr<BasicKvAllocator>> create(
      Storage& storage, Hash hash = {}, Eviction eviction = {}, const KvOptions& options = {}) {
    const KvShape shape = storage.shape();
    if (Status status = validate(shape); !status.ok()) return status;
    auto cache = BlockCache<Hash, Eviction>::create(storage.blocks(), shape.block_tokens, std::move(hash),
                                                    std::move(eviction), options);
    if (!cache.ok()) return cache.status();
    std::unique_ptr<BasicKvAllocator> allocator;
    if (!detail::try_allocate(
            [&] { allocator.reset(new BasicKvAllocator(storage, *std::move(cache), options.events)); })) {
      return codegemm::error(codegemm::StatusCode::kOutOfMemory, "KvAllocator: no memory");
    }
    return allocator;
  }

  BasicKvAllocator(const BasicKvAllocator&) = delete;
  BasicKvAllocator& operator=(const BasicKvAllocator&) = delete;
  ~BasicKvAllocator() { CODEGEMM_ASSERT(core_.sequences().open() == 0); }

  /// A tenant more, for open(). kInvalidArgument, kOutOfMemory.
  [[nodiscard]] codegemm::Result<TenantId> add_tenant(std::string name, const TenantQuota& quota = {}) {
    const Guard guard(lock_);
    return core_.cache().ledger().add(std::move(name), quota);
  }
  /// From now on; what the tenant holds beyond it, it keeps. kInvalidArgument.
  [[nodiscard]] Status set_quota(TenantId tenant, const TenantQuota& quota) {
    const Guard guard(lock_);
    if (Status status = check(tenant, "set_quota"); !status.ok()) return status;
    if (quota.max_blocks < 0) {
      return Core::refuse(codegemm::StatusCode::kInvalidArgument, "set_quota", quota.max_blocks, " blocks");
    }
    core_.cache().ledger().set_quota(tenant, quota);
    return {};
  }

  /// A base sequence over the longest prefix of `tokens` that is cached, in full blocks; length() tells how
  /// many tokens that is. All of them may be: then there is nothing to reserve and the sequence is ready.
  /// Stops short of blocks that the tenant's quota has no room for.
  /// kInvalidArgument when the key names no model or the tenant is unknown; kOutOfMemory.
  [[nodiscard]] codegemm::Result<Sequence> open(const CacheKey& key, Tokens tokens,
                                                TenantId tenant = kDefaultTenant) {
    Sequence sequence;  // outlives the guard: closing takes the lock
    const Guard guard(lock_);
    if (key.model_id.empty()) {
      return Core::refuse(codegemm::StatusCode::kInvalidArgument, "open",
                          "the cache key has an empty model_id");
    }
    if (Status status = check(tenant, "open"); !status.ok()) return status;
    auto base = core_.open(key, tenant);
    if (!base.ok()) return base.status();
    sequence = detail::SequenceAccess::make(*this, **base);
    if (auto found = core_.extend(**base, tokens); !found.ok()) return found.status();
    return sequence;
  }

  /// Takes what the tree has of `tokens`, which are to follow a base sequence; the number of them that need
  /// no prefill now. Saves the work when another session has been here. Not while tokens are reserved.
  /// kInvalidArgument, kOutOfMemory.
  [[nodiscard]] codegemm::Result<std::int64_t> extend(Sequence& sequence, Tokens tokens) {
    const Guard guard(lock_);
    if (Status status = check(sequence, "extend", Kind::kBase); !status.ok()) return status;
    if (Status status = check_unreserved(sequence, "extend"); !status.ok()) return status;
    return core_.extend(state_of(sequence), tokens);
  }

  /// How many of `tokens`, from the first, lie on the device (tier 0) and after these in each tier below:
  /// what a router wants to know. Changes nothing. `by_tier` has one number for each tier.
  void lookup(const CacheKey& key, Tokens tokens, std::span<std::int64_t> by_tier) const {
    const Guard guard(lock_);
    std::fill(by_tier.begin(), by_tier.end(), 0);
    TreeNode node = tree().find_root(key);
    if (node == TreeNode() || by_tier.empty()) return;
    by_tier[0] = block_tokens() * tree().walk(node, tokens, [&](BlockId found) {
      node = TreeNode::of_block(found);
      return true;
    });
    if (core_.cache().tiers() == nullptr) return;
    core_.cache().tiers()->walk(
        tree().hash_of(node), tree().serial_of(node), tokens.subspan(static_cast<std::size_t>(by_tier[0])),
        tree(), [&](std::int32_t entry) {
          const auto tier = static_cast<std::size_t>(core_.cache().tiers()->place(entry).tier);
          if (tier < by_tier.size()) by_tier[tier] += block_tokens();
        });
  }

  /// Makes sure that `extra_tokens` can follow length(): takes free blocks, evicts cached ones where these
  /// do not do, and copies a partly filled last block that others share. All or nothing. Asking again for
  /// no more than is reserved does nothing. Works on both kinds: on a fork, before it is admitted, so that
  /// append_private() cannot fail later.
  /// kExhausted when blocks in use leave too few, the tenant's quota is full, or blocks wait for their copies
  /// (poll(), and ask again); kInvalidArgument; kOutOfMemory; the storage's failure.
  [[nodiscard]] Status reserve(Sequence& sequence, std::int64_t extra_tokens) {
    const Guard guard(lock_);
    if (Status status = check(sequence, "reserve", Kind::kEither); !status.ok()) return status;
    if (extra_tokens < 0) return negative("reserve", extra_tokens);
    return core_.reserve(state_of(sequence), extra_tokens, "reserve");
  }

  /// Gives back what is reserved and not used.
  [[nodiscard]] Status release_reserved(Sequence& sequence) {
    const Guard guard(lock_);
    if (Status status = check(sequence, "release_reserved", Kind::kEither); !status.ok()) return status;
    core_.shrink(state_of(sequence), state_of(sequence).length);
    return {};
  }

  /// The KV of `tokens` is now written at length() and after: the base sequence grows by them, and each
  /// block that is full enters the prefix tree (or gives way to its equal there).
  /// kInvalidArgument on a fork, and for more tokens than are reserved.
  [[nodiscard]] Status commit(Sequence& sequence, Tokens tokens) {
    const Guard guard(lock_);
    if (Status status = check(sequence, "commit", Kind::kBase); !status.ok()) return status;
    if (std::ssize(tokens) > state_of(sequence).reserved) {
      return Core::refuse(codegemm::StatusCode::kInvalidArgument, "commit", tokens.size(), " tokens, but ",
                          state_of(sequence).reserved, " are reserved");
    }
    core_.commit(state_of(sequence), tokens);
    return {};
  }

  /// A decode-private view of a sequence of either kind, as long as it is now, of the same tenant. Shares
  /// every block, the partly filled last one too: whoever appends first while it is shared gets a copy of its
  /// own. (If the parent has tokens reserved in that block, which it may write at any time, the fork gets its
  /// copy now.)
  /// kInvalidArgument, kOutOfMemory; kExhausted or the storage's failure only in the case in brackets.
  [[nodiscard]] codegemm::Result<Sequence> fork(const Sequence& parent) {
    const Guard guard(lock_);
    if (Status status = check(parent, "fork", Kind::kEither); !status.ok()) return status;
    auto forked = core_.fork(state_of(parent));
    if (!forked.ok()) return forked.status();
    return detail::SequenceAccess::make(*this, **forked);
  }

  /// One fork for each of `forks`, each with `reserved_tokens` reserved: N decode modules admitted together,
  /// or none. As fork() and reserve(); on failure `forks` are closed and every block is back.
  [[nodiscard]] Status fork_all(const Sequence& parent, std::span<Sequence> forks,
                                std::int64_t reserved_tokens) {
    for (Sequence& one : forks) one.reset();
    Status status = negative("fork_all", reserved_tokens);
    if (reserved_tokens >= 0) status = fork_each(parent, forks, reserved_tokens);
    if (!status.ok()) {
      for (Sequence& one : forks) one.reset();
    }
    return status;
  }

  /// A fork grows by `tokens`, whose KV the decode module writes next, at length() - tokens and after.
  /// As reserve(); cannot fail within what is reserved. kInvalidArgument on a base sequence.
  [[nodiscard]] Status append_private(Sequence& sequence, std::int64_t tokens) {
    const Guard guard(lock_);
    if (Status status = check(sequence, "append_private", Kind::kFork); !status.ok()) return status;
    if (tokens < 0) return negative("append_private", tokens);
    detail::SequenceState& state = state_of(sequence);
    if (Status status = core_.reserve(state, tokens, "append_private"); !status.ok()) return status;
    state.length += tokens;
    state.reserved -= tokens;
    return {};
  }

  /// Forgets the tokens from `length` on, and gives back the blocks past the new end, reserved ones included:
  /// a fork after a rejected speculation, not below its base_length(); a base sequence after an edit of its
  /// context, whose blocks in the tree stay cached. kInvalidArgument.
  [[nodiscard]] Status truncate(Sequence& sequence, std::int64_t length) {
    const Guard guard(lock_);
    if (Status status = check(sequence, "truncate", Kind::kEither); !status.ok()) return status;
    detail::SequenceState& state = state_of(sequence);
    const std::int64_t least = state.is_fork ? state.base_length : 0;
    if (length < least || length > state.length) {
      return Core::refuse(codegemm::StatusCode::kInvalidArgument, "truncate", "to ", length,
                          " tokens, expected ", least, " to ", state.length);
    }
    if (!state.is_fork) core_.truncate_base(state, length);
    if (state.is_fork) core_.shrink(state, length);
    return {};
  }

  /// What the caller knows about the future of the full blocks that hold the tokens [first, last) of a base
  /// sequence; a block partly within counts as within. The last word on a block counts, until it is evicted.
  /// kInvalidArgument.
  [[nodiscard]] Status retain(const Sequence& sequence, std::int64_t first, std::int64_t last,
                              const Retention& retention) requires HintedEviction<Eviction> {
    const Guard guard(lock_);
    if (Status status = check(sequence, "retain", Kind::kBase); !status.ok()) return status;
    if (first < 0 || last < first || last > sequence.length() || retention.priority < 0 ||
        retention.priority > 100) {
      return Core::refuse(codegemm::StatusCode::kInvalidArgument, "retain", "tokens ", first, " to ", last,
                          " of ", sequence.length(), ", priority ", retention.priority);
    }
    const std::int64_t end = std::min(core_.blocks_for(last), sequence.length() / block_tokens());
    for (std::int64_t i = first / block_tokens(); i < end; ++i) {
      core_.cache().eviction().retain(sequence.blocks()[static_cast<std::size_t>(i)], retention);
    }
    return {};
  }
  /// Tells the policy the caller's time, which does not go back.
  void set_time(KvTime now) requires HintedEviction<Eviction> {
    const Guard guard(lock_);
    core_.cache().eviction().set_time(now);
  }

  /// Begins to copy the full blocks of a base sequence to a lower tier, those without a copy, so that they
  /// are free at once when they are evicted: for a session that will be idle. How many were begun; a full
  /// queue takes fewer. kInvalidArgument; kUnsupported without tiers.
  [[nodiscard]] codegemm::Result<std::int64_t> offload(const Sequence& sequence) {
    const Guard guard(lock_);
    if (Status status = check(sequence, "offload", Kind::kBase); !status.ok()) return status;
    if (Status status = check_tiers("offload"); !status.ok()) return status;
    return core_.offload(state_of(sequence));
  }

  /// Begins to bring back what lower tiers have of `tokens`, which are to follow a base sequence that ends
  /// with a full block and has nothing reserved. How many tokens are under way, 0 if the tiers have none.
  /// Until finish_load() the sequence can only be closed. kExhausted as reserve(); kInvalidArgument;
  /// kOutOfMemory; the engine's failure.
  [[nodiscard]] codegemm::Result<std::int64_t> start_load(Sequence& sequence, Tokens tokens) {
    const Guard guard(lock_);
    if (Status status = check(sequence, "start_load", Kind::kBase); !status.ok()) return status;
    if (Status status = check_unreserved(sequence, "start_load"); !status.ok()) return status;
    return core_.start_load(state_of(sequence), tokens);
  }
  /// After poll(): length() grows by what was loaded, less than was under way if a copy failed. How many
  /// tokens that is. kExhausted while copies are under way; kInvalidArgument.
  [[nodiscard]] codegemm::Result<std::int64_t> finish_load(Sequence& sequence) {
    const Guard guard(lock_);
    if (Status status = check(sequence, "finish_load", Kind::kBase, /*may_load=*/true); !status.ok()) {
      return status;
    }
    return core_.finish_load(state_of(sequence));
  }
  /// Takes note of the copies that have ended. Does not wait. Nothing without tiers.
  void poll() {
    const Guard guard(lock_);
    if (core_.cache().tiers() != nullptr) core_.cache().poll();
  }
  /// Copies between tiers that poll() has not seen end.
  [[nodiscard]] std::int64_t copies_under_way() const {
    const Guard guard(lock_);
    return core_.cache().tiers() != nullptr ? core_.cache().tiers()->copies_under_way() : 0;
  }

  /// Whether the slot of `position` may be written: its block is this sequence's alone.
  [[nodiscard]] bool writable(const Sequence& sequence, std::int64_t position) const {
    const Guard guard(lock_);
    const std::span<const BlockId> blocks = sequence.blocks();
    if (detail::SequenceAccess::owner(sequence) != this || position < 0) return false;
    const std::int64_t index = position / block_tokens();
    return index < std::ssize(blocks) && !core_.cache().shared(blocks[static_cast<std::size_t>(index)]);
  }

  /// How many blocks are what, now, and what was counted since the beginning.
  [[nodiscard]] KvStats stats() const {
    const Guard guard(lock_);
    return core_.stats();
  }
  /// kInvalidArgument for a tenant that is not there; kOutOfMemory.
  [[nodiscard]] codegemm::Result<TenantStats> tenant_stats(TenantId tenant) const {
    const Guard guard(lock_);
    if (Status status = check(tenant, "tenant_stats"); !status.ok()) return status;
    TenantStats stats;
    if (!detail::try_allocate([&] { stats = core_.cache().ledger().stats(tenant); })) {
      return Core::no_memory("tenant_stats");
    }
    stats.bytes_shared = stats.shared_blocks * storage().bytes_per_block();
    stats.bytes_private = stats.private_blocks * storage().bytes_per_block();
    return stats;
  }
  /// All that is cached now, as events to begin with, and the number of the event to read on from: for a
  /// router that is new or has lost events. kOutOfMemory.
  [[nodiscard]] codegemm::Result<std::uint64_t> snapshot(std::vector<KvEvent>& out) const {
    const Guard guard(lock_);
    const bool allocated = detail::try_allocate([&] {
      out.clear();
      core_.for_each_cached([&](int tier, std::uint64_t parent, std::uint64_t hash) {
        out.push_back({0, KvEvent::Kind::kStored, tier, parent, hash});
      });
    });
    if (!allocated) return Core::no_memory("snapshot");
    return events_ != nullptr ? events_->next_number() : 0;
  }

  [[nodiscard]] Storage& storage() const noexcept { return core_.storage(); }            ///< as it was given
  [[nodiscard]] const BlockPool& pool() const noexcept { return core_.cache().pool(); }  ///< to look at
  /// To look at.
  [[nodiscard]] const PrefixTree<Hash>& tree() const noexcept { return core_.cache().tree(); }
  /// To look at.
  [[nodiscard]] const Eviction& eviction() const noexcept { return core_.cache().eviction(); }
  /// To look at.
  [[nodiscard]] const BlockCache<Hash, Eviction>& cache() const noexcept { return core_.cache(); }
  [[nodiscard]] int block_tokens() const noexcept { return core_.block_tokens(); }  ///< tokens of a block

  /// Recounts everything from the open sequences and the tree, and says what does not agree. For tests and
  /// for an engine's debug mode. O(blocks + sequences), allocates.
  [[nodiscard]] Status check_invariants() const {
    const Guard guard(lock_);
    return detail::check_invariants(core_);
  }

 private:
  enum class Kind { kBase, kFork, kEither };

  BasicKvAllocator(Storage& storage, BlockCache<Hash, Eviction> cache, EventLog* events)
      : core_(storage, std::move(cache)), events_(events) {}

  void close(detail::SequenceState& state) noexcept override {
    const Guard guard(lock_);
    core_.close(state);
  }

  [[nodiscard]] Status check(const Sequence& sequence, const char* call, Kind kind,
                             bool may_load = false) const {
    if (detail::SequenceAccess::owner(sequence) != this) {
      return Core::refuse(codegemm::StatusCode::kInvalidArgument, call,
                          "the sequence is closed or of another allocator");
    }
    if (kind != Kind::kEither && sequence.is_fork() != (kind == Kind::kFork)) {
      return Core::refuse(codegemm::StatusCode::kInvalidArgument, call, "the sequence is a ",
                          sequence.is_fork() ? "fork, whose KV a decode module made"
                                             : "base sequence; fork it to append decode-private tokens");
    }
    if (!may_load && sequence.loading() > 0) {
      return Core::refuse(codegemm::StatusCode::kInvalidArgument, call, sequence.loading(),
                          " tokens are being loaded: finish_load() first");
    }
    return {};
  }
  [[nodiscard]] Status check(TenantId tenant, const char* call) const {
    if (core_.cache().ledger().contains(tenant)) return {};
    return Core::refuse(codegemm::StatusCode::kInvalidArgument, call, "tenant ", tenant, " of ",
                        core_.cache().ledger().tenants());
  }
  [[nodiscard]] Status check_unreserved(const Sequence& sequence, const char* call) const {
    if (sequence.reserved() == 0) return {};
    return Core::refuse(codegemm::StatusCode::kInvalidArgument, call, sequence.reserved(),
                        " tokens are reserved and not committed");
  }
  [[nodiscard]] Status check_tiers(const char* call) const {
    if (core_.cache().tiers() != nullptr) return {};
    return Core::refuse(codegemm::StatusCode::kUnsupported, call, "the allocator has no copy engine");
  }
  [[nodiscard]] static Status negative(const char* call, std::int64_t tokens) {
    return Core::refuse(codegemm::StatusCode::kInvalidArgument, call, tokens, " tokens");
  }
  [[nodiscard]] Status fork_each(const Sequence& parent, std::span<Sequence> forks, std::int64_t reserved) {
    for (Sequence& one : forks) {
      auto forked = fork(parent);
      if (!forked.ok()) return forked.status();
      one = *std::move(forked);
      if (Status status = reserve(one, reserved); !status.ok()) return status;
    }
    return {};
  }
  [[nodiscard]] static detail::SequenceState& state_of(const Sequence& sequence) {
    return *detail::SequenceAccess::state(sequence);
  }

  Core core_;
  EventLog* events_;
  mutable Lock lock_;
};

/// The allocator over pages in host memory.
using KvAllocator = BasicKvAllocator<HostKvStorage>;
/// The same for several threads.
using ConcurrentKvAllocator = BasicKvAllocator<HostKvStorage, ChainHash, LruEviction, std::mutex>;

}  // namespace prefillshare
