// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/model/forward_rig.cuh - what the tests of the forward pass on the GPU work with.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include <prefillshare/model/cuda/modules.cuh>
#include <prefillshare/model/cuda/upload.cuh>

#include "../gpu_model.cuh"

namespace prefillshare::test {

/// A dense model on the device.
template <class T>
[[nodiscard]] auto upload_dense(const LlamaModel<DenseLinear>& model) {
  const auto cublas = take(cuda::Cublas::create());
  const cuda::DenseUploader<T> uploader(cublas);
  return take(cuda::upload(model, uploader, uploader));
}

/// A cache of elements C with its allocator, a workspace of a model of type T, and the input of a prefill.
template <class T, class C = T>
struct ForwardRig {
  Stream stream;
  cuda::Device device;
  cuda::DeviceKvStorage<C> storage;
  std::unique_ptr<cuda::DeviceKvAllocator<C>> allocator;
  cuda::DeviceWorkspace<T> workspace;
  cuda::PrefillBatch input;

  template <class Linear, class Head>
  ForwardRig(const cuda::DeviceLlama<Linear, Head>& model, const cuda::Device& device_,
             std::int64_t max_tokens, std::int64_t blocks = 64)
      : device(device_),
        storage(take(cuda::DeviceKvStorage<C>::create(kv_shape(model.config), blocks, stream.get))),
        allocator(take(cuda::DeviceKvAllocator<C>::create(storage))),
        workspace(take(cuda::DeviceWorkspace<T>::create(model, max_tokens,
                                                        std::min<std::int64_t>(max_tokens, 8), device))),
        input(take(cuda::PrefillBatch::create(max_tokens, 8, blocks))) {
    // What no pass has written is NaN.
    REQUIRE_CUDA(cudaMemsetAsync(storage.layer(0), 0xFF,
                                 static_cast<std::size_t>(blocks * storage.bytes_per_block()), stream.get));
  }
  /// What a pass has written, once it has ended: [rows][vocab].
  [[nodiscard]] std::vector<float> logits(std::int64_t rows, std::int64_t vocab) const {
    std::vector<float> out(static_cast<std::size_t>(rows * vocab));
    REQUIRE_CUDA(cudaStreamSynchronize(stream.get));
    REQUIRE_CUDA(
        cudaMemcpy(out.data(), workspace.logits.data(), out.size() * sizeof(float), cudaMemcpyDeviceToHost));
    return out;
  }
};

}  // namespace prefillshare::test
