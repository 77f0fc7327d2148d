// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/sim/worker_models.hpp - prefill and decode modules that take their time by a cost model and
// compute nothing: what the workers of serve/ run in a simulation of one machine.
// Layer: sim (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <prefillshare/kv/allocator.hpp>
#include <prefillshare/serve/decode_worker.hpp>
#include <prefillshare/serve/hash_ring.hpp>
#include <prefillshare/serve/prefill_worker.hpp>
#include <prefillshare/sim/cost_model.hpp>

namespace prefillshare {

/// What the simulated modules of one machine share. Each step adds its time, one after the other; or, while
/// `beside` is set, prefill steps follow one another on a part of the machine and decode steps on the rest.
struct SimMachine {
  double now = 0.0;  ///< seconds; where decode steps have got to
  /// Prefill steps add to prefill_until instead of `now`.
  bool beside = false;
  double prefill_until = 0.0;    ///< when the last prefill step that was begun ends
  bool prefill_in_part = false;  ///< prefill steps take the time that they take beside decode steps
  bool decode_in_part = false;   ///< the same of decode steps

  /// A prefill step of so many seconds.
  void prefill(double seconds) noexcept {
    if (beside) {
      prefill_until = std::max(prefill_until, now) + seconds;
    } else {
      now += seconds;
    }
  }
};

/// What bounds a simulated module.
struct SimModuleLimits {
  std::int64_t vocab_size = 0;   ///< ids below it
  std::int64_t max_tokens = 0;   ///< of a prefill step
  std::int64_t max_context = 0;  ///< of a sequence
};

/// A prefill module for PrefillWorker's scheduling, over an allocator with nothing in its blocks. Allocator,
/// machine and cost model outlive it.
class SimPrefill {
 public:
  using Allocator = BasicKvAllocator<NoKvStorage>;  ///< blocks with nothing behind them

  /// `cost.prefill` tells the times; that of `part`, where there is one, of steps on a part of the machine.
  SimPrefill(CacheKey key, Allocator& allocator, const CostModel& cost, SimMachine& machine,
             const SimModuleLimits& limits, const CostModel* part = nullptr)
      : key_(std::move(key)),
        allocator_(&allocator),
        cost_(&cost),
        part_(part != nullptr ? part : &cost),
        machine_(&machine),
        limits_(limits) {}

  [[nodiscard]] Allocator& allocator() const noexcept { return *allocator_; }            ///< as given
  [[nodiscard]] const CacheKey& key() const noexcept { return key_; }                    ///< as given
  [[nodiscard]] std::int64_t vocab_size() const noexcept { return limits_.vocab_size; }  ///< as given
  [[nodiscard]] int layers() const noexcept { return 1; }                                ///< announced as one
  [[nodiscard]] std::int64_t max_tokens() const noexcept { return limits_.max_tokens; }  ///< as given
  [[nodiscard]] std::int64_t max_context() const noexcept { return limits_.max_context; }  ///< as given
  /// As PrefillRunner says.
  [[nodiscard]] bool reserve(std::int64_t caches) {
    return detail::try_allocate([&] { parts_.reserve(static_cast<std::size_t>(caches)); });
  }
  /// The same.
  template <class AfterLayer>
  [[nodiscard]] Status run(std::span<const std::span<const std::int32_t>> chunks,
                           std::span<Sequence* const> caches, AfterLayer&& after_layer) {
    parts_.clear();
    for (std::size_t i = 0; i < caches.size(); ++i) {
      parts_.push_back({std::ssize(chunks[i]), caches[i]->length()});
    }
    machine_->prefill((machine_->prefill_in_part ? part_ : cost_)->prefill_step_seconds(parts_));
    if (Status s = after_layer(0); !s.ok()) return s;
    for (std::size_t i = 0; i < caches.size(); ++i) {
      if (Status s = allocator_->commit(*caches[i], chunks[i]); !s.ok()) return s;
    }
    return {};
  }

 private:
  CacheKey key_;
  Allocator* allocator_;
  const CostModel* cost_;
  const CostModel* part_;
  SimMachine* machine_;
  SimModuleLimits limits_;
  std::vector<PrefillPart> parts_;
};

/// A decode module for BasicDecodeWorker's scheduling; its tokens are drawn from the requests' seeds. Machine
/// and cost model outlive it.
class SimDecodeLane {
 public:
  using Allocator = SimPrefill::Allocator;  ///< blocks with nothing behind them

  /// `cost.decode` tells the times; that of `part`, where there is one, of steps on a part of the machine. A
  /// batch of a size that is not in `sizes` (ascending, the last the most) takes as long as the next larger
  /// one.
  SimDecodeLane(const CostModel& cost, SimMachine& machine, const SimModuleLimits& limits,
                std::vector<std::int64_t> sizes, const CostModel* part = nullptr)
      : cost_(&cost),
        part_(part != nullptr ? part : &cost),
        machine_(&machine),
        limits_(limits),
        sizes_(std::move(sizes)) {}

  [[nodiscard]] std::int64_t vocab_size() const noexcept { return limits_.vocab_size; }    ///< as given
  [[nodiscard]] std::int64_t max_batch() const noexcept { return sizes_.back(); }          ///< as given
  [[nodiscard]] std::int64_t max_context() const noexcept { return limits_.max_context; }  ///< as given
  /// As DecodeLane says.
  [[nodiscard]] Status launch(std::span<const DecodeSlot> batch) {
    std::int64_t context = 0;
    tokens_.clear();
    for (const DecodeSlot& slot : batch) {
      context += slot.own->length();
      tokens_.push_back(static_cast<std::int32_t>(detail::scramble(slot.seed) %
                                                  static_cast<std::uint64_t>(limits_.vocab_size)));
    }
    const std::int64_t size = *std::lower_bound(sizes_.begin(), sizes_.end() - 1, std::ssize(batch));
    machine_->now += (machine_->decode_in_part ? part_ : cost_)->decode_seconds(size, context, 1);
    return {};
  }
  [[nodiscard]] static Status wait() { return {}; }  ///< launch() has done all
  /// Of batch[item].
  [[nodiscard]] std::int32_t token(std::size_t item) const noexcept { return tokens_[item]; }

 private:
  const CostModel* cost_;
  const CostModel* part_;
  SimMachine* machine_;
  SimModuleLimits limits_;
  std::vector<std::int64_t> sizes_;
  std::vector<std::int32_t> tokens_;  // of the last launch()
};

/// Workers on them.
using SimPrefillWorker = BasicPrefillWorker<SimPrefill>;
using SimDecodeWorker = BasicDecodeWorker<SimDecodeLane>;  ///< the same

static_assert(PrefillRunner<SimPrefill> && ChoosingLane<SimDecodeLane>);

}  // namespace prefillshare
