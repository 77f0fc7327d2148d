// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/modules.hpp - a model factorized into a frozen prefill module and decode modules.
// Layer: model (host only).
// See: PrefillShare (arXiv 2602.12029) section 3, equations 5 and 6.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include <prefillshare/kv/allocator.hpp>
#include <prefillshare/kv/cache_key.hpp>
#include <prefillshare/model/forward.hpp>

namespace prefillshare {

/// The frozen half: turns a context into the base cache C_base and nothing else (equation 5). It makes no
/// token. Its key names whose cache it is, so that no other producer's cache is ever taken for it.
template <LinearLayer Linear>
class PrefillModule {
 public:
  /// Called after each chunk with the tokens of this call that are done and their total.
  using Progress = std::function<void(std::int64_t done, std::int64_t total)>;

  /// `key` names the model, its version and the tenant: caches are shared under equal keys only.
  PrefillModule(std::shared_ptr<const LlamaModel<Linear>> model, CacheKey key)
      : model_(std::move(model)), key_(std::move(key)) {}

  [[nodiscard]] const LlamaModel<Linear>& model() const noexcept { return *model_; }   ///< frozen
  [[nodiscard]] const ModelConfig& config() const noexcept { return model_->config; }  ///< of the model
  [[nodiscard]] const CacheKey& key() const noexcept { return key_; }                  ///< of its caches

  /// Computes the next tokens of several base sequences in one pass and commits them: caches[i] is extended
  /// by chunks[i], for which it has blocks reserved. after_layer: see forward(); the pages of all of them
  /// stand when it is called. `items` is scratch, as long as the caches. Errors: as forward_batch().
  template <class AfterLayer = IgnoreLayers>
  [[nodiscard]] Status prefill_chunks(std::span<const std::span<const std::int32_t>> chunks,
                                      std::span<Sequence* const> caches, std::span<ForwardItem> items,
                                      KvAllocator& allocator, HostKvStorage& storage,
                                      ForwardWorkspace& workspace, Executor& executor,
                                      AfterLayer&& after_layer = {}) const {
    for (std::size_t i = 0; i < caches.size(); ++i) {
      items[i] = {chunks[i], KvTarget{&storage, caches[i]->blocks(), caches[i]->length()}};
    }
    if (Status s = forward_batch(*model_, items.first(caches.size()), MatrixView<float>(), workspace,
                                 executor, std::forward<AfterLayer>(after_layer));
        !s.ok()) {
      return s;
    }
    for (std::size_t i = 0; i < caches.size(); ++i) {
      if (Status s = allocator.commit(*caches[i], chunks[i]); !s.ok()) return s;
    }
    return {};
  }

  /// Extends `cache` by `tokens` (a partial prefill): reserves blocks, computes their KV in chunks of the
  /// workspace's size and commits each chunk, so that what is done stays usable whatever happens next.
  /// Errors: kInvalidArgument past the model's context length, kExhausted when no block can be had, and what
  /// forward() returns.
  [[nodiscard]] Status prefill(std::span<const std::int32_t> tokens, KvAllocator& allocator,
                               HostKvStorage& storage, Sequence& cache, ForwardWorkspace& workspace,
                               Executor& executor, const Progress& progress = {}) const {
    const auto total = static_cast<std::int64_t>(tokens.size());
    if (cache.length() + total > config().context_length) {
      return error(StatusCode::kInvalidArgument, "context of ", cache.length() + total,
                   " tokens, the model's context length is ", config().context_length);
    }
    if (Status s = allocator.reserve(cache, total); !s.ok()) return s;
    for (std::int64_t done = 0; done < total;) {
      const std::int64_t count = std::min(workspace.max_tokens(), total - done);
      const auto chunk = tokens.subspan(static_cast<std::size_t>(done), static_cast<std::size_t>(count));
      const KvTarget target{&storage, cache.blocks(), cache.length()};
      if (Status s = forward(*model_, chunk, target, MatrixView<float>(), workspace, executor); !s.ok())
        return s;
      if (Status s = allocator.commit(cache, chunk); !s.ok()) return s;
      done += count;
      if (progress) progress(done, total);
    }
    return {};
  }

 private:
  std::shared_ptr<const LlamaModel<Linear>> model_;
  CacheKey key_;
};

/// The task's half: generates tokens from a base cache that it only reads (equation 6). The KV of the last
/// prompt token and of every generated token is its own, in a fork of the base sequence, and dies with it.
template <LinearLayer Linear>
class DecodeModule {
 public:
  [[nodiscard]] const LlamaModel<Linear>& model() const noexcept { return *model_; }   ///< what generates
  [[nodiscard]] const ModelConfig& config() const noexcept { return model_->config; }  ///< of the model

  /// The place of one token at the end of `own` (a fork), for run(); `token` stays where it is until then.
  /// Errors: kInvalidArgument past the model's context length; as KvAllocator::append_private().
  [[nodiscard]] Result<ForwardItem> place(const std::int32_t& token, KvAllocator& allocator,
                                          HostKvStorage& storage, Sequence& own) const {
    if (own.length() + 1 > config().context_length) {
      return error(StatusCode::kInvalidArgument, "context of ", own.length() + 1,
                   " tokens, the model's context length is ", config().context_length);
    }
    const std::int64_t position = own.length();
    if (Status s = allocator.append_private(own, 1); !s.ok()) return s;
    return ForwardItem{std::span(&token, 1), KvTarget{&storage, own.blocks(), position}};
  }
  /// Runs one token of each of several sequences and writes the logits of the next of each: logits
  /// [items][vocab_size]. See forward_batch().
  [[nodiscard]] Status run(std::span<const ForwardItem> items, MatrixView<float> logits,
                           ForwardWorkspace& workspace, Executor& executor) const {
    return forward_batch(*model_, items, logits, workspace, executor);
  }

  /// Runs one token at the end of `own` (a fork) and writes the logits of the next: logits [vocab_size].
  /// Errors: as PrefillModule::prefill.
  [[nodiscard]] Status step(std::int32_t token, KvAllocator& allocator, HostKvStorage& storage, Sequence& own,
                            std::span<float> logits, ForwardWorkspace& workspace, Executor& executor) const {
    const Result<ForwardItem> item = place(token, allocator, storage, own);
    if (!item.ok()) return item.status();
    return forward(*model_, item->tokens, item->kv,
                   MatrixView<float>(logits.data(), 1, static_cast<std::int64_t>(logits.size())), workspace,
                   executor);
  }

 private:
  explicit DecodeModule(std::shared_ptr<const LlamaModel<Linear>> model) : model_(std::move(model)) {}

  template <LinearLayer Decode>
  friend Result<DecodeModule<Decode>> factorize(const ModelConfig&,
                                                std::shared_ptr<const LlamaModel<Decode>>);

  std::shared_ptr<const LlamaModel<Linear>> model_;
};

/// Makes `decode` a decode module of a base of that config, which may be in another process: the only way to
/// get one, so that no module ever reads a cache that it does not fit. Call it once for each task's model; a
/// base whose own weights are passed gives the ordinary model back, split in two. Errors: kIncompatible
/// naming all that differs, or what validate() finds.
template <LinearLayer Decode>
[[nodiscard]] Result<DecodeModule<Decode>> factorize(const ModelConfig& base,
                                                     std::shared_ptr<const LlamaModel<Decode>> decode) {
  if (decode == nullptr) return error(StatusCode::kNullPointer, "factorize: no decode model");
  if (Status s = validate(*decode); !s.ok()) return s;
  if (Status s = check_compatible(base, decode->config); !s.ok()) return s;
  return DecodeModule<Decode>(std::move(decode));
}
/// The same, named by its types.
template <LinearLayer Base, LinearLayer Decode>
[[nodiscard]] Result<DecodeModule<Decode>> factorize(const PrefillModule<Base>& base,
                                                     std::shared_ptr<const LlamaModel<Decode>> decode) {
  return factorize(base.config(), std::move(decode));
}

}  // namespace prefillshare
