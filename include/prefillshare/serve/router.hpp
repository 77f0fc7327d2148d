// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/router.hpp - sends requests to the workers of a pool, and again when one of them dies.
// Layer: serve (host only).
// See: routing.hpp for the rules; worker_caches.hpp for what a rule may know of the caches.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <prefillshare/kv/try_allocate.hpp>
#include <prefillshare/serve/routing.hpp>
#include <prefillshare/serve/worker_caches.hpp>
#include <prefillshare/serve/worker_table.hpp>
#include <prefillshare/vocabulary.hpp>

namespace prefillshare {

/// One attempt at a request. A later attempt at the same request makes earlier tickets void, so whatever a
/// worker that was thought dead still says about it is refused: nothing is answered twice.
struct Ticket {
  RequestId request = 0;      ///< which request
  std::uint64_t attempt = 0;  ///< from 1 on, another number each time

  /// The same attempt.
  friend bool operator==(const Ticket&, const Ticket&) = default;
};

/// Where an attempt goes.
struct Route {
  Ticket ticket;                   ///< to be given back when the attempt ends
  WorkerId worker = kNoWorker;     ///< where it goes
  std::uint64_t epoch = 0;         ///< of the worker: to be sent along, so that a restarted one refuses
  std::int64_t cached_tokens = 0;  ///< that the worker is believed to have, whole blocks
  double seconds = 0.0;            ///< of the prefill, estimated
};

/// What a Router may be told.
struct RouterOptions {
  WorkerId workers = 0;   ///< numbers 0 .. workers - 1 may be added
  int block_tokens = 16;  ///< of the caches whose events are observed
};

/// The requests of one pool of workers, from route() to finish(). Each attempt depends on its worker until
/// handed_off() (its result lies elsewhere) or finish(); if the worker dies before, the request becomes an
/// orphan: orphans() names it, route() with its number sends it elsewhere. A request leaves the router only
/// by finish() or cancel(), so nothing is lost.
///
///   route()            the rule chooses; load and expected cache count from here
///   prefilled()        computed: no longer load (first observe() the worker's events: its cache stays known)
///   handed_off()       no longer depends on the worker
///   finish()           answered; true for one ticket only
///
/// Externally synchronized.
template <RoutingPolicy Policy = StickyRouting<>, PrefillCost Cost = LinearPrefillCost>
class Router {
 public:
  /// kInvalidArgument, kOutOfMemory.
  [[nodiscard]] static Result<Router> create(const RouterOptions& options, Policy policy = Policy(),
                                             Cost cost = Cost()) {
    if (options.block_tokens < 1) {
      return error(StatusCode::kInvalidArgument, "Router: blocks of ", options.block_tokens, " tokens");
    }
    Result<WorkerCaches> caches = WorkerCaches::create(options.workers);
    if (!caches.ok()) return caches.status().with_prefix("Router");
    return Router(options, *std::move(caches), std::move(policy), std::move(cost));
  }

  // --- Workers ---

  /// A worker begins, with an empty cache. One that was there under another epoch has died in between: what
  /// it was doing is orphaned. The same epoch again makes a draining worker take requests again; one that was
  /// stopped and is alive after all comes back by it too, its cache unknown until the next resync().
  /// kInvalidArgument, kOutOfMemory.
  [[nodiscard]] Status start(WorkerId worker, std::uint64_t epoch) {
    if (worker < 0 || worker >= caches_.workers()) {
      return error(StatusCode::kInvalidArgument, "Router: worker ", worker, " of ", caches_.workers());
    }
    if (table_.contains(worker) && table_[worker].epoch == epoch &&
        table_[worker].state != WorkerState::kDown) {
      table_.set_state(worker, WorkerState::kUp);
      return {};
    }
    if (table_.contains(worker)) orphan_all(worker);
    if (Status s = table_.start(worker, epoch); !s.ok()) return s;
    caches_.start(worker, epoch);
    return {};
  }
  /// It is dead, or is taken for dead: its requests are orphans now. How many. Nothing for one that is not
  /// there.
  std::int64_t stop(WorkerId worker) {
    if (!table_.contains(worker)) return 0;
    table_.set_state(worker, WorkerState::kDown);
    caches_.stop(worker);
    return orphan_all(worker);
  }
  /// It ends what it has and gets nothing new. kInvalidArgument for one that is not up.
  [[nodiscard]] Status drain(WorkerId worker) {
    if (!table_.up(worker))
      return error(StatusCode::kInvalidArgument, "Router: worker ", worker, " is not up");
    table_.set_state(worker, WorkerState::kDraining);
    return {};
  }
  /// Work that the worker has from elsewhere. Replaces what was reported before.
  void report_load(WorkerId worker, double seconds) {
    if (table_.contains(worker)) table_[worker].reported_seconds = seconds;
  }

  // --- Requests ---

  /// Chooses a worker and counts the request as under way there. kExhausted when no worker is up: ask again
  /// later, the request is where it was. kInvalidArgument for a request that is under way; kOutOfMemory.
  [[nodiscard]] Result<Route> route(const RouteRequest& request) {
    const auto found = flights_.find(request.request);
    if (found != flights_.end() && found->second.state != FlightState::kOrphan) {
      return error(StatusCode::kInvalidArgument, "Router: request ", request.request,
                   " is under way at worker ", found->second.worker);
    }
    if (version_ != table_.version()) {
      if (Status s = policy_.changed(table_); !s.ok()) return s;
      version_ = table_.version();
    }
    matches_.clear();
    if constexpr (Policy::kUsesPrefixes) {
      if (Status s = caches_.match(request.prefix, matches_); !s.ok()) return s;
    }
    Result<WorkerId> chosen =
        policy_.choose(request, RouteContext<Cost>{table_, matches_, options_.block_tokens, cost_});
    if (!chosen.ok()) return chosen.status();
    if (*chosen == kNoWorker) return nobody();
    CODEGEMM_ASSERT(table_.up(*chosen));
    return depart(request, *chosen, found == flights_.end());
  }

  /// The prompt is computed. False for a ticket that is void.
  bool prefilled(const Ticket& ticket) {
    Flight* const flight = find(ticket);
    if (flight == nullptr || flight->state != FlightState::kRouted) return false;
    unload(*flight);
    flight->state = FlightState::kPrefilled;
    return true;
  }
  /// Its result lies with somebody else now: the worker may die. False for a ticket that is void.
  bool handed_off(const Ticket& ticket) {
    Flight* const flight = find(ticket);
    if (flight == nullptr || flight->state == FlightState::kHandedOff) return false;
    leave(*flight);
    flight->state = FlightState::kHandedOff;
    return true;
  }
  /// The attempt has failed, wherever it was: the request is an orphan. False for a ticket that is void.
  bool fail(const Ticket& ticket) {
    Flight* const flight = find(ticket);
    if (flight == nullptr) return false;
    orphan(*flight);
    return true;
  }
  /// Whether this answer counts: true once for each request, for its last attempt.
  bool finish(const Ticket& ticket) {
    Flight* const flight = find(ticket);
    if (flight == nullptr) return false;
    leave(*flight);
    flights_.erase(ticket.request);
    ++finished_;
    return true;
  }
  /// Nobody wants the answer any more. False if it is not there.
  bool cancel(RequestId request) {
    const auto found = flights_.find(request);
    if (found == flights_.end()) return false;
    if (found->second.state == FlightState::kOrphan) {
      --orphaned_;
    } else {
      leave(found->second);
    }
    flights_.erase(found);
    return true;
  }
  /// The rule may forget the session.
  void end_session(SessionId session) { policy_.ended(session); }

  /// Requests that wait to be routed again, those first that were routed first. kOutOfMemory.
  [[nodiscard]] Result<std::vector<RequestId>> orphans() const {
    std::vector<std::pair<std::uint64_t, RequestId>> waiting;
    std::vector<RequestId> out;
    const bool allocated = detail::try_allocate([&] {
      waiting.reserve(static_cast<std::size_t>(orphaned_));
      out.reserve(static_cast<std::size_t>(orphaned_));
      for (const auto& [request, flight] : flights_) {
        if (flight.state == FlightState::kOrphan) waiting.emplace_back(flight.attempt, request);
      }
    });
    if (!allocated) return error(StatusCode::kOutOfMemory, "Router: no memory for ", orphaned_, " orphans");
    std::sort(waiting.begin(), waiting.end());
    for (const auto& [attempt, request] : waiting) out.push_back(request);
    return out;
  }

  // --- Caches: see WorkerCaches ---

  /// WorkerCaches::observe().
  [[nodiscard]] Result<CacheSync> observe(WorkerId worker, std::uint64_t epoch,
                                          std::span<const KvEvent> events) {
    return caches_.observe(worker, epoch, events);
  }
  /// WorkerCaches::resync().
  [[nodiscard]] Result<CacheSync> resync(WorkerId worker, std::uint64_t epoch,
                                         std::span<const KvEvent> cached, std::uint64_t next) {
    return caches_.resync(worker, epoch, cached, next);
  }
  /// WorkerCaches::follow().
  template <class Snapshot>
  [[nodiscard]] Result<CacheSync> follow(WorkerId worker, std::uint64_t epoch, const EventLog& log,
                                         Snapshot&& snapshot) {
    return caches_.follow(worker, epoch, log, std::forward<Snapshot>(snapshot));
  }

  [[nodiscard]] const WorkerTable& workers() const noexcept { return table_; }   ///< to look at
  [[nodiscard]] const WorkerCaches& caches() const noexcept { return caches_; }  ///< to look at
  [[nodiscard]] const Policy& policy() const noexcept { return policy_; }        ///< to look at
  /// Requests in the router, orphans included.
  [[nodiscard]] std::int64_t requests() const noexcept { return static_cast<std::int64_t>(flights_.size()); }
  /// Of these, those whose worker died.
  [[nodiscard]] std::int64_t orphaned() const noexcept { return orphaned_; }
  [[nodiscard]] std::int64_t finished() const noexcept { return finished_; }  ///< since the beginning

  /// Recounts load and orphans from the requests. O(requests + workers).
  [[nodiscard]] Status check_invariants() const {
    std::vector<std::int64_t> requests(static_cast<std::size_t>(table_.size()), 0);
    std::vector<double> seconds(static_cast<std::size_t>(table_.size()), 0.0);
    std::int64_t orphans = 0;
    for (const auto& [request, flight] : flights_) {
      const auto worker = static_cast<std::size_t>(flight.worker);
      if (flight.state == FlightState::kOrphan) {
        ++orphans;
      } else if (flight.state != FlightState::kHandedOff) {
        ++requests[worker];
        seconds[worker] += flight.seconds;
      }
    }
    if (orphans != orphaned_) {
      return error(StatusCode::kCorruptData, "Router: ", orphaned_, " orphans, counted anew ", orphans);
    }
    for (WorkerId worker = 0; worker < table_.size(); ++worker) {
      const auto at = static_cast<std::size_t>(worker);
      const double difference = table_[worker].queued_seconds - seconds[at];
      if (table_[worker].requests == requests[at] && difference * difference <= 1e-12 * (1.0 + seconds[at])) {
        continue;
      }
      return error(StatusCode::kCorruptData, "Router: worker ", worker, " has ", table_[worker].requests,
                   " requests, counted anew ", requests[at]);
    }
    if (Status s = caches_.confirmed().check_invariants(); !s.ok()) return s;
    return caches_.expected().check_invariants();
  }

 private:
  enum class FlightState : std::uint8_t { kRouted, kPrefilled, kHandedOff, kOrphan };
  struct Flight {
    FlightState state = FlightState::kOrphan;
    WorkerId worker = kNoWorker;
    std::uint64_t attempt = 0;
    double seconds = 0.0;                 // still counted as load
    std::vector<std::uint64_t> expected;  // prefixes that the worker has not, but will have
  };

  Router(const RouterOptions& options, WorkerCaches caches, Policy policy, Cost cost)
      : options_(options), caches_(std::move(caches)), policy_(std::move(policy)), cost_(std::move(cost)) {}

  [[nodiscard]] Status nobody() const {
    return error(StatusCode::kExhausted, "Router: no worker is up: ", table_.count(WorkerState::kDown),
                 " are down, ", table_.count(WorkerState::kDraining), " draining");
  }
  [[nodiscard]] Flight* find(const Ticket& ticket) {
    const auto found = flights_.find(ticket.request);
    if (found == flights_.end() || found->second.attempt != ticket.attempt ||
        found->second.state == FlightState::kOrphan) {
      return nullptr;
    }
    return &found->second;
  }
  [[nodiscard]] std::int64_t matched_blocks(WorkerId worker) const {
    for (const PrefixMatch& match : matches_) {
      if (match.worker == worker) return match.blocks;
    }
    return 0;
  }

  [[nodiscard]] Result<Route> depart(const RouteRequest& request, WorkerId worker, bool is_new) {
    Route route;
    route.worker = worker;
    route.epoch = table_[worker].epoch;
    const std::int64_t matched = matched_blocks(worker);
    route.cached_tokens = std::min(matched * options_.block_tokens, request.tokens);
    route.seconds = static_cast<double>(cost_(request.tokens - route.cached_tokens, route.cached_tokens));
    Flight* flight = nullptr;
    const bool allocated = detail::try_allocate([&] {
      flight = &flights_[request.request];
      if constexpr (Policy::kUsesPrefixes) {
        const auto fresh = request.prefix.subspan(static_cast<std::size_t>(matched));
        flight->expected.assign(fresh.begin(), fresh.end());
      }
    });
    Status expected = allocated ? Status() : error(StatusCode::kOutOfMemory, "Router: no memory");
    if (allocated) expected = caches_.expect(worker, flight->expected);
    if (!expected.ok()) {
      if (is_new) flights_.erase(request.request);
      return expected;
    }
    if (!is_new) --orphaned_;
    route.ticket = {request.request, ++attempts_};
    flight->state = FlightState::kRouted;
    flight->worker = worker;
    flight->attempt = attempts_;
    flight->seconds = route.seconds;
    ++table_[worker].requests;
    table_[worker].queued_seconds += route.seconds;
    return route;
  }
  /// Its work is done or will never be done: no load, and no cache but what the events tell.
  void unload(Flight& flight) {
    WorkerView& worker = table_[flight.worker];
    worker.queued_seconds = std::max(0.0, worker.queued_seconds - std::exchange(flight.seconds, 0.0));
    caches_.settle(flight.worker, flight.expected);
    flight.expected.clear();
  }
  /// It does not depend on its worker any more.
  void leave(Flight& flight) {
    if (flight.state == FlightState::kHandedOff) return;
    if (flight.state == FlightState::kRouted) unload(flight);
    WorkerView& worker = table_[flight.worker];
    if (--worker.requests == 0) worker.queued_seconds = 0.0;  // no rounding is left over
  }
  void orphan(Flight& flight) {
    leave(flight);
    flight.state = FlightState::kOrphan;
    ++orphaned_;
  }
  std::int64_t orphan_all(WorkerId worker) {
    std::int64_t count = 0;
    for (auto& [request, flight] : flights_) {
      if (flight.worker != worker || flight.state == FlightState::kOrphan ||
          flight.state == FlightState::kHandedOff) {
        continue;
      }
      orphan(flight);
      ++count;
    }
    return count;
  }

  RouterOptions options_;
  WorkerTable table_;
  WorkerCaches caches_;
  Policy policy_;
  Cost cost_;
  std::unordered_map<RequestId, Flight> flights_;
  std::vector<PrefixMatch> matches_;
  std::uint64_t attempts_ = 0;
  std::uint64_t version_ = ~std::uint64_t{0};  // of the table that the rule has seen
  std::int64_t orphaned_ = 0;
  std::int64_t finished_ = 0;
};

}  // namespace prefillshare
