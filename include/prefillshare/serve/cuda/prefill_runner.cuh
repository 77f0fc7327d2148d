// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/cuda/prefill_runner.cuh - a prefill module on a GPU, for a prefill worker.
// Layer: serve (host, needs nvcc).
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>

#include <cuda_runtime.h>

#include <prefillshare/model/cuda/modules.cuh>
#include <prefillshare/serve/prefill_worker.hpp>

namespace prefillshare::cuda {

/// A stream, what its kernels may count on, and the memory of its passes: all of it the caller's, and
/// outlives the workers.
template <class T>
struct DevicePlace {
  Device device;                            ///< the card, or a CardPart of it
  cudaStream_t stream = nullptr;            ///< not the default one
  DeviceWorkspace<T>* workspace = nullptr;  ///< for the largest pass there; no other place's at the same time
};

/// Where a GPU's workers put their work, and the memory that they share: all of it the caller's, used by one
/// worker at a time, in one stream (others: DevicePlace). It outlives the workers.
template <class T>
struct DeviceResources {
  Device device;                              ///< the card
  cudaStream_t stream = nullptr;              ///< not the default one; the storage's too
  DeviceKvAllocator<T>* allocator = nullptr;  ///< of all caches
  DeviceKvStorage<T>* storage = nullptr;      ///< the allocator's blocks lie here
  DeviceWorkspace<T>* workspace = nullptr;    ///< for the largest pass of any of the models
};

namespace detail {

/// Puts one stream's work behind another's. A copy has an event of its own.
class StreamOrder {
 public:
  StreamOrder() = default;
  StreamOrder(const StreamOrder&) {}
  StreamOrder& operator=(const StreamOrder&) { return *this; }
  ~StreamOrder() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }

  /// What is put into `later` from now on waits for what is in `earlier` now.
  [[nodiscard]] Status behind(cudaStream_t earlier, cudaStream_t later) {
    using codegemm::cuda::cuda_status;
    if (earlier == later) return {};
    if (event_ == nullptr) {
      if (Status s =
              cuda_status(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreate");
          !s.ok()) {
        return s;
      }
    }
    if (Status s = cuda_status(cudaEventRecord(event_, earlier), "cudaEventRecord"); !s.ok()) return s;
    return cuda_status(cudaStreamWaitEvent(later, event_, 0), "cudaStreamWaitEvent");
  }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace detail

/// Runs a prefill module's chunks in a stream; see PrefillRunner. Nothing waits for the GPU, but for the
/// batch's input to have left the host when the next one is written.
///
/// The stream may be another one than the storage's, in which decoding runs: chunks then wait for the copies
/// of blocks that were put into the storage's stream before, and that stream waits for a chunk which has
/// given a block back (one that the tree has already). A result's cache is to be kept until the chunk that
/// completed it has run (an event behind it), and is decoded from after that.
template <class Linear, class Head>
class DevicePrefill {
 public:
  using T = typename Linear::Scalar;       ///< of the cache
  using Allocator = DeviceKvAllocator<T>;  ///< of pages in device memory

  /// Module and batch are the caller's too, and outlive it. The batch bounds a step's tokens and sequences.
  DevicePrefill(const DevicePrefillModule<Linear, Head>& module, const DeviceResources<T>& resources,
                PrefillBatch& batch, std::int64_t max_context)
      : module_(&module), on_(resources), batch_(&batch), max_context_(max_context) {}

  [[nodiscard]] Allocator& allocator() const noexcept { return *on_.allocator; }  ///< as given
  [[nodiscard]] const CacheKey& key() const noexcept { return module_->key(); }   ///< the module's
  [[nodiscard]] std::int64_t vocab_size() const noexcept { return module_->config().vocab_size; }  ///< of it
  [[nodiscard]] int layers() const noexcept { return on_.storage->shape().layers; }  ///< of the model
  /// Of a step.
  [[nodiscard]] std::int64_t max_tokens() const noexcept {
    return std::min(batch_->max_tokens(), on_.workspace->max_tokens());
  }
  /// Of a cache: the model's and as asked for.
  [[nodiscard]] std::int64_t max_context() const noexcept {
    return std::min(module_->config().context_length, max_context_);
  }
  /// As PrefillRunner says: the batch has its memory.
  [[nodiscard]] bool reserve(std::int64_t caches) const { return caches <= batch_->max_sequences(); }
  /// The same. Errors: as DevicePrefillModule::prefill_chunks().
  template <class AfterLayer>
  [[nodiscard]] Status run(std::span<const std::span<const std::int32_t>> chunks,
                           std::span<Sequence* const> caches, AfterLayer&& after_layer) {
    if (Status s = order_.behind(on_.storage->stream(), on_.stream); !s.ok()) return s;
    const auto merged = on_.allocator->stats().merged_blocks;
    if (Status s =
            module_->prefill_chunks(chunks, caches, *on_.allocator, *on_.storage, *batch_, *on_.workspace,
                                    on_.device, on_.stream, std::forward<AfterLayer>(after_layer));
        !s.ok()) {
      return s;
    }
    // Those blocks are written by this chunk, and may be an answer's next.
    if (on_.allocator->stats().merged_blocks == merged) return {};
    return order_.behind(on_.stream, on_.storage->stream());
  }

  /// Chunks run there from now on, behind what is in the stream that they have run in. Workers that share a
  /// workspace move together. kCudaError.
  [[nodiscard]] Status move_to(const DevicePlace<T>& place) {
    if (Status s = order_.behind(on_.stream, place.stream); !s.ok()) return s;
    on_.device = place.device;
    on_.stream = place.stream;
    on_.workspace = place.workspace;
    return {};
  }

 private:
  const DevicePrefillModule<Linear, Head>* module_;
  DeviceResources<T> on_;
  PrefillBatch* batch_;
  std::int64_t max_context_;
  detail::StreamOrder order_;
};

/// A prefill worker on a GPU.
template <class Linear, class Head>
using DevicePrefillWorker = BasicPrefillWorker<DevicePrefill<Linear, Head>>;

}  // namespace prefillshare::cuda
