// SPDX-License-Identifier: Apache-2.0
//
// bench/support/multi_gpu_common.cuh - what the parts of the suite multi-gpu share: GPUs that reach each
// other, a thread for each rank, the rows.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <prefillshare/model/cuda/peer_group.cuh>
#include <prefillshare/model/shard.hpp>
#include <prefillshare/serve/cuda/peer_transport.cuh>
#ifdef PREFILLSHARE_WITH_NCCL
#include <prefillshare/serve/cuda/nccl_wire.cuh>
#endif

#include "gpu_program.hpp"
#include "gpu_timing.cuh"
#include "random_llama.cuh"
#include "report.hpp"

namespace codegemm::bench::multi {

using namespace prefillshare;
using namespace prefillshare::cuda;
using Clock = std::chrono::steady_clock;
using Table = HandoffTable<DeviceKvAllocator<__half>, std::mutex>;

struct Options {
  std::string json;
  std::vector<std::string> parts;
  bool quick = false;
  int steps = 100;
};

inline double us_since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}
inline int gpu_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  return count;
}
void use(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }
inline Device device_of(int number) {
  use(number);
  return take(codegemm::cuda::query_device(number));
}
// Every GPU reaches every other's memory from now on.
inline void enable_peers(int gpus) {
  for (int a = 0; a < gpus; ++a) {
    use(a);
    for (int b = 0; b < gpus; ++b) {
      if (a == b) continue;
      int can = 0;
      check(cudaDeviceCanAccessPeer(&can, a, b), "cudaDeviceCanAccessPeer");
      if (can == 0)
        throw std::runtime_error("GPU " + std::to_string(a) + " does not reach GPU " + std::to_string(b));
      const cudaError_t code = cudaDeviceEnablePeerAccess(b, 0);
      if (code != cudaErrorPeerAccessAlreadyEnabled) check(code, "cudaDeviceEnablePeerAccess");
      static_cast<void>(cudaGetLastError());
    }
  }
  use(0);
}

// A stream of the current device; `first`: before the others' work.
struct Stream {
  cudaStream_t get = nullptr;
  explicit Stream(bool first = false) {
    int least = 0, greatest = 0;
    check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    check(cudaStreamCreateWithPriority(&get, cudaStreamNonBlocking, first ? greatest : least),
          "cudaStreamCreateWithPriority");
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(get); }
  void wait() const { check(cudaStreamSynchronize(get), "cudaStreamSynchronize"); }
};

// body(rank) in a thread for each rank, whose GPU is current; what one throws ends the program, for the
// others would wait for it.
inline void on_ranks(int ranks, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int r = 0; r < ranks; ++r) {
    threads.emplace_back([&, r] {
      try {
        use(r);
        body(r);
      } catch (const std::exception& e) {
        std::fprintf(stderr, "multi-gpu: rank %d: %s\n", r, e.what());
        std::fflush(nullptr);
        std::_Exit(1);
      }
    });
  }
  for (std::thread& t : threads) t.join();
  use(0);
}

// Mailboxes of all ranks, and each one's group.
struct Peers {
  std::vector<DeviceArray<std::byte>> boxes;
  std::vector<void*> pointers;
  std::vector<PeerGroup> groups;

  Peers(int ranks, const PeerGroup::Options& options) {
    for (int r = 0; r < ranks; ++r) {
      use(r);
      boxes.push_back(take(DeviceArray<std::byte>::zeros(PeerGroup::mailbox_bytes(ranks, options.most))));
      pointers.push_back(boxes.back().data());
    }
    for (int r = 0; r < ranks; ++r)
      groups.push_back(take(PeerGroup::create(r, pointers, device_of(r), options)));
    use(0);
  }
};

#ifdef PREFILLSHARE_WITH_NCCL
inline void nccl_check(ncclResult_t code, const char* what, int rank) {
  check(nccl_status(code, what, rank, nullptr));
}
struct Communicators {
  std::vector<ncclComm_t> comms;
  explicit Communicators(int ranks) : comms(static_cast<std::size_t>(ranks)) {
    ncclUniqueId id;
    nccl_check(ncclGetUniqueId(&id), "ncclGetUniqueId", 0);
    on_ranks(ranks, [&](int r) {
      nccl_check(ncclCommInitRank(&comms[static_cast<std::size_t>(r)], ranks, id, r), "ncclCommInitRank", r);
    });
  }
  Communicators(const Communicators&) = delete;
  Communicators& operator=(const Communicators&) = delete;
  ~Communicators() {
    on_ranks(static_cast<int>(comms.size()),
             [&](int r) { ncclCommDestroy(comms[static_cast<std::size_t>(r)]); });
  }
};
#endif

// Numbers of a group that has failed are worth nothing.
inline void check_group(const PeerGroup& group, cudaStream_t stream) { check(group.check(stream)); }
#ifdef PREFILLSHARE_WITH_NCCL
inline void check_group(const NcclGroup& group, cudaStream_t) { check(group.check()); }
#endif

struct Rows {
  nlohmann::json rows = nlohmann::json::array();
  std::function<void()> added;
  void add(const char* part, nlohmann::json row) {
    row["part"] = part;
    std::printf("%s\n", row.dump().c_str());
    std::fflush(stdout);
    rows.push_back(std::move(row));
    if (added) added();
  }
};

}  // namespace codegemm::bench::multi
