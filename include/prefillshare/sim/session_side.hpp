// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/sim/session_side.hpp - sessions at the door of a simulated cluster, and what is measured.
// Layer: sim (host only).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include <prefillshare/serve/admission.hpp>
#include <prefillshare/sim/prefill_side.hpp>
#include <prefillshare/sim/recorder.hpp>

namespace prefillshare::detail {

/// A session arrives, waits until it is admitted or gone, has one slot while its calls follow one another,
/// and ends.
class SessionSide : public PrefillSide {
 public:
  using PrefillSide::PrefillSide;

 protected:
  ~SessionSide() = default;

  /// The session's next call, from nothing.
  virtual void issue(std::int32_t slot) = 0;

  /// A session's blocks lie in one of that many pools of prefill workers.
  void set_up_sessions(int prefill_pools) {
    AdmissionLimits limits;
    limits.begun = config_.most_sessions;
    limits.queued = config_.most_queued;
    limits.blocks = std::numeric_limits<std::int64_t>::max();
    const double blocks = config_.session_blocks_share * static_cast<double>(config_.prefill_blocks) *
                          std::floor(static_cast<double>(config_.prefill_workers) / prefill_pools);
    if (blocks < 9e18) limits.blocks = static_cast<std::int64_t>(blocks);
    sessions_ = std::make_unique<AdmissionQueue<FairOrder>>(limits);
  }

  void session_arrives(std::int32_t index) {
    const SessionPlan& plan = workload_->sessions[static_cast<std::size_t>(index)];
    if (static_cast<std::size_t>(index) + 1 < workload_->sessions.size()) {
      events_.push(workload_->sessions[static_cast<std::size_t>(index) + 1].arrival, SimEvent::kSession,
                   index + 1);
    }
    AdmissionRequest request;
    request.id = static_cast<std::uint64_t>(index);
    request.tenant = plan.tenant;
    const CallPlan& last = workload_->calls_of(plan).back();
    request.blocks = blocks_at_most(last.context, last.output, config_.block_tokens);
    if (config_.session_patience < std::numeric_limits<double>::infinity()) {
      request.deadline = now_ + config_.session_patience;
      events_.push(request.deadline, SimEvent::kPatience, index);
    }
    // A call that is larger than a worker could never be run.
    const bool fits = request.blocks <= std::min(config_.prefill_blocks, config_.decode_blocks);
    if (!fits || !sessions_->submit(request, now_).ok()) {
      ++report_.sessions_refused;
      return;
    }
    admit_sessions();
  }
  void admit_sessions() {
    for (;;) {
      const Admission next = sessions_->next(now_);
      if (next.kind == Admission::Kind::kNone) return;
      if (next.kind != Admission::Kind::kAdmitted) {
        ++report_.sessions_refused;
        continue;
      }
      const std::int32_t slot = idle_slot();
      SimCall& one = call(slot);
      one.session = static_cast<std::int64_t>(next.request.id);
      one.index = 0;
      one.issued = now_;
      issue(slot);
    }
  }
  /// Its last call is answered; who waits at the door may come in.
  void end_session(std::int32_t slot) {
    const std::int64_t session = call(slot).session;
    recorder_.session_ended(now_ - workload_->sessions[static_cast<std::size_t>(session)].arrival);
    ++report_.sessions_finished;
    sessions_->release(static_cast<SessionId>(session));
    idle_.push_back(slot);
    admit_sessions();
  }

  void sample() {
    std::int64_t prefill_blocks = 0;
    std::int64_t decode_blocks = 0;
    for (const PrefillNode& node : prefill_) prefill_blocks += node.allocator->stats().in_use_blocks;
    for (const DecodeNode& node : decode_) decode_blocks += node.allocator->stats().in_use_blocks;
    const double block_bytes = config_.block_tokens * config_.kv_bytes_per_token;
    recorder_.sample(static_cast<double>(prefill_blocks) * block_bytes,
                     static_cast<double>(decode_blocks) * block_bytes, report_);
    if (!events_.empty()) events_.push(now_ + config_.sample_seconds, SimEvent::kSample, 0);
  }
  /// Once, behind the last event.
  void finish_report() {
    recorder_.finish(report_);
    const double seconds = std::max(report_.seconds, 1e-300);
    for (const PrefillNode& node : prefill_) report_.prefill_busy += node.busy_seconds;
    for (const DecodeNode& node : decode_) report_.decode_busy += node.busy_seconds;
    report_.prefill_busy /= seconds * config_.prefill_workers;
    report_.decode_busy /= seconds * config_.decode_workers;
    report_.mean_batch =
        static_cast<double>(batch_steps_) / static_cast<double>(std::max<std::int64_t>(steps_, 1));
    report_.events = events_.pushed();
  }

  /// No worker holds anything, and every allocator and gate agrees with itself.
  [[nodiscard]] Status check_nodes_idle() const {
    for (const PrefillNode& node : prefill_) {
      if (Status s = check_allocator(*node.allocator, "prefill"); !s.ok()) return s;
    }
    for (const DecodeNode& node : decode_) {
      if (Status s = check_allocator(*node.allocator, "decode"); !s.ok()) return s;
      if (node.gate->held() != 0 || node.gate->begun() != 0) {
        return error(StatusCode::kCorruptData, "a gate holds ", node.gate->held(), " blocks for nobody");
      }
    }
    return {};
  }

  SimRecorder recorder_;

 private:
  [[nodiscard]] std::int32_t idle_slot() {
    if (idle_.empty()) {
      calls_.emplace_back();
      calls_.back().slot = static_cast<std::int32_t>(calls_.size() - 1);
      idle_.push_back(calls_.back().slot);
    }
    const std::int32_t slot = idle_.back();
    idle_.pop_back();
    return slot;
  }
  [[nodiscard]] static Status check_allocator(const SimAllocator& allocator, const char* side) {
    const KvStats stats = allocator.stats();
    if (stats.sequences != 0 || stats.in_use_blocks != 0) {
      return error(StatusCode::kCorruptData, "a ", side, " worker has ", stats.in_use_blocks,
                   " blocks in use by ", stats.sequences, " sequences");
    }
    return allocator.check_invariants();
  }

  std::unique_ptr<AdmissionQueue<FairOrder>> sessions_;
  std::vector<std::int32_t> idle_;  // slots
};

}  // namespace prefillshare::detail
