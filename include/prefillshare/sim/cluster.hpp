// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/sim/cluster.hpp - a cluster of prefill and decode workers, simulated event by event.
// Layer: sim (host only).
// See: bench/sim.cpp
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <prefillshare/sim/cluster_routers.hpp>
#include <prefillshare/sim/session_side.hpp>

namespace prefillshare {

/// Runs a workload on a cluster. What decides is the code that a real cluster runs: Router, AdmissionQueue,
/// the KV allocator (over blocks with nothing in them) and Handoff; only time is made up, by the CostModel.
/// The same configuration, workload and policy give the same report, on any machine.
///
/// Each session's calls follow one another, each as soon as the one before has ended (and its think time). A
/// call:
///   a decode worker is chosen (least loaded of its module) and, with reserve_decode, sets blocks aside;
///   a prefill worker is chosen by `Policy`; its queue, its steps;
///   transfer of the blocks that the decode worker has not; its batch, until the answer is complete.
/// Generated text joins the context, and the prefill side computes it for the next call.
///
/// Each object runs once. The workload must outlive it.
template <RoutingPolicy Policy = StickyRouting<>>
class Cluster final : private detail::SessionSide {
  using Event = detail::SimEvent;
  using Phase = detail::SimPhase;

 public:
  /// kInvalidArgument; kOutOfMemory.
  [[nodiscard]] static Result<std::unique_ptr<Cluster>> create(const ClusterConfig& config,
                                                               const Workload& workload,
                                                               const Policy& policy = Policy()) {
    if (Status s = validate(config); !s.ok()) return s;
    if (Status s = validate(workload); !s.ok()) return s;
    if (workload.modules > config.modules) {
      return error(StatusCode::kInvalidArgument, "Cluster: a workload of ", workload.modules, " modules for ",
                   config.modules);
    }
    std::unique_ptr<Cluster> cluster(new (std::nothrow) Cluster(config, workload));
    if (cluster == nullptr) return error(StatusCode::kOutOfMemory, "Cluster: no memory");
    Status status;
    if (!detail::try_allocate([&] { status = cluster->set_up(policy); })) {
      return error(StatusCode::kOutOfMemory, "Cluster: no memory");
    }
    if (!status.ok()) return status;
    return cluster;
  }

  /// To the end. kOutOfMemory; kInvalidArgument when called twice.
  [[nodiscard]] Result<SimReport> run() {
    if (ran_) return error(StatusCode::kInvalidArgument, "Cluster: ran already");
    ran_ = true;
    if (!detail::try_allocate([&] {
          start();
          while (!events_.empty()) handle(events_.pop());
          for (const std::int32_t slot : slot_of_) report_.calls_unfinished += slot >= 0 ? 1 : 0;
          finish_report();
        })) {
      return error(StatusCode::kOutOfMemory, "Cluster: no memory at ", now_, " s");
    }
    return report_;
  }

  /// After run(): nothing is held by anybody, and every allocator, router and gate agrees with itself.
  [[nodiscard]] Status check_idle() const {
    if (Status s = check_nodes_idle(); !s.ok()) return s;
    return routers_.check_idle(report_.calls_unfinished);
  }

 private:
  Cluster(const ClusterConfig& config, const Workload& workload) : SessionSide(config, workload) {}

  // --- Setting up ---

  [[nodiscard]] Status set_up(const Policy& policy) {
    const bool shared = config_.sharing == CacheSharing::kShared;
    for (std::int32_t m = 0; m < (shared ? 1 : config_.modules); ++m) {
      keys_.push_back({shared ? "base" : "module-" + std::to_string(m), "1", ""});
    }
    if (Status s = routers_.set_up(config_, policy); !s.ok()) return s;
    for (std::int32_t i = 0; i < config_.prefill_workers; ++i) {
      detail::PrefillNode node;
      node.pool = i % routers_.prefill_pools();
      node.in_pool = i / routers_.prefill_pools();
      if (!config_.prefill_speed.empty()) node.speed = config_.prefill_speed[static_cast<std::size_t>(i)];
      if (Status s = routers_.prefill(node).start(node.in_pool, node.epoch); !s.ok()) return s;
      if (Status s = add_prefill(std::move(node), Policy::kUsesPrefixes); !s.ok()) return s;
    }
    for (std::int32_t i = 0; i < config_.decode_workers; ++i) {
      detail::DecodeNode node;
      node.pool = i % config_.modules;
      node.in_pool = i / config_.modules;
      if (!config_.decode_speed.empty()) node.speed = config_.decode_speed[static_cast<std::size_t>(i)];
      if (Status s = routers_.decode(node).start(node.in_pool, node.epoch); !s.ok()) {
        return s;
      }
      if (Status s = add_decode(std::move(node)); !s.ok()) return s;
    }
    set_up_sessions(routers_.prefill_pools());
    return {};
  }

  // --- The clock ---

  void start() {
    slot_of_.assign(workload_->calls.size(), -1);
    recorder_.reserve(workload_->calls.size());
    if (!workload_->sessions.empty()) events_.push(workload_->sessions.front().arrival, Event::kSession, 0);
    for (std::size_t i = 0; i < config_.faults.size(); ++i) {
      events_.push(config_.faults[i].down, Event::kDown, static_cast<std::int32_t>(i));
      if (config_.faults[i].up < std::numeric_limits<double>::infinity()) {
        events_.push(config_.faults[i].up, Event::kUp, static_cast<std::int32_t>(i));
      }
    }
    events_.push(0.0, Event::kSample, 0);
  }

  void handle(const EventQueue<Event>::Event& event) {
    now_ = event.time;
    const auto at = static_cast<std::size_t>(event.subject);
    switch (event.kind) {
      case Event::kSession: session_arrives(event.subject); break;
      case Event::kPatience: admit_sessions(); break;
      case Event::kCall: issue(event.subject); break;
      case Event::kPrefillStep:
        if (prefill_[at].version == event.version) end_step(event.subject);
        break;
      case Event::kTransferred:
        if (calls_[at].version == event.version) transferred(event.subject);
        break;
      case Event::kStaged:
        if (calls_[at].version == event.version) staged(event.subject);
        break;
      case Event::kDecodeStep:
        if (decode_[at].version == event.version) end_segment(event.subject);
        break;
      case Event::kDown: down(config_.faults[at]); break;
      case Event::kUp: up(config_.faults[at]); break;
      case Event::kSample: sample(); break;
    }
  }

  // --- Calls ---

  void issue(std::int32_t slot) override {
    detail::SimCall& one = call(slot);
    const CallPlan& plan = plan_of(one);
    const SessionPlan& session = workload_->sessions[static_cast<std::size_t>(one.session)];
    one.id = static_cast<RequestId>(session.first_call + one.index);
    one.module = plan.module;
    one.context = plan.context;
    one.remaining = plan.output;
    one.generated = 0;
    one.began = one.first_token = -1.0;
    slot_of_[static_cast<std::size_t>(one.id)] = slot;
    begin(slot);
  }
  /// An attempt at a call that holds nothing.
  void begin(std::int32_t slot) {
    detail::SimCall& one = call(slot);
    RouteRequest request;
    request.request = one.id;
    request.session = static_cast<SessionId>(one.session);
    request.tokens = one.context + one.remaining;
    const Result<Route> route = routers_.decode(one).route(request);
    if (!route.ok()) {
      strand(slot);
      return;
    }
    one.decode_ticket = route.value().ticket;
    one.decode = routers_.decode_worker(one, route.value().worker);
    if (config_.reserve_decode) {
      ask_gate(slot);
    } else {
      go_to_prefill(slot);
    }
  }
  void go_to_prefill(std::int32_t slot) {
    detail::SimCall& one = call(slot);
    RouteRequest request;
    request.request = one.id;
    request.session = static_cast<SessionId>(one.session);
    request.tokens = one.context - 1;
    if constexpr (Policy::kUsesPrefixes) {
      const Status status = prefix_hashes(key_of(one), names(one), 1, hashes_);
      CODEGEMM_ASSERT(status.ok());
      static_cast<void>(status.ok());
      request.prefix = hashes_;
    }
    const Result<Route> route = routers_.prefill(one).route(request);
    if (!route.ok()) {
      strand(slot);
      return;
    }
    one.prefill_ticket = route.value().ticket;
    one.prefill = routers_.prefill_worker(one, route.value().worker);
    enqueue(slot);
  }
  /// No worker is up for it: it waits, holding nothing, until one is.
  void strand(std::int32_t slot) {
    end_attempt(slot);
    call(slot).phase = Phase::kStranded;
    stranded_.push_back(slot);
  }
  /// It is nowhere any more, and holds nothing.
  void end_attempt(std::int32_t slot) {
    detail::SimCall& one = call(slot);
    leave_lists(one, slot);
    leave(one);
    leave_prefill(one, slot);
    ++one.version;
    one.phase = Phase::kIdle;
    routers_.decode(one).fail(one.decode_ticket);
    routers_.prefill(one).fail(one.prefill_ticket);
  }

  void admitted(std::int32_t slot) override {
    if (config_.reserve_decode) {
      go_to_prefill(slot);
    } else {
      transfer(slot);
    }
  }
  void prefilled(std::int32_t slot) override {
    detail::SimCall& one = call(slot);
    detail::PrefillNode& node = prefill(one);
    if constexpr (Policy::kUsesPrefixes) {
      const auto seen = routers_.prefill(one).follow(
          node.in_pool, node.epoch, *node.log,
          [&](std::vector<KvEvent>& out) { return node.allocator->snapshot(out); });
      CODEGEMM_ASSERT(seen.ok() && *seen == CacheSync::kCurrent);
      static_cast<void>(seen.ok());
    }
    routers_.prefill(one).prefilled(one.prefill_ticket);
    if (config_.reserve_decode) {
      transfer(slot);
      return;
    }
    one.phase = Phase::kPending;
    decode(one).pending.push_back(slot);
    pump(one.decode);
    if (one.phase == Phase::kPending && config_.staging_bytes_per_second > 0.0) stage(slot);
  }
  void transferred(std::int32_t slot) {
    detail::SimCall& one = call(slot);
    routers_.prefill(one).handed_off(one.prefill_ticket);
    one.staged = false;
    let_go(one);
    if (!arrive(slot)) preempted(slot);
  }
  void preempted(std::int32_t slot) override {
    ++report_.preempted;
    const std::int32_t worker = call(slot).decode;
    end_attempt(slot);
    begin(slot);
    pump(worker);  // what it has lost may be what another waits for
  }
  void answered(std::int32_t slot) override {
    detail::SimCall& one = call(slot);
    const bool counts = routers_.prefill(one).finish(one.prefill_ticket);
    const bool decoded = routers_.decode(one).finish(one.decode_ticket);
    CODEGEMM_ASSERT(counts && decoded && !answered_twice(one));
    if (!counts || !decoded) return;
    slot_of_[static_cast<std::size_t>(one.id)] = -1;
    const CallPlan& plan = plan_of(one);
    ++report_.calls_finished;
    report_.output_tokens += plan.output;
    recorder_.answered(one, plan.output, now_);
    report_.seconds = now_;
    ++one.version;
    one.phase = Phase::kIdle;
    const SessionPlan& session = workload_->sessions[static_cast<std::size_t>(one.session)];
    if (++one.index == session.calls) {
      routers_.end_session(static_cast<SessionId>(one.session));
      end_session(slot);
      return;
    }
    one.issued = now_ + static_cast<double>(plan_of(one).think_seconds);
    prepare_next(slot);
  }
  void prepare_next(std::int32_t slot) {
    detail::SimCall& one = call(slot);
    if (one.issued <= now_) {
      issue(slot);
      return;
    }
    events_.push(one.issued, Event::kCall, slot, one.version);
  }
  [[nodiscard]] bool answered_twice(const detail::SimCall& one) const {
    return slot_of_[static_cast<std::size_t>(one.id)] < 0;
  }

  // --- Faults ---

  void down(const SimFault& fault) {
    const auto at = static_cast<std::size_t>(fault.worker);
    std::vector<RequestId> orphans;
    if (fault.side == SimFault::Side::kPrefill) {
      detail::PrefillNode& node = prefill_[at];
      routers_.prefill(node).stop(node.in_pool);
      orphans = routers_.prefill(node).orphans().value();
      node.alive = node.busy = false;
      ++node.version;
    } else {
      detail::DecodeNode& node = decode_[at];
      routers_.decode(node).stop(node.in_pool);
      orphans = routers_.decode(node).orphans().value();
      node.alive = node.running = false;
      ++node.version;
    }
    std::vector<std::int32_t> slots;  // orphans from before, waiting for something else, stay where they are
    for (const RequestId id : orphans) {
      const std::int32_t slot = slot_of_[static_cast<std::size_t>(id)];
      if (slot >= 0 && depends_on(call(slot), fault)) slots.push_back(slot);
    }
    for (const std::int32_t slot : slots) end_attempt(slot);
    report_.rerouted += std::ssize(slots);
    for (const std::int32_t slot : slots) begin(slot);
    poke();
  }
  [[nodiscard]] static bool depends_on(const detail::SimCall& one, const SimFault& fault) {
    if (fault.side == SimFault::Side::kDecode) {
      return one.decode == fault.worker && one.phase != Phase::kStranded && one.phase != Phase::kIdle;
    }
    return one.prefill == fault.worker && (one.phase == Phase::kQueued || one.phase == Phase::kPrefill ||
                                           one.phase == Phase::kPending || one.phase == Phase::kTransfer);
  }
  void up(const SimFault& fault) {
    const auto at = static_cast<std::size_t>(fault.worker);
    Status status;
    if (fault.side == SimFault::Side::kPrefill) {
      detail::PrefillNode& node = prefill_[at];
      status = refill(node);
      node.alive = true;
      node.link_free = node.host_link_free = now_;
      if (status.ok()) status = routers_.prefill(node).start(node.in_pool, ++node.epoch);
    } else {
      detail::DecodeNode& node = decode_[at];
      status = refill(node);
      node.alive = true;
      node.link_free = now_;
      if (status.ok()) {
        status = routers_.decode(node).start(node.in_pool, ++node.epoch);
      }
    }
    CODEGEMM_ASSERT(status.ok());
    for (const std::int32_t slot : std::exchange(stranded_, {})) begin(slot);
    poke();
  }
  /// What an attempt's end has freed on workers that live may be what others wait for.
  void poke() {
    for (std::int32_t i = 0; i < config_.decode_workers; ++i) {
      if (decode_[static_cast<std::size_t>(i)].alive) pump(i);
    }
    for (std::int32_t i = 0; i < config_.prefill_workers; ++i) step(i);
  }

  detail::ClusterRouters<Policy> routers_;
  std::vector<std::int32_t> slot_of_;  // [calls of the workload], -1: not under way
  std::vector<std::int32_t> stranded_;
  std::vector<std::uint64_t> hashes_;
  bool ran_ = false;
};

}  // namespace prefillshare
