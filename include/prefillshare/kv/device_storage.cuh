// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/device_storage.cuh - KV pages in device memory.
// Layer: kv (host, needs nvcc).
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <codegemm/base/status.hpp>
#include <codegemm/cuda/device_array.cuh>
#include <prefillshare/kv/block_pool.hpp>
#include <prefillshare/kv/shape.hpp>
#include <prefillshare/kv/storage.hpp>
#include <prefillshare/kv/try_allocate.hpp>

namespace prefillshare::cuda {

/// The pages of all layers, [layer][block][2: K, V][block_tokens][kv_heads][head_dim], on the device that was
/// current at create(). T: __half, __nv_bfloat16 or Fp8E4M3, which has a scale for K and one for V in each
/// layer. Copies are put into one stream: kernels that read or write the pages run in it, or wait for it.
template <class T>
class DeviceKvStorage {
 public:
  /// kInvalidArgument for a shape or count that cannot be; kOutOfMemory with the bytes; kCudaError.
  [[nodiscard]] static codegemm::Result<DeviceKvStorage> create(const KvShape& shape, std::int64_t blocks,
                                                                cudaStream_t stream) {
    if (codegemm::Status status = validate(shape); !status.ok()) return status;
    const std::int64_t per_block = shape.bytes_per_block(sizeof(T));
    if (blocks < 1 || blocks >= std::numeric_limits<BlockId>::max() ||
        blocks > std::numeric_limits<std::int64_t>::max() / per_block) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "DeviceKvStorage: ", blocks,
                             " blocks of ", per_block, " bytes");
    }
    auto data =
        codegemm::cuda::DeviceArray<T>::create(static_cast<std::size_t>(blocks * per_block) / sizeof(T));
    if (!data.ok()) return data.status().with_prefix("DeviceKvStorage");
    DeviceKvStorage out;
    const bool allocated = prefillshare::detail::try_allocate(
        [&] { out.scales_.resize(static_cast<std::size_t>(shape.layers)); });
    if (!allocated) return codegemm::error(codegemm::StatusCode::kOutOfMemory, "DeviceKvStorage: no memory");
    out.shape_ = shape;
    out.blocks_ = blocks;
    out.stream_ = stream;
    out.data_ = std::move(data).value();
    return out;
  }

  [[nodiscard]] const KvShape& shape() const noexcept { return shape_; }  ///< as given
  [[nodiscard]] std::int64_t blocks() const noexcept { return blocks_; }  ///< as given
  /// All layers of a block, K and V.
  [[nodiscard]] std::int64_t bytes_per_block() const noexcept { return shape_.bytes_per_block(sizeof(T)); }
  [[nodiscard]] cudaStream_t stream() const noexcept { return stream_; }  ///< where copies are put

  /// The pages of one layer, device memory.
  [[nodiscard]] T* layer(int index) const noexcept {
    return data_.data() + index * blocks_ * page_elements();
  }
  /// What K and V of a layer were divided by when they were written: 1 unless set.
  struct Scales {
    float k = 1.0F;  ///< of K
    float v = 1.0F;  ///< of V
  };
  /// Of one layer.
  [[nodiscard]] Scales scales(int index) const noexcept { return scales_[static_cast<std::size_t>(index)]; }
  /// For fp8, before anything is written and before a pass is captured: their largest magnitudes over 448.
  /// kInvalidArgument unless both are positive and finite.
  [[nodiscard]] codegemm::Status set_scales(int index, Scales scales) {
    const auto good = [](float x) { return x > 0.0F && x <= std::numeric_limits<float>::max(); };
    if (index < 0 || index >= shape_.layers || !good(scales.k) || !good(scales.v)) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "DeviceKvStorage: scales ", scales.k,
                             " and ", scales.v, " of layer ", index);
    }
    scales_[static_cast<std::size_t>(index)] = scales;
    return {};
  }

  /// K and V of a page: 2 * block_tokens * kv_heads * head_dim.
  [[nodiscard]] std::int64_t page_elements() const noexcept {
    return std::int64_t{2} * shape_.block_tokens * shape_.kv_heads * shape_.head_dim;
  }

  /// Puts a copy of the first `tokens` slots of `source` over those of `destination`, K and V, every layer,
  /// into the stream. kInvalidArgument, kCudaError.
  [[nodiscard]] codegemm::Status copy_block(BlockId destination, BlockId source, int tokens) {
    if (destination < 0 || destination >= blocks_ || source < 0 || source >= blocks_ || tokens < 0 ||
        tokens > shape_.block_tokens) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "DeviceKvStorage: copy of ", tokens,
                             " tokens from block ", source, " to block ", destination, "; there are ",
                             blocks_, " blocks of ", shape_.block_tokens, " tokens");
    }
    if (destination == source || tokens == 0) return {};
    const std::int64_t half = page_elements() / 2;
    const auto bytes = static_cast<std::size_t>(half / shape_.block_tokens * tokens) * sizeof(T);
    for (int index = 0; index < shape_.layers; ++index) {
      T* const to = layer(index) + destination * page_elements();
      const T* const from = layer(index) + source * page_elements();
      // K and V of a page as the two rows of a matrix.
      const auto pitch = static_cast<std::size_t>(half) * sizeof(T);
      if (codegemm::Status s = codegemm::cuda::cuda_status(
              cudaMemcpy2DAsync(to, pitch, from, pitch, bytes, 2, cudaMemcpyDeviceToDevice, stream_),
              "cudaMemcpy2DAsync");
          !s.ok()) {
        return s;
      }
    }
    return {};
  }

 private:
  DeviceKvStorage() = default;

  KvShape shape_;
  std::int64_t blocks_ = 0;
  cudaStream_t stream_ = nullptr;
  codegemm::cuda::DeviceArray<T> data_;
  std::vector<Scales> scales_;  // of the layers
};

}  // namespace prefillshare::cuda
