// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/sim/event_queue.hpp - what happens next.
// Layer: sim (host only).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace prefillshare {

/// A binary heap by time; events of one time come in the order in which they were put in, so that a run is
/// the same each time. Nothing is taken out early: who changes his mind raises the version that he compares.
template <class Kind>
class EventQueue {
 public:
  /// Something that happens to a subject at a time.
  struct Event {
    double time = 0.0;          ///< seconds
    std::uint64_t order = 0;    ///< of pushing: equal times come in this order
    Kind kind{};                ///< what happens
    std::int32_t subject = 0;   ///< to whom; the caller's number
    std::uint32_t version = 0;  ///< the caller's, to tell that an event is void
  };

  /// Puts an event in; `time` may be any.
  void push(double time, Kind kind, std::int32_t subject, std::uint32_t version = 0) {
    heap_.push_back({time, ++pushed_, kind, subject, version});
    std::push_heap(heap_.begin(), heap_.end(), after);
  }
  [[nodiscard]] bool empty() const noexcept { return heap_.empty(); }  ///< nothing will happen
  /// Takes out what happens next. Not if empty().
  [[nodiscard]] Event pop() {
    std::pop_heap(heap_.begin(), heap_.end(), after);
    const Event event = heap_.back();
    heap_.pop_back();
    return event;
  }
  [[nodiscard]] std::uint64_t pushed() const noexcept { return pushed_; }  ///< since the beginning

 private:
  [[nodiscard]] static bool after(const Event& a, const Event& b) noexcept {
    return a.time != b.time ? a.time > b.time : a.order > b.order;
  }

  std::vector<Event> heap_;
  std::uint64_t pushed_ = 0;
};

}  // namespace prefillshare
