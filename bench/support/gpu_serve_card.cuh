// SPDX-License-Identifier: Apache-2.0
//
// bench/support/gpu_serve_card.cuh - the card of suite serve-gpu, whole or in two parts, and its time.
#pragma once

#include <chrono>
#include <cstdint>
#include <thread>
#include <utility>

#include <prefillshare/serve/cuda/card_split.cuh>
#include <prefillshare/serve/cuda/prefill_runner.cuh>

#include "cost_tables.hpp"
#include "gpu_models.cuh"
#include "sim_card.hpp"

namespace codegemm::bench {

inline constexpr int kAgents = 4;
inline constexpr std::int64_t kMostRunning = 16;  // prefill jobs that share a step
inline constexpr std::int64_t kChunk = 4096;      // tokens of a step at most
inline constexpr std::int64_t kMostBatch = 32;    // sequences of a decode step

class RealClock {
 public:
  using Clock = std::chrono::steady_clock;
  [[nodiscard]] double now() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }
  void wait_until(double seconds) const {
    std::this_thread::sleep_until(
        start_ + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds)));
  }

 private:
  Clock::time_point start_ = Clock::now();
};

/// The card in two parts, decode steps on the smaller one.
struct ServeParts {
  CardSplit split;
  DeviceWorkspace<__half> decode;

  [[nodiscard]] CardParts multiprocessors() const {
    return {split.rest().device.multiprocessors, split.part().device.multiprocessors};
  }
};

/// What all systems use, one at a time.
struct ServeCard {
  Device device;
  cudaStream_t stream = nullptr;
  DeviceWorkspace<__half>* workspace = nullptr;
  CardShape shape;  // but for the blocks

  [[nodiscard]] DevicePlace<__half> whole() const { return {device, stream, workspace}; }
  /// Where prefills run beside decode steps.
  [[nodiscard]] DevicePlace<__half> rest(const ServeParts& parts) const {
    return {parts.split.rest().device, parts.split.rest().stream, workspace};
  }
};

template <class T>
T take(codegemm::Result<T> made) {
  check(made.status());
  return std::move(made).value();
}

}  // namespace codegemm::bench
