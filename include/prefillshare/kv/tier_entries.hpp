// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/tier_entries.hpp - blocks that have a copy below the device: by key, by tier, by last use.
// Layer: kv (host only).
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/status.hpp>
#include <prefillshare/kv/block_pool.hpp>
#include <prefillshare/kv/copy_engine.hpp>
#include <prefillshare/kv/events.hpp>
#include <prefillshare/kv/prefix_tree.hpp>

namespace prefillshare::detail {

/// An entry is one block's content in one slot of one tier. Below the copies of TierCache, which alone makes
/// and moves entries.
class TierEntries {
 public:
  static constexpr std::int32_t kNoEntry = -1;  ///< no entry

  /// The entry of these tokens after that prefix, whether it can be read yet or not.
  [[nodiscard]] std::int32_t find(std::uint64_t hash, std::uint64_t parent_serial,
                                  std::span<const std::int32_t> tokens) const {
    for (std::int32_t e = buckets_[bucket_of(hash)]; e != kNoEntry; e = at(e).next_in_bucket) {
      const Entry& entry = at(e);
      if (entry.hash == hash && entry.parent_serial == parent_serial &&
          std::equal(tokens.begin(), tokens.end(), tokens_of(e).begin())) {
        return e;
      }
    }
    return kNoEntry;
  }
  /// Follows `tokens` by full blocks from the prefix of that hash and serial number, as far as entries can be
  /// read: visit(entry) for each. `hasher` gives hash_after(hash, tokens).
  template <class Hasher, class Visit>
  void walk(std::uint64_t hash, std::uint64_t serial, std::span<const std::int32_t> tokens,
            const Hasher& hasher, Visit&& visit) const {
    for (; tokens.size() >= block_tokens_; tokens = tokens.subspan(block_tokens_)) {
      hash = hasher.hash_after(hash, tokens.first(block_tokens_));
      const std::int32_t e = find(hash, serial, tokens.first(block_tokens_));
      if (e == kNoEntry || !readable(e)) return;
      visit(e);
      serial = at(e).serial;
    }
  }
  /// Whether the entry can be read and still holds what walk() has found there.
  [[nodiscard]] bool still_holds(std::int32_t e, std::uint64_t serial) const {
    return readable(e) && at(e).serial == serial;
  }
  /// Whether the entry's content can be copied to the device now.
  [[nodiscard]] bool readable(std::int32_t entry) const {
    return at(entry).state == State::kReady || at(entry).state == State::kMoving;
  }
  /// Names the prefix, as PrefixTree::serial_of().
  [[nodiscard]] std::uint64_t serial(std::int32_t entry) const { return at(entry).serial; }
  /// Where its content lies.
  [[nodiscard]] BlockPlace place(std::int32_t entry) const { return at(entry).place; }

  /// Whether a device block has an entry, be it still being filled.
  [[nodiscard]] bool has_entry(BlockId block) const {
    return entry_of_block_[static_cast<std::size_t>(block)] != kNoEntry;
  }
  /// Whether a copy of a device block's content can be read.
  [[nodiscard]] bool has_copy(BlockId block) const {
    const std::int32_t entry = entry_of_block_[static_cast<std::size_t>(block)];
    return entry != kNoEntry && readable(entry);
  }
  /// Used now: dropped after all that were used before. Paths are touched last block first, so that what lies
  /// below a block is dropped before it.
  void touch(std::int32_t e) {
    at(e).stamp = ++clock_;
    if (at(e).listed) keep(e, true);
  }
  /// The device's block has the entry's content.
  void link(std::int32_t entry, BlockId block) {
    CODEGEMM_ASSERT(at(entry).block == kNoBlock);
    at(entry).block = block;
    entry_of_block_[static_cast<std::size_t>(block)] = entry;
  }
  /// The device's block is somebody else's now; the copy counts as used now.
  void unlink(BlockId block) {
    const std::int32_t entry = std::exchange(entry_of_block_[static_cast<std::size_t>(block)], kNoEntry);
    if (entry == kNoEntry) return;
    at(entry).block = kNoBlock;
    touch(entry);
  }

  /// Roots whose hold start_out() was given and that entries no longer need; the caller releases and clears.
  [[nodiscard]] std::vector<TreeNode>& released_roots() noexcept { return released_roots_; }

  /// Entries in a tier that can be read, or will be when their copy ends.
  [[nodiscard]] std::int64_t used_slots(int t) const {
    return tier(t).slots - std::ssize(tier(t).idle_slots);
  }
  /// visit(tier, hash of the prefix before, hash of the prefix) for each entry that is readable().
  template <class Visit>
  void for_each_readable(Visit&& visit) const {
    for (std::int32_t e = 0; e < static_cast<std::int32_t>(entries_.size()); ++e) {
      if (readable(e)) visit(at(e).place.tier, at(e).parent_hash, at(e).hash);
    }
  }

  /// visit(root) for each root that an entry holds.
  template <class Visit>
  void for_each_root(Visit&& visit) const {
    for (const Entry& entry : entries_) {
      if (entry.root != TreeNode()) visit(entry.root);
    }
  }

 protected:
  enum class State : std::uint8_t { kIdle, kFilling, kReady, kMoving };
  struct Entry {
    std::uint64_t hash = 0;
    std::uint64_t parent_hash = 0;
    std::uint64_t serial = 0;
    std::uint64_t parent_serial = 0;
    TreeNode root;  // the parent if that is a root, else nowhere
    std::int32_t next_in_bucket = kNoEntry;
    BlockId block = kNoBlock;  // the device's block of the same content
    BlockPlace place;
    BlockPlace target;  // kMoving
    State state = State::kIdle;
    bool listed = false;       // among those its tier may drop
    std::int32_t readers = 0;  // copies to the device under way
    std::uint64_t stamp = 0;   // when it was used; the list of its tier is in this order
    std::int32_t older = kNoEntry;
    std::int32_t newer = kNoEntry;
  };
  struct Tier {
    std::int64_t slots = 0;
    std::vector<std::int32_t> idle_slots;
    std::int64_t moving = 0;  // slots that a kDown copy will free
    std::int32_t oldest = kNoEntry;
    std::int32_t newest = kNoEntry;
  };

  TierEntries() = default;
  ~TierEntries() = default;
  TierEntries(TierEntries&&) noexcept = default;
  TierEntries& operator=(TierEntries&&) noexcept = default;

  /// Throws what std::vector throws. slots[i] are those of tier i + 1.
  void allocate(std::span<const std::int64_t> slots, std::int64_t device_blocks, int block_tokens,
                EventLog* events) {
    events_ = events;
    block_tokens_ = static_cast<std::size_t>(block_tokens);
    std::int64_t entries = 0;
    tiers_.resize(slots.size() + 1);
    for (std::size_t i = 0; i < slots.size(); ++i) {
      tiers_[i + 1].slots = slots[i];
      tiers_[i + 1].idle_slots = countdown(slots[i]);
      entries += slots[i];
    }
    const auto count = static_cast<std::size_t>(entries);
    entries_.resize(count);
    idle_entries_ = countdown(entries);
    tokens_.resize(count * block_tokens_);
    buckets_.assign(std::bit_ceil(std::max<std::size_t>(count, 1)), kNoEntry);
    released_roots_.reserve(count);
    entry_of_block_.assign(static_cast<std::size_t>(device_blocks), kNoEntry);
  }
  [[nodiscard]] int tier_count() const noexcept { return static_cast<int>(tiers_.size()) - 1; }

  /// A new one, being filled, of a device block that has none, in a slot that take_slot() gave.
  [[nodiscard]] std::int32_t add(BlockId block, std::uint64_t hash, std::uint64_t parent_hash,
                                 std::uint64_t parent_serial, std::uint64_t serial, TreeNode root,
                                 std::span<const std::int32_t> tokens, BlockPlace to) {
    const std::int32_t e = idle_entries_.back();
    idle_entries_.pop_back();
    std::int32_t& bucket = buckets_[bucket_of(hash)];
    at(e) = Entry{hash, parent_hash, serial, parent_serial, root, bucket, kNoBlock, to, {}, State::kFilling};
    bucket = e;
    at(e).stamp = ++clock_;
    std::copy(tokens.begin(), tokens.end(), tokens_.begin() + offset_of(e));
    link(e, block);
    return e;
  }
  /// A free slot of the first tier from `first` on that has one; of the last tier also by dropping what was
  /// used longest ago. Tier 0: there is none.
  [[nodiscard]] BlockPlace take_slot(int first) {
    for (int t = first; t <= tier_count(); ++t) {
      Tier& at_tier = tier(t);
      if (at_tier.idle_slots.empty() && t == tier_count() && at_tier.oldest != kNoEntry) {
        remove(at_tier.oldest);
      }
      if (at_tier.idle_slots.empty()) continue;
      const std::int32_t slot = at_tier.idle_slots.back();
      at_tier.idle_slots.pop_back();
      return {t, slot};
    }
    return {};
  }
  void remove(std::int32_t e) {
    keep(e, false);
    Entry& entry = at(e);
    CODEGEMM_ASSERT(entry.readers == 0 && entry.state != State::kMoving);
    if (entry.state == State::kReady) tell(KvEvent::Kind::kRemoved, entry);
    if (entry.block != kNoBlock) entry_of_block_[static_cast<std::size_t>(entry.block)] = kNoEntry;
    if (entry.root != TreeNode()) released_roots_.push_back(entry.root);
    std::int32_t* link = &buckets_[bucket_of(entry.hash)];
    while (*link != e) link = &at(*link).next_in_bucket;
    *link = entry.next_in_bucket;
    tier(entry.place.tier).idle_slots.push_back(entry.place.slot);
    entry = Entry{};
    idle_entries_.push_back(e);
  }
  /// Into the list of its tier if it can be dropped and `may`; else out of it.
  void keep(std::int32_t e, bool may) {
    Entry& entry = at(e);
    Tier& list = tier(entry.place.tier);
    if (entry.listed) {
      (entry.older != kNoEntry ? at(entry.older).newer : list.oldest) = entry.newer;
      (entry.newer != kNoEntry ? at(entry.newer).older : list.newest) = entry.older;
      entry.older = entry.newer = kNoEntry;
      entry.listed = false;
    }
    if (!may || entry.state != State::kReady || entry.readers != 0) return;
    // Mostly the newest; copies that ended out of order, and those that come from a tier above, are not.
    std::int32_t before = list.newest;
    while (before != kNoEntry && at(before).stamp > entry.stamp) before = at(before).older;
    const std::int32_t after = before != kNoEntry ? at(before).newer : list.oldest;
    entry.older = before;
    entry.newer = after;
    (before != kNoEntry ? at(before).newer : list.oldest) = e;
    (after != kNoEntry ? at(after).older : list.newest) = e;
    entry.listed = true;
  }
  void tell(KvEvent::Kind kind, const Entry& entry) {
    if (events_ != nullptr) events_->push(kind, entry.place.tier, entry.parent_hash, entry.hash);
  }

  [[nodiscard]] Entry& at(std::int32_t e) { return entries_[static_cast<std::size_t>(e)]; }
  [[nodiscard]] const Entry& at(std::int32_t e) const { return entries_[static_cast<std::size_t>(e)]; }
  [[nodiscard]] Tier& tier(int t) { return tiers_[static_cast<std::size_t>(t)]; }
  [[nodiscard]] const Tier& tier(int t) const { return tiers_[static_cast<std::size_t>(t)]; }

  /// Every slot free or in one place, every entry found by its key and in the right list.
  [[nodiscard]] codegemm::Status check_entries() const {
    std::vector<std::vector<char>> seen(tiers_.size());
    const auto claim = [&](BlockPlace place) {
      if (place.tier < 1 || place.tier > tier_count() || place.slot < 0 ||
          place.slot >= tier(place.tier).slots) {
        return false;
      }
      char& taken = seen[static_cast<std::size_t>(place.tier)][static_cast<std::size_t>(place.slot)];
      return std::exchange(taken, char{1}) == 0;
    };
    for (int t = 1; t <= tier_count(); ++t) {
      seen[static_cast<std::size_t>(t)].assign(static_cast<std::size_t>(tier(t).slots), 0);
      for (const std::int32_t slot : tier(t).idle_slots) {
        if (!claim({t, slot})) return broken("a free slot is there twice", t, slot);
      }
    }
    std::int64_t used = 0;
    for (std::int32_t e = 0; e < static_cast<std::int32_t>(entries_.size()); ++e) {
      const Entry& entry = at(e);
      if (entry.state == State::kIdle) continue;
      ++used;
      if (!claim(entry.place) || (entry.state == State::kMoving && !claim(entry.target))) {
        return broken("slot is in two places", entry.place.tier, entry.place.slot);
      }
      if (find(entry.hash, entry.parent_serial, tokens_of(e)) != e) return broken("is not found", 0, e);
      if (entry.block != kNoBlock && entry_of_block_[static_cast<std::size_t>(entry.block)] != e) {
        return broken("is linked one way only", 0, e);
      }
      if (entry.listed != (entry.state == State::kReady && entry.readers == 0)) {
        return broken("is kept wrongly for dropping", 0, e);
      }
    }
    if (used + std::ssize(idle_entries_) != std::ssize(entries_)) return broken("entries were lost", 0, 0);
    for (int t = 1; t <= tier_count(); ++t) {
      const auto& slots = seen[static_cast<std::size_t>(t)];
      if (std::count(slots.begin(), slots.end(), char{0}) != 0) return broken("slots were lost", t, 0);
    }
    return {};
  }
  [[nodiscard]] static std::vector<std::int32_t> countdown(std::int64_t count) {
    std::vector<std::int32_t> numbers(static_cast<std::size_t>(count));
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      numbers[i] = static_cast<std::int32_t>(numbers.size() - 1 - i);
    }
    return numbers;
  }
  [[nodiscard]] static codegemm::Status broken(const char* what, int t, std::int32_t number) {
    return codegemm::error(codegemm::StatusCode::kCorruptData, "TierCache: tier ", t, ", ", number, ": ",
                           what);
  }

  std::vector<Entry> entries_;

 private:
  [[nodiscard]] std::size_t bucket_of(std::uint64_t hash) const noexcept {
    return static_cast<std::size_t>(hash) & (buckets_.size() - 1);
  }
  [[nodiscard]] std::ptrdiff_t offset_of(std::int32_t e) const {
    return static_cast<std::ptrdiff_t>(static_cast<std::size_t>(e) * block_tokens_);
  }
  [[nodiscard]] std::span<const std::int32_t> tokens_of(std::int32_t e) const {
    return std::span(tokens_).subspan(static_cast<std::size_t>(e) * block_tokens_, block_tokens_);
  }

  EventLog* events_ = nullptr;
  std::size_t block_tokens_ = 1;
  std::vector<std::int32_t> idle_entries_;
  std::vector<std::int32_t> tokens_;          // [entries][block_tokens]
  std::vector<std::int32_t> buckets_;         // a power of two
  std::vector<std::int32_t> entry_of_block_;  // [device blocks]
  std::vector<TreeNode> released_roots_;
  std::vector<Tier> tiers_;  // [tiers + 1], the first unused
  std::uint64_t clock_ = 0;
};

}  // namespace prefillshare::detail
