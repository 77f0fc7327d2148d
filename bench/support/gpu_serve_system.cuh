// SPDX-License-Identifier: Apache-2.0
//
// bench/support/gpu_serve_system.cuh - models, caches and workers of one system of suite serve-gpu; its runs.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <prefillshare/serve/cuda/decode_worker.cuh>
#include <prefillshare/serve/cuda/prefill_runner.cuh>

#include "card_engine.hpp"
#include "gpu_serve_card.cuh"

namespace codegemm::bench {

/// A system on the card: its pools, its workers.
template <class DecodeModel>
class ServeSystem {
 public:
  using Prefill = DevicePrefillWorker<Dense, Dense>;
  using Decode = DeviceDecodeWorker<__half>;

  /// bases: one, or one for each agent. `blocks` of all pools together. parts: where decode steps run beside
  /// a prefill, or null.
  ServeSystem(CardSharing sharing, const std::vector<std::shared_ptr<const DenseModel>>& bases,
              const std::vector<std::shared_ptr<const DecodeModel>>& decode, std::int64_t blocks,
              ServeParts* parts, const ServeCard& card)
      : card_(card), split_(parts), sharing_(sharing), blocks_(blocks) {
    const std::size_t pools = sharing == CardSharing::kSeparate ? decode.size() : 1;
    std::vector<DevicePlace<__half>> further;
    if (parts != nullptr) {
      further.push_back({parts->split.part().device, parts->split.part().stream, &parts->decode});
    }
    for (std::size_t i = 0; i < pools; ++i) {
      auto pool = std::make_unique<Pool>(take(DeviceKvStorage<__half>::create(
          card.shape.kv, blocks / static_cast<std::int64_t>(pools), card.stream)));
      pool->allocator = take(DeviceKvAllocator<__half>::create(pool->storage));
      pool->worker = take(Decode::create(resources(*pool), std::int64_t{1} << 20, further));
      for (std::size_t agent = 0; agent < decode.size(); ++agent) {
        if (pools > 1 && agent != i) continue;
        auto module = take(factorize(bases[0]->config, decode[agent]));
        check(pool->worker->add_module(std::move(module), card.shape.batch_sizes, card.shape.max_context)
                  .status());
      }
      parts_.push_back({pool->allocator.get(), pool->worker.get()});
      pools_.push_back(std::move(pool));
    }
    for (std::size_t i = 0; i < bases.size(); ++i) {
      modules_.push_back(std::make_unique<DevicePrefillModule<Dense, Dense>>(
          bases[i], CacheKey{bases.size() == 1 ? "base" : "agent " + std::to_string(i), "1", ""}));
      // Each has an input of its own: it is written again when the one before has left the host.
      batches_.push_back(std::make_unique<PrefillBatch>(
          take(PrefillBatch::create(kChunk, kMostRunning, kMostRunning * card.shape.max_context / 16))));
      const DevicePrefill<Dense, Dense> runner(*modules_.back(), resources(*pools_[pools > 1 ? i : 0]),
                                               *batches_.back(), card.shape.max_context);
      prefills_.push_back(std::make_unique<Prefill>(
          take(Prefill::create(runner, {kChunk, kMostRunning, std::int64_t{1} << 20}))));
      workers_.push_back(prefills_.back().get());
    }
    for (cudaEvent_t& event : events_)
      check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event");
  }
  ServeSystem(const ServeSystem&) = delete;
  ServeSystem& operator=(const ServeSystem&) = delete;
  ~ServeSystem() {
    for (cudaEvent_t event : events_) cudaEventDestroy(event);
  }

  /// options: chunk_tokens, beside and admission are the caller's.
  CardOutcome run(const prefillshare::Workload& workload, CardOptions options) {
    if (options.beside && split_ == nullptr) throw std::runtime_error("a system on a card that is not split");
    options.sharing = sharing_;
    options.agents = kAgents;
    options.blocks = blocks_ / static_cast<std::int64_t>(pools_.size()) - 1;  // a padding page is set aside
    options.vocab_size = card_.shape.vocab_size;
    options.salt = ++runs_;
    check(cudaDeviceSynchronize(), "a system");
    Machine machine(*this);
    CardEngine<Prefill, Decode, Machine> engine(workers_, parts_, machine, options);
    CardOutcome out = engine.run(workload);
    machine.begin_prefill(false);
    machine.begin_decode(false);
    check(cudaDeviceSynchronize(), "a run");
    for (const auto& pool : pools_) {
      check(pool->allocator->check_invariants());
      if (pool->allocator->stats().in_use_blocks != 1) throw std::runtime_error("a run has kept blocks");
    }
    return out;
  }

 private:
  struct Pool {
    explicit Pool(DeviceKvStorage<__half> of) : storage(std::move(of)) {}
    DeviceKvStorage<__half> storage;
    std::unique_ptr<DeviceKvAllocator<__half>> allocator;
    std::unique_ptr<Decode> worker;
  };

  /// Time, and where the workers' steps run.
  class Machine : public RealClock {
   public:
    explicit Machine(ServeSystem& system) : system_(system) {}

    void begin_prefill(bool part) {
      if (part == part_) return;
      part_ = part;
      const DevicePlace<__half> to = part ? system_.card_.rest(*system_.split_) : system_.card_.whole();
      for (Prefill* worker : system_.workers_) check(worker->runner().move_to(to));
      stream_ = to.stream;
    }
    [[nodiscard]] std::uint64_t end_prefill() {
      check(cudaEventRecord(event(tickets_), stream_), "cudaEventRecord");
      return tickets_++;
    }
    [[nodiscard]] bool done(std::uint64_t ticket) const {
      const cudaError_t code = cudaEventQuery(event(ticket));
      if (code == cudaErrorNotReady) {
        static_cast<void>(cudaGetLastError());
        return false;
      }
      check(code, "cudaEventQuery");
      return true;
    }
    void wait(std::uint64_t ticket) const {
      check(cudaEventSynchronize(event(ticket)), "cudaEventSynchronize");
    }
    void begin_decode(bool part) {
      if (part == decode_part_) return;
      decode_part_ = part;
      for (const auto& pool : system_.pools_) check(pool->worker->use(part ? 1 : 0));
    }

   private:
    // Two chunks are under way at most.
    [[nodiscard]] cudaEvent_t event(std::uint64_t ticket) const {
      return system_.events_[ticket % system_.events_.size()];
    }

    ServeSystem& system_;
    bool part_ = false;
    bool decode_part_ = false;
    cudaStream_t stream_ = system_.card_.stream;
    std::uint64_t tickets_ = 0;
  };

  [[nodiscard]] DeviceResources<__half> resources(Pool& pool) const {
    DeviceResources<__half> out;
    out.device = card_.device;
    out.stream = card_.stream;
    out.allocator = pool.allocator.get();
    out.storage = &pool.storage;
    out.workspace = card_.workspace;
    return out;
  }

  const ServeCard& card_;
  ServeParts* split_;
  CardSharing sharing_;
  std::int64_t blocks_;
  std::uint64_t runs_ = 0;
  std::array<cudaEvent_t, 4> events_ = {};
  std::vector<std::unique_ptr<Pool>> pools_;
  std::vector<std::unique_ptr<DevicePrefillModule<Dense, Dense>>> modules_;
  std::vector<std::unique_ptr<PrefillBatch>> batches_;
  std::vector<std::unique_ptr<Prefill>> prefills_;
  std::vector<CardPool<Decode>> parts_;
  std::vector<Prefill*> workers_;
};

}  // namespace codegemm::bench
