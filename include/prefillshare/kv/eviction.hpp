// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/eviction.hpp - which cached block goes first when a sequence needs room.
// Layer: kv (host only).
// See: priority_eviction.hpp and agent_eviction.hpp for the policies that take hints.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/status.hpp>
#include <prefillshare/kv/block_pool.hpp>
#include <prefillshare/kv/try_allocate.hpp>

namespace prefillshare {

/// Keeps the blocks that are in the prefix tree and used by no sequence, and names the next to go.
/// The allocator promises: a block is inserted after every unused descendant of it (sequences return their
/// blocks last one first), and a block that is used again takes all its ancestors out with it. The policy
/// promises: victim() has no descendant among the blocks it keeps, so what is evicted is always a leaf.
template <class Policy>
concept EvictionPolicy = requires(Policy policy, const Policy constant, BlockId block, BlockId parent,
                                  std::int64_t blocks) {
  { policy.resize(blocks) } -> std::same_as<codegemm::Status>;  // once, before anything else
  // No longer used by any sequence. `parent` is the block before it, kNoBlock at the start of a prefix.
  { policy.insert(block, parent) } -> std::same_as<void>;
  { policy.erase(block) } -> std::same_as<void>;           // used again, or evicted
  { constant.victim() } -> std::same_as<BlockId>;          // kNoBlock when none may go
  { constant.size() } -> std::same_as<std::int64_t>;       // kept
  { constant.evictable() } -> std::same_as<std::int64_t>;  // victims that can be had, one by one
  { constant.contains(block) } -> std::same_as<bool>;
};

/// A moment on the caller's clock, in whatever unit it counts: milliseconds, or steps of an agent graph. The
/// allocator has no clock of its own, so that the same calls make the same decisions.
using KvTime = std::int64_t;
inline constexpr KvTime kKvNever = std::numeric_limits<KvTime>::max();  ///< a moment that does not come

/// What a caller knows about the future of cached blocks. Each policy reads the fields that it is for.
struct Retention {
  static constexpr int kDefaultPriority = 35;  ///< of blocks without a hint

  int priority = kDefaultPriority;  ///< 0 .. 100; the lowest goes first (PriorityEviction)
  KvTime expires = kKvNever;        ///< from then on the priority is 0, and a pin is none
  KvTime next_use = kKvNever;       ///< when the blocks are wanted again; kKvNever: unknown (AgentEviction)
  bool pinned = false;              ///< not to be evicted before `expires` (AgentEviction)

  /// All of it is equal.
  friend bool operator==(const Retention&, const Retention&) = default;
};

/// A policy that takes hints: KvAllocator::retain() and set_time() are there with such a policy only.
template <class Policy>
concept HintedEviction = EvictionPolicy<Policy> &&
    requires(Policy policy, BlockId block, const Retention& retention, KvTime now) {
  { policy.retain(block, retention) } -> std::same_as<void>;  // of a block in the tree, kept or in use
  { policy.forget(block) } -> std::same_as<void>;             // it left the tree: no hint any more
  { policy.set_time(now) } -> std::same_as<void>;             // does not go back
};

/// Least recently used first. By the order of insertion the head of the list is always a leaf, so choosing
/// is O(1) with no search. Intrusive, doubly linked, allocates in resize() only.
class LruEviction {
 public:
  /// As EvictionPolicy says. kOutOfMemory.
  [[nodiscard]] codegemm::Status resize(std::int64_t blocks) {
    if (!detail::try_allocate([&] { links_.assign(static_cast<std::size_t>(blocks) + 1, Link{}); })) {
      return codegemm::error(codegemm::StatusCode::kOutOfMemory, "LruEviction: no memory for ", blocks,
                             " entries");
    }
    sentinel_ = static_cast<BlockId>(blocks);
    at(sentinel_) = Link{sentinel_, sentinel_};
    size_ = 0;
    return {};
  }

  /// As EvictionPolicy says.
  void insert(BlockId block, BlockId /*parent*/) {
    CODEGEMM_ASSERT(!contains(block));
    const BlockId last = at(sentinel_).previous;
    at(block) = Link{last, sentinel_};
    at(last).next = block;
    at(sentinel_).previous = block;
    ++size_;
  }

  /// As EvictionPolicy says.
  void erase(BlockId block) {
    CODEGEMM_ASSERT(contains(block));
    const Link link = at(block);
    at(link.previous).next = link.next;
    at(link.next).previous = link.previous;
    at(block) = Link{};
    --size_;
  }

  /// As EvictionPolicy says.
  [[nodiscard]] BlockId victim() const { return size_ > 0 ? at(sentinel_).next : kNoBlock; }
  [[nodiscard]] std::int64_t size() const noexcept { return size_; }       ///< as EvictionPolicy says
  [[nodiscard]] std::int64_t evictable() const noexcept { return size_; }  ///< all of them
  /// As EvictionPolicy says.
  [[nodiscard]] bool contains(BlockId block) const { return at(block).next != kNoBlock; }

  /// The block that goes after `block`; kNoBlock at the end.
  [[nodiscard]] BlockId after(BlockId block) const {
    const BlockId next = at(block).next;
    return next == sentinel_ ? kNoBlock : next;
  }

 private:
  struct Link {
    BlockId previous = kNoBlock;
    BlockId next = kNoBlock;  // kNoBlock: not in the list
  };

  [[nodiscard]] Link& at(BlockId block) { return links_[static_cast<std::size_t>(block)]; }
  [[nodiscard]] const Link& at(BlockId block) const { return links_[static_cast<std::size_t>(block)]; }

  std::vector<Link> links_ = {Link{0, 0}};  // [blocks + 1], the last is the ring's sentinel
  BlockId sentinel_ = 0;
  std::int64_t size_ = 0;
};
static_assert(EvictionPolicy<LruEviction> && !HintedEviction<LruEviction>);

}  // namespace prefillshare
