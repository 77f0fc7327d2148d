// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/prefill_runner.hpp - what a prefill worker asks of that which computes, and the one on
// processors.
// Layer: serve (host only).
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <prefillshare/kv/try_allocate.hpp>
#include <prefillshare/model/modules.hpp>

namespace prefillshare {

/// Computes the KV of chunks for a PrefillWorker: HostPrefill, cuda::DevicePrefill, SimPrefill.
///   allocator(), key()   whose blocks, and whose caches they are
///   vocab_size(), layers(), max_tokens() of a step, max_context() of a cache
///   reserve(n)           memory for steps of up to n caches; false: there is none
///   run(chunks, caches, after_layer)   computes chunks[i], the next tokens of caches[i], for which blocks
///                        are reserved, and commits them. after_layer(layer) -> Status: the layer's KV
///                        stands, or does when the runner's stream gets there.
template <class R>
concept PrefillRunner = requires(R& runner, const R& is,
                                 std::span<const std::span<const std::int32_t>> chunks,
                                 std::span<Sequence* const> caches, std::int64_t count) {
  { is.allocator() } -> std::same_as<typename R::Allocator&>;
  { is.key() } -> std::same_as<const CacheKey&>;
  { is.vocab_size() } -> std::same_as<std::int64_t>;
  { is.layers() } -> std::same_as<int>;
  { is.max_tokens() } -> std::same_as<std::int64_t>;
  { is.max_context() } -> std::same_as<std::int64_t>;
  { runner.reserve(count) } -> std::same_as<bool>;
  { runner.run(chunks, caches, IgnoreLayers()) } -> std::same_as<Status>;
};

/// A prefill module on processors. Module, allocator, storage and executor are the caller's and outlive it.
template <LinearLayer Base>
class HostPrefill {
 public:
  using Allocator = KvAllocator;  ///< of pages in host memory

  /// `workspace` was made for the module's model.
  HostPrefill(const PrefillModule<Base>& module, KvAllocator& allocator, HostKvStorage& storage,
              ForwardWorkspace workspace, Executor& executor)
      : module_(&module),
        allocator_(&allocator),
        storage_(&storage),
        workspace_(std::move(workspace)),
        executor_(&executor) {}

  [[nodiscard]] KvAllocator& allocator() const noexcept { return *allocator_; }   ///< as given
  [[nodiscard]] const CacheKey& key() const noexcept { return module_->key(); }   ///< the module's
  [[nodiscard]] int layers() const noexcept { return storage_->shape().layers; }  ///< of the model
  [[nodiscard]] std::int64_t max_tokens() const noexcept { return workspace_.max_tokens(); }  ///< of a step
  [[nodiscard]] std::int64_t vocab_size() const noexcept { return module_->config().vocab_size; }  ///< of it
  /// Of a cache: the model's and the workspace's.
  [[nodiscard]] std::int64_t max_context() const noexcept {
    return std::min(module_->config().context_length, workspace_.max_context());
  }
  /// As PrefillRunner says.
  [[nodiscard]] bool reserve(std::int64_t caches) {
    return detail::try_allocate([&] { items_.resize(static_cast<std::size_t>(caches)); });
  }
  /// The same. Errors: as PrefillModule::prefill_chunks().
  template <class AfterLayer>
  [[nodiscard]] Status run(std::span<const std::span<const std::int32_t>> chunks,
                           std::span<Sequence* const> caches, AfterLayer&& after_layer) {
    return module_->prefill_chunks(chunks, caches, items_, *allocator_, *storage_, workspace_, *executor_,
                                   std::forward<AfterLayer>(after_layer));
  }

 private:
  const PrefillModule<Base>* module_;
  KvAllocator* allocator_;
  HostKvStorage* storage_;
  ForwardWorkspace workspace_;
  Executor* executor_;
  std::vector<ForwardItem> items_;
};

}  // namespace prefillshare
