// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/allocator.hpp - shares one context's KV blocks between turns, sessions and decode modules.
// Layer: kv (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/status.hpp>
#include <prefillshare/kv/block_cache.hpp>
#include <prefillshare/kv/block_pool.hpp>
#include <prefillshare/kv/cache_key.hpp>
#include <prefillshare/kv/eviction.hpp>
#include <prefillshare/kv/invariants.hpp>
#include <prefillshare/kv/prefix_tree.hpp>
#include <prefillshare/kv/sequence.hpp>
#include <prefillshare/kv/shape.hpp>
#include <prefillshare/kv/stats.hpp>
#include <prefillshare/kv/storage.hpp>
#include <prefillshare/kv/try_allocate.hpp>

namespace prefillshare {

/// Decides which block holds which tokens. Every block is in exactly one state: free, cached (in the prefix
/// tree, used by no sequence, may be evicted) or in use; nothing in use is ever evicted. The numbers in the
/// blocks are the caller's business: it writes them through its storage, the allocator only copies a partly
/// filled block when two that share it go different ways.
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
/// nothing but what was evicted in trying. Externally synchronized: no two calls at once, on the allocator
/// or on its sequences, closing a sequence included. The storage must outlive the allocator, and the
/// allocator its sequences.
template <KvStorage Storage, BlockHash Hash = ChainHash, EvictionPolicy Eviction = LruEviction>
class BasicKvAllocator final : private detail::SequenceOwner {
 public:
  /// For all blocks of the storage. kInvalidArgument for an impossible shape, kOutOfMemory.
  [[nodiscard]] static codegemm::Result<std::unique_ptr<BasicKvAllocator>> create(Storage& storage,
                                                                                  Hash hash = {},
                                                                                  Eviction eviction = {}) {
    const KvShape shape = storage.shape();
    if (codegemm::Status status = validate(shape); !status.ok()) return status;
    auto cache = BlockCache<Hash, Eviction>::create(storage.blocks(), shape.block_tokens, std::move(hash),
                                                    std::move(eviction));
    if (!cache.ok()) return cache.status();
    std::unique_ptr<BasicKvAllocator> allocator;
    const bool allocated = detail::try_allocate([&] {
      allocator.reset(new BasicKvAllocator(storage, *std::move(cache)));
      allocator->key_tokens_.resize(static_cast<std::size_t>(shape.block_tokens));
    });
    if (!allocated) return codegemm::error(codegemm::StatusCode::kOutOfMemory, "KvAllocator: no memory");
    return allocator;
  }

  BasicKvAllocator(const BasicKvAllocator&) = delete;
  BasicKvAllocator& operator=(const BasicKvAllocator&) = delete;
  ~BasicKvAllocator() { CODEGEMM_ASSERT(open_sequences() == 0); }

  /// A base sequence over the longest prefix of `tokens` that is cached, in full blocks; length() tells how
  /// many tokens that is. All of them may be: then there is nothing to reserve and the sequence is ready.
  /// kInvalidArgument when the key names no model; kOutOfMemory.
  [[nodiscard]] codegemm::Result<Sequence> open(const CacheKey& key, std::span<const std::int32_t> tokens) {
    if (key.model_id.empty()) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument,
                             "KvAllocator::open: the cache key has an empty model_id");
    }
    auto state = new_state();
    if (!state.ok()) return state.status();
    auto root = cache_.acquire_root(key);
    if (!root.ok()) return root.status();
    detail::SequenceState& base = start(**state, /*is_fork=*/false);
    base.root = *root;
    Sequence sequence = detail::SequenceAccess::make(*this, base);
    if (auto found = extend(sequence, tokens); !found.ok()) return found.status();
    return sequence;
  }

  /// Takes what the tree has of `tokens`, which are to follow a base sequence; the number of them that need
  /// no prefill now. Saves the work when another session has been here. Not while tokens are reserved.
  /// kInvalidArgument, kOutOfMemory.
  [[nodiscard]] codegemm::Result<std::int64_t> extend(Sequence& sequence,
                                                      std::span<const std::int32_t> tokens) {
    if (codegemm::Status status = check(sequence, "extend", Kind::kBase); !status.ok()) return status;
    detail::SequenceState& state = state_of(sequence);
    if (state.reserved != 0) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "KvAllocator::extend: ", state.reserved,
                             " tokens are reserved and not committed");
    }
    const std::size_t block_tokens = key_tokens_.size();
    const std::size_t full_blocks = (state.tail.size() + tokens.size()) / block_tokens;
    if (!detail::try_reserve(state.blocks, state.blocks.size() + full_blocks)) return no_memory("extend");

    const std::int64_t old_length = state.length;
    std::size_t next = 0;  // of tokens, the first not yet covered
    for (std::size_t i = 0; i < full_blocks; ++i) {
      const std::size_t used = state.tail.size();  // 0 but perhaps for the first
      std::span<const std::int32_t> key_tokens = tokens.subspan(next, block_tokens - used);
      if (used > 0) {
        std::copy(state.tail.begin(), state.tail.end(), key_tokens_.begin());
        std::copy(key_tokens.begin(), key_tokens.end(),
                  key_tokens_.begin() + static_cast<std::ptrdiff_t>(used));
        key_tokens = key_tokens_;
      }
      const BlockId found = tree().find(tree().query(parent_of_next(state), key_tokens));
      if (found == kNoBlock) break;
      cache_.hold(found);
      if (used > 0) {
        cache_.drop(state.blocks.back());
        state.blocks.back() = found;
        state.tail.clear();
      } else {
        state.blocks.push_back(found);
      }
      next += block_tokens - used;
      state.length += static_cast<std::int64_t>(block_tokens - used);
    }
    stats_.hit_tokens += state.length - old_length;
    stats_.miss_tokens += std::ssize(tokens) - (state.length - old_length);
    return state.length - old_length;
  }

  /// Makes sure that `extra_tokens` can follow length(): takes free blocks, evicts cached ones where these
  /// do not do, and copies a partly filled last block that others share. All or nothing. Asking again for
  /// no more than is reserved does nothing. Works on both kinds: on a fork, before it is admitted, so that
  /// append_private() cannot fail later.
  /// kExhausted when blocks in use leave too few; kInvalidArgument; kOutOfMemory; the storage's failure.
  [[nodiscard]] codegemm::Status reserve(Sequence& sequence, std::int64_t extra_tokens) {
    if (codegemm::Status status = check(sequence, "reserve", Kind::kEither); !status.ok()) return status;
    if (extra_tokens < 0) return negative("reserve", extra_tokens);
    detail::SequenceState& state = state_of(sequence);
    if (extra_tokens <= state.reserved) return {};
    const std::int64_t room = pool().blocks() * block_tokens() - state.length;
    const std::int64_t needed = blocks_for(state.length + std::min(extra_tokens, room));
    const std::int64_t used = state.length % block_tokens();  // of the last block
    const bool copies = state.reserved == 0 && used > 0 && cache_.shared(state.blocks.back());
    const std::int64_t fresh = needed - std::ssize(state.blocks) + (copies ? 1 : 0);
    if (extra_tokens > room || fresh > cache_.available()) {
      return codegemm::error(codegemm::StatusCode::kExhausted, "KvAllocator::reserve: ", extra_tokens,
                             " tokens after ", state.length, " need more than the ", pool().free_blocks(),
                             " free and ", eviction().size(), " cached blocks of ", pool().blocks());
    }
    if (!detail::try_reserve(state.blocks, static_cast<std::size_t>(needed))) return no_memory("reserve");
    cache_.make_room(fresh);
    if (copies) {
      auto copy = copy_of(state.blocks.back(), static_cast<int>(used));
      if (!copy.ok()) return copy.status();
      cache_.drop(state.blocks.back());
      state.blocks.back() = *copy;
    }
    while (std::ssize(state.blocks) < needed) state.blocks.push_back(cache_.take());
    state.reserved = extra_tokens;
    return {};
  }

  /// Gives back what is reserved and not used.
  [[nodiscard]] codegemm::Status release_reserved(Sequence& sequence) {
    if (codegemm::Status status = check(sequence, "release_reserved", Kind::kEither); !status.ok())
      return status;
    shrink(state_of(sequence), state_of(sequence).length);
    return {};
  }

  /// The KV of `tokens` is now written at length() and after: the base sequence grows by them, and each
  /// block that is full enters the prefix tree (or gives way to its equal there).
  /// kInvalidArgument on a fork, and for more tokens than are reserved.
  [[nodiscard]] codegemm::Status commit(Sequence& sequence, std::span<const std::int32_t> tokens) {
    if (codegemm::Status status = check(sequence, "commit", Kind::kBase); !status.ok()) return status;
    detail::SequenceState& state = state_of(sequence);
    if (std::ssize(tokens) > state.reserved) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "KvAllocator::commit: ", tokens.size(),
                             " tokens, but ", state.reserved, " are reserved");
    }
    const std::size_t block_tokens = key_tokens_.size();
    while (!tokens.empty()) {
      const std::size_t count = std::min(tokens.size(), block_tokens - state.tail.size());
      state.tail.insert(state.tail.end(), tokens.begin(),
                        tokens.begin() + static_cast<std::ptrdiff_t>(count));
      tokens = tokens.subspan(count);
      if (state.tail.size() == block_tokens) publish(state);
      state.length += static_cast<std::int64_t>(count);
      state.reserved -= static_cast<std::int64_t>(count);
    }
    return {};
  }

  /// A decode-private view of a sequence of either kind, as long as it is now. Shares every block, the
  /// partly filled last one too: whoever appends first while it is shared gets a copy of its own. (If the
  /// parent has tokens reserved in that block, which it may write at any time, the fork gets its copy now.)
  /// kInvalidArgument, kOutOfMemory; kExhausted or the storage's failure only in the case in brackets.
  [[nodiscard]] codegemm::Result<Sequence> fork(const Sequence& parent) {
    if (codegemm::Status status = check(parent, "fork", Kind::kEither); !status.ok()) return status;
    const detail::SequenceState& from = state_of(parent);
    auto fresh = new_state();
    if (!fresh.ok()) return fresh.status();
    const std::int64_t count = blocks_for(from.length);
    if (!detail::try_reserve((*fresh)->blocks, static_cast<std::size_t>(count))) return no_memory("fork");

    const std::int64_t used = from.length % block_tokens();
    BlockId last = kNoBlock;
    if (used > 0) {
      last = from.blocks[static_cast<std::size_t>(count - 1)];
      if (from.reserved > 0) {
        if (cache_.available() == 0) {
          return codegemm::error(codegemm::StatusCode::kExhausted, "KvAllocator::fork: no block of ",
                                 pool().blocks(), " is left to copy the parent's last ", used, " tokens to");
        }
        cache_.make_room(1);
        auto copy = copy_of(last, static_cast<int>(used));
        if (!copy.ok()) return copy.status();
        last = *copy;
      } else {
        cache_.hold(last);
      }
    }
    detail::SequenceState& state = start(**fresh, /*is_fork=*/true);
    const std::int64_t full = used > 0 ? count - 1 : count;
    for (std::int64_t i = 0; i < full; ++i) {
      cache_.hold(from.blocks[static_cast<std::size_t>(i)]);
      state.blocks.push_back(from.blocks[static_cast<std::size_t>(i)]);
    }
    if (used > 0) state.blocks.push_back(last);
    state.length = from.length;
    state.base_length = from.is_fork ? from.base_length : from.length;
    return detail::SequenceAccess::make(*this, state);
  }

  /// A fork grows by `tokens`, whose KV the decode module writes next, at length() - tokens and after.
  /// Fails as reserve() does, and never within what is reserved; kInvalidArgument on a base sequence.
  [[nodiscard]] codegemm::Status append_private(Sequence& sequence, std::int64_t tokens) {
    if (codegemm::Status status = check(sequence, "append_private", Kind::kFork); !status.ok()) return status;
    if (tokens < 0) return negative("append_private", tokens);
    if (codegemm::Status status = reserve(sequence, tokens); !status.ok()) return status;
    state_of(sequence).length += tokens;
    state_of(sequence).reserved -= tokens;
    return {};
  }

  /// A fork forgets its tokens from `length` on, as after a rejected speculation, and gives back the blocks
  /// past the new end, reserved ones included. Not below base_length(): kInvalidArgument.
  [[nodiscard]] codegemm::Status truncate(Sequence& sequence, std::int64_t length) {
    if (codegemm::Status status = check(sequence, "truncate", Kind::kFork); !status.ok()) return status;
    detail::SequenceState& state = state_of(sequence);
    if (length < state.base_length || length > state.length) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "KvAllocator::truncate: to ", length,
                             " tokens, expected ", state.base_length, " to ", state.length);
    }
    shrink(state, length);
    return {};
  }

  /// Whether the slot of `position` may be written: its block is this sequence's alone.
  [[nodiscard]] bool writable(const Sequence& sequence, std::int64_t position) const {
    const std::span<const BlockId> blocks = sequence.blocks();
    if (detail::SequenceAccess::owner(sequence) != this || position < 0) return false;
    const std::int64_t index = position / block_tokens();
    return index < std::ssize(blocks) && !cache_.shared(blocks[static_cast<std::size_t>(index)]);
  }

  [[nodiscard]] KvStats stats() const {
    KvStats stats = stats_;
    stats.total_blocks = pool().blocks();
    stats.free_blocks = pool().free_blocks();
    stats.cached_blocks = eviction().size();
    stats.in_use_blocks = stats.total_blocks - stats.free_blocks - stats.cached_blocks;
    stats.shared_blocks = cache_.shared_blocks();
    stats.private_blocks = stats.in_use_blocks - stats.shared_blocks;
    stats.tree_blocks = tree().size();
    stats.evicted_blocks = cache_.evicted_blocks();
    stats.sequences = open_sequences();
    stats.bytes_per_block = storage_->bytes_per_block();
    stats.bytes_in_use = stats.in_use_blocks * stats.bytes_per_block;
    stats.bytes_shared = stats.shared_blocks * stats.bytes_per_block;
    stats.bytes_private = stats.private_blocks * stats.bytes_per_block;
    stats.bytes_cached = stats.cached_blocks * stats.bytes_per_block;
    return stats;
  }

  [[nodiscard]] Storage& storage() const noexcept { return *storage_; }
  [[nodiscard]] const BlockPool& pool() const noexcept { return cache_.pool(); }
  [[nodiscard]] const PrefixTree<Hash>& tree() const noexcept { return cache_.tree(); }
  [[nodiscard]] const Eviction& eviction() const noexcept { return cache_.eviction(); }
  [[nodiscard]] int block_tokens() const noexcept { return static_cast<int>(key_tokens_.size()); }

  /// Recounts everything from the open sequences and the tree, and says what does not agree. For tests and
  /// for an engine's debug mode. O(blocks + sequences), allocates.
  [[nodiscard]] codegemm::Status check_invariants() const { return detail::check_invariants(*this, states_); }

 private:
  enum class Kind { kBase, kFork, kEither };

  BasicKvAllocator(Storage& storage, BlockCache<Hash, Eviction> cache)
      : storage_(&storage), cache_(std::move(cache)) {}

  [[nodiscard]] codegemm::Status check(const Sequence& sequence, const char* call, Kind kind) const {
    if (detail::SequenceAccess::owner(sequence) != this) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "KvAllocator::", call,
                             ": the sequence is closed or of another allocator");
    }
    if (kind != Kind::kEither && sequence.is_fork() != (kind == Kind::kFork)) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "KvAllocator::", call,
                             ": the sequence is a ",
                             sequence.is_fork() ? "fork, whose KV a decode module made"
                                                : "base sequence; fork it to append decode-private tokens");
    }
    return {};
  }
  [[nodiscard]] static codegemm::Status negative(const char* call, std::int64_t tokens) {
    return codegemm::error(codegemm::StatusCode::kInvalidArgument, "KvAllocator::", call, ": ", tokens,
                           " tokens");
  }
  [[nodiscard]] static codegemm::Status no_memory(const char* call) {
    return codegemm::error(codegemm::StatusCode::kOutOfMemory, "KvAllocator::", call, ": no memory");
  }

  [[nodiscard]] static detail::SequenceState& state_of(const Sequence& sequence) {
    return *detail::SequenceAccess::state(sequence);
  }

  /// A closed state with its memory; it counts as taken only after start().
  [[nodiscard]] codegemm::Result<detail::SequenceState*> new_state() {
    const bool allocated = detail::try_allocate([&] {
      if (!idle_states_.empty()) return;
      if (states_.size() == states_.capacity()) {
        const std::size_t grown = std::max<std::size_t>(16, 2 * states_.size());
        idle_states_.reserve(grown);  // room for all, so that closing never allocates
        states_.reserve(grown);
      }
      auto state = std::make_unique<detail::SequenceState>();
      state->index = static_cast<std::int32_t>(states_.size());
      state->block_tokens = block_tokens();
      state->tail.reserve(key_tokens_.size());
      states_.push_back(std::move(state));
      idle_states_.push_back(states_.back()->index);
    });
    if (!allocated) return no_memory("open");
    return states_[static_cast<std::size_t>(idle_states_.back())].get();
  }
  [[nodiscard]] detail::SequenceState& start(detail::SequenceState& state, bool is_fork) {
    CODEGEMM_ASSERT(!state.is_open && idle_states_.back() == state.index);
    idle_states_.pop_back();
    state.is_open = true;
    state.is_fork = is_fork;
    return state;
  }
  void close(detail::SequenceState& state) noexcept override {
    CODEGEMM_ASSERT(state.is_open);
    shrink(state, 0);
    if (!state.is_fork) cache_.release_root(state.root);
    state.tail.clear();
    state.root = TreeNode();
    state.base_length = 0;
    state.is_open = false;
    idle_states_.push_back(state.index);
  }
  [[nodiscard]] std::int64_t open_sequences() const noexcept {
    return std::ssize(states_) - std::ssize(idle_states_);
  }

  /// Cuts the sequence to `length` tokens with nothing reserved. The last block goes first, so that the
  /// eviction policy hears of children before their parents.
  void shrink(detail::SequenceState& state, std::int64_t length) {
    const std::int64_t keep = blocks_for(length);
    while (std::ssize(state.blocks) > keep) {
      cache_.drop(state.blocks.back());
      state.blocks.pop_back();
    }
    state.length = length;
    state.reserved = 0;
  }

  [[nodiscard]] std::int64_t blocks_for(std::int64_t tokens) const noexcept {
    return tokens / block_tokens() + (tokens % block_tokens() != 0 ? 1 : 0);
  }
  /// Of a base sequence: the node that the block at length() comes after.
  [[nodiscard]] TreeNode parent_of_next(const detail::SequenceState& state) const {
    const std::int64_t full = state.length / block_tokens();
    return full == 0 ? state.root : TreeNode::of_block(state.blocks[static_cast<std::size_t>(full - 1)]);
  }

  /// Puts the block that the tail has just filled into the tree, or the tree's equal in its place.
  void publish(detail::SequenceState& state) {
    BlockId& own = state.blocks[static_cast<std::size_t>(state.length / block_tokens())];
    const BlockId kept = cache_.publish(parent_of_next(state), state.tail, own);
    stats_.merged_blocks += kept != own ? 1 : 0;
    own = kept;
    state.tail.clear();
  }

  /// After make_room(1): a block of the caller's own with the first `tokens` slots of `block`.
  [[nodiscard]] codegemm::Result<BlockId> copy_of(BlockId block, int tokens) {
    const BlockId copy = cache_.take();
    if (codegemm::Status status = storage_->copy_block(copy, block, tokens); !status.ok()) {
      cache_.drop(copy);
      return status;
    }
    ++stats_.copied_blocks;
    return copy;
  }

  Storage* storage_;
  BlockCache<Hash, Eviction> cache_;
  std::vector<std::int32_t>
      key_tokens_;  // [block_tokens], scratch for a block whose tokens lie in two places
  std::vector<std::unique_ptr<detail::SequenceState>> states_;  // open and idle; they do not move
  std::vector<std::int32_t> idle_states_;
  KvStats stats_;  // the counters of lookups, merges and copies; the rest is filled in by stats()
};

/// The allocator over fp32 pages in host memory.
using KvAllocator = BasicKvAllocator<HostKvStorage>;

}  // namespace prefillshare
