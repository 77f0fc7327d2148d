// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/hash_ring.hpp - consistent hashing: when a worker comes or goes, few sessions move.
// Layer: serve (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <prefillshare/kv/try_allocate.hpp>
#include <prefillshare/serve/worker_table.hpp>
#include <prefillshare/vocabulary.hpp>

namespace prefillshare {

namespace detail {

/// splitmix64's finisher: every bit of the input moves every bit of the output.
[[nodiscard]] constexpr std::uint64_t scramble(std::uint64_t z) noexcept {
  z += 0x9E3779B97F4A7C15ULL;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return z ^ (z >> 31);
}

}  // namespace detail

/// Each worker has `points` places on a ring of 2^64; a key belongs to the first place at or after its own,
/// and to those that follow when that worker is not accepted. See: Karger et al., Consistent Hashing and
/// Random Trees (STOC 1997); Mirrokni et al., Consistent Hashing with Bounded Loads (arXiv 1608.01350).
class HashRing {
 public:
  /// `points` of each worker on the ring: more make shares more even.
  explicit HashRing(int points = 64) : points_(std::max(points, 1)) {}

  /// The workers that are up now. kOutOfMemory.
  [[nodiscard]] Status rebuild(const WorkerTable& workers) {
    const auto count =
        static_cast<std::size_t>(workers.count(WorkerState::kUp)) * static_cast<std::size_t>(points_);
    ring_.clear();
    if (!detail::try_reserve(ring_, count)) {
      return error(StatusCode::kOutOfMemory, "HashRing: no memory for ", count, " points");
    }
    for (WorkerId worker = 0; worker < workers.size(); ++worker) {
      if (!workers.up(worker)) continue;
      for (int i = 0; i < points_; ++i) {
        const auto name = static_cast<std::uint64_t>(worker) << 32 | static_cast<std::uint64_t>(i);
        ring_.push_back({detail::scramble(name), worker});
      }
    }
    std::sort(ring_.begin(), ring_.end(), [](const Point& a, const Point& b) {
      return a.place != b.place ? a.place < b.place : a.worker < b.worker;
    });
    return {};
  }

  /// The first worker from the key's place on that accept(WorkerId) takes; kNoWorker if none does.
  template <class Accept>
  [[nodiscard]] WorkerId find(std::uint64_t key, Accept&& accept) const {
    const std::uint64_t place = detail::scramble(~key);
    const auto first = static_cast<std::size_t>(
        std::lower_bound(ring_.begin(), ring_.end(), place,
                         [](const Point& point, std::uint64_t wanted) { return point.place < wanted; }) -
        ring_.begin());
    for (std::size_t i = 0; i < ring_.size(); ++i) {
      const WorkerId worker = ring_[(first + i) % ring_.size()].worker;
      if (accept(worker)) return worker;
    }
    return kNoWorker;
  }

  [[nodiscard]] std::size_t size() const noexcept { return ring_.size(); }  ///< points of all workers

 private:
  struct Point {
    std::uint64_t place = 0;
    WorkerId worker = kNoWorker;
  };

  int points_ = 64;
  std::vector<Point> ring_;  // in the order of places
};

}  // namespace prefillshare
