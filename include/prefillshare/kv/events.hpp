// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/events.hpp - what entered and left the cache, numbered, for routers.
// Layer: kv (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include <codegemm/base/status.hpp>
#include <prefillshare/kv/try_allocate.hpp>

namespace prefillshare {

/// One change of what a cache holds. Prefixes are named by their hashes, which are the same in every process.
struct KvEvent {
  /// A block came, or went.
  enum class Kind : std::uint8_t { kStored, kRemoved };

  std::uint64_t number = 0;   ///< from 0, with no gap
  Kind kind = Kind::kStored;  ///< what happened
  int tier = 0;               ///< 0: the allocator's own blocks; 1, 2, ...: the copy engine's tiers
  std::uint64_t parent = 0;   ///< hash of the prefix before the block, or of the CacheKey at its start
  std::uint64_t hash = 0;     ///< hash of the prefix up to the block's end

  /// All of it is equal.
  friend bool operator==(const KvEvent&, const KvEvent&) = default;
};

/// The last `capacity` events, in a ring. One allocator writes; any number of readers keep their own position
/// and see by the numbers whether they have missed some. Thread-safe. Writing never waits for a reader and
/// allocates nothing.
class EventLog {
 public:
  /// What read() found.
  struct Batch {
    std::int64_t count = 0;  ///< events written to `out`
    std::uint64_t next = 0;  ///< where to read on
    std::uint64_t lost = 0;  ///< events from the asked number on that the ring no longer has: start over from
                             ///< KvAllocator::snapshot()
  };

  /// kInvalidArgument, kOutOfMemory.
  [[nodiscard]] codegemm::Status resize(std::int64_t capacity) {
    const std::lock_guard lock(mutex_);
    if (capacity < 1) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "EventLog: a ring of ", capacity,
                             " events");
    }
    std::vector<KvEvent> ring;
    if (!detail::try_allocate([&] { ring.resize(static_cast<std::size_t>(capacity)); })) {
      return codegemm::error(codegemm::StatusCode::kOutOfMemory, "EventLog: no memory for ", capacity,
                             " events");
    }
    ring_ = std::move(ring);
    first_ = next_;
    return {};
  }

  /// For the allocator: the next event, under the next number.
  void push(KvEvent::Kind kind, int tier, std::uint64_t parent, std::uint64_t hash) {
    const std::lock_guard lock(mutex_);
    if (!ring_.empty()) {
      ring_[static_cast<std::size_t>(next_ % ring_.size())] = {next_, kind, tier, parent, hash};
    }
    ++next_;
    first_ = std::max(first_, next_ - std::min<std::uint64_t>(next_, ring_.size()));
  }

  /// Events from number `from` on, oldest first.
  [[nodiscard]] Batch read(std::uint64_t from, std::span<KvEvent> out) const {
    const std::lock_guard lock(mutex_);
    Batch batch;
    batch.next = std::min(std::max(from, first_), next_);
    batch.lost = from < batch.next ? batch.next - from : 0;
    while (batch.next < next_ && batch.count < std::ssize(out)) {
      out[static_cast<std::size_t>(batch.count++)] =
          ring_[static_cast<std::size_t>(batch.next++ % ring_.size())];
    }
    return batch;
  }

  /// The number that the next event will have.
  [[nodiscard]] std::uint64_t next_number() const {
    const std::lock_guard lock(mutex_);
    return next_;
  }

 private:
  mutable std::mutex mutex_;
  std::vector<KvEvent> ring_;  // event n at n % capacity
  std::uint64_t first_ = 0;    // the oldest still there
  std::uint64_t next_ = 0;
};

}  // namespace prefillshare
