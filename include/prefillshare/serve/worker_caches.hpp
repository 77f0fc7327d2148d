// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/worker_caches.hpp - what a router believes that each prefill worker has cached.
// Layer: serve (host only).
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include <prefillshare/kv/cache_key.hpp>
#include <prefillshare/kv/events.hpp>
#include <prefillshare/kv/try_allocate.hpp>
#include <prefillshare/serve/prefix_index.hpp>
#include <prefillshare/serve/worker_table.hpp>
#include <prefillshare/vocabulary.hpp>

namespace prefillshare {

/// The hash of the prefix that ends with each full block of `tokens`, as the allocator's events name it.
/// kOutOfMemory.
template <BlockHash Hash = ChainHash>
[[nodiscard]] Status prefix_hashes(const CacheKey& key, std::span<const std::int32_t> tokens,
                                   int block_tokens, std::vector<std::uint64_t>& out, const Hash& hash = {}) {
  if (block_tokens < 1) {
    return error(StatusCode::kInvalidArgument, "prefix_hashes: blocks of ", block_tokens, " tokens");
  }
  const auto size = static_cast<std::size_t>(block_tokens);
  const std::size_t blocks = tokens.size() / size;
  if (!detail::try_allocate([&] { out.resize(blocks); })) {
    return error(StatusCode::kOutOfMemory, "prefix_hashes: no memory for ", blocks, " blocks");
  }
  std::uint64_t last = hash(key);
  for (std::size_t i = 0; i < blocks; ++i) {
    last = hash(last, tokens.subspan(i * size, size));
    out[i] = last;
  }
  return {};
}

/// How many blocks of a request's prefix, from the first on and with no gap, a worker has or will have.
struct PrefixMatch {
  WorkerId worker = kNoWorker;  ///< which worker
  std::int32_t blocks = 0;      ///< the prefix's length in blocks

  /// Both are equal.
  friend bool operator==(const PrefixMatch&, const PrefixMatch&) = default;
};

/// What observe() found the events to be.
enum class CacheSync : std::uint8_t {
  kCurrent,     ///< taken
  kLost,        ///< some are missing before these: nothing counts until resync() with a snapshot
  kOtherEpoch,  ///< of a worker that has died since, or was not added: not taken
};

/// As it is printed.
[[nodiscard]] constexpr std::string_view to_string(CacheSync sync) noexcept {
  switch (sync) {
    case CacheSync::kCurrent: return "current";
    case CacheSync::kLost: return "lost";
    case CacheSync::kOtherEpoch: return "other epoch";
  }
  return "unknown";
}

/// Two beliefs beside each other. *Confirmed*: what the worker's numbered events (kv/events.hpp) say that
/// lies in its allocator's own blocks; events of tiers below are passed over. *Expected*: what requests that
/// are on their way will leave there, from expect() to settle(); without it a second request of a session
/// that comes while the first is in the queue would be sent elsewhere. Externally synchronized.
class WorkerCaches {
 public:
  /// For workers 0 .. `workers` - 1. kInvalidArgument, kOutOfMemory.
  [[nodiscard]] static Result<WorkerCaches> create(WorkerId workers) {
    Result<PrefixIndex> confirmed = PrefixIndex::create(workers);
    if (!confirmed.ok()) return confirmed.status();
    Result<PrefixIndex> expected = PrefixIndex::create(workers);
    if (!expected.ok()) return expected.status();
    WorkerCaches caches(*std::move(confirmed), *std::move(expected));
    const bool allocated = detail::try_allocate([&] {
      caches.sources_.resize(static_cast<std::size_t>(workers));
      caches.active_.resize(caches.confirmed_.words());
      caches.holding_.resize(caches.confirmed_.words());
    });
    if (!allocated)
      return error(StatusCode::kOutOfMemory, "WorkerCaches: no memory for ", workers, " workers");
    return caches;
  }

  /// A worker that starts, with an empty cache whose first event is number 0. What was known of an earlier
  /// epoch is forgotten.
  void start(WorkerId worker, std::uint64_t epoch) {
    stop(worker);
    source(worker) = Source{true, true, epoch, 0};
  }
  /// A worker that is dead: nothing lies there any more. Its expected entries stay until they are settled.
  void stop(WorkerId worker) {
    if (source(worker).confirmed > 0) confirmed_.drop(worker);
    source(worker) = Source{};
  }

  /// The worker's next events, oldest first; those seen before are passed over. kOutOfMemory: as if lost.
  [[nodiscard]] Result<CacheSync> observe(WorkerId worker, std::uint64_t epoch,
                                          std::span<const KvEvent> events) {
    if (!knows(worker, epoch)) return CacheSync::kOtherEpoch;
    Source& from = source(worker);
    for (const KvEvent& event : events) {
      if (event.number < from.next) continue;
      if (event.number > from.next) from.in_sync = false;
      if (!from.in_sync) return CacheSync::kLost;
      if (Status s = apply(worker, event); !s.ok()) {
        from.in_sync = false;
        return s;
      }
      ++from.next;
    }
    return from.in_sync ? CacheSync::kCurrent : CacheSync::kLost;
  }
  /// All that is cached there, from KvAllocator::snapshot(), and the number of the event to go on with.
  /// kOutOfMemory.
  [[nodiscard]] Result<CacheSync> resync(WorkerId worker, std::uint64_t epoch,
                                         std::span<const KvEvent> cached, std::uint64_t next) {
    if (!knows(worker, epoch)) return CacheSync::kOtherEpoch;
    confirmed_.drop(worker);
    source(worker) = Source{true, false, epoch, next};
    for (const KvEvent& event : cached) {
      if (Status s = apply(worker, event); !s.ok()) return s;
    }
    source(worker).in_sync = true;
    return CacheSync::kCurrent;
  }
  /// Reads the log to its end; snapshot(std::vector<KvEvent>&) -> Result<std::uint64_t>, the allocator's, is
  /// called if events were lost. Its failure; kOutOfMemory.
  template <class Snapshot>
  [[nodiscard]] Result<CacheSync> follow(WorkerId worker, std::uint64_t epoch, const EventLog& log,
                                         Snapshot&& snapshot) {
    KvEvent events[64];
    for (;;) {
      if (!knows(worker, epoch)) return CacheSync::kOtherEpoch;
      const EventLog::Batch batch = log.read(source(worker).next, events);
      if (batch.lost > 0) source(worker).in_sync = false;
      Result<CacheSync> seen =
          observe(worker, epoch, std::span(events).first(static_cast<std::size_t>(batch.count)));
      if (!seen.ok()) return seen;
      if (*seen == CacheSync::kLost) {
        Result<std::uint64_t> next = snapshot(snapshot_);
        if (!next.ok()) return next.status();
        return resync(worker, epoch, snapshot_, *next);
      }
      if (batch.count == 0) return seen;
    }
  }

  /// A request with this prefix is on its way there. kOutOfMemory; then nothing has changed.
  [[nodiscard]] Status expect(WorkerId worker, std::span<const std::uint64_t> prefix) {
    for (std::size_t i = 0; i < prefix.size(); ++i) {
      bool again = false;
      Result<bool> added = expected_.add(prefix[i], worker);
      if (added.ok() && !*added) again = detail::try_allocate([&] { ++more_[{prefix[i], worker}]; });
      if (added.ok() && (*added || again)) continue;
      settle(worker, prefix.first(i));
      return error(StatusCode::kOutOfMemory, "WorkerCaches: no memory");
    }
    return {};
  }
  /// It has arrived, or never will: from here on the events alone count.
  void settle(WorkerId worker, std::span<const std::uint64_t> prefix) {
    for (const std::uint64_t hash : prefix) {
      const auto more = more_.empty() ? more_.end() : more_.find({hash, worker});
      if (more == more_.end()) {
        expected_.remove(hash, worker);
      } else if (--more->second == 0) {
        more_.erase(more);
      }
    }
  }

  /// Each worker that has a first part of the prefix, and how much of it. kOutOfMemory.
  [[nodiscard]] Status match(std::span<const std::uint64_t> prefix, std::vector<PrefixMatch>& out) const {
    constexpr std::size_t kAhead = 8;
    out.clear();
    if (prefix.empty()) return {};
    if (!detail::try_reserve(out, sources_.size())) {
      return error(StatusCode::kOutOfMemory, "WorkerCaches: no memory for ", sources_.size(), " matches");
    }
    for (std::size_t i = 0; i < std::min(kAhead, prefix.size()); ++i) prefetch(prefix[i]);
    std::fill(active_.begin(), active_.end(), ~std::uint64_t{0});
    for (std::size_t i = 0; i < prefix.size(); ++i) {
      if (i + kAhead < prefix.size()) prefetch(prefix[i + kAhead]);
      std::fill(holding_.begin(), holding_.end(), std::uint64_t{0});
      confirmed_.load(prefix[i], holding_);
      expected_.load(prefix[i], holding_);
      std::uint64_t any = 0;
      for (std::size_t w = 0; w < active_.size(); ++w) {
        if (i > 0) append(w, active_[w] & ~holding_[w], i, out);
        active_[w] &= holding_[w];
        any |= active_[w];
      }
      if (any == 0) return {};
    }
    for (std::size_t w = 0; w < active_.size(); ++w) append(w, active_[w], prefix.size(), out);
    return {};
  }

  /// By the workers' own events.
  [[nodiscard]] const PrefixIndex& confirmed() const noexcept { return confirmed_; }
  /// Of requests that are on their way.
  [[nodiscard]] const PrefixIndex& expected() const noexcept { return expected_; }
  [[nodiscard]] WorkerId workers() const noexcept { return confirmed_.workers(); }  ///< of the tables
  /// The number of the event that the worker's log is to be read on from.
  [[nodiscard]] std::uint64_t next_event(WorkerId worker) const { return source(worker).next; }

 private:
  struct Source {
    bool there = false;
    bool in_sync = false;
    std::uint64_t epoch = 0;
    std::uint64_t next = 0;
    std::int64_t confirmed = 0;  // prefixes
  };
  struct PairHash {
    [[nodiscard]] std::size_t operator()(const std::pair<std::uint64_t, WorkerId>& pair) const noexcept {
      constexpr std::uint64_t kOdd = 0x9E3779B97F4A7C15ULL;
      return static_cast<std::size_t>(pair.first ^ (static_cast<std::uint64_t>(pair.second) * kOdd));
    }
  };

  WorkerCaches(PrefixIndex confirmed, PrefixIndex expected)
      : confirmed_(std::move(confirmed)), expected_(std::move(expected)) {}

  [[nodiscard]] Source& source(WorkerId worker) { return sources_[static_cast<std::size_t>(worker)]; }
  [[nodiscard]] const Source& source(WorkerId worker) const {
    return sources_[static_cast<std::size_t>(worker)];
  }
  [[nodiscard]] bool knows(WorkerId worker, std::uint64_t epoch) const {
    return worker >= 0 && worker < workers() && source(worker).there && source(worker).epoch == epoch;
  }
  [[nodiscard]] Status apply(WorkerId worker, const KvEvent& event) {
    if (event.tier != 0) return {};
    if (event.kind == KvEvent::Kind::kRemoved) {
      source(worker).confirmed -= confirmed_.remove(event.hash, worker) ? 1 : 0;
      return {};
    }
    const Result<bool> added = confirmed_.add(event.hash, worker);
    if (!added.ok()) return added.status();
    source(worker).confirmed += *added ? 1 : 0;
    return {};
  }
  void prefetch(std::uint64_t hash) const {
    confirmed_.prefetch(hash);
    expected_.prefetch(hash);
  }
  static void append(std::size_t word, std::uint64_t bits, std::size_t blocks,
                     std::vector<PrefixMatch>& out) {
    for (; bits != 0; bits &= bits - 1) {
      const auto worker = static_cast<WorkerId>(64 * word) + static_cast<WorkerId>(std::countr_zero(bits));
      out.push_back({worker, static_cast<std::int32_t>(blocks)});
    }
  }

  PrefixIndex confirmed_;
  PrefixIndex expected_;
  std::unordered_map<std::pair<std::uint64_t, WorkerId>, std::int64_t, PairHash>
      more_;                     // expected twice or more
  std::vector<Source> sources_;  // [workers]
  std::vector<KvEvent> snapshot_;
  mutable std::vector<std::uint64_t> active_;   // [words], for match() only
  mutable std::vector<std::uint64_t> holding_;  // [words]
};

}  // namespace prefillshare
