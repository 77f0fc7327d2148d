// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/sim/prefill_side.hpp - prefill workers: chunked steps over a queue, and the way to decode.
// Layer: sim (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <prefillshare/sim/decode_side.hpp>

namespace prefillshare::detail {

/// A step takes up to chunk_tokens from the requests in the order in which they came; each begins by looking
/// for its prefix in the cache and by reserving all its blocks, and waits at the head of the queue while it
/// cannot.
class PrefillSide : public DecodeSide {
 public:
  using DecodeSide::DecodeSide;

 protected:
  ~PrefillSide() = default;

  /// All of it is computed, its cache events are written. What follows is the hand-off.
  virtual void prefilled(std::int32_t slot) = 0;

  [[nodiscard]] Status add_prefill(PrefillNode node, bool events) {
    if (events) {
      node.log = std::make_unique<EventLog>();
    }
    if (Status s = refill(node); !s.ok()) return s;
    prefill_.push_back(std::move(node));
    return {};
  }
  /// An empty cache and an event log that begins again.
  [[nodiscard]] Status refill(PrefillNode& node) {
    node.allocator.reset();
    KvOptions options;
    if (node.log != nullptr) {
      node.log = std::make_unique<EventLog>();
      if (Status s = node.log->resize(config_.event_ring); !s.ok()) return s;
      options.events = node.log.get();
    }
    auto made = SimAllocator::create(prefill_storage_, {}, {}, options);
    if (!made.ok()) return made.status();
    node.allocator = *std::move(made);
    return {};
  }
  using DecodeSide::refill;
  [[nodiscard]] PrefillNode& prefill(const SimCall& one) {
    return prefill_[static_cast<std::size_t>(one.prefill)];
  }

  void enqueue(std::int32_t slot) {
    call(slot).phase = SimPhase::kQueued;
    prefill(call(slot)).queue.push_back(slot);
    step(call(slot).prefill);
  }
  /// Begins a step, if the worker is idle and there is something to do.
  void step(std::int32_t worker) {
    PrefillNode& node = prefill_[static_cast<std::size_t>(worker)];
    if (node.busy || !node.alive) return;
    std::int64_t budget = config_.chunk_tokens;
    std::vector<std::int32_t> ready;  // whose whole prefix was cached
    node.parts.clear();
    for (const std::int32_t slot : node.running) take_part(node, slot, budget);
    while (budget > 0 && !node.queue.empty() && open(node, node.queue.front())) {
      const std::int32_t slot = node.queue.front();
      node.queue.pop_front();
      if (call(slot).computed == call(slot).context - 1) {
        ready.push_back(slot);
      } else {
        node.running.push_back(slot);
        take_part(node, slot, budget);
      }
    }
    if (!node.parts.empty()) {
      double seconds = config_.cost.prefill_seconds(0, 0);
      for (const PrefillNode::Part& part : node.parts) {
        seconds += config_.cost.prefill_share(part.tokens, call(part.call).computed);
      }
      node.step_seconds = seconds / node.speed;
      node.busy = true;
      events_.push(now_ + node.step_seconds, SimEvent::kPrefillStep, worker, ++node.version);
    }
    for (const std::int32_t slot : ready) complete(node, slot);
  }
  void end_step(std::int32_t worker) {
    PrefillNode& node = prefill_[static_cast<std::size_t>(worker)];
    node.busy = false;
    node.busy_seconds += node.step_seconds;
    std::vector<std::int32_t> done;
    for (const PrefillNode::Part& part : node.parts) {
      SimCall& one = call(part.call);
      if (one.version != part.version) continue;  // its attempt has ended meanwhile
      one.computed += part.tokens;
      one.prefill_spent += node.step_seconds;
      report_.computed_tokens += part.tokens;
      if (one.computed == one.context - 1) done.push_back(part.call);
    }
    for (const std::int32_t slot : done) {
      take_out(node.running, slot);
      complete(node, slot);
    }
    step(worker);
  }

  /// The cache goes over the wire, out of the prefill worker or its host's memory, behind what is under way
  /// on either end.
  void transfer(std::int32_t slot) {
    SimCall& one = call(slot);
    PrefillNode& from = prefill(one);
    DecodeNode& to = decode(one);
    const std::int64_t blocks = one.handoff->pages().blocks();
    if (blocks > 0) {
      const Status status = one.handoff->begin(0, 0, blocks);
      CODEGEMM_ASSERT(status.ok());
      static_cast<void>(status.ok());
      one.writing = blocks;
    }
    const auto tail = static_cast<double>((one.context - 1) % config_.block_tokens);
    const double bytes =
        (static_cast<double>(blocks) * config_.block_tokens + tail) * config_.kv_bytes_per_token;
    double& link = one.staged ? from.host_link_free : from.link_free;
    const double seconds = one.staged ? bytes / config_.staging_bytes_per_second + config_.cost.link_seconds
                                      : config_.cost.transfer_seconds(bytes, one.prefill_spent);
    const double end = std::max({now_, link, to.link_free}) + seconds;
    link = to.link_free = end;
    report_.transferred_bytes += bytes;
    one.phase = SimPhase::kTransfer;
    events_.push(end, SimEvent::kTransferred, slot, one.version);
  }
  /// To host memory, so that the prefill worker can go on.
  void stage(std::int32_t slot) {
    SimCall& one = call(slot);
    PrefillNode& node = prefill(one);
    const double bytes = static_cast<double>(one.context - 1) * config_.kv_bytes_per_token;
    node.host_link_free = std::max(now_, node.host_link_free) + bytes / config_.staging_bytes_per_second;
    one.staging = true;
    ++report_.staged;
    report_.staged_bytes += bytes;
    events_.push(node.host_link_free, SimEvent::kStaged, slot, one.version);
  }
  void staged(std::int32_t slot) {
    SimCall& one = call(slot);
    one.staging = false;
    one.staged = true;
    let_go(one);
    pump(one.decode);
  }
  /// The prefill worker need not hold the call's cache any more: it is cached there now, and others may
  /// begin.
  void let_go(SimCall& one) {
    if (!one.base.is_open()) return;
    one.base.reset();
    step(one.prefill);
  }
  /// Takes it out of whatever list of its prefill worker it is in, and gives back what it holds there.
  void leave_prefill(SimCall& one, std::int32_t slot) {
    PrefillNode& node = prefill(one);
    if (one.phase == SimPhase::kQueued) take_out(node.queue, slot);
    if (one.phase == SimPhase::kPrefill) take_out(node.running, slot);
    one.base.reset();
    one.staging = one.staged = false;
    one.computed = 0;
    one.prefill_spent = 0.0;
  }

  std::vector<PrefillNode> prefill_;
  NoKvStorage prefill_storage_{{1, 1, 1, 1}, config_.prefill_blocks};

 private:
  void take_part(PrefillNode& node, std::int32_t slot, std::int64_t& budget) {
    const SimCall& one = call(slot);
    const std::int64_t tokens = std::min(budget, one.context - 1 - one.computed);
    if (tokens == 0) return;
    node.parts.push_back({slot, one.version, tokens});
    budget -= tokens;
  }
  /// Its cached prefix and room for the rest; false while there is none.
  [[nodiscard]] bool open(PrefillNode& node, std::int32_t slot) {
    SimCall& one = call(slot);
    const std::span<const std::int32_t> blocks = names(one);
    Sequence base = *node.allocator->open(key_of(one), blocks);
    const std::int64_t cached = base.length();
    const std::int64_t tail = (one.context - 1) % config_.block_tokens > 0 ? 1 : 0;
    if (!node.allocator->reserve(base, std::ssize(blocks) - cached + tail).ok()) return false;
    one.base = std::move(base);
    one.computed = cached * config_.block_tokens;
    one.phase = SimPhase::kPrefill;
    if (one.began < 0.0) one.began = now_;
    ++report_.attempts;
    report_.prompt_tokens += one.context - 1;
    report_.hit_tokens += one.computed;
    return true;
  }
  void complete(PrefillNode& node, std::int32_t slot) {
    SimCall& one = call(slot);
    const auto fresh = names(one).subspan(static_cast<std::size_t>(one.base.length()));
    const Status status = node.allocator->commit(one.base, fresh);
    CODEGEMM_ASSERT(status.ok());
    static_cast<void>(status.ok());
    prefilled(slot);
  }
};

}  // namespace prefillshare::detail
