// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/routing.hpp - which worker a request should go to: the rules that a Router can have.
// Layer: serve (host only).
// See: PrefillShare (arXiv 2602.12029) section 3.3 for the sticky rule.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include <prefillshare/kv/try_allocate.hpp>
#include <prefillshare/serve/hash_ring.hpp>
#include <prefillshare/serve/worker_caches.hpp>
#include <prefillshare/serve/worker_table.hpp>
#include <prefillshare/vocabulary.hpp>

namespace prefillshare {

/// The caller's number of a request.
using RequestId = std::uint64_t;
/// The caller's number of a session.
using SessionId = std::uint64_t;

/// What a router must know of a request.
struct RouteRequest {
  RequestId request = 0;                  ///< one number for each; asking again after a failure uses the same
  SessionId session = 0;                  ///< requests of one session have one number
  std::int64_t tokens = 0;                ///< of the prompt
  std::span<const std::uint64_t> prefix;  ///< prefix_hashes() of it; may be empty, then nothing is matched
};

/// Estimates the seconds that a worker takes to prefill `tokens` after `context` tokens that it has already.
template <class Cost>
concept PrefillCost = requires(const Cost cost, std::int64_t tokens) {
  { cost(tokens, tokens) } -> std::convertible_to<double>;
};

/// Linear layers by the token, attention by pairs of tokens. The numbers are the caller's to measure; with
/// the default, load is counted in tokens.
struct LinearPrefillCost {
  double seconds_per_token = 1.0;    ///< linear layers
  double seconds_per_pair = 0.0;     ///< attention, for a token and a token that it sees
  double seconds_per_request = 0.0;  ///< whatever its length

  /// Seconds for `tokens` behind a context of `context` tokens.
  [[nodiscard]] constexpr double operator()(std::int64_t tokens, std::int64_t context) const noexcept {
    const auto n = static_cast<double>(tokens);
    return seconds_per_request + n * seconds_per_token +
           n * (static_cast<double>(context) + 0.5 * n) * seconds_per_pair;
  }
};

/// What a rule may look at.
template <PrefillCost Cost>
struct RouteContext {
  const WorkerTable& workers;            ///< all workers
  std::span<const PrefixMatch> matches;  ///< with kUsesPrefixes; workers that are not up may be among them
  int block_tokens = 1;                  ///< tokens of a block
  const Cost& cost;                      ///< estimates a prefill
};

/// A rule. choose() names a worker that is up, kNoWorker if there is none; it may remember sessions, and
/// forgets one on ended(). The router calls changed() before the first choice and after each change of a
/// worker's state or epoch. All decisions are functions of the calls alone: no clock, no address, no random
/// number.
template <class Policy>
concept RoutingPolicy = requires(Policy policy, const RouteRequest& request,
                                 const RouteContext<LinearPrefillCost>& context, const WorkerTable& workers,
                                 SessionId session) {
  { Policy::kUsesPrefixes } -> std::convertible_to<bool>;  // whether the router should match prefixes for it
  { policy.choose(request, context) } -> std::same_as<Result<WorkerId>>;
  { policy.changed(workers) } -> std::same_as<Status>;
  { policy.ended(session) } -> std::same_as<void>;
};

namespace detail {

/// Among workers of equal cost: fewer requests first, then by a hash of session and worker (so that equal
/// workers do not all get the same sessions), then the lower number.
struct TieBreak {
  std::int64_t requests = 0;
  std::uint64_t draw = 0;

  [[nodiscard]] static TieBreak of(const WorkerView& view, SessionId session, WorkerId worker) noexcept {
    return {view.requests, scramble(scramble(session) ^ static_cast<std::uint64_t>(worker))};
  }
  [[nodiscard]] bool before(const TieBreak& other) const noexcept {
    return requests != other.requests ? requests < other.requests : draw < other.draw;
  }
};

/// The worker of least cost(worker, view) among those up.
template <class CostOf>
[[nodiscard]] WorkerId cheapest(const WorkerTable& workers, SessionId session, CostOf&& cost_of) {
  WorkerId best = kNoWorker;
  double best_cost = 0.0;
  TieBreak best_tie;
  for (WorkerId worker = 0; worker < workers.size(); ++worker) {
    const WorkerView& view = workers[worker];
    if (view.state != WorkerState::kUp) continue;
    const double cost = cost_of(worker, view);
    if (best != kNoWorker && cost > best_cost) continue;
    const TieBreak tie = TieBreak::of(view, session, worker);
    if (best != kNoWorker && cost == best_cost && !tie.before(best_tie)) continue;
    best = worker;
    best_cost = cost;
    best_tie = tie;
  }
  return best;
}

}  // namespace detail

/// One after the other.
class RoundRobinRouting {
 public:
  static constexpr bool kUsesPrefixes = false;  ///< does not ask what is cached

  /// As RoutingPolicy says.
  template <PrefillCost Cost>
  [[nodiscard]] Result<WorkerId> choose(const RouteRequest& /*request*/, const RouteContext<Cost>& context) {
    for (WorkerId i = 0; i < context.workers.size(); ++i) {
      const WorkerId worker = (next_ + i) % context.workers.size();
      if (!context.workers.up(worker)) continue;
      next_ = worker + 1;
      return worker;
    }
    return kNoWorker;
  }
  [[nodiscard]] Status changed(const WorkerTable& /*workers*/) { return {}; }  ///< nothing depends on them
  void ended(SessionId /*session*/) {}  ///< nothing is kept of a session

 private:
  WorkerId next_ = 0;
};
static_assert(RoutingPolicy<RoundRobinRouting>);

/// The least work in the queue; for decode workers too, where nothing is matched.
class LeastLoadedRouting {
 public:
  static constexpr bool kUsesPrefixes = false;  ///< does not ask what is cached

  /// As RoutingPolicy says.
  template <PrefillCost Cost>
  [[nodiscard]] Result<WorkerId> choose(const RouteRequest& request, const RouteContext<Cost>& context) {
    return detail::cheapest(context.workers, request.session,
                            [](WorkerId /*worker*/, const WorkerView& view) { return view.load(); });
  }
  [[nodiscard]] Status changed(const WorkerTable& /*workers*/) { return {}; }  ///< nothing depends on them
  void ended(SessionId /*session*/) {}  ///< nothing is kept of a session
};
static_assert(RoutingPolicy<LeastLoadedRouting>);

/// Consistent hashing of sessions with bounded load: no worker has more than `bound` times the mean of
/// requests, rounded up; a session whose worker is full goes to the next on the ring.
class HashRouting {
 public:
  static constexpr bool kUsesPrefixes = false;  ///< does not ask what is cached

  /// A worker has at most `bound` times the mean number of requests; `points` as HashRing.
  explicit HashRouting(double bound = 1.25, int points = 64) : bound_(std::max(bound, 1.0)), ring_(points) {}

  /// As RoutingPolicy says.
  template <PrefillCost Cost>
  [[nodiscard]] Result<WorkerId> choose(const RouteRequest& request, const RouteContext<Cost>& context) {
    std::int64_t requests = 1;  // this one is counted
    for (const WorkerView& view : context.workers.workers()) {
      if (view.state == WorkerState::kUp) requests += view.requests;
    }
    const auto up = static_cast<double>(context.workers.count(WorkerState::kUp));
    const double most = std::ceil(bound_ * static_cast<double>(requests) / std::max(up, 1.0));
    return ring_.find(request.session, [&](WorkerId worker) {
      return static_cast<double>(context.workers[worker].requests + 1) <= most;
    });
  }
  /// The ring is made anew.
  [[nodiscard]] Status changed(const WorkerTable& workers) { return ring_.rebuild(workers); }
  void ended(SessionId /*session*/) {}  ///< nothing is kept of a session

 private:
  double bound_;
  HashRing ring_;
};
static_assert(RoutingPolicy<HashRouting>);

/// The paper's rule: a table from session to worker. It keeps each context where its cache is and knows no
/// load: a worker whose sessions are all busy gets hotter, and nobody helps it. `Placement` chooses for
/// sessions that are new, or whose worker is not up.
template <RoutingPolicy Placement = HashRouting>
class StickyRouting {
 public:
  static constexpr bool kUsesPrefixes = Placement::kUsesPrefixes;  ///< what the placement asks

  /// `placement` chooses where a session begins.
  explicit StickyRouting(Placement placement = Placement()) : placement_(std::move(placement)) {}

  /// As RoutingPolicy says: where the session was, if that worker is up.
  template <PrefillCost Cost>
  [[nodiscard]] Result<WorkerId> choose(const RouteRequest& request, const RouteContext<Cost>& context) {
    const auto found = worker_of_.find(request.session);
    if (found != worker_of_.end() && context.workers.up(found->second)) return found->second;
    Result<WorkerId> placed = placement_.choose(request, context);
    if (!placed.ok() || *placed == kNoWorker) return placed;
    if (found != worker_of_.end()) {
      found->second = *placed;
    } else if (!detail::try_allocate([&] { worker_of_.emplace(request.session, *placed); })) {
      return error(StatusCode::kOutOfMemory, "StickyRouting: no memory for ", worker_of_.size() + 1,
                   " sessions");
    }
    return placed;
  }
  /// Of the placement.
  [[nodiscard]] Status changed(const WorkerTable& workers) { return placement_.changed(workers); }
  /// The session is forgotten.
  void ended(SessionId session) {
    worker_of_.erase(session);
    placement_.ended(session);
  }

  /// Sessions that are remembered.
  [[nodiscard]] std::int64_t sessions() const noexcept {
    return static_cast<std::int64_t>(worker_of_.size());
  }

 private:
  Placement placement_;
  std::unordered_map<SessionId, WorkerId> worker_of_;
};
static_assert(RoutingPolicy<StickyRouting<>>);

/// The least seconds until the prompt is prefilled: `weight` times what this worker would have to compute
/// (the prompt less what it has cached or is about to), and the work in its queue. A context follows its
/// cache until the queue there costs more than computing it again elsewhere, so a hot prefix spreads by
/// itself. Load counts from the moment of routing, so many cold requests at once go to as many workers.
/// O(workers).
class PrefixRouting {
 public:
  static constexpr bool kUsesPrefixes = true;  ///< asks what is cached where

  /// 1 is best for this request alone; but what is computed twice delays all others and fills a second cache,
  /// so under load more is better for all. Less spreads.
  explicit PrefixRouting(double weight = 2.0) : weight_(weight) {}

  /// As RoutingPolicy says.
  template <PrefillCost Cost>
  [[nodiscard]] Result<WorkerId> choose(const RouteRequest& request, const RouteContext<Cost>& context) {
    const auto workers = static_cast<std::size_t>(context.workers.size());
    if (matched_.size() < workers && !detail::try_allocate([&] { matched_.resize(workers, 0); })) {
      return error(StatusCode::kOutOfMemory, "PrefixRouting: no memory for ", workers, " workers");
    }
    const auto prefill = [&](std::int64_t cached) {
      return weight_ * static_cast<double>(context.cost(request.tokens - cached, cached));
    };
    for (const PrefixMatch& match : context.matches) at(match.worker) = match.blocks;
    const double cold = prefill(0);
    const WorkerId best =
        detail::cheapest(context.workers, request.session, [&](WorkerId worker, const WorkerView& view) {
          const std::int64_t cached = std::int64_t{at(worker)} * context.block_tokens;
          return view.load() + (cached == 0 ? cold : prefill(std::min(cached, request.tokens)));
        });
    for (const PrefixMatch& match : context.matches) at(match.worker) = 0;
    return best;
  }
  [[nodiscard]] Status changed(const WorkerTable& /*workers*/) { return {}; }  ///< nothing depends on them
  void ended(SessionId /*session*/) {}  ///< nothing is kept of a session

 private:
  /// A match may name a worker that the table has not: matched_ covers the table, others are not asked for.
  [[nodiscard]] std::int32_t& at(WorkerId worker) {
    const auto index = static_cast<std::size_t>(worker);
    return index < matched_.size() ? matched_[index] : nobody_;
  }

  double weight_;
  std::vector<std::int32_t> matched_;  // [workers], all 0 between calls
  std::int32_t nobody_ = 0;
};
static_assert(RoutingPolicy<PrefixRouting>);

}  // namespace prefillshare
