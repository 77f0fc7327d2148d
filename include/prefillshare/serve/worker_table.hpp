// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/worker_table.hpp - the workers of one pool as a router sees them: life, epoch and load.
// Layer: serve (host only).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include <prefillshare/kv/try_allocate.hpp>
#include <prefillshare/vocabulary.hpp>

namespace prefillshare {

/// Small numbers from 0 on: tables are indexed by them. A worker that is started again keeps its number.
using WorkerId = std::int32_t;
inline constexpr WorkerId kNoWorker = -1;                    ///< no worker
inline constexpr WorkerId kMostWorkers = WorkerId{1} << 20;  ///< of a table

/// What may be sent to a worker.
enum class WorkerState : std::uint8_t {
  kAbsent,    ///< was never added
  kDown,      ///< dead: what it was doing is to be done elsewhere
  kDraining,  ///< ends what it has, gets nothing new
  kUp,
};

/// As it is printed.
[[nodiscard]] constexpr std::string_view to_string(WorkerState state) noexcept {
  switch (state) {
    case WorkerState::kAbsent: return "absent";
    case WorkerState::kDown: return "down";
    case WorkerState::kDraining: return "draining";
    case WorkerState::kUp: return "up";
  }
  return "unknown";
}

/// What is known of a worker.
struct WorkerView {
  WorkerState state = WorkerState::kAbsent;  ///< whether requests may go to it
  std::uint64_t epoch = 0;                   ///< another number each time the worker starts
  std::int64_t requests = 0;                 ///< routed here and not done with
  double queued_seconds = 0.0;               ///< of these, the work that is not done, estimated
  double reported_seconds = 0.0;             ///< what the worker says it has besides

  /// Seconds of work before it.
  [[nodiscard]] constexpr double load() const noexcept { return queued_seconds + reported_seconds; }
};

/// Indexed by WorkerId. Changes are counted, so that a policy knows when what it derived is old.
class WorkerTable {
 public:
  [[nodiscard]] std::span<const WorkerView> workers() const noexcept { return workers_; }  ///< by number
  /// Numbers given out.
  [[nodiscard]] WorkerId size() const noexcept { return static_cast<WorkerId>(workers_.size()); }
  /// Was added.
  [[nodiscard]] bool contains(WorkerId id) const noexcept {
    return id >= 0 && id < size() && (*this)[id].state != WorkerState::kAbsent;
  }
  /// Takes requests.
  [[nodiscard]] bool up(WorkerId id) const noexcept {
    return id >= 0 && id < size() && (*this)[id].state == WorkerState::kUp;
  }
  /// A number below size().
  [[nodiscard]] const WorkerView& operator[](WorkerId id) const noexcept {
    return workers_[static_cast<std::size_t>(id)];
  }
  /// A number below size().
  [[nodiscard]] WorkerView& operator[](WorkerId id) noexcept {
    return workers_[static_cast<std::size_t>(id)];
  }

  /// Workers that take new requests.
  [[nodiscard]] std::int64_t count(WorkerState state) const noexcept {
    std::int64_t n = 0;
    for (const WorkerView& worker : workers_) n += worker.state == state ? 1 : 0;
    return n;
  }
  /// Goes up whenever a worker's state or epoch changes.
  [[nodiscard]] std::uint64_t version() const noexcept { return version_; }

  /// kInvalidArgument for a number below 0 or from kMostWorkers on; kOutOfMemory.
  [[nodiscard]] Status start(WorkerId id, std::uint64_t epoch) {
    if (id < 0 || id >= kMostWorkers) {
      return error(StatusCode::kInvalidArgument, "worker ", id, ", expected 0 to ", kMostWorkers - 1);
    }
    const auto count = static_cast<std::size_t>(id) + 1;
    if (workers_.size() < count && !detail::try_allocate([&] { workers_.resize(count); })) {
      return error(StatusCode::kOutOfMemory, "WorkerTable: no memory for ", count, " workers");
    }
    (*this)[id] = WorkerView{WorkerState::kUp, epoch, 0, 0.0, 0.0};
    ++version_;
    return {};
  }
  /// Counts as a change unless it is the state already.
  void set_state(WorkerId id, WorkerState state) noexcept {
    if ((*this)[id].state == state) return;
    (*this)[id].state = state;
    ++version_;
  }

 private:
  std::vector<WorkerView> workers_;
  std::uint64_t version_ = 0;
};

}  // namespace prefillshare
