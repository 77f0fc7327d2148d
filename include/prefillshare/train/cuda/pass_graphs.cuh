// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/pass_graphs.cuh - passes as CUDA graphs: the hundreds of launches of a pass as
// one, as soon as a pass of the same padded sizes comes again.
// Layer: train/cuda (host, needs nvcc).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <prefillshare/train/cuda/train_stream.cuh>

namespace prefillshare::cuda::detail {

/// What a size is rounded up to a multiple of, so that few sizes are left: at most an eighth of it, or
/// `least`.
[[nodiscard]] constexpr std::int64_t padding_step(std::int64_t size, std::int64_t least) {
  std::int64_t step = least;
  while (step * 16 <= size) step *= 2;
  return step;
}
[[nodiscard]] constexpr std::int64_t padded_size(std::int64_t size, std::int64_t least) {
  const std::int64_t step = padding_step(size, least);
  return (size + step - 1) / step * step;
}

/// Graphs by all that their launches depend on. What lies behind the pointers of a pass may change from one
/// replay to the next; the pointers may not.
class PassGraphs {
 public:
  using Key = std::vector<std::uintptr_t>;

  PassGraphs() = default;
  PassGraphs(PassGraphs&&) = default;
  PassGraphs& operator=(PassGraphs&&) = default;

  /// Off: passes are launched one by one.
  void enable(bool on) noexcept { enabled_ = on; }

  /// body() puts a pass into the stream of `ts`: as it is when its key is new, then captured, then replayed.
  template <class Body>
  void run(TrainStream& ts, const Key& key, Body&& body) {
    if (!ts.ok()) return;
    if (!enabled_) return body();
    const auto found = graphs_.find(key);
    if (found == graphs_.end()) {
      if (graphs_.size() >= kMost) {
        ts.synchronize();
        graphs_.clear();
      }
      graphs_.emplace(key, nullptr);
      body();
      return;
    }
    if (found->second == nullptr) {
      ts.check(cudaStreamBeginCapture(ts.stream(), cudaStreamCaptureModeThreadLocal),
               "cudaStreamBeginCapture");
      if (!ts.ok()) return;
      body();
      cudaGraph_t graph = nullptr;
      const cudaError_t ended = cudaStreamEndCapture(ts.stream(), &graph);
      ts.check(ended, "cudaStreamEndCapture");
      cudaGraphExec_t exec = nullptr;
      if (ts.ok()) ts.check(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
      if (graph != nullptr) cudaGraphDestroy(graph);
      found->second.reset(exec);
    }
    if (ts.ok()) ts.check(cudaGraphLaunch(found->second.get(), ts.stream()), "cudaGraphLaunch");
  }

 private:
  static constexpr std::size_t kMost = 64;
  struct Destroy {
    void operator()(cudaGraphExec_t exec) const { cudaGraphExecDestroy(exec); }
  };
  std::map<Key, std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, Destroy>> graphs_;
  bool enabled_ = true;
};

}  // namespace prefillshare::cuda::detail
