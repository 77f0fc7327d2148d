// SPDX-License-Identifier: Apache-2.0
//
// bench/support/gpu_energy.cuh - the energy of one launch, from the card's own counter (NVML).
#pragma once

#include <chrono>
#include <stdexcept>
#include <string>

#include <dlfcn.h>

#include "gpu_timing.cuh"

namespace codegemm::bench {

// The counter of the CUDA device 0, found by its bus address: NVML numbers cards in its own way. The library
// comes with the driver and is loaded when asked for, so that a suite builds and runs without it; its
// functions are declared here for the same reason (NVML API reference, device queries).
class EnergyCounter {
 public:
  EnergyCounter() {
    library_ = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library_ == nullptr) throw std::runtime_error(dlerror());
    char bus[32] = "";
    check(cudaDeviceGetPCIBusId(bus, sizeof bus, 0), "cudaDeviceGetPCIBusId");
    call("nvmlInit_v2", symbol<int (*)()>("nvmlInit_v2")());
    constexpr const char* kFind = "nvmlDeviceGetHandleByPciBusId_v2";
    call(kFind, symbol<int (*)(const char*, void**)>(kFind)(bus, &device_));
    read_ = symbol<decltype(read_)>("nvmlDeviceGetTotalEnergyConsumption");
  }

  double joules() const {
    unsigned long long millijoules = 0;
    call("nvmlDeviceGetTotalEnergyConsumption", read_(device_, &millijoules));
    return static_cast<double>(millijoules) * 1e-3;
  }

 private:
  template <class Function>
  Function symbol(const char* name) const {
    void* const found = dlsym(library_, name);
    if (found == nullptr) throw std::runtime_error(std::string("libnvidia-ml.so.1 lacks ") + name);
    return reinterpret_cast<Function>(found);
  }
  static void call(const char* name, int code) {
    if (code != 0) throw std::runtime_error(std::string(name) + ": error " + std::to_string(code));
  }

  void* library_ = nullptr;  // kept until the program ends
  void* device_ = nullptr;
  int (*read_)(void*, unsigned long long*) = nullptr;
};

struct Energy {
  double microjoules;  // of one launch, the idle card's share included
  double watts;
};

// Replays the launches for so many seconds, after half a second in which the card's clocks and power settle.
// Two runs on an H100 with a second each were 2% apart.
template <class Enqueue>
Energy measure_energy(const EnergyCounter& counter, cudaStream_t stream, int launches, double seconds,
                      Enqueue&& enqueue) {
  using Clock = std::chrono::steady_clock;
  const Replay graph(stream, launches, enqueue);
  const auto replay_for = [&](double time) {
    const auto start = Clock::now();
    long long replays = 0;
    while (std::chrono::duration<double>(Clock::now() - start).count() < time) {
      for (int i = 0; i < 8; ++i) graph.enqueue();
      graph.wait();
      replays += 8;
    }
    return static_cast<double>(replays);
  };
  replay_for(0.5);
  const double before = counter.joules();
  const auto start = Clock::now();
  const double replays = replay_for(seconds);
  const double joules = counter.joules() - before;
  const double elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  return {joules * 1e6 / (replays * launches), joules / elapsed};
}

}  // namespace codegemm::bench
