// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/prefix_index.hpp - which workers hold the KV of which prefix.
// Layer: serve (host only).
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <prefillshare/kv/try_allocate.hpp>
#include <prefillshare/serve/worker_table.hpp>
#include <prefillshare/vocabulary.hpp>

namespace prefillshare {

/// A set of workers for each prefix, which its hash names. One table for the whole pool, so that a question
/// costs one look-up a block however many workers there are: most prefixes lie with one worker or two, which
/// stand in the entry itself; more become a row of bits. Two prefixes with equal hashes are one here: that
/// can make an estimate wrong, never an answer. Open addressing, deletion without gravestones. Externally
/// synchronized.
class PrefixIndex {
 public:
  /// For workers 0 .. `workers` - 1. kInvalidArgument, kOutOfMemory.
  [[nodiscard]] static Result<PrefixIndex> create(WorkerId workers) {
    if (workers < 1 || workers > kMostWorkers) {
      return error(StatusCode::kInvalidArgument, "PrefixIndex: ", workers, " workers, expected 1 to ",
                   kMostWorkers);
    }
    PrefixIndex index;
    index.workers_ = workers;
    index.words_ = (static_cast<std::size_t>(workers) + 63) / 64;
    if (!detail::try_allocate([&] { index.slots_.resize(kFewestSlots); })) {
      return error(StatusCode::kOutOfMemory, "PrefixIndex: no memory");
    }
    return index;
  }

  /// Words of a set of workers as load() gives it.
  [[nodiscard]] std::size_t words() const noexcept { return words_; }
  [[nodiscard]] WorkerId workers() const noexcept { return workers_; }  ///< of the index
  /// Prefixes that some worker holds.
  [[nodiscard]] std::int64_t size() const noexcept { return size_; }

  /// Whether the worker did not have it. kOutOfMemory; then nothing has changed.
  [[nodiscard]] Result<bool> add(std::uint64_t hash, WorkerId worker) {
    CODEGEMM_ASSERT(worker >= 0 && worker < workers_);
    if (2 * (size_ + 1) > static_cast<std::int64_t>(slots_.size()) && !grow()) return no_memory();
    Slot& slot = slots_[place_of(hash)];
    if (slot.count == 0) {
      slot = Slot{hash, worker, kNoWorker, 1};
      ++size_;
      return true;
    }
    if (holds(slot, worker)) return false;
    if (slot.count == 1 && !slot.has_row()) {
      slot.second = worker;
    } else {
      if (!slot.has_row() && !make_row(slot)) return no_memory();
      row(slot)[static_cast<std::size_t>(worker) / 64] |= bit(worker);
    }
    ++slot.count;
    return true;
  }

  /// Whether the worker had it.
  bool remove(std::uint64_t hash, WorkerId worker) {
    const std::size_t place = place_of(hash);
    Slot& slot = slots_[place];
    if (slot.count == 0 || !holds(slot, worker)) return false;
    if (slot.has_row()) {
      row(slot)[static_cast<std::size_t>(worker) / 64] &= ~bit(worker);
    } else if (slot.first == worker) {
      slot.first = std::exchange(slot.second, kNoWorker);
    } else {
      slot.second = kNoWorker;
    }
    if (--slot.count == 0) erase(place);
    return true;
  }

  /// Whether the worker holds the prefix of that hash.
  [[nodiscard]] bool holds(std::uint64_t hash, WorkerId worker) const {
    const Slot& slot = slots_[place_of(hash)];
    return slot.count > 0 && holds(slot, worker);
  }

  /// Sets the bits of the workers that hold it, [words()]; the others stay as they are.
  void load(std::uint64_t hash, std::span<std::uint64_t> set) const {
    const Slot& slot = slots_[place_of(hash)];
    if (slot.count == 0) return;
    if (slot.has_row()) {
      const std::uint64_t* const bits = row(slot);
      for (std::size_t i = 0; i < words_; ++i) set[i] |= bits[i];
      return;
    }
    set[static_cast<std::size_t>(slot.first) / 64] |= bit(slot.first);
    if (slot.count > 1) set[static_cast<std::size_t>(slot.second) / 64] |= bit(slot.second);
  }
  /// The slot of this hash will be asked for soon.
  void prefetch(std::uint64_t hash) const {
#if defined(__GNUC__)
    __builtin_prefetch(&slots_[home_of(hash)]);
#else
    static_cast<void>(hash);
#endif
  }

  /// The worker holds nothing any more; how many prefixes it had. O(table).
  std::int64_t drop(WorkerId worker) {
    std::vector<std::uint64_t> held;  // erasing moves slots: first all are found
    std::int64_t dropped = 0;
    for (bool more = true; more;) {
      held.clear();
      if (!detail::try_reserve(held, 1024)) return dropped;  // what stays is an estimate that is wrong
      for (const Slot& slot : slots_) {
        if (held.size() == held.capacity()) break;
        if (slot.count > 0 && holds(slot, worker)) held.push_back(slot.hash);
      }
      more = held.size() == held.capacity();
      for (const std::uint64_t hash : held) dropped += remove(hash, worker) ? 1 : 0;
      if (more) static_cast<void>(detail::try_reserve(held, 4 * held.size()));
    }
    return dropped;
  }

  /// Every entry found by its hash, every count right. O(table).
  [[nodiscard]] Status check_invariants() const {
    std::int64_t counted = 0;
    std::size_t rows = 0;
    for (std::size_t place = 0; place < slots_.size(); ++place) {
      const Slot& slot = slots_[place];
      if (slot.count == 0) continue;
      ++counted;
      if (place_of(slot.hash) != place) return broken("is not found by its hash", place);
      if (slot.has_row()) {
        ++rows;
        std::int64_t bits = 0;
        for (std::size_t i = 0; i < words_; ++i) bits += std::popcount(row(slot)[i]);
        if (bits != slot.count) return broken("counts wrongly", place);
      } else if (slot.count > 2 || slot.first < 0 || (slot.count == 2) != (slot.second >= 0)) {
        return broken("counts wrongly", place);
      }
    }
    if (counted != size_) return broken("is one of a wrong number", static_cast<std::size_t>(size_));
    if (rows + idle_rows_.size() != rows_.size() / words_) return broken("lost a row of bits", rows);
    return {};
  }

 private:
  static constexpr std::size_t kFewestSlots = 64;

  struct Slot {
    std::uint64_t hash = 0;
    WorkerId first = kNoWorker;   // with a row of bits: -2 - its number
    WorkerId second = kNoWorker;  // of two
    std::int32_t count = 0;       // 0: nothing here

    [[nodiscard]] bool has_row() const noexcept { return first <= -2; }
  };

  PrefixIndex() = default;

  [[nodiscard]] static Status no_memory() {
    return error(StatusCode::kOutOfMemory, "PrefixIndex: no memory");
  }
  [[nodiscard]] static Status broken(const char* what, std::size_t place) {
    return error(StatusCode::kCorruptData, "PrefixIndex: entry ", place, " ", what);
  }
  [[nodiscard]] static constexpr std::uint64_t bit(WorkerId worker) noexcept {
    return std::uint64_t{1} << (static_cast<unsigned>(worker) % 64U);
  }
  [[nodiscard]] std::size_t home_of(std::uint64_t hash) const noexcept {
    return static_cast<std::size_t>(hash) & (slots_.size() - 1);
  }
  /// Where it is, or the empty slot where it would be.
  [[nodiscard]] std::size_t place_of(std::uint64_t hash) const noexcept {
    std::size_t place = home_of(hash);
    while (slots_[place].count != 0 && slots_[place].hash != hash) place = (place + 1) & (slots_.size() - 1);
    return place;
  }
  [[nodiscard]] std::uint64_t* row(const Slot& slot) noexcept {
    return rows_.data() + static_cast<std::size_t>(-2 - slot.first) * words_;
  }
  [[nodiscard]] const std::uint64_t* row(const Slot& slot) const noexcept {
    return rows_.data() + static_cast<std::size_t>(-2 - slot.first) * words_;
  }
  [[nodiscard]] bool holds(const Slot& slot, WorkerId worker) const noexcept {
    if (slot.has_row()) return (row(slot)[static_cast<std::size_t>(worker) / 64] & bit(worker)) != 0;
    return slot.first == worker || slot.second == worker;
  }
  [[nodiscard]] bool make_row(Slot& slot) {
    if (idle_rows_.empty()) {
      const std::size_t rows = rows_.size() / words_;
      const bool allocated = detail::try_allocate([&] {
        if (idle_rows_.capacity() <= rows) idle_rows_.reserve(2 * rows + 16);  // to give rows back without
        rows_.resize((rows + 1) * words_);
      });
      if (!allocated) return false;
      idle_rows_.push_back(static_cast<std::int32_t>(rows));
    }
    const Slot old = slot;
    slot.first = -2 - idle_rows_.back();
    slot.second = kNoWorker;
    idle_rows_.pop_back();
    std::fill_n(row(slot), words_, std::uint64_t{0});
    row(slot)[static_cast<std::size_t>(old.first) / 64] |= bit(old.first);
    row(slot)[static_cast<std::size_t>(old.second) / 64] |= bit(old.second);
    return true;
  }
  void erase(std::size_t hole) {
    if (slots_[hole].has_row()) idle_rows_.push_back(-2 - slots_[hole].first);
    --size_;
    // What follows without a gap and would be found no more past the hole moves into it.
    const std::size_t mask = slots_.size() - 1;
    for (std::size_t place = (hole + 1) & mask; slots_[place].count != 0; place = (place + 1) & mask) {
      const std::size_t home = home_of(slots_[place].hash);
      if (((place - home) & mask) < ((place - hole) & mask)) continue;
      slots_[hole] = slots_[place];
      hole = place;
    }
    slots_[hole] = Slot{};
  }
  [[nodiscard]] bool grow() {
    std::vector<Slot> old;
    if (!detail::try_allocate([&] { old.resize(2 * slots_.size()); })) return false;
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.count != 0) slots_[place_of(slot.hash)] = slot;
    }
    return true;
  }

  WorkerId workers_ = 0;
  std::size_t words_ = 1;
  std::vector<Slot> slots_;          // a power of two, at most half of them used
  std::vector<std::uint64_t> rows_;  // [rows][words]
  std::vector<std::int32_t> idle_rows_;
  std::int64_t size_ = 0;
};

}  // namespace prefillshare
