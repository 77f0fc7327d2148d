// SPDX-License-Identifier: Apache-2.0
//
// bench/support/sim_card.hpp - a card in simulated time for CardEngine, with step costs from measured tables.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <prefillshare/sim/worker_models.hpp>

#include "card_engine.hpp"

namespace codegemm::bench {

/// Simulated time, which the steps move on.
struct SimCardClock {
  prefillshare::SimMachine machine;
  std::vector<double> ends;  // of prefills, by their tickets

  [[nodiscard]] double now() const { return machine.now; }
  void wait_until(double seconds) { machine.now = std::max(machine.now, seconds); }
  void begin_prefill(bool part) { machine.prefill_in_part = part; }
  [[nodiscard]] std::uint64_t end_prefill() {
    ends.push_back(std::max(machine.prefill_until, machine.now));
    return ends.size() - 1;
  }
  [[nodiscard]] bool done(std::uint64_t ticket) const { return ends[ticket] <= machine.now; }
  void wait(std::uint64_t ticket) { wait_until(ends[ticket]); }
  void begin_decode(bool part) { machine.decode_in_part = part; }
};

/// What a system is made of, on whatever card.
struct CardShape {
  prefillshare::KvShape kv;
  std::int64_t blocks = 0;  // of all pools together
  std::int64_t vocab_size = 0;
  std::int64_t max_context = 0;
  std::int64_t most_running = 16;  // prefill jobs that share a step
  std::vector<std::int64_t> batch_sizes;
};

/// Runs the workload with the costs of `cost`, and of `part` for steps beside one another; options.blocks is
/// set here.
[[nodiscard]] inline CardOutcome simulate_card(const CardShape& shape, const prefillshare::CostModel& cost,
                                               const prefillshare::Workload& workload, CardOptions options,
                                               const prefillshare::CostModel* part = nullptr) {
  using namespace prefillshare;
  const auto agents = static_cast<std::size_t>(options.agents);
  const std::size_t pools = options.sharing == CardSharing::kSeparate ? agents : 1;
  const std::size_t bases = options.sharing == CardSharing::kShared ? 1 : agents;
  options.blocks = shape.blocks / static_cast<std::int64_t>(pools);
  options.vocab_size = shape.vocab_size;
  const SimModuleLimits limits{shape.vocab_size, options.chunk_tokens, shape.max_context};
  SimCardClock clock;
  clock.machine.beside = options.beside;
  using Engine = CardEngine<SimPrefillWorker, SimDecodeWorker, SimCardClock>;
  std::vector<std::unique_ptr<NoKvStorage>> storages;
  std::vector<std::unique_ptr<SimPrefill::Allocator>> allocators;
  std::vector<std::unique_ptr<SimDecodeWorker>> decodes;
  std::vector<std::unique_ptr<SimPrefillWorker>> prefills;
  std::vector<typename Engine::Pool> parts;
  std::vector<SimPrefillWorker*> workers;
  for (std::size_t i = 0; i < pools; ++i) {
    storages.push_back(std::make_unique<NoKvStorage>(shape.kv, options.blocks));
    allocators.push_back(SimPrefill::Allocator::create(*storages.back()).value());
    decodes.push_back(std::make_unique<SimDecodeWorker>(*allocators.back(), std::int64_t{1} << 20));
    for (std::size_t agent = 0; agent < agents / pools; ++agent) {
      const auto added = decodes.back()->add_lane(
          std::make_unique<SimDecodeLane>(cost, clock.machine, limits, shape.batch_sizes, part));
      if (!added.ok()) throw std::runtime_error(added.status().message());
    }
    parts.push_back({allocators.back().get(), decodes.back().get()});
  }
  for (std::size_t i = 0; i < bases; ++i) {
    prefills.push_back(std::make_unique<SimPrefillWorker>(
        SimPrefillWorker::create(
            SimPrefill({bases == 1 ? "base" : "agent " + std::to_string(i), "1", ""},
                       *allocators[pools > 1 ? i : 0], cost, clock.machine, limits, part),
            {options.chunk_tokens, shape.most_running, std::int64_t{1} << 20})
            .value()));
    workers.push_back(prefills.back().get());
  }
  Engine engine(workers, parts, clock, options);
  CardOutcome out = engine.run(workload);
  for (const auto& allocator : allocators) {
    if (allocator->stats().in_use_blocks != 0) throw std::runtime_error("the simulation has kept blocks");
  }
  // The simulated pages have no type: those of 16 bits.
  out.kv_bytes_in_use /= 2;
  out.kv_bytes_held /= 2;
  return out;
}

}  // namespace codegemm::bench
