// SPDX-License-Identifier: Apache-2.0
//
// tests/support/serve_harness.hpp - prefill and decode workers on tiny models, as tests need them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <prefillshare/model/codegemm_linear.hpp>
#include <prefillshare/model/dense_linear.hpp>
#include <prefillshare/serve/decode_worker.hpp>
#include <prefillshare/serve/prefill_worker.hpp>
#include <support/model_harness.hpp>
#include <support/quantized.hpp>
#include <support/tiny_model.hpp>

namespace prefillshare::test {

/// tiny_config() with rows that fill cache lines, as those of every real model do.
[[nodiscard]] inline ModelConfig lined_config() {
  ModelConfig config = tiny_config();
  config.hidden_size = 32;
  config.intermediate_size = 48;
  return config;
}

inline const CacheKey kBaseKey{"base", "1", ""};

/// A decode module's model in random codes of 2 bits; embedding and norms are `dense`'s.
[[nodiscard]] inline std::shared_ptr<const LlamaModel<CodeGemmLinear>> random_codes(
    const LlamaModel<DenseLinear>& dense, std::uint64_t seed) {
  Rng rng(seed);
  auto out = std::make_shared<LlamaModel<CodeGemmLinear>>();
  out->config = dense.config;
  out->embedding = dense.embedding;
  out->final_norm = dense.final_norm;
  for (const auto& layer : dense.layers) {
    auto& target = out->layers.emplace_back();
    target.input_norm = layer.input_norm;
    target.post_attention_norm = layer.post_attention_norm;
  }
  std::vector<CodeGemmLinear*> into;
  for_each_linear(*out, [&](const std::string&, CodeGemmLinear& layer) { into.push_back(&layer); });
  std::size_t index = 0;
  for_each_linear(dense, [&](const std::string&, const DenseLinear& layer) {
    codegemm::QuantizedMatrix matrix =
        codegemm::test::random_matrix({4, 1, 8, 8}, layer.rows(), layer.cols(), rng);
    for (codegemm::Half& scale : matrix.scales()) scale = codegemm::Half::from_float(rng.uniform(0.1F, 0.3F));
    *into[index++] = CodeGemmLinear(codegemm::pack(matrix.view()).value());
  });
  return out;
}

/// A pool with a prefill worker on it.
struct PrefillSide {
  CacheHarness cache;
  PrefillModule<DenseLinear> base;
  PrefillWorker<DenseLinear> worker;

  PrefillSide(const std::shared_ptr<const LlamaModel<DenseLinear>>& model, std::int64_t blocks,
              const PrefillOptions& options, Executor& executor)
      : cache(model->config, blocks),
        base(model, kBaseKey),
        worker(PrefillWorker<DenseLinear>::create(
                   base, *cache.allocator, cache.storage,
                   ForwardWorkspace::create(*model, options.chunk_tokens, 256, executor.workers()).value(),
                   executor, options)
                   .value()) {}

  [[nodiscard]] std::int64_t in_use() const { return cache.allocator->stats().in_use_blocks; }
};

/// What became of each request of a decode worker.
struct Answers {
  struct Answer {
    std::vector<std::int32_t> tokens;
    int ends = 0;
    DecodeEvent last;
  };
  std::map<std::uint64_t, Answer> by_id;

  void operator()(const DecodeEvent& event) {
    Answer& answer = by_id[event.id];
    if (event.kind == DecodeEvent::Kind::kToken) {
      answer.tokens.push_back(event.token);
    } else {
      ++answer.ends;
      answer.last = event;
    }
  }
};

inline std::int32_t greedy(std::uint64_t /*id*/, std::span<float> logits) { return argmax(logits); }

/// What a session of its own, alone, answers.
template <LinearLayer Decode>
std::vector<std::int32_t> alone(const std::shared_ptr<const LlamaModel<DenseLinear>>& base,
                                const std::shared_ptr<const LlamaModel<Decode>>& decode,
                                std::span<const std::int32_t> context, std::int64_t count,
                                Executor& executor) {
  SessionHarness<DenseLinear, Decode> harness(base, decode, 256, 256, 32, executor);
  harness.session.append(context);
  return harness.greedy(count).value().tokens;
}

}  // namespace prefillshare::test
