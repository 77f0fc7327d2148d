// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/search_products.cuh - which of cuBLAS's algorithms multiply a model's dense weights
// in decode steps: found by trying.
// Layer: model/cuda (host, needs nvcc and cuBLAS).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <type_traits>
#include <vector>

#include <cuda_runtime.h>

#include <prefillshare/model/cuda/dense_linear.cuh>
#include <prefillshare/model/cuda/llama.cuh>

namespace prefillshare::cuda {

/// Has the dense layers of a model and its dense head use what was searched; null: what cuBLAS chooses.
template <class Linear, class T>
void set_products(DeviceLlama<Linear, DeviceDenseLinear<T>>& model,
                  const std::shared_ptr<const CublasProducts>& products) {
  if constexpr (std::is_same_v<Linear, DeviceDenseLinear<T>>) {
    for (DeviceLlamaLayer<Linear>& l : model.layers) {
      for (Linear* layer : {&l.qkv, &l.o, &l.gate_up, &l.down}) layer->set_products(products);
    }
  }
  model.head.set_products(products);
}

/// Searches an algorithm for each product of a step with so many tokens, on the layers' own weights, and
/// set_products(). Once for each number of tokens that is to be fast, before the model is shared; takes some
/// seconds, and waits for the stream. Errors as CublasProducts::search(), kOutOfMemory.
template <class Linear, class T>
[[nodiscard]] Status search_products(DeviceLlama<Linear, DeviceDenseLinear<T>>& model, std::int64_t tokens,
                                     const std::shared_ptr<CublasProducts>& products, cudaStream_t stream) {
  using Dense = DeviceDenseLinear<T>;
  Status status;
  const auto search = [&](std::span<const Dense* const> alike, bool full, bool adds) {
    if (!status.ok()) return;
    const CublasProduct p = alike[0]->product(tokens, full, adds);
    auto x = DeviceArray<T>::zeros(static_cast<std::size_t>(p.tokens * p.cols));
    auto y = DeviceArray<float>::zeros(static_cast<std::size_t>(p.tokens * p.rows));
    if (!x.ok() || !y.ok()) {
      status = !x.ok() ? x.status() : y.status();
      return;
    }
    std::vector<const void*> weights;
    for (const Dense* const layer : alike) weights.push_back(layer->weights()->data());
    status = products->search(p, weights, x->data(), y->data(), stream);
  };
  if constexpr (std::is_same_v<Linear, Dense>) {
    const auto all = [&](Dense DeviceLlamaLayer<Linear>::*which, bool adds) {
      std::vector<const Dense*> layers;
      for (const DeviceLlamaLayer<Linear>& layer : model.layers) layers.push_back(&(layer.*which));
      search(layers, adds, adds);
    };
    all(&DeviceLlamaLayer<Linear>::qkv, false);
    all(&DeviceLlamaLayer<Linear>::o, true);
    all(&DeviceLlamaLayer<Linear>::gate_up, false);
    all(&DeviceLlamaLayer<Linear>::down, true);
  }
  const Dense* const head = &model.head;
  search(std::span(&head, 1), true, false);
  if (status.ok()) set_products(model, products);
  return status;
}

}  // namespace prefillshare::cuda
