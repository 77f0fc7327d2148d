// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/admission.hpp - what may begin now, and what waits or is refused, when memory is short.
// Layer: serve (host only).
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <limits>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>

#include <codegemm/base/macros.hpp>
#include <prefillshare/kv/tenant.hpp>
#include <prefillshare/kv/try_allocate.hpp>
#include <prefillshare/vocabulary.hpp>

namespace prefillshare {

/// Seconds on the caller's clock: nothing here reads one.
using AdmissionTime = double;
inline constexpr AdmissionTime kNoDeadline = std::numeric_limits<AdmissionTime>::infinity();  ///< never

/// What waits to begin.
struct AdmissionRequest {
  std::uint64_t id = 0;                  ///< the caller's, one for each request that waits
  TenantId tenant = kDefaultTenant;      ///< whose it is
  std::int64_t blocks = 0;               ///< the most it will ever hold, its growth included
  AdmissionTime deadline = kNoDeadline;  ///< not to begin at or after it
};

/// Blocks that a decode call may come to hold, its answer included.
[[nodiscard]] constexpr std::int64_t blocks_at_most(std::int64_t context_tokens, std::int64_t output_tokens,
                                                    int block_tokens) noexcept {
  return (context_tokens + output_tokens + block_tokens - 1) / block_tokens;
}

/// In which order requests begin: each gets a number when it comes, the least goes first, equal ones as they
/// came.
template <class Order>
concept AdmissionOrder = requires(Order order, const AdmissionRequest& request, double tag) {
  { order.tag(request) } -> std::same_as<double>;
  { order.began(tag) } -> std::same_as<void>;
};

/// As they came.
struct ArrivalOrder {
  /// All the same: by arrival.
  [[nodiscard]] double tag(const AdmissionRequest& /*request*/) const noexcept { return 0.0; }
  void began(double /*tag*/) noexcept {}  ///< nothing to remember
};
static_assert(AdmissionOrder<ArrivalOrder>);

/// Tenants that wait share what begins by their weights, counted in blocks; one that floods the queue waits
/// behind itself only. Self-clocked fair queueing (Golestani, INFOCOM 1994): O(1) besides the queue's own
/// cost.
class FairOrder {
 public:
  /// Where the request stands in the order: the lowest first, equal ones by arrival. Asked once, on
  /// arrival.
  [[nodiscard]] double tag(const AdmissionRequest& request) {
    double weight = 1.0;
    if (const auto found = weights_.find(request.tenant); found != weights_.end()) weight = found->second;
    double& last = last_[request.tenant];
    last = std::max(last, now_) + static_cast<double>(std::max<std::int64_t>(request.blocks, 1)) / weight;
    return last;
  }
  /// A request of that tag has begun.
  void began(double tag) noexcept { now_ = std::max(now_, tag); }

  /// kInvalidArgument unless above 0; kOutOfMemory.
  [[nodiscard]] Status set_weight(TenantId tenant, double weight) {
    if (!(weight > 0.0) || weight > 1e12) {
      return error(StatusCode::kInvalidArgument, "FairOrder: a weight must be above 0 and at most 1e12");
    }
    if (detail::try_allocate([&] { weights_[tenant] = weight; })) return {};
    return error(StatusCode::kOutOfMemory, "FairOrder: no memory for tenant ", tenant);
  }

 private:
  std::unordered_map<TenantId, double> weights_;
  std::unordered_map<TenantId, double> last_;  // the tag of the tenant's last request
  double now_ = 0.0;                           // the tag of what began last
};
static_assert(AdmissionOrder<FairOrder>);

/// What an AdmissionQueue keeps to.
struct AdmissionLimits {
  std::int64_t blocks = 0;                                         ///< held by all that has begun, at most
  std::int64_t begun = std::numeric_limits<std::int64_t>::max();   ///< at once, at most
  std::int64_t queued = std::numeric_limits<std::int64_t>::max();  ///< more are refused
};

/// What next() has taken out of the queue.
struct Admission {
  /// What became of the request.
  enum class Kind : std::uint8_t {
    kNone,      ///< nothing: the queue is empty, or its first request has no room now
    kAdmitted,  ///< begins: release() it when it has ended
    kExpired,   ///< its deadline has passed while it waited
    kRefused,   ///< `reserve` failed for good
  };
  Kind kind = Kind::kNone;   ///< what became of it
  AdmissionRequest request;  ///< the request, unless kNone
  Status status;             ///< why, unless kNone or kAdmitted
};

/// Admits requests as long as the blocks that they may come to hold are there, so that what has begun can
/// always end: nothing is preempted, and nothing is prefilled that the decode side could not take. The others
/// wait in a bounded queue, or are refused at once. One queue for each place where blocks are held: a decode
/// worker (the calls that it will run), a pool of prefill workers (the sessions whose contexts they keep).
///
/// Only the first of the order is looked at, so a large request is not starved by small ones.
/// Everything that was submitted leaves by next() or cancel(), once. Externally synchronized.
template <AdmissionOrder Order = ArrivalOrder>
class AdmissionQueue {
 public:
  /// An empty queue.
  explicit AdmissionQueue(const AdmissionLimits& limits, Order order = Order())
      : limits_(limits), order_(std::move(order)) {}

  /// kExhausted when the queue is full: the caller should come again later. kCancelled when the deadline has
  /// passed; kInvalidArgument for more blocks than there are at all, fewer than 0, or an id that is here
  /// already; kOutOfMemory.
  [[nodiscard]] Status submit(const AdmissionRequest& request, AdmissionTime now) {
    if (request.blocks < 0 || request.blocks > limits_.blocks) {
      return error(StatusCode::kInvalidArgument, "admission: request ", request.id, " may need ",
                   request.blocks, " blocks of ", limits_.blocks);
    }
    if (entries_.count(request.id) != 0) {
      return error(StatusCode::kInvalidArgument, "admission: request ", request.id, " is here already");
    }
    if (!(now < request.deadline)) {
      return error(StatusCode::kCancelled, "admission: the deadline of request ", request.id, " has passed");
    }
    if (queued() >= limits_.queued) {
      return error(StatusCode::kExhausted, "admission: ", queued(), " requests wait, as many as may");
    }
    const bool allocated = detail::try_allocate([&] {
      const Place place{order_.tag(request), ++submitted_, request.id};
      Undo undo{*this, request.id, place};
      entries_.emplace(request.id, Entry{request, place, false});
      queue_.insert(place);
      if (request.deadline < kNoDeadline) deadlines_.emplace(request.deadline, request.id);
      undo.keep = true;
    });
    return allocated ? Status() : error(StatusCode::kOutOfMemory, "admission: no memory");
  }

  /// The next that leaves the queue; call it until kNone, whenever something was submitted or released or a
  /// deadline has come. reserve(const AdmissionRequest&) -> Status takes the real blocks (a Handoff at the
  /// decode worker, say): kExhausted leaves the request at the head, any other failure takes it out.
  template <class Reserve>
  [[nodiscard]] Admission next(AdmissionTime now, Reserve&& reserve) {
    Admission out;
    if (!deadlines_.empty() && deadlines_.begin()->first <= now) {
      out.kind = Admission::Kind::kExpired;
      out.request = remove(deadlines_.begin()->second);
      out.status =
          error(StatusCode::kCancelled, "admission: request ", out.request.id, " waited past its deadline");
      return out;
    }
    if (queue_.empty() || begun_ >= limits_.begun) return out;
    const Place place = *queue_.begin();
    Entry& entry = entries_.find(std::get<2>(place))->second;
    if (entry.request.blocks > limits_.blocks - held_) return out;
    out.status = reserve(std::as_const(entry.request));
    if (out.status.code() == StatusCode::kExhausted) {
      out.status = {};
      return out;
    }
    out.request = entry.request;
    if (!out.status.ok()) {
      out.kind = Admission::Kind::kRefused;
      remove(out.request.id);
      return out;
    }
    out.kind = Admission::Kind::kAdmitted;
    unqueue(entry);
    entry.begun = true;
    order_.began(std::get<0>(place));
    held_ += entry.request.blocks;
    ++begun_;
    return out;
  }
  /// The same, with nothing to reserve.
  [[nodiscard]] Admission next(AdmissionTime now) {
    return next(now, [](const AdmissionRequest&) { return Status(); });
  }

  /// Something that had begun has ended and given its blocks back. False if it had not begun.
  bool release(std::uint64_t id) {
    const auto found = entries_.find(id);
    if (found == entries_.end() || !found->second.begun) return false;
    held_ -= found->second.request.blocks;
    --begun_;
    entries_.erase(found);
    return true;
  }
  /// Takes it out of the queue. False if it does not wait.
  bool cancel(std::uint64_t id) {
    const auto found = entries_.find(id);
    if (found == entries_.end() || found->second.begun) return false;
    remove(id);
    return true;
  }
  /// From now on; what has begun keeps what it has.
  void set_limits(const AdmissionLimits& limits) noexcept { limits_ = limits; }

  [[nodiscard]] const AdmissionLimits& limits() const noexcept { return limits_; }  ///< as given
  /// waiting.
  [[nodiscard]] std::int64_t queued() const noexcept { return static_cast<std::int64_t>(queue_.size()); }
  [[nodiscard]] std::int64_t begun() const noexcept { return begun_; }  ///< begun and not yet over
  /// Blocks promised to what has begun.
  [[nodiscard]] std::int64_t held() const noexcept { return held_; }
  /// When next() should be called even if nothing else happens; kNoDeadline: never.
  [[nodiscard]] AdmissionTime next_deadline() const {
    return deadlines_.empty() ? kNoDeadline : deadlines_.begin()->first;
  }
  [[nodiscard]] Order& order() noexcept { return order_; }  ///< to set weights

 private:
  using Place = std::tuple<double, std::uint64_t, std::uint64_t>;  // tag, order of arrival, id
  struct Entry {
    AdmissionRequest request;
    Place place;
    bool begun = false;
  };
  /// Takes back what submit() had done when memory ran out.
  struct Undo {
    AdmissionQueue& queue;
    std::uint64_t id;
    Place place;
    bool keep = false;

    Undo(AdmissionQueue& owner, std::uint64_t request, const Place& at)
        : queue(owner), id(request), place(at) {}
    Undo(const Undo&) = delete;
    Undo& operator=(const Undo&) = delete;
    ~Undo() {
      if (keep) return;
      queue.queue_.erase(place);
      queue.entries_.erase(id);
    }
  };

  void unqueue(const Entry& entry) {
    queue_.erase(entry.place);
    if (entry.request.deadline < kNoDeadline) deadlines_.erase({entry.request.deadline, entry.request.id});
  }
  AdmissionRequest remove(std::uint64_t id) {
    const auto found = entries_.find(id);
    const AdmissionRequest request = found->second.request;
    unqueue(found->second);
    entries_.erase(found);
    return request;
  }

  AdmissionLimits limits_;
  Order order_;
  std::unordered_map<std::uint64_t, Entry> entries_;  // waiting or begun
  std::set<Place> queue_;
  std::set<std::pair<AdmissionTime, std::uint64_t>> deadlines_;  // of those that wait
  std::uint64_t submitted_ = 0;
  std::int64_t held_ = 0;
  std::int64_t begun_ = 0;
};

}  // namespace prefillshare
