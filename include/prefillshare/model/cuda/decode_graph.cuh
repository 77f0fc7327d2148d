// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/decode_graph.cuh - one step of a batch of decoding sequences as one CUDA graph:
// token ids in, token ids out.
// Layer: model/cuda (host, needs nvcc).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include <cuda_runtime.h>

#include <prefillshare/kv/page_table.hpp>
#include <prefillshare/model/cuda/forward.cuh>
#include <prefillshare/model/cuda/sampling.cuh>
#include <prefillshare/model/cuda/staged_input.cuh>

namespace prefillshare::cuda {

/// What a step reads besides what the step before it left.
struct DecodeStep {
  /// The sequences' pages, each with room for and counting the new token. At most max_pages in all.
  const PageTable* table = nullptr;
  std::span<const std::int32_t> tokens;        ///< [sequences], or empty: those that the last step chose
  std::span<const std::int32_t> group_indptr;  ///< [groups + 1] as SharedPrefixes has it, or empty
  std::span<const std::int32_t> shared_pages;  ///< [groups]
  std::span<const float> temperatures;         ///< [sequences], or empty: the largest logit
  std::span<const std::uint64_t> seeds;        ///< [sequences], with temperatures
};

/// A captured step: embedding, all layers, head and sampling of a fixed number of sequences. Model, cache and
/// workspace stay where they are for as long as it lives. Not copied or moved: the graph knows its buffers.
/// One thread uses it at a time.
template <class Linear, class Head>
class DecodeGraph {
 public:
  using T = typename Linear::Scalar;  ///< of activations

  /// Captures a step of `sequences` sequences with up to `max_pages` pages in all. `share`: sequences may
  /// share prefixes. few_keys: steps in which no sequence has more keys go through a second graph, with
  /// DeviceBatch::few_keys, if that is another one. C: as forward() has it. The stream must not be the
  /// default one, and holds no work of another thread. Errors as forward(), kOutOfMemory, kCudaError.
  template <class C>
  [[nodiscard]] static Result<std::unique_ptr<DecodeGraph>> capture(
      const DeviceLlama<Linear, Head>& model, const DeviceKvStorage<C>& storage,
      DeviceWorkspace<T>& workspace, int sequences, std::int64_t max_pages, bool share, const Device& device,
      cudaStream_t stream, std::int64_t few_keys = kFewKeys) {
    if (sequences < 1 || max_pages < sequences || max_pages > (std::int64_t{1} << 30)) {
      return codegemm::error(StatusCode::kInvalidArgument, "DecodeGraph of ", sequences, " sequences in ",
                             max_pages, " pages");
    }
    std::unique_ptr<DecodeGraph> out(new DecodeGraph(sequences, max_pages, share, stream));
    if (Status s = out->allocate(); !s.ok()) return s;
    out->few_pages_ = few_keys / storage.shape().block_tokens;
    for (const bool few : {false, true}) {
      if (Status s = out->record(model, storage, workspace, device, few); !s.ok()) return s;
    }
    return out;
  }
  DecodeGraph(const DecodeGraph&) = delete;
  DecodeGraph& operator=(const DecodeGraph&) = delete;
  ~DecodeGraph() {
    static_cast<void>(cudaStreamSynchronize(stream_));  // it may still read and write the buffers
    for (cudaGraphExec_t one : exec_) {
      if (one != nullptr) cudaGraphExecDestroy(one);
    }
    cudaFreeHost(chosen_);
  }

  /// Puts a step into the stream and returns. kInvalidArgument, kShapeMismatch for input of another size than
  /// was captured (nothing is launched then), kNullPointer, kCudaError.
  [[nodiscard]] Status launch(const DecodeStep& step) {
    if (Status s = check(step); !s.ok()) return s;
    if (Status s = input_.begin(); !s.ok()) return s;
    const PageTable& table = *step.table;
    const auto n = static_cast<std::size_t>(sequences_);
    using Ints = std::span<const std::int32_t>;
    input_.write(at_.tokens, step.tokens);
    input_.write(at_.indptr, Ints(table.indptr));
    input_.write(at_.last_page_len, Ints(table.last_page_len));
    input_.write(at_.indices, Ints(table.indices));
    if (share_) {
      // Groups that are not there are empty.
      std::int32_t end = 0;
      for (std::size_t g = 0; g <= n; ++g) {
        if (g < step.group_indptr.size()) end = step.group_indptr[g];
        input_.write(at_.group_indptr + g * sizeof(end), Ints(&end, 1));
      }
      input_.clear(at_.shared_pages, n * sizeof(std::int32_t));
      input_.write(at_.shared_pages, step.shared_pages);
    }
    input_.clear(at_.temperatures, n * sizeof(float));
    input_.write(at_.temperatures, step.temperatures);
    input_.write(at_.seeds, step.seeds);
    for (std::size_t i = 0; i < n; ++i) {
      input_.write(at_.steps + i * sizeof(steps_), std::span<const std::uint64_t>(&steps_, 1));
    }
    ++steps_;
    // Tokens lie first, so that they can be left out, and pages last.
    const std::size_t first = step.tokens.empty() ? at_.indptr : at_.tokens;
    const std::size_t last = at_.indices + table.indices.size() * sizeof(std::int32_t);
    if (Status s = input_.send(first, last, stream_); !s.ok()) return s;
    bool few = exec_[1] != nullptr;
    for (std::size_t i = 0; i < n; ++i) few = few && table.indptr[i + 1] - table.indptr[i] <= few_pages_;
    return cuda_ok(cudaGraphLaunch(exec_[few ? 1 : 0], stream_), "cudaGraphLaunch");
  }

  /// Waits for the steps that were launched: the tokens that the last one chose, [sequences], until the next
  /// launch(). kCudaError.
  [[nodiscard]] Result<std::span<const std::int32_t>> wait() {
    if (Status s = cuda_ok(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); !s.ok()) return s;
    return std::span<const std::int32_t>(chosen_, static_cast<std::size_t>(sequences_));
  }

  [[nodiscard]] int sequences() const noexcept { return sequences_; }  ///< of the batch

 private:
  // Where what lies in the input.
  struct Places {
    std::size_t tokens = 0;
    std::size_t indptr = 0;
    std::size_t last_page_len = 0;
    std::size_t group_indptr = 0;
    std::size_t shared_pages = 0;
    std::size_t temperatures = 0;
    std::size_t seeds = 0;
    std::size_t steps = 0;
    std::size_t indices = 0;
  };

  DecodeGraph(int sequences, std::int64_t max_pages, bool share, cudaStream_t stream)
      : stream_(stream), max_pages_(max_pages), sequences_(sequences), share_(share) {
    const auto n = static_cast<std::size_t>(sequences);
    at_.tokens = input_.place<std::int32_t>(n);
    at_.indptr = input_.place<std::int32_t>(n + 1);
    at_.last_page_len = input_.place<std::int32_t>(n);
    at_.group_indptr = input_.place<std::int32_t>(n + 1);
    at_.shared_pages = input_.place<std::int32_t>(n);
    at_.temperatures = input_.place<float>(n);
    at_.seeds = input_.place<std::uint64_t>(n);
    at_.steps = input_.place<std::uint64_t>(n);
    at_.indices = input_.place<std::int32_t>(static_cast<std::size_t>(max_pages));
  }

  [[nodiscard]] static Status cuda_ok(cudaError_t code, const char* what) {
    if (code != cudaSuccess) static_cast<void>(cudaGetLastError());
    return codegemm::cuda::cuda_status(code, what);
  }
  [[nodiscard]] Status allocate() {
    if (Status s = input_.allocate(); !s.ok()) return s;
    auto best = DeviceArray<std::uint64_t>::zeros(static_cast<std::size_t>(sequences_));
    if (!best.ok()) return best.status();
    best_ = std::move(best).value();
    auto arrived = DeviceArray<unsigned>::zeros(static_cast<std::size_t>(sequences_));
    if (!arrived.ok()) return arrived.status();
    arrived_ = std::move(arrived).value();
    void* chosen = nullptr;
    if (Status s =
            cuda_ok(cudaMallocHost(&chosen, static_cast<std::size_t>(sequences_) * sizeof(std::int32_t)),
                    "cudaMallocHost");
        !s.ok()) {
      return s;
    }
    chosen_ = static_cast<std::int32_t*>(chosen);
    return {};
  }

  // The graph for any number of keys, or the one for few, if that is another one.
  template <class C>
  [[nodiscard]] Status record(const DeviceLlama<Linear, Head>& model, const DeviceKvStorage<C>& storage,
                              DeviceWorkspace<T>& workspace, const Device& device, bool few) {
    DeviceBatch batch;
    auto* const tokens = input_.device<std::int32_t>(at_.tokens);
    batch.tokens = tokens;
    batch.count = sequences_;
    batch.table = {input_.device<std::int32_t>(at_.indptr), input_.device<std::int32_t>(at_.indices),
                   input_.device<std::int32_t>(at_.last_page_len), sequences_};
    if (share_) {
      batch.prefixes = {input_.device<std::int32_t>(at_.group_indptr),
                        input_.device<std::int32_t>(at_.shared_pages), sequences_};
    }
    batch.few_keys = few;
    if (few &&
        !detail::DeviceForward<Linear, Head, C>(model, batch, storage, workspace, device, stream_).at_once())
      return {};
    DeviceSampling how;
    how.temperatures = input_.device<float>(at_.temperatures);
    how.seeds = input_.device<std::uint64_t>(at_.seeds);
    how.steps = input_.device<std::uint64_t>(at_.steps);
    how.best = best_.data();
    how.arrived = arrived_.data();
    how.copy = chosen_;
    const MatrixView<float> logits(workspace.logits.data(), sequences_, model.config.vocab_size);

    if (Status s = cuda_ok(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal),
                           "cudaStreamBeginCapture");
        !s.ok()) {
      return s;
    }
    Status status = forward(model, batch, storage, logits, workspace, device, stream_);
    if (status.ok()) status = sample(logits, how, tokens, device, stream_);
    cudaGraph_t graph = nullptr;
    const Status ended = cuda_ok(cudaStreamEndCapture(stream_, &graph), "cudaStreamEndCapture");
    if (status.ok()) status = ended;
    if (status.ok()) {
      static_cast<void>(
          status = cuda_ok(cudaGraphInstantiate(&exec_[few ? 1 : 0], graph, 0), "cudaGraphInstantiate"));
    }
    // So that the first launch makes nothing: other GPUs may wait for it.
    if (status.ok()) status = cuda_ok(cudaGraphUpload(exec_[few ? 1 : 0], stream_), "cudaGraphUpload");
    if (graph != nullptr) cudaGraphDestroy(graph);
    return status;
  }

  [[nodiscard]] Status check(const DecodeStep& step) const {
    if (step.table == nullptr) return codegemm::error(StatusCode::kNullPointer, "DecodeGraph: no page table");
    const auto n = static_cast<std::size_t>(sequences_);
    const auto wrong = [&](const char* name, std::size_t size) {
      return codegemm::error(StatusCode::kShapeMismatch, "DecodeGraph of ", sequences_, " sequences: ", name,
                             " has ", size, " elements");
    };
    if (step.table->indptr.size() != n + 1) return wrong("indptr", step.table->indptr.size());
    if (step.table->last_page_len.size() != n)
      return wrong("last_page_len", step.table->last_page_len.size());
    if (!step.tokens.empty() && step.tokens.size() != n) return wrong("tokens", step.tokens.size());
    if (!step.temperatures.empty() && step.temperatures.size() != n)
      return wrong("temperatures", step.temperatures.size());
    if (step.seeds.size() != step.temperatures.size()) return wrong("seeds", step.seeds.size());
    if (std::ssize(step.table->indices) > max_pages_) {
      return codegemm::error(StatusCode::kInvalidArgument, "DecodeGraph for ", max_pages_,
                             " pages: a table of ", step.table->indices.size());
    }
    if (step.group_indptr.empty()) return {};
    if (!share_)
      return codegemm::error(StatusCode::kInvalidArgument, "DecodeGraph was captured without prefixes");
    if (step.group_indptr.size() > n + 1) return wrong("group_indptr", step.group_indptr.size());
    if (step.shared_pages.size() + 1 != step.group_indptr.size())
      return wrong("shared_pages", step.shared_pages.size());
    return {};
  }

  cudaStream_t stream_ = nullptr;
  std::int64_t max_pages_ = 0;
  int sequences_ = 0;
  bool share_ = false;
  Places at_;
  std::uint64_t steps_ = 0;         // launched so far: the counter of the draws
  std::int32_t* chosen_ = nullptr;  // page-locked, what the last step chose
  std::int64_t few_pages_ = 0;      // that a sequence may have for the second graph
  cudaGraphExec_t exec_[2] = {};    // for any number of keys, and for few of them or null
  StagedInput input_;
  DeviceArray<std::uint64_t> best_;
  DeviceArray<unsigned> arrived_;
};

}  // namespace prefillshare::cuda
