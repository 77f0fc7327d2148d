// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/session.hpp - the PrefillShare loop: shared or partial prefill, selective decode,
// hand-back.
// Layer: serve (host only).
// See: PrefillShare (arXiv 2602.12029) section 3.3; examples/03_shared_prefill.cpp
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <prefillshare/model/modules.hpp>

namespace prefillshare {

/// What a session works with. All of it is the caller's and outlives the session; one call at a time.
struct SessionResources {
  KvAllocator* allocator = nullptr;               ///< of all caches
  HostKvStorage* storage = nullptr;               ///< the allocator's blocks lie here
  ForwardWorkspace* prefill_workspace = nullptr;  ///< made for the base; its size is the prefill chunk
  Executor* executor = nullptr;                   ///< the threads
};

/// When a decode call ends.
struct DecodeLimits {
  std::int64_t max_tokens = 0;                ///< of the call's output
  std::span<const std::int32_t> stop_tokens;  ///< end the call; not part of its output
};

/// One decode call: what it made and what it cost.
struct Generation {
  std::vector<std::int32_t> tokens;   ///< the output, without a stop token
  bool stopped = false;               ///< by a stop token or by the caller, rather than by max_tokens
  std::int64_t prefilled_tokens = 0;  ///< computed by the base for this call
  std::int64_t reused_tokens = 0;     ///< of the base cache, found there
  double prefill_seconds = 0.0;       ///< of the base
  double first_token_seconds = 0.0;   ///< from the call to its first token, the prefill included
  double decode_seconds = 0.0;        ///< all steps of the decode module
  std::int64_t kv_bytes = 0;  ///< held by the allocator at the end of the call, the call's own tail included
};

/// The context of one session, shared by all agents that take turns on it.
///
/// The base cache covers all tokens of the context but the last; the decode module runs that one itself, so
/// that the first token of its answer is its own. An answer joins the context only by append(): the base then
/// prefills it like any other text, and the decode module's own KV is given back when its call ends.
template <LinearLayer Base>
class SharedSession {
 public:
  /// An empty context. The module outlives the session.
  SharedSession(const PrefillModule<Base>& base, const SessionResources& resources)
      : base_(&base), resources_(resources) {}

  /// X := [X; tokens]. Computes nothing yet.
  void append(std::span<const std::int32_t> tokens) {
    context_.insert(context_.end(), tokens.begin(), tokens.end());
  }

  /// All that was appended so far.
  [[nodiscard]] std::span<const std::int32_t> context() const noexcept { return context_; }

  /// Tokens that the base cache covers now.
  [[nodiscard]] std::int64_t cached_tokens() const noexcept { return cache_ ? cache_->length() : 0; }

  /// Brings the base cache up to all but the last token of the context. The first call takes what the prefix
  /// tree has from earlier sessions. Returns the tokens computed.
  [[nodiscard]] Result<std::int64_t> prefill(const typename PrefillModule<Base>::Progress& progress = {}) {
    if (context_.empty()) return error(StatusCode::kInvalidArgument, "prefill of an empty context");
    const std::span<const std::int32_t> wanted =
        std::span<const std::int32_t>(context_).first(context_.size() - 1);
    if (!cache_) {
      Result<Sequence> opened = resources_.allocator->open(base_->key(), wanted);
      if (!opened.ok()) return opened.status();
      cache_.emplace(std::move(opened).value());
    }
    const auto rest = wanted.subspan(static_cast<std::size_t>(cache_->length()));
    if (Status s = base_->prefill(rest, *resources_.allocator, *resources_.storage, *cache_,
                                  *resources_.prefill_workspace, *resources_.executor, progress);
        !s.ok()) {
      return s;
    }
    return static_cast<std::int64_t>(rest.size());
  }

  /// One agent's call: prefill() as far as needed, then up to limits.max_tokens tokens by `module`.
  ///
  /// next_token(std::span<float> logits) -> int32: the sampler; it may overwrite the logits.
  /// on_token(int32) -> bool: sees each token as it comes; false ends the call.
  /// `workspace` was made for the module. On an error nothing of the call is kept but the base cache.
  template <LinearLayer Decode, class NextToken, class OnToken>
  [[nodiscard]] Result<Generation> decode(const DecodeModule<Decode>& module, ForwardWorkspace& workspace,
                                          const DecodeLimits& limits, NextToken&& next_token,
                                          OnToken&& on_token,
                                          const typename PrefillModule<Base>::Progress& progress = {}) {
    using Clock = std::chrono::steady_clock;
    const auto seconds_since = [](Clock::time_point start) {
      return std::chrono::duration<double>(Clock::now() - start).count();
    };

    Generation out;
    const Clock::time_point start = Clock::now();
    Result<std::int64_t> computed = prefill(progress);
    if (!computed.ok()) return computed.status();
    out.prefilled_tokens = *computed;
    out.reused_tokens = cache_->length() - *computed;
    out.prefill_seconds = seconds_since(start);

    KvAllocator& allocator = *resources_.allocator;
    Result<Sequence> fork = allocator.fork(*cache_);
    if (!fork.ok()) return fork.status();
    Sequence own = std::move(fork).value();

    const Clock::time_point decode_start = Clock::now();
    logits_.resize(static_cast<std::size_t>(module.config().vocab_size));
    std::int32_t token = context_.back();
    while (static_cast<std::int64_t>(out.tokens.size()) < limits.max_tokens) {
      if (Status s = module.step(token, allocator, *resources_.storage, own, logits_, workspace,
                                 *resources_.executor);
          !s.ok()) {
        return s;
      }
      token = next_token(std::span<float>(logits_));
      if (out.first_token_seconds == 0.0) out.first_token_seconds = seconds_since(start);
      if (std::find(limits.stop_tokens.begin(), limits.stop_tokens.end(), token) !=
          limits.stop_tokens.end()) {
        out.stopped = true;
        break;
      }
      out.tokens.push_back(token);
      if (!on_token(token)) {
        out.stopped = true;
        break;
      }
    }
    out.decode_seconds = seconds_since(decode_start);
    out.kv_bytes = allocator.stats().bytes_in_use;
    return out;
  }

 private:
  const PrefillModule<Base>* base_;
  SessionResources resources_;
  std::vector<std::int32_t> context_;  // all tokens of the session so far
  std::optional<Sequence> cache_;      // the base cache of a prefix of them
  std::vector<float> logits_;
};

}  // namespace prefillshare
