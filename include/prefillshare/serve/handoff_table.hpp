// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/handoff_table.hpp - the hand-offs that a decode worker has under way, each under a
// number that is never used again.
// Layer: serve (host only).
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include <prefillshare/kv/eviction.hpp>
#include <prefillshare/serve/handoff.hpp>

namespace prefillshare {

/// Names a hand-off in messages. Never used again by a table, so that a message that comes late speaks of
/// nothing rather than of somebody else's blocks.
using HandoffId = std::uint64_t;

/// Who asked for a hand-off and how long it may take.
struct HandoffTerms {
  std::int32_t source = 0;     ///< the prefill worker that sends it: aborted together when that one dies
  KvTime deadline = kKvNever;  ///< by the caller's clock
};

/// What the sender must know.
struct HandoffGrant {
  HandoffId id = 0;                 ///< to be sent along with every page
  std::int64_t cached_tokens = 0;   ///< there already: send what follows
  std::int64_t missing_blocks = 0;  ///< of them each layer is to be sent
};

/// The hand-offs under way at one decode worker. A call with the number of one that is over, taken or was
/// never there is kNotFound and does nothing.
///
/// With Lock = std::mutex and an allocator that has one too, any thread may call at any time: the thread that
/// writes pages, the one that cancels and the one that decodes.
template <class Allocator = KvAllocator, class Lock = NoLock>
class HandoffTable {
  using Guard = std::lock_guard<Lock>;

 public:
  /// Each block arrives in `layers` parts. No more than `most` at once. A worker that is started again should
  /// begin with another `first_id` than before (its start time, for instance). The allocator outlives the
  /// table.
  HandoffTable(Allocator& allocator, std::int64_t layers, std::int64_t most, HandoffId first_id = 1)
      : allocator_(&allocator), layers_(layers), most_(most), next_id_(first_id) {}

  /// kExhausted when `most` are under way or the pool has no room: ask again later. As Handoff::reserve().
  [[nodiscard]] Result<HandoffGrant> reserve(const CacheKey& key, std::span<const std::int32_t> tokens,
                                             const HandoffTerms& terms = {},
                                             TenantId tenant = kDefaultTenant) {
    const Guard guard(lock_);
    if (std::ssize(entries_) >= most_) {
      return error(StatusCode::kExhausted, "hand-off: ", entries_.size(), " are under way, at most ", most_);
    }
    Result<Handoff<Allocator>> made = Handoff<Allocator>::reserve(*allocator_, key, tokens, layers_, tenant);
    if (!made.ok()) return made.status();
    const HandoffGrant grant{next_id_, made->cached_tokens(), made->pages().blocks()};
    if (!detail::try_allocate([&] { entries_.emplace(next_id_, Entry{*std::move(made), terms}); })) {
      return error(StatusCode::kOutOfMemory, "hand-off: no memory for the table's entry");
    }
    ++next_id_;
    return grant;
  }

  /// As Handoff::begin(). Where the pages go: the blocks' numbers from `first` on, good until they are
  /// finished or have failed. `last_tokens`, unless negative, is how many tokens the sender has in the last
  /// of them: kInvalidArgument where the hand-off needs another number.
  [[nodiscard]] Result<std::vector<BlockId>> begin(HandoffId id, std::int64_t layer, std::int64_t first,
                                                   std::int64_t count, std::int64_t last_tokens = -1) {
    const Guard guard(lock_);
    Entry* entry = find(id);
    if (entry == nullptr) return unknown(id);
    Handoff<Allocator>& handoff = entry->handoff;
    std::vector<BlockId> out;
    if (!detail::try_reserve(
            out, static_cast<std::size_t>(std::clamp<std::int64_t>(count, 0, handoff.pages().blocks())))) {
      return error(StatusCode::kOutOfMemory, "hand-off ", id, ": no memory for ", count, " block numbers");
    }
    if (Status s = handoff.pages().check(layer, first, count); !s.ok()) return s;
    const std::int64_t needed = handoff.tokens_in(first + count - 1);
    if (last_tokens >= 0 && last_tokens != needed) {
      return error(StatusCode::kInvalidArgument, "hand-off ", id, ": block ", first + count - 1, " holds ",
                   needed, " tokens, not ", last_tokens);
    }
    if (Status s = handoff.begin(layer, first, count); !s.ok()) return s;
    const auto blocks =
        handoff.blocks().subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
    out.assign(blocks.begin(), blocks.end());
    return out;
  }
  /// As Handoff::finish().
  [[nodiscard]] Result<HandoffState> finish(HandoffId id, std::int64_t layer, std::int64_t first,
                                            std::int64_t count) {
    return step<Result<HandoffState>>(id, [&](auto& handoff) { return handoff.finish(layer, first, count); });
  }
  /// As Handoff::fail().
  [[nodiscard]] Status fail(HandoffId id, std::int64_t layer, std::int64_t first, std::int64_t count) {
    return step<Status>(id, [&](auto& handoff) { return handoff.fail(layer, first, count); });
  }
  /// begin() and finish() in one, for whoever writes nothing.
  [[nodiscard]] Result<HandoffState> arrive(HandoffId id, std::int64_t layer, std::int64_t first,
                                            std::int64_t count) {
    return step<Result<HandoffState>>(id, [&](auto& handoff) { return handoff.arrive(layer, first, count); });
  }

  /// Whether this call aborted it. An aborted one stays in the table while pages of it are being written.
  bool abort(HandoffId id, const Status& reason) {
    const Guard guard(lock_);
    Entry* entry = find(id);
    if (entry == nullptr) return false;
    const bool decided = entry->handoff.abort(reason);
    erase_if_over(id, *entry);
    return decided;
  }
  /// Aborts all that `source` has not completed; how many.
  std::int64_t abort_from(std::int32_t source, const Status& reason) {
    return abort_where([&](const Entry& entry) { return entry.terms.source == source; }, reason);
  }
  /// Aborts all whose deadline is past; how many.
  std::int64_t expire(KvTime now) {
    return abort_where([&](const Entry& entry) { return entry.terms.deadline <= now; },
                       error(StatusCode::kCancelled, "its deadline is past"));
  }

  /// kNotFound when it is over.
  [[nodiscard]] Result<HandoffState> state(HandoffId id) const {
    const Guard guard(lock_);
    const auto at = entries_.find(id);
    if (at == entries_.end()) return unknown(id);
    return at->second.handoff.state();
  }
  /// How many tokens block i of a hand-off holds; kNotFound; kInvalidArgument for a block that is not there.
  [[nodiscard]] Result<std::int64_t> tokens_in(HandoffId id, std::int64_t block) const {
    const Guard guard(lock_);
    const auto at = entries_.find(id);
    if (at == entries_.end()) return unknown(id);
    const Handoff<Allocator>& handoff = at->second.handoff;
    if (block < 0 || block >= handoff.pages().blocks()) {
      return error(StatusCode::kInvalidArgument, "hand-off ", id, ": block ", block, " of ",
                   handoff.pages().blocks());
    }
    return handoff.tokens_in(block);
  }

  /// As Handoff::take(), and forgets it.
  [[nodiscard]] Result<Sequence> take(HandoffId id) {
    return step<Result<Sequence>>(id, [](auto& handoff) { return handoff.take(); });
  }

  /// In the table: under way, complete and not taken, or aborted with writes that have not ended.
  [[nodiscard]] std::int64_t size() const {
    const Guard guard(lock_);
    return std::ssize(entries_);
  }

  /// Every block accounted for. For tests.
  [[nodiscard]] Status check_invariants() const {
    const Guard guard(lock_);
    for (const auto& [id, entry] : entries_) {
      if (Status s = entry.handoff.pages().check_invariants(); !s.ok()) return s;
      if (!entry.handoff.holds_blocks()) {
        return error(StatusCode::kCorruptData, "hand-off ", id, " is in the table and holds nothing");
      }
    }
    return {};
  }

 private:
  struct Entry {
    Handoff<Allocator> handoff;
    HandoffTerms terms;
  };

  [[nodiscard]] Entry* find(HandoffId id) {
    const auto at = entries_.find(id);
    return at != entries_.end() ? &at->second : nullptr;
  }
  // What body(handoff) gives; a hand-off that is over then leaves the table.
  template <class Answer, class Body>
  [[nodiscard]] Answer step(HandoffId id, Body&& body) {
    const Guard guard(lock_);
    Entry* entry = find(id);
    if (entry == nullptr) return unknown(id);
    Answer answer = body(entry->handoff);
    erase_if_over(id, *entry);
    return answer;
  }
  void erase_if_over(HandoffId id, const Entry& entry) {
    if (!entry.handoff.holds_blocks()) entries_.erase(id);
  }
  template <class Predicate>
  std::int64_t abort_where(Predicate&& predicate, const Status& reason) {
    const Guard guard(lock_);
    std::int64_t aborted = 0;
    for (auto at = entries_.begin(); at != entries_.end();) {
      Entry& entry = at->second;
      if (predicate(entry) && entry.handoff.abort(reason)) ++aborted;
      at = entry.handoff.holds_blocks() ? std::next(at) : entries_.erase(at);
    }
    return aborted;
  }
  [[nodiscard]] static Status unknown(HandoffId id) {
    return error(StatusCode::kNotFound, "hand-off ", id, " is over or was never reserved");
  }

  Allocator* allocator_;
  std::int64_t layers_;
  std::int64_t most_;
  HandoffId next_id_;
  std::map<HandoffId, Entry> entries_;  // in the order of reservation
  mutable Lock lock_;
};

}  // namespace prefillshare
