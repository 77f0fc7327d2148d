// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/priority_eviction.hpp - lowest priority first, then least recently used; priorities expire.
// Layer: kv (host only).
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

/// Evicts the leaf of the lowest priority, among equals the one unused longest. From Retention::expires on a
/// block counts as priority 0. Leaves only: a block waits for all that lies below it, whatever its own
/// priority. Reads priority and expires. O(log blocks) a call.
class PriorityEviction {
 public:
  /// As EvictionPolicy says. kOutOfMemory.
  [[nodiscard]] codegemm::Status resize(std::int64_t blocks) {
    const auto count = static_cast<std::size_t>(blocks);
    const bool allocated = detail::try_allocate([&] {
      order_.resize(count);
      expiry_.resize(count);
      retention_.assign(count, Retention{});
    });
    if (allocated) return {};
    return codegemm::error(codegemm::StatusCode::kOutOfMemory, "PriorityEviction: no memory for ", blocks,
                           " entries");
  }

  /// As EvictionPolicy says.
  void insert(BlockId block, BlockId parent) { order_.insert(block, parent, key_of(block, ++stamp_), false); }
  void erase(BlockId block) { order_.erase(block); }                          ///< as EvictionPolicy says
  [[nodiscard]] BlockId victim() const { return order_.first(); }             ///< as EvictionPolicy says
  [[nodiscard]] std::int64_t size() const noexcept { return order_.size(); }  ///< as EvictionPolicy says
  /// As EvictionPolicy says.
  [[nodiscard]] std::int64_t evictable() const noexcept { return order_.evictable(); }
  /// As EvictionPolicy says.
  [[nodiscard]] bool contains(BlockId block) const { return order_.contains(block); }

  /// As HintedEviction says; replaces an older hint.
  void retain(BlockId block, const Retention& retention) {
    forget(block);
    at(block) = retention;
    if (retention.expires <= now_) {
      at(block).priority = 0;
    } else if (retention.expires != kKvNever) {
      expiry_.push(block, retention.expires);
    }
    rank(block);
  }
  /// As HintedEviction says.
  void forget(BlockId block) {
    if (expiry_.contains(block)) expiry_.erase(block);
    at(block) = Retention{};
  }
  /// As HintedEviction says; priorities that expire by then become 0.
  void set_time(KvTime now) {
    now_ = now;
    while (expiry_.size() > 0 && expiry_.top_key() <= now) {
      const BlockId block = expiry_.top();
      expiry_.erase(block);
      at(block).priority = 0;
      rank(block);
    }
  }

 private:
  using Key = std::pair<int, std::uint64_t>;  // priority; then when it was last used

  [[nodiscard]] Retention& at(BlockId block) { return retention_[static_cast<std::size_t>(block)]; }
  [[nodiscard]] Key key_of(BlockId block, std::uint64_t stamp) { return {at(block).priority, stamp}; }
  void rank(BlockId block) {
    if (order_.contains(block)) order_.set(block, key_of(block, order_.key(block).second), false);
  }

  detail::LeafOrder<Key> order_;
  detail::BlockHeap<KvTime> expiry_;  // blocks whose priority is to fall
  std::vector<Retention> retention_;
  std::uint64_t stamp_ = 0;
  KvTime now_ = 0;
};
static_assert(HintedEviction<PriorityEviction>);

}  // namespace prefillshare
