// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/modules.cuh - a model factorized into a frozen prefill module and decode modules,
// on the GPU.
// Layer: model/cuda (host, needs nvcc).
// See: PrefillShare (arXiv 2602.12029) section 3, equations 5 and 6; prefillshare/model/modules.hpp
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include <cuda_runtime.h>

#include <prefillshare/kv/allocator.hpp>
#include <prefillshare/model/cuda/decode_graph.cuh>
#include <prefillshare/model/cuda/forward.cuh>
#include <prefillshare/model/cuda/prefill_batch.cuh>

namespace prefillshare::cuda {

/// The allocator over pages in device memory. T: as DeviceKvStorage has it.
template <class T>
using DeviceKvAllocator = BasicKvAllocator<DeviceKvStorage<T>>;

/// The frozen half: turns a context into the base cache and nothing else (equation 5).
template <class Linear, class Head>
class DevicePrefillModule {
 public:
  using T = typename Linear::Scalar;  ///< of activations

  /// `key` names the model, its version and the tenant: caches are shared under equal keys only.
  DevicePrefillModule(std::shared_ptr<const DeviceLlama<Linear, Head>> model, CacheKey key)
      : model_(std::move(model)), key_(std::move(key)) {}

  [[nodiscard]] const DeviceLlama<Linear, Head>& model() const noexcept { return *model_; }  ///< frozen
  [[nodiscard]] const ModelConfig& config() const noexcept { return model_->config; }        ///< of the model
  [[nodiscard]] const CacheKey& key() const noexcept { return key_; }  ///< of its caches

  /// Puts one pass over the next tokens of several base sequences into the stream and commits them: caches[i]
  /// is extended by chunks[i], for which it has blocks reserved. C, after_layer: see forward(). Errors: those
  /// of PrefillBatch::send() and forward(); then nothing is committed.
  template <class C, class AfterLayer = IgnoreLayers>
  [[nodiscard]] Status prefill_chunks(std::span<const std::span<const std::int32_t>> chunks,
                                      std::span<Sequence* const> caches, DeviceKvAllocator<C>& allocator,
                                      const DeviceKvStorage<C>& storage, PrefillBatch& batch,
                                      DeviceWorkspace<T>& workspace, const Device& device,
                                      cudaStream_t stream, AfterLayer&& after_layer = {}) const {
    const std::span<const Sequence* const> tables(caches.data(), caches.size());
    const auto sent = batch.send(chunks, tables, config().vocab_size, stream);
    if (!sent.ok()) return sent.status();
    if (Status s = forward(*model_, *sent, storage, MatrixView<float>(), workspace, device, stream,
                           std::forward<AfterLayer>(after_layer));
        !s.ok()) {
      return s;
    }
    for (std::size_t i = 0; i < caches.size(); ++i) {
      if (Status s = allocator.commit(*caches[i], chunks[i]); !s.ok()) return s;
    }
    return {};
  }

  /// Extends `cache` by `tokens`: reserves blocks, puts the passes that compute their KV into the stream, in
  /// chunks of the batch's size, and commits each. The KV stands when the stream gets there: whatever reads
  /// it is put into the same stream, or waits for it. C, after_layer: see forward(). Errors: kInvalidArgument
  /// past the model's context length, kExhausted when no block can be had, those of PrefillBatch::send() and
  /// forward().
  template <class C, class AfterLayer = IgnoreLayers>
  [[nodiscard]] Status prefill(std::span<const std::int32_t> tokens, DeviceKvAllocator<C>& allocator,
                               const DeviceKvStorage<C>& storage, Sequence& cache, PrefillBatch& batch,
                               DeviceWorkspace<T>& workspace, const Device& device, cudaStream_t stream,
                               AfterLayer&& after_layer = {}) const {
    const auto total = std::ssize(tokens);
    if (cache.length() + total > config().context_length) {
      return codegemm::error(StatusCode::kInvalidArgument, "context of ", cache.length() + total,
                             " tokens, the model's context length is ", config().context_length);
    }
    if (Status s = allocator.reserve(cache, total); !s.ok()) return s;
    const std::int64_t most = std::min(batch.max_tokens(), workspace.max_tokens());
    for (std::int64_t done = 0; done < total;) {
      const std::int64_t count = std::min(most, total - done);
      const auto chunk = tokens.subspan(static_cast<std::size_t>(done), static_cast<std::size_t>(count));
      const Sequence* const one = &cache;
      const auto sent = batch.send(std::span(&chunk, 1), std::span(&one, 1), config().vocab_size, stream);
      if (!sent.ok()) return sent.status();
      if (Status s =
              forward(*model_, *sent, storage, MatrixView<float>(), workspace, device, stream, after_layer);
          !s.ok()) {
        return s;
      }
      if (Status s = allocator.commit(cache, chunk); !s.ok()) return s;
      done += count;
    }
    return {};
  }

 private:
  std::shared_ptr<const DeviceLlama<Linear, Head>> model_;
  CacheKey key_;
};

/// The task's half: generates tokens from a base cache that it only reads (equation 6), in forks of it. Steps
/// are run by a DecodeGraph of its model, or by forward() of this header's kin.
template <class Linear, class Head>
class DeviceDecodeModule {
 public:
  [[nodiscard]] const DeviceLlama<Linear, Head>& model() const noexcept {
    return *model_;
  }                                                                                    ///< what generates
  [[nodiscard]] const ModelConfig& config() const noexcept { return model_->config; }  ///< of the model

 private:
  explicit DeviceDecodeModule(std::shared_ptr<const DeviceLlama<Linear, Head>> model)
      : model_(std::move(model)) {}

  template <class L, class H>
  friend Result<DeviceDecodeModule<L, H>> factorize(const ModelConfig&,
                                                    std::shared_ptr<const DeviceLlama<L, H>>);

  std::shared_ptr<const DeviceLlama<Linear, Head>> model_;
};

/// Makes `decode` a decode module of a base of that config: the only way to get one, so that no module ever
/// reads a cache that it does not fit. kNullPointer; kIncompatible naming all that differs, or what
/// validate() finds.
template <class Linear, class Head>
[[nodiscard]] Result<DeviceDecodeModule<Linear, Head>> factorize(
    const ModelConfig& base, std::shared_ptr<const DeviceLlama<Linear, Head>> decode) {
  if (decode == nullptr) return codegemm::error(StatusCode::kNullPointer, "factorize: no decode model");
  if (Status s = validate(*decode); !s.ok()) return s;
  if (Status s = check_compatible(base, decode->config); !s.ok()) return s;
  return DeviceDecodeModule<Linear, Head>(std::move(decode));
}

}  // namespace prefillshare::cuda
