// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/base.cuh - the frozen base of a fine-tuning on the GPU: keys and values of the
// shared part of many prompts at once.
// Layer: train/cuda (host, needs nvcc and cuBLAS).
// See: PrefillShare (arXiv 2602.12029) section 3.2.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <prefillshare/train/cuda/cache_forward.cuh>

namespace prefillshare::cuda {

/// Runs prompts through frozen weights and keeps their KV. One thread, one stream. S: TrainStorage.
template <TrainStorage S>
class DeviceFrozenBase {
 public:
  /// For sequences of up to max_tokens tokens, computed in passes of up to pass_tokens. kInvalidArgument for
  /// numbers below 1; kOutOfMemory, kCudaError.
  [[nodiscard]] static Result<DeviceFrozenBase> create(std::shared_ptr<const DeviceFrozenWeights<S>> weights,
                                                       std::int64_t max_tokens, std::int64_t pass_tokens,
                                                       const Device& device, cudaStream_t stream) {
    if (weights == nullptr) return codegemm::error(StatusCode::kNullPointer, "DeviceFrozenBase: no weights");
    if (max_tokens < 1 || pass_tokens < 1) {
      return codegemm::error(StatusCode::kInvalidArgument, "DeviceFrozenBase for ", max_tokens, " tokens, ",
                             pass_tokens, " a pass");
    }
    Result<detail::CacheForward<S>> forward = detail::CacheForward<S>::create(
        weights->config(), std::max(max_tokens, pass_tokens), max_tokens, 0, device, stream);
    if (!forward.ok()) return forward.status().with_prefix("DeviceFrozenBase");
    return DeviceFrozenBase(std::move(weights), *std::move(forward));
  }

  [[nodiscard]] const ModelConfig& config() const noexcept { return weights_->config(); }  ///< of the base

  /// As DeviceTrainer's.
  void use_graphs(bool on) noexcept { forward_.use_graphs(on); }

  /// The KV of all sequences, one after the other in rows, until the next call. kInvalidArgument for a
  /// sequence longer than a pass or a token outside of the vocabulary; kOutOfMemory, kCudaError.
  [[nodiscard]] Result<DevicePrefixView<S>> run(std::span<const std::span<const std::int32_t>> sequences) {
    std::int64_t rows = 0;
    for (const std::span<const std::int32_t> s : sequences) rows += std::ssize(s);
    if (rows == 0) return DevicePrefixView<S>();
    const Result<detail::CacheTarget<S>> cache = forward_.reserve(cache_, rows);
    if (!cache.ok()) return cache.status().with_prefix("DeviceFrozenBase");
    std::int32_t row = 0;
    pieces_.clear();
    for (const std::span<const std::int32_t> s : sequences) {
      pieces_.push_back({s, 0, row});
      row += static_cast<std::int32_t>(s.size());
    }
    if (Status s = forward_.run_in_passes(weights_->view(), pieces_, *cache); !s.ok()) return s;
    return DevicePrefixView<S>{cache->data, cache->rows};
  }

 private:
  DeviceFrozenBase(std::shared_ptr<const DeviceFrozenWeights<S>> weights, detail::CacheForward<S> forward)
      : weights_(std::move(weights)), forward_(std::move(forward)) {}

  std::shared_ptr<const DeviceFrozenWeights<S>> weights_;
  detail::CacheForward<S> forward_;
  std::vector<detail::CachedPiece> pieces_;
  DeviceArray<S> cache_;
};

}  // namespace prefillshare::cuda
