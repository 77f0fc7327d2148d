// SPDX-License-Identifier: Apache-2.0
//
// bench/support/finetune_backend.hpp - what the suites finetune and finetune-gpu ask of whoever trains and
// generates.
#pragma once

#include <concepts>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <codegemm/quantized_matrix.hpp>
#include <common/low_rank.hpp>
#include <common/text_quantizer.hpp>
#include <prefillshare/model/dense_linear.hpp>
#include <prefillshare/model/llama.hpp>
#include <prefillshare/train/trainer.hpp>

namespace codegemm::bench {

using DenseModel = prefillshare::LlamaModel<prefillshare::DenseLinear>;
using DenseModelPtr = std::shared_ptr<const DenseModel>;
using Tokens = std::vector<std::int32_t>;
/// By their names ("model.layers.0.mlp.up_proj").
using Matrices = std::map<std::string, QuantizedMatrix>;

enum class ParameterKind { kFull, kLowRank, kCodebooks };

/// One training run. All that is pointed to outlives the call.
struct TrainJob {
  DenseModelPtr start;  // the module before the first step; of the base's shape
  ParameterKind kind = ParameterKind::kFull;
  prefillshare::LowRankOptions low_rank;  // kLowRank
  const Matrices* matrices = nullptr;     // kCodebooks: in place of start's layers of those names
  std::span<const prefillshare::TrainingExample> examples;
  prefillshare::TrainOptions options;                                // sharing among them
  std::function<void(const prefillshare::TrainProgress&)> progress;  // after each step, if any
  bool alone = true;  // whether no other thread of the process trains at the same time
};

/// Trains decode modules of one frozen base and generates with them. Module is a handle to a decode module
/// wherever its weights are; it may be moved, and is freed with its last owner. Made by
/// `static Result<B> create(DenseModelPtr base, std::int64_t max_tokens, Executor& executor)`, max_tokens of
/// a prompt and its answer together; the executor, for what the host computes, outlives the backend.
template <class B>
concept FinetuneBackend = requires(B& backend, Executor& executor, const TrainJob& job, DenseModelPtr model,
                                   const typename B::Module& module,
                                   std::span<const prefillshare::TrainingExample> examples,
                                   std::span<const Tokens> prompts, double sharing, std::int64_t most,
                                   std::span<const std::int32_t> stop) {
  { B::create(model, most, executor) } -> std::same_as<Result<B>>;
  /// A line about the device for the results: "NVIDIA H200, CUDA 13.0", "CPU".
  { backend.device() } -> std::same_as<std::string>;
  /// A decode module with these weights, untrained: the base itself, or what somebody made of it.
  { backend.load(model) } -> std::same_as<Result<typename B::Module>>;
  /// Runs all steps. kInvalidArgument where a loss is not finite, as Trainer::step().
  { backend.train(job) } -> std::same_as<Result<typename B::Module>>;
  /// Mean -log p over the target tokens, the first shared_tokens() of each prompt's KV from the base.
  { backend.loss(module, examples, sharing) } -> std::same_as<Result<double>>;
  /// Greedy answers, in the prompts' order: the base's cache covers the first shared_tokens(prompt,
  /// sharing) tokens of each prompt, the module runs the rest of it and all that it generates. An answer
  /// ends before the first token of `stop`, or after `most` tokens. Ties take the lowest id.
  { backend.generate(module, prompts, sharing, most, stop) } -> std::same_as<Result<std::vector<Tokens>>>;
  /// The module's weights in fp32 on the host: deltas merged, codes looked up.
  { backend.dense(module) } -> std::same_as<Result<DenseModelPtr>>;
  /// The deltas of a module trained with kLowRank, in for_each_linear()'s order; none of another.
  { backend.low_rank(module) } -> std::same_as<Result<std::vector<prefillshare::examples::LowRankDelta>>>;
  /// Where layers are quantized; valid as long as the backend lives.
  { backend.quantizer() } -> std::same_as<prefillshare::examples::QuantizeBackend>;
};

}  // namespace codegemm::bench
