// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/agent_eviction.hpp - for callers that know which agent is called when: pins and next uses.
// Layer: kv (host only).
// See: KVFlow (arXiv 2507.07400), which evicts by the steps that an agent graph still has to go.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/status.hpp>
#include <prefillshare/kv/block_heap.hpp>
#include <prefillshare/kv/eviction.hpp>
#include <prefillshare/kv/leaf_order.hpp>
#include <prefillshare/kv/try_allocate.hpp>

namespace prefillshare {

/// Blocks of which nothing is known go first, the least recently used of them first; then those with a next
/// use, the farthest first, so that with right hints for all this is Belady's rule. A hint that the clock has
/// passed is none: the use did not come. A pinned block, and all above it, stays until the pin expires; an
/// allocator that is full of pinned blocks answers kExhausted. A sequence kept open pins just as well, for as
/// long as it is open. Reads next_use, pinned and expires. O(log blocks) a call, pins O(depth).
class AgentEviction {
 public:
  /// As EvictionPolicy says. kOutOfMemory.
  [[nodiscard]] codegemm::Status resize(std::int64_t blocks) {
    const auto count = static_cast<std::size_t>(blocks);
    const bool allocated = detail::try_allocate([&] {
      order_.resize(count);
      due_.resize(count);
      retention_.assign(count, Retention{});
    });
    if (allocated) return {};
    return codegemm::error(codegemm::StatusCode::kOutOfMemory, "AgentEviction: no memory for ", blocks,
                           " entries");
  }

  /// As EvictionPolicy says.
  void insert(BlockId block, BlockId parent) {
    order_.insert(block, parent, key_of(block, ++stamp_), at(block).pinned);
  }
  void erase(BlockId block) { order_.erase(block); }                          ///< as EvictionPolicy says
  [[nodiscard]] BlockId victim() const { return order_.first(); }             ///< as EvictionPolicy says
  [[nodiscard]] std::int64_t size() const noexcept { return order_.size(); }  ///< as EvictionPolicy says
  /// Unpinned ones with nothing pinned below them.
  [[nodiscard]] std::int64_t evictable() const noexcept { return order_.evictable(); }
  /// As EvictionPolicy says.
  [[nodiscard]] bool contains(BlockId block) const { return order_.contains(block); }

  /// As HintedEviction says; replaces an older hint.
  void retain(BlockId block, const Retention& retention) {
    if (due_.contains(block)) due_.erase(block);
    at(block) = retention;
    lapse(block);
    rank(block);
  }
  /// As HintedEviction says.
  void forget(BlockId block) {
    if (due_.contains(block)) due_.erase(block);
    at(block) = Retention{};
  }
  /// As HintedEviction says; hints that expire by then lapse.
  void set_time(KvTime now) {
    now_ = now;
    while (due_.size() > 0 && due_.top_key() <= now) {
      const BlockId block = due_.top();
      due_.erase(block);
      lapse(block);
      rank(block);
    }
  }

 private:
  /// Unknown: {0, when last used}. Known: {1, farthest first}, then when last used.
  struct Key {
    std::uint64_t first = 0;  // 0: unknown; else falls as next_use rises, and is never 0
    std::uint64_t stamp = 0;
    friend bool operator<(const Key& a, const Key& b) {
      return a.first != b.first ? a.first < b.first : a.stamp < b.stamp;
    }
  };

  [[nodiscard]] Retention& at(BlockId block) { return retention_[static_cast<std::size_t>(block)]; }
  [[nodiscard]] Key key_of(BlockId block, std::uint64_t stamp) {
    const KvTime next = at(block).next_use;
    return {next == kKvNever ? 0 : static_cast<std::uint64_t>(kKvNever) - static_cast<std::uint64_t>(next),
            stamp};
  }
  /// Drops what the clock has passed, and has set_time() come back for the rest.
  void lapse(BlockId block) {
    Retention& retention = at(block);
    if (retention.next_use < now_) retention.next_use = kKvNever;
    if (retention.expires <= now_) retention.pinned = false;
    KvTime due = retention.pinned ? retention.expires : kKvNever;
    if (retention.next_use != kKvNever && retention.next_use + 1 < due) due = retention.next_use + 1;
    if (due != kKvNever) due_.push(block, due);
  }
  void rank(BlockId block) {
    if (order_.contains(block)) {
      order_.set(block, key_of(block, order_.key(block).stamp), at(block).pinned);
    }
  }

  detail::LeafOrder<Key> order_;
  detail::BlockHeap<KvTime> due_;  // blocks with a hint or a pin that will lapse
  std::vector<Retention> retention_;
  std::uint64_t stamp_ = 0;
  KvTime now_ = 0;
};
static_assert(HintedEviction<AgentEviction>);

}  // namespace prefillshare
