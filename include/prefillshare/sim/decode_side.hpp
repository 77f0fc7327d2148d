// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/sim/decode_side.hpp - decode workers: who gets memory, what a batch does between two changes.
// Layer: sim (host only).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <prefillshare/sim/cluster_config.hpp>
#include <prefillshare/sim/metrics.hpp>
#include <prefillshare/sim/nodes.hpp>
#include <prefillshare/sim/workload.hpp>
#include <prefillshare/vocabulary.hpp>

namespace prefillshare::detail {

/// What both sides share: configuration, calls, the clock. A call's slot is its number everywhere.
class SimCore {
 public:
  SimCore(const ClusterConfig& config, const Workload& workload) : config_(config), workload_(&workload) {}
  SimCore(const SimCore&) = delete;
  SimCore& operator=(const SimCore&) = delete;

 protected:
  ~SimCore() = default;

  [[nodiscard]] SimCall& call(std::int32_t slot) { return calls_[static_cast<std::size_t>(slot)]; }
  [[nodiscard]] const CallPlan& plan_of(const SimCall& one) const {
    const SessionPlan& session = workload_->sessions[static_cast<std::size_t>(one.session)];
    return workload_->calls[static_cast<std::size_t>(session.first_call + one.index)];
  }
  /// Full blocks of the base cache, which covers all of the prompt but its last token.
  [[nodiscard]] std::int64_t base_blocks(const SimCall& one) const {
    return (one.context - 1) / config_.block_tokens;
  }
  [[nodiscard]] std::int64_t blocks_of(std::int64_t tokens) const {
    return (tokens + config_.block_tokens - 1) / config_.block_tokens;
  }
  [[nodiscard]] const CacheKey& key_of(const SimCall& one) const {
    return keys_[config_.sharing == CacheSharing::kShared ? 0 : static_cast<std::size_t>(one.module)];
  }
  /// The names of a call's base blocks, until the next call of this.
  [[nodiscard]] std::span<const std::int32_t> names(const SimCall& one) {
    const auto count = static_cast<std::size_t>(base_blocks(one));
    if (names_.size() < count) names_.resize(count);
    const std::span<std::int32_t> out = std::span(names_).first(count);
    workload_->name_blocks(one.session, config_.block_tokens, out);
    return out;
  }
  template <class List>
  static void take_out(List& list, std::int32_t slot) {
    list.erase(std::remove(list.begin(), list.end(), slot), list.end());
  }

  ClusterConfig config_;
  const Workload* workload_;
  std::vector<CacheKey> keys_;  // [modules], or one
  std::deque<SimCall> calls_;   // by slot; they stay where they are
  EventQueue<SimEvent> events_;
  double now_ = 0.0;
  SimReport report_;

 private:
  std::vector<std::int32_t> names_;
};

/// Between two changes of its batch a decode worker is one event, whatever the tokens: all steps of the
/// segment take the mean of their times.
class DecodeSide : public SimCore {
 public:
  using SimCore::SimCore;

 protected:
  ~DecodeSide() = default;

  /// The gate lets the call through: its blocks at the decode worker are set aside.
  virtual void admitted(std::int32_t slot) = 0;
  /// Its answer is complete. It holds nothing any more.
  virtual void answered(std::int32_t slot) = 0;
  /// It has lost its memory. It holds nothing here any more, and is in no list.
  virtual void preempted(std::int32_t slot) = 0;

  [[nodiscard]] Status add_decode(DecodeNode node) {
    if (Status s = refill(node); !s.ok()) return s;
    decode_.push_back(std::move(node));
    return {};
  }
  /// An empty cache and gate.
  [[nodiscard]] Status refill(DecodeNode& node) {
    node.allocator.reset();
    auto made = SimAllocator::create(decode_storage_);
    if (!made.ok()) return made.status();
    node.allocator = *std::move(made);
    node.gate = std::make_unique<AdmissionQueue<>>(AdmissionLimits{config_.decode_blocks});
    return {};
  }
  [[nodiscard]] DecodeNode& decode(const SimCall& one) {
    return decode_[static_cast<std::size_t>(one.decode)];
  }

  /// The call asks its decode worker for all that it may need.
  void ask_gate(std::int32_t slot) {
    SimCall& one = call(slot);
    one.phase = SimPhase::kGate;
    AdmissionRequest request;
    request.id = static_cast<std::uint64_t>(slot);
    request.blocks = blocks_of(one.context + one.remaining);
    const Status status = decode(one).gate->submit(request, now_);
    CODEGEMM_ASSERT(status.ok());  // run() has refused calls that never fit
    static_cast<void>(status.ok());
    pump(one.decode);
  }
  /// Gives what room there is to those who wait for it.
  void pump(std::int32_t worker) {
    if (config_.reserve_decode) {
      pump_gate(worker);
    } else {
      pump_pending(worker);
    }
  }
  /// The whole base cache is here: the call may join the batch. False if it has no room after all.
  [[nodiscard]] bool arrive(std::int32_t slot) {
    SimCall& one = call(slot);
    if (one.writing > 0) {
      const auto state = one.handoff->finish(0, 0, std::exchange(one.writing, 0));
      CODEGEMM_ASSERT(state.ok() && *state == HandoffState::kComplete);
      static_cast<void>(state.ok());
    }
    Sequence base = *one.handoff->take();
    one.handoff.reset();
    one.fork = *decode(one).allocator->fork(base);
    one.private_blocks = first_private_blocks(one);
    const bool has_room = grow(one.decode, slot, one.private_blocks);
    if (has_room) {
      one.phase = SimPhase::kReady;
      decode(one).ready.push_back(slot);
      wake(one.decode);
    }
    tell_preempted();
    return has_room;
  }
  /// What the end of a segment brings.
  void end_segment(std::int32_t worker) {
    DecodeNode& node = decode_[static_cast<std::size_t>(worker)];
    node.running = false;
    const double first = node.segment_start + node.step_seconds;
    node.busy_seconds += now_ - node.segment_start;
    steps_ += node.segment_steps;
    batch_steps_ += node.segment_steps * static_cast<std::int64_t>(node.batch.size());
    std::vector<std::int32_t> ended;
    std::size_t kept = 0;
    for (const std::int32_t slot : node.batch) {
      SimCall& one = call(slot);
      if (one.first_token < 0.0) one.first_token = first;
      one.generated += node.segment_steps;
      one.context += node.segment_steps;
      one.remaining -= node.segment_steps;
      if (one.remaining > 0) {
        node.batch[kept++] = slot;
      } else {
        ended.push_back(slot);
        leave(one);
      }
    }
    node.batch.resize(kept);
    start_segment(worker);
    if (!ended.empty()) pump(worker);
    for (const std::int32_t slot : ended) answered(slot);
  }
  /// Gives back all that the call holds or waits for at its decode worker.
  void leave(SimCall& one) {
    DecodeNode& node = decode(one);
    if (one.handoff) {
      one.handoff->abort(error(StatusCode::kCancelled, "the attempt has ended"));
      if (one.writing > 0) {
        const Status status = one.handoff->fail(0, 0, std::exchange(one.writing, 0));
        CODEGEMM_ASSERT(status.code() == StatusCode::kCancelled);
        static_cast<void>(status.ok());
      }
      one.handoff.reset();
    }
    one.fork.reset();
    if (std::exchange(one.gate_held, false)) node.gate->release(static_cast<std::uint64_t>(one.slot));
  }
  /// Takes it out of whatever list of its decode worker it is in.
  void leave_lists(SimCall& one, std::int32_t slot) {
    DecodeNode& node = decode(one);
    if (one.phase == SimPhase::kGate) node.gate->cancel(static_cast<std::uint64_t>(slot));
    if (one.phase == SimPhase::kPending) take_out(node.pending, slot);
    if (one.phase == SimPhase::kReady) take_out(node.ready, slot);
    if (one.phase == SimPhase::kDecode) take_out(node.batch, slot);
  }

  std::vector<DecodeNode> decode_;
  NoKvStorage decode_storage_{{1, 1, 1, 1}, config_.decode_blocks};
  std::int64_t steps_ = 0;
  std::int64_t batch_steps_ = 0;

 private:
  /// What a fork needs besides the base's full blocks: all of the answer, or as far as the next token.
  [[nodiscard]] std::int64_t first_private_blocks(const SimCall& one) const {
    return blocks_of(one.context + (config_.reserve_decode ? one.remaining : 1)) - base_blocks(one);
  }
  [[nodiscard]] bool reserve(SimCall& one) {
    auto handoff = Handoff<SimAllocator>::reserve(*decode(one).allocator, key_of(one), names(one), 1);
    if (!handoff.ok()) return false;
    one.handoff.emplace(*std::move(handoff));
    return true;
  }
  void pump_gate(std::int32_t worker) {
    AdmissionQueue<>& gate = *decode_[static_cast<std::size_t>(worker)].gate;
    for (;;) {
      const Admission next = gate.next(now_, [&](const AdmissionRequest& request) {
        if (reserve(call(static_cast<std::int32_t>(request.id)))) return Status();
        return error(StatusCode::kExhausted, "no blocks");
      });
      if (next.kind != Admission::Kind::kAdmitted) return;
      const auto slot = static_cast<std::int32_t>(next.request.id);
      call(slot).gate_held = true;
      admitted(slot);
    }
  }
  void pump_pending(std::int32_t worker) {
    DecodeNode& node = decode_[static_cast<std::size_t>(worker)];
    while (node.alive && !node.pending.empty()) {
      const std::int32_t slot = node.pending.front();
      SimCall& one = call(slot);
      if (one.staging || !reserve(one)) return;
      const KvStats stats = node.allocator->stats();
      if (stats.free_blocks + stats.cached_blocks < first_private_blocks(one)) {
        one.handoff.reset();
        return;
      }
      node.pending.pop_front();
      admitted(slot);
    }
  }

  /// The fork's private blocks become `blocks`, if need be at the cost of those that joined last. False if
  /// the call itself was the last.
  [[nodiscard]] bool grow(std::int32_t worker, std::int32_t slot, std::int64_t blocks) {
    DecodeNode& node = decode_[static_cast<std::size_t>(worker)];
    SimCall& one = call(slot);
    while (!node.allocator->reserve(one.fork, blocks).ok()) {
      CODEGEMM_ASSERT(!config_.reserve_decode);
      if (node.ready.empty() && (node.batch.empty() || node.batch.back() == slot)) return false;
      evict_last(node);
    }
    one.private_blocks = blocks;
    return true;
  }
  void evict_last(DecodeNode& node) {
    const std::int32_t victim = node.ready.empty() ? node.batch.back() : node.ready.back();
    if (node.ready.empty()) {
      node.batch.pop_back();
    } else {
      node.ready.pop_back();
    }
    leave(call(victim));
    lost_.push_back(victim);
  }

  /// Something is ready: the batch takes it in after the step that is under way.
  void wake(std::int32_t worker) {
    DecodeNode& node = decode_[static_cast<std::size_t>(worker)];
    if (!node.running) {
      start_segment(worker);
      return;
    }
    if (static_cast<std::int32_t>(node.batch.size()) >= config_.most_batch) return;
    const double steps =
        node.step_seconds > 0.0 ? std::ceil((now_ - node.segment_start) / node.step_seconds) : 1.0;
    const auto done = std::max<std::int64_t>(1, static_cast<std::int64_t>(steps));
    if (done >= node.segment_steps) return;
    node.segment_steps = done;
    events_.push(std::max(now_, node.segment_start + static_cast<double>(done) * node.step_seconds),
                 SimEvent::kDecodeStep, worker, ++node.version);
  }
  void start_segment(std::int32_t worker) {
    DecodeNode& node = decode_[static_cast<std::size_t>(worker)];
    do {
      while (!node.ready.empty() && static_cast<std::int32_t>(node.batch.size()) < config_.most_batch) {
        call(node.ready.front()).phase = SimPhase::kDecode;
        node.batch.push_back(node.ready.front());
        node.ready.pop_front();
      }
      if (!config_.reserve_decode) grow_batch(worker);
    } while (node.batch.empty() && !node.ready.empty());
    if (!node.batch.empty()) run_segment(node, worker);
    tell_preempted();
  }
  void tell_preempted() {
    const std::vector<std::int32_t> lost = std::exchange(lost_, {});
    for (const std::int32_t slot : lost) preempted(slot);
  }
  /// Room for one more block's worth of steps for each, the first that joined first.
  void grow_batch(std::int32_t worker) {
    DecodeNode& node = decode_[static_cast<std::size_t>(worker)];
    for (std::size_t i = 0; i < node.batch.size(); ++i) {
      SimCall& one = call(node.batch[i]);
      const std::int64_t wanted =
          blocks_of(one.context + std::min<std::int64_t>(one.remaining, config_.block_tokens));
      const std::int64_t blocks = wanted - one.fork.length();
      if (blocks > one.private_blocks && !grow(worker, node.batch[i], blocks)) {
        evict_last(node);  // itself
      }
    }
  }
  void run_segment(DecodeNode& node, std::int32_t worker) {
    std::int64_t context = 0;
    std::int64_t steps =
        config_.reserve_decode ? std::numeric_limits<std::int64_t>::max() : config_.block_tokens;
    for (const std::int32_t slot : node.batch) {
      context += call(slot).context;
      steps = std::min(steps, call(slot).remaining);
    }
    node.segment_steps = steps;
    node.step_seconds =
        config_.cost.decode_seconds(static_cast<std::int64_t>(node.batch.size()), context, steps) /
        node.speed;
    node.segment_start = now_;
    node.running = true;
    events_.push(now_ + static_cast<double>(steps) * node.step_seconds, SimEvent::kDecodeStep, worker,
                 ++node.version);
  }

  std::vector<std::int32_t> lost_;
};

}  // namespace prefillshare::detail
