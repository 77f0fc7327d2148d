// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/tier_cache.hpp - which blocks have a copy below the device, and which copies are under way.
// Layer: kv (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/status.hpp>
#include <prefillshare/kv/block_pool.hpp>
#include <prefillshare/kv/copy_engine.hpp>
#include <prefillshare/kv/events.hpp>
#include <prefillshare/kv/prefix_tree.hpp>
#include <prefillshare/kv/tier_entries.hpp>
#include <prefillshare/kv/try_allocate.hpp>

namespace prefillshare {

/// The prefix cache below the device. An entry is one block's content in one slot of one tier, found by the
/// serial number of the prefix before it and its tokens, compared one by one: as safe as the tree. Entries
/// outlive the device's block and are linked to it while both are there. Each tier drops what was used
/// longest ago, and hands it to the next tier ahead of need; the last one forgets it. A slot is given to
/// somebody else only when no copy reads or writes it. All memory is taken by create(). Externally
/// synchronized. The lower half of BlockCache, which knows the device's blocks.
class TierCache : public detail::TierEntries {
 public:
  /// What a copy was for: to a lower tier, back to the device, or from one lower tier to the next.
  enum class CopyKind : std::uint8_t { kNone, kOut, kIn, kDown };
  /// A copy that has ended.
  struct Finished {
    CopyKind kind = CopyKind::kNone;  ///< kNone: none has ended
    BlockId block = kNoBlock;         ///< the device's, of kOut and kIn
    bool ok = false;                  ///< the content is where it should be
  };

  TierCache() = default;

  /// kInvalidArgument for an engine whose numbers cannot be; kOutOfMemory.
  [[nodiscard]] static codegemm::Result<TierCache> create(CopyEngine& engine, std::int64_t device_blocks,
                                                          int block_tokens, EventLog* events) {
    std::int64_t entries = 0;
    const int tiers = engine.tiers();
    const std::int64_t queue = engine.queue_size();
    if (tiers < 1 || queue < 1 || queue > (std::int64_t{1} << 24)) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "CopyEngine: ", tiers,
                             " tiers, a queue of ", queue, " copies");
    }
    for (int tier = 1; tier <= tiers; ++tier) {
      const std::int64_t count = engine.slots(tier);
      if (count < 0 || count > std::numeric_limits<std::int32_t>::max() - 1 - entries) {
        return codegemm::error(codegemm::StatusCode::kInvalidArgument, "CopyEngine: tier ", tier, " has ",
                               count, " slots");
      }
      entries += count;
    }
    TierCache cache;
    cache.engine_ = &engine;
    const bool allocated = detail::try_allocate([&] {
      std::vector<std::int64_t> slots;
      for (int tier = 1; tier <= tiers; ++tier) slots.push_back(engine.slots(tier));
      cache.allocate(slots, device_blocks, block_tokens, events);
      cache.copies_.resize(static_cast<std::size_t>(queue));
      cache.idle_copies_ = countdown(queue);
    });
    if (allocated) return cache;
    return codegemm::error(codegemm::StatusCode::kOutOfMemory, "TierCache: no memory for ", entries,
                           " entries");
  }

  /// Begins to copy a block of the device's tree, which has no entry, to the first tier with room. `root` is
  /// its parent if that is a root, which the caller then holds once more, until it is in released_roots().
  /// kExhausted when no slot or no place in the queue is to be had now; else the engine's failure.
  [[nodiscard]] codegemm::Status start_out(BlockId block, std::uint64_t hash, std::uint64_t parent_hash,
                                           std::uint64_t parent_serial, std::uint64_t serial, TreeNode root,
                                           std::span<const std::int32_t> tokens) {
    CODEGEMM_ASSERT(!has_entry(block));
    const BlockPlace to = idle_copies_.empty() ? BlockPlace() : take_slot(1);
    if (to.tier == 0) {
      return codegemm::error(codegemm::StatusCode::kExhausted, "TierCache: ", copies_.size(),
                             " copies and no slot to copy a block to");
    }
    const std::int32_t ticket = idle_copies_.back();
    if (codegemm::Status status = engine_->start({0, block}, to, static_cast<std::uint64_t>(ticket));
        !status.ok()) {
      tier(to.tier).idle_slots.push_back(to.slot);
      return status;
    }
    const std::int32_t e = add(block, hash, parent_hash, parent_serial, serial, root, tokens, to);
    begin(ticket, {CopyKind::kOut, e, block});
    return {};
  }

  /// Begins to copy an entry that is readable() to a device block of the caller's. As start_out().
  [[nodiscard]] codegemm::Status start_in(std::int32_t e, BlockId block) {
    if (idle_copies_.empty()) {
      return codegemm::error(codegemm::StatusCode::kExhausted, "TierCache: ", copies_.size(),
                             " copies are under way");
    }
    const std::int32_t ticket = idle_copies_.back();
    codegemm::Status status = engine_->start(at(e).place, {0, block}, static_cast<std::uint64_t>(ticket));
    if (!status.ok()) return status;
    keep(e, false);
    ++at(e).readers;
    begin(ticket, {CopyKind::kIn, e, block});
    return {};
  }

  /// Takes note of one copy that has ended.
  [[nodiscard]] Finished finish_one() {
    CopyResult result;
    if (!engine_->poll(result)) return {};
    CODEGEMM_ASSERT(result.ticket < copies_.size());
    const auto ticket = static_cast<std::int32_t>(result.ticket);
    const Copy copy = std::exchange(copies_[static_cast<std::size_t>(ticket)], Copy());
    CODEGEMM_ASSERT(copy.kind != CopyKind::kNone);
    idle_copies_.push_back(ticket);
    const bool ok = result.status.ok();
    if (!ok) ++failed_copies_;
    Entry& entry = at(copy.entry);
    switch (copy.kind) {
      case CopyKind::kOut:
        if (ok) {
          entry.state = State::kReady;
          tell(KvEvent::Kind::kStored, entry);
          keep(copy.entry, true);
          ++offloaded_;
        } else {
          remove(copy.entry);
        }
        break;
      case CopyKind::kIn:
        --entry.readers;
        keep(copy.entry, true);
        if (ok) ++loaded_;
        break;
      case CopyKind::kDown: {
        entry.state = State::kReady;
        --tier(entry.place.tier).moving;
        const bool moves = ok && entry.readers == 0;  // somebody reads the old slot: it stays there
        const BlockPlace leaves = moves ? entry.place : entry.target;
        if (moves) {
          tell(KvEvent::Kind::kRemoved, entry);
          entry.place = entry.target;
          tell(KvEvent::Kind::kStored, entry);
        }
        tier(leaves.tier).idle_slots.push_back(leaves.slot);
        keep(copy.entry, true);
        break;
      }
      case CopyKind::kNone: break;
    }
    return {copy.kind, copy.block, ok};
  }

  /// Moves down what each tier would drop next, until one slot of sixteen is free for the blocks that come.
  void balance() {
    for (int t = 1; t < engine_->tiers(); ++t) {
      Tier& from = tier(t);
      const std::int64_t wanted = std::max<std::int64_t>(1, from.slots / 16);
      while (std::ssize(from.idle_slots) + from.moving < wanted && from.oldest != kNoEntry &&
             !idle_copies_.empty()) {
        const BlockPlace to = take_slot(t + 1);
        if (to.tier == 0) break;
        const std::int32_t e = from.oldest;
        const std::int32_t ticket = idle_copies_.back();
        if (!engine_->start(at(e).place, to, static_cast<std::uint64_t>(ticket)).ok()) {
          tier(to.tier).idle_slots.push_back(to.slot);
          break;
        }
        keep(e, false);
        at(e).state = State::kMoving;
        at(e).target = to;
        begin(ticket, {CopyKind::kDown, e, kNoBlock});
      }
    }
  }

  [[nodiscard]] int tiers() const noexcept { return engine_->tiers(); }  ///< below the device
  /// Begun, and not noted as finished.
  [[nodiscard]] std::int64_t copies_under_way() const noexcept {
    return std::ssize(copies_) - std::ssize(idle_copies_);
  }
  /// Since the beginning.
  [[nodiscard]] std::int64_t offloaded_blocks() const noexcept { return offloaded_; }
  [[nodiscard]] std::int64_t loaded_blocks() const noexcept { return loaded_; }  ///< since the beginning
  /// Since the beginning.
  [[nodiscard]] std::int64_t failed_copies() const noexcept { return failed_copies_; }

  /// Every slot free or in one place, every entry found by its key, every copy accounted for. O(slots).
  [[nodiscard]] codegemm::Status check_invariants() const {
    if (codegemm::Status status = check_entries(); !status.ok()) return status;
    std::vector<std::int32_t> readers(entries_.size(), 0);
    std::int64_t filling = 0;
    std::int64_t moving = 0;
    for (const Copy& copy : copies_) {
      if (copy.kind == CopyKind::kIn) ++readers[static_cast<std::size_t>(copy.entry)];
      if (copy.kind == CopyKind::kOut) --filling;
      if (copy.kind == CopyKind::kDown) --moving;
    }
    for (std::int32_t e = 0; e < static_cast<std::int32_t>(entries_.size()); ++e) {
      filling += at(e).state == State::kFilling ? 1 : 0;
      moving += at(e).state == State::kMoving ? 1 : 0;
      if (at(e).readers != readers[static_cast<std::size_t>(e)])
        return broken("readers are counted wrongly", 0, e);
    }
    if (filling != 0 || moving != 0) return broken("entries and copies do not agree", 0, 0);
    return {};
  }

 private:
  struct Copy {
    CopyKind kind = CopyKind::kNone;
    std::int32_t entry = kNoEntry;
    BlockId block = kNoBlock;
  };

  void begin(std::int32_t ticket, const Copy& copy) {
    idle_copies_.pop_back();
    copies_[static_cast<std::size_t>(ticket)] = copy;
    if (copy.kind == CopyKind::kDown) ++tier(at(copy.entry).place.tier).moving;
  }

  CopyEngine* engine_ = nullptr;
  std::vector<Copy> copies_;  // by ticket
  std::vector<std::int32_t> idle_copies_;
  std::int64_t offloaded_ = 0;
  std::int64_t loaded_ = 0;
  std::int64_t failed_copies_ = 0;
};

}  // namespace prefillshare
