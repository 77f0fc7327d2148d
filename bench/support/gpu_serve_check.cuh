// SPDX-License-Identifier: Apache-2.0
//
// bench/support/gpu_serve_check.cuh - the workers of suite serve-gpu against plain passes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include <prefillshare/serve/cuda/decode_worker.cuh>
#include <prefillshare/serve/cuda/prefill_runner.cuh>

#include "gpu_serve_card.cuh"

namespace codegemm::bench {

/// One worker with a module of fp16 and one of codes: the first tokens of its batches are those of a plain
/// pass of each module over the context's last token, but for what rounding may turn.
inline void check_workers(const ServeCard& card, const std::shared_ptr<const DenseModel>& dense,
                          const std::shared_ptr<const CodedModel>& coded) {
  constexpr int kContexts = 4;
  constexpr std::int64_t kTokens = 333;
  auto storage =
      take(DeviceKvStorage<__half>::create(card.shape.kv, 4 * kContexts * (kTokens / 16 + 2), card.stream));
  auto allocator = take(DeviceKvAllocator<__half>::create(storage));
  const DeviceResources<__half> on{card.device, card.stream, allocator.get(), &storage, card.workspace};
  const DevicePrefillModule<Dense, Dense> base(dense, CacheKey{"base", "1", ""});
  using Prefill = DevicePrefillWorker<Dense, Dense>;
  auto input = take(PrefillBatch::create(kChunk, kMostRunning, kMostRunning * 1024));
  Prefill prefill = take(Prefill::create(DevicePrefill<Dense, Dense>(base, on, input, 4096), {512, 4, 64}));
  auto decode = take(DeviceDecodeWorker<__half>::create(on, 64));
  const std::vector<std::int64_t> sizes{1, kContexts + 1};
  check(decode->add_module(take(factorize(dense->config, dense)), sizes, 4096).status());
  check(decode->add_module(take(factorize(dense->config, coded)), sizes, 4096).status());
  std::vector<std::vector<std::int32_t>> contexts;
  for (int i = 0; i < kContexts; ++i) {
    prefillshare::SimRandom random(static_cast<std::uint64_t>(i) + 77);
    auto& context = contexts.emplace_back(static_cast<std::size_t>(kTokens + i));
    for (std::int32_t& id : context)
      id = static_cast<std::int32_t>(random.between(0, card.shape.vocab_size - 1));
    prefillshare::PrefillJob job;
    job.id = static_cast<std::uint64_t>(i);
    job.tokens.assign(context.begin(), context.end() - 1);
    check(prefill.submit(std::move(job)));
  }
  std::vector<Sequence> caches(kContexts);
  while (!prefill.idle()) {
    prefill.step(
        0, [](const prefillshare::PagesReady&) { return Status(); },
        [&](prefillshare::PrefillResult&& result) {
          check(result.status);
          caches[result.id] = std::move(result.cache);
        });
  }
  std::map<std::uint64_t, std::int32_t> first;
  for (std::uint64_t id = 0; id < 2 * kContexts; ++id) {
    prefillshare::DecodeRequest request;
    request.id = id;
    request.module = static_cast<prefillshare::ModuleId>(id / kContexts);
    request.last_token = contexts[id % kContexts].back();
    request.max_tokens = 2;
    check(decode->start(std::move(request), caches[id % kContexts]));
  }
  while (decode->active() > 0) {
    decode->step(0, [&](const prefillshare::DecodeEvent& event) {
      check(event.status);
      first.try_emplace(event.id, event.token);
    });
  }
  int same = 0;
  const auto plain = [&](const auto& model, std::uint64_t module) {
    for (std::uint64_t i = 0; i < kContexts; ++i) {
      // The base's cache for both, and the module's own pass over the last token.
      Sequence fork = take(allocator->fork(caches[i]));
      check(allocator->reserve(fork, 1));
      const Sequence* const one = &fork;
      const std::span<const std::int32_t> last(&contexts[i].back(), 1);
      const MatrixView<float> logits(card.workspace->logits.data(), 1, card.shape.vocab_size);
      const auto batch =
          take(input.send(std::span(&last, 1), std::span(&one, 1), card.shape.vocab_size, card.stream));
      check(forward(model, batch, storage, logits, *card.workspace, card.device, card.stream));
      check(cudaStreamSynchronize(card.stream), "a pass");
      std::vector<float> row(static_cast<std::size_t>(card.shape.vocab_size));
      check(cudaMemcpy(row.data(), logits.data, row.size() * sizeof(float), cudaMemcpyDeviceToHost),
            "cudaMemcpy");
      const auto most = std::max_element(row.begin(), row.end());
      if (!std::isfinite(*most)) throw std::runtime_error("a logit is not finite");
      same += first.at(module * kContexts + i) == most - row.begin() ? 1 : 0;
    }
  };
  plain(*dense, 0);
  plain(*coded, 1);
  std::fprintf(stderr, "workers: %d of %d first tokens are those of plain passes\n", same, 2 * kContexts);
  if (same < 2 * kContexts - 2) throw std::runtime_error("the workers choose other tokens than plain passes");
}

}  // namespace codegemm::bench
