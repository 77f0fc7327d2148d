// SPDX-License-Identifier: Apache-2.0
//
// tests/support/model_harness.hpp - a model with a cache, an allocator and workspaces, as tests need them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include <codegemm/base/thread_pool.hpp>
#include <prefillshare/serve/session.hpp>
#include <support/catch.hpp>

namespace prefillshare::test {

/// Storage and allocator for `blocks` blocks of a config's cache.
struct CacheHarness {
  HostKvStorage storage;
  std::unique_ptr<KvAllocator> allocator;

  CacheHarness(const ModelConfig& config, std::int64_t blocks, int block_tokens = 16)
      : storage(HostKvStorage::create(kv_shape(config, block_tokens), blocks).value()),
        allocator(KvAllocator::create(storage).value()) {}
};

/// Runs tokens through a model on a base sequence of its own; logits [rows][vocab] as forward() has them.
template <LinearLayer Linear>
std::vector<float> run_forward(const LlamaModel<Linear>& model, std::span<const std::int32_t> tokens,
                               std::int64_t logit_rows, CacheHarness& cache, Sequence& sequence,
                               Executor& executor) {
  ForwardWorkspace workspace = ForwardWorkspace::create(model, static_cast<std::int64_t>(tokens.size()),
                                                        model.config.context_length, executor.workers())
                                   .value();
  REQUIRE(cache.allocator->reserve(sequence, static_cast<std::int64_t>(tokens.size())).ok());
  std::vector<float> logits(static_cast<std::size_t>(logit_rows * model.config.vocab_size), NAN);
  const KvTarget target{&cache.storage, sequence.blocks(), sequence.length()};
  const Status status =
      forward(model, tokens, target, MatrixView<float>(logits.data(), logit_rows, model.config.vocab_size),
              workspace, executor);
  INFO(status.message());
  REQUIRE(status.ok());
  REQUIRE(cache.allocator->commit(sequence, tokens).ok());
  return logits;
}

[[nodiscard]] inline std::int32_t argmax(std::span<const float> logits) {
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

/// The ordinary way to generate: one model, one cache, the prompt in one pass, the first token from the
/// logits of its last position. Greedy, `count` tokens, no stop token.
template <LinearLayer Linear>
std::vector<std::int32_t> generate_unshared(const LlamaModel<Linear>& model,
                                            std::span<const std::int32_t> prompt, std::int64_t count,
                                            Executor& executor) {
  const auto length = static_cast<std::int64_t>(prompt.size());
  CacheHarness cache(model.config, (length + count) / 16 + 2);
  Sequence sequence = cache.allocator->open(CacheKey{"unshared", "1", ""}, {}).value();
  std::vector<float> logits = run_forward(model, prompt, 1, cache, sequence, executor);
  ForwardWorkspace workspace = ForwardWorkspace::create(model, 1, length + count, executor.workers()).value();
  std::vector<std::int32_t> out{argmax(logits)};
  while (static_cast<std::int64_t>(out.size()) < count) {
    REQUIRE(cache.allocator->reserve(sequence, 1).ok());
    const std::span<const std::int32_t> last(&out.back(), 1);
    const KvTarget target{&cache.storage, sequence.blocks(), sequence.length()};
    REQUIRE(forward(model, last, target, MatrixView<float>(logits.data(), 1, model.config.vocab_size),
                    workspace, executor)
                .ok());
    REQUIRE(cache.allocator->commit(sequence, last).ok());
    out.push_back(argmax(logits));
  }
  return out;
}

/// Greedy generation by a session, with all that a session needs.
template <LinearLayer Base, LinearLayer Decode>
struct SessionHarness {
  codegemm::Executor& executor;
  PrefillModule<Base> base;
  DecodeModule<Decode> decode;
  CacheHarness cache;
  ForwardWorkspace prefill_workspace;
  ForwardWorkspace decode_workspace;
  SharedSession<Base> session;

  SessionHarness(std::shared_ptr<const LlamaModel<Base>> base_model,
                 std::shared_ptr<const LlamaModel<Decode>> decode_model, std::int64_t chunk,
                 std::int64_t context, std::int64_t blocks, Executor& executor_)
      : executor(executor_),
        base(base_model, CacheKey{"base", "1", ""}),
        decode(factorize(base, decode_model).value()),
        cache(base_model->config, blocks),
        prefill_workspace(ForwardWorkspace::create(*base_model, chunk, context, executor_.workers()).value()),
        decode_workspace(ForwardWorkspace::create(*decode_model, 1, context, executor_.workers()).value()),
        session(base, resources()) {}

  [[nodiscard]] SessionResources resources() {
    return {cache.allocator.get(), &cache.storage, &prefill_workspace, &executor};
  }

  [[nodiscard]] Result<Generation> greedy(std::int64_t count) {
    return session.decode(
        decode, decode_workspace, DecodeLimits{count, {}},
        [](std::span<float> logits) { return argmax(logits); }, [](std::int32_t) { return true; });
  }
};

}  // namespace prefillshare::test
