// SPDX-License-Identifier: Apache-2.0
//
// bench/support/finetune_cpu_backend.hpp - FinetuneBackend on the CPU: the Trainer and the forward pass.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <prefillshare/kv/storage.hpp>
#include <prefillshare/model/forward.hpp>
#include <prefillshare/train/trainer.hpp>

#include "finetune_backend.hpp"

namespace codegemm::bench {

class FinetuneCpuBackend {
 public:
  struct Module {
    DenseModelPtr dense;
    std::vector<prefillshare::examples::LowRankDelta> deltas;
  };

  [[nodiscard]] static Result<FinetuneCpuBackend> create(DenseModelPtr base, std::int64_t max_tokens,
                                                         Executor& executor) {
    using namespace prefillshare;
    const ModelConfig& c = base->config;
    Result<ForwardWorkspace> workspace =
        ForwardWorkspace::create(*base, kSequences * max_tokens, max_tokens, executor.workers());
    if (!workspace.ok()) return workspace.status();
    const KvShape shape = kv_shape(c);
    const std::int64_t blocks = (max_tokens + shape.block_tokens - 1) / shape.block_tokens;
    Result<HostKvStorage> storage = HostKvStorage::create(shape, kSequences * blocks);
    if (!storage.ok()) return storage.status();
    return FinetuneCpuBackend(std::move(base), max_tokens, executor, *std::move(workspace),
                              *std::move(storage));
  }

  [[nodiscard]] std::string device() const { return "CPU"; }

  [[nodiscard]] Result<Module> load(DenseModelPtr model) const {
    if (Status s = check_compatible(base_->config, model->config); !s.ok()) return s;
    return Module{std::move(model), {}};
  }

  [[nodiscard]] Result<Module> train(const TrainJob& job) {
    using namespace prefillshare;
    Result<TrainableModel<float>> model = trainable(job);
    if (!model.ok()) return model.status();
    std::vector<TrainingExample> examples(job.examples.begin(), job.examples.end());
    Result<Trainer<DenseLinear>> trainer = Trainer<DenseLinear>::create(
        *model, base_, std::move(examples), job.options, "of a benchmark", *executor_);
    if (!trainer.ok()) return trainer.status();
    if (Status s = trainer->run("", 0, job.progress); !s.ok()) return s;
    Result<DenseModelPtr> dense = model->dense(*executor_);
    if (!dense.ok()) return dense.status();
    Module out{*std::move(dense), {}};
    if (job.kind == ParameterKind::kLowRank) out.deltas = deltas_of(*model, job.low_rank);
    return out;
  }

  [[nodiscard]] Result<double> loss(const Module& module,
                                    std::span<const prefillshare::TrainingExample> examples, double sharing) {
    using namespace prefillshare;
    // A delta of rank 1 that is zero: a model as it is, without the memory of a training of all of it.
    Result<TrainableModel<float>> model = TrainableModel<float>::low_rank(module.dense, {.rank = 1});
    if (!model.ok()) return model.status();
    TrainOptions options;
    options.steps = 0;
    options.max_tokens = max_tokens_;
    std::vector<TrainingExample> one(examples.begin(), examples.begin() + (examples.empty() ? 0 : 1));
    Result<Trainer<DenseLinear>> trainer =
        Trainer<DenseLinear>::create(*model, base_, std::move(one), options, "of a benchmark", *executor_);
    if (!trainer.ok()) return trainer.status();
    return trainer->evaluate(examples, sharing);
  }

  [[nodiscard]] Result<std::vector<Tokens>> generate(const Module& module, std::span<const Tokens> prompts,
                                                     double sharing, std::int64_t most,
                                                     std::span<const std::int32_t> stop) {
    std::vector<Tokens> answers(prompts.size());
    for (std::size_t first = 0; first < prompts.size(); first += kSequences) {
      const std::size_t count = std::min<std::size_t>(kSequences, prompts.size() - first);
      const Status status = generate_some(module, prompts.subspan(first, count), sharing, most, stop,
                                          std::span(answers).subspan(first, count));
      if (!status.ok()) return status.with_prefix(concat("prompts from ", first));
    }
    return answers;
  }

  [[nodiscard]] Result<DenseModelPtr> dense(const Module& module) const { return module.dense; }

  [[nodiscard]] Result<std::vector<prefillshare::examples::LowRankDelta>> low_rank(
      const Module& module) const {
    return module.deltas;
  }

  [[nodiscard]] prefillshare::examples::QuantizeBackend quantizer() const { return {}; }  // the host

 private:
  static constexpr int kSequences = 32;  // at a time

  FinetuneCpuBackend(DenseModelPtr base, std::int64_t max_tokens, Executor& executor,
                     prefillshare::ForwardWorkspace workspace, prefillshare::HostKvStorage storage)
      : base_(std::move(base)),
        max_tokens_(max_tokens),
        executor_(&executor),
        workspace_(std::make_unique<prefillshare::ForwardWorkspace>(std::move(workspace))),
        storage_(std::make_unique<prefillshare::HostKvStorage>(std::move(storage))),
        blocks_(static_cast<std::size_t>(storage_->blocks())) {
    std::iota(blocks_.begin(), blocks_.end(), prefillshare::BlockId{0});
  }

  [[nodiscard]] static Result<prefillshare::TrainableModel<float>> trainable(const TrainJob& job) {
    using Model = prefillshare::TrainableModel<float>;
    switch (job.kind) {
      case ParameterKind::kLowRank: return Model::low_rank(job.start, job.low_rank);
      case ParameterKind::kCodebooks:
        if (job.matrices == nullptr) return error(StatusCode::kNullPointer, "TrainJob: no matrices");
        return Model::codebooks(job.start, *job.matrices);
      default: return Model::full(job.start);
    }
  }

  /// A and B of each layer stand one after the other among the parameters.
  [[nodiscard]] static std::vector<prefillshare::examples::LowRankDelta> deltas_of(
      const prefillshare::TrainableModel<float>& model, const prefillshare::LowRankOptions& options) {
    const std::string end = ".lora_A.weight";
    std::vector<prefillshare::examples::LowRankDelta> out;
    for (const prefillshare::Parameter<float>& p : model.parameters()) {
      const std::span<const float> values = p.value.span();
      if (p.name.ends_with(end)) {
        out.push_back({p.name.substr(0, p.name.size() - end.size()),
                       options.rank,
                       static_cast<float>(options.alpha / static_cast<double>(options.rank)),
                       std::vector<float>(values.begin(), values.end()),
                       {}});
      } else {
        out.back().b.assign(values.begin(), values.end());
      }
    }
    return out;
  }

  /// The blocks of place `slot` among the sequences that run at a time.
  [[nodiscard]] prefillshare::KvTarget place(std::size_t slot, std::int64_t position) {
    const std::size_t each = blocks_.size() / kSequences;
    return {storage_.get(), std::span(blocks_).subspan(slot * each, each), position};
  }

  [[nodiscard]] Status generate_some(const Module& module, std::span<const Tokens> prompts, double sharing,
                                     std::int64_t most, std::span<const std::int32_t> stop,
                                     std::span<Tokens> answers) {
    using namespace prefillshare;
    std::vector<ForwardItem> of_base;
    std::vector<ForwardItem> items;
    std::vector<std::size_t> slots;  // of each item
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      const std::span<const std::int32_t> prompt = prompts[i];
      const auto length = static_cast<std::int64_t>(prompt.size());
      if (length < 1 || most < 1 || length + most > max_tokens_) {
        return error(StatusCode::kInvalidArgument, "a prompt of ", length, " tokens and an answer of up to ",
                     most, ", at most ", max_tokens_, " together");
      }
      const auto shared = static_cast<std::size_t>(shared_tokens(length, sharing));
      if (shared > 0) of_base.push_back({prompt.first(shared), place(i, 0)});
      items.push_back({prompt.subspan(shared), place(i, static_cast<std::int64_t>(shared))});
      slots.push_back(i);
    }
    if (Status s = forward_batch(*base_, of_base, MatrixView<float>(), *workspace_, *executor_); !s.ok())
      return s;
    const std::int64_t vocabulary = base_->config.vocab_size;
    std::vector<float> logits(prompts.size() * static_cast<std::size_t>(vocabulary));
    std::vector<std::int32_t> next(prompts.size());
    while (!items.empty()) {
      const auto rows = static_cast<std::int64_t>(items.size());
      const MatrixView<float> out(logits.data(), rows, vocabulary);
      if (Status s = forward_batch(*module.dense, items, out, *workspace_, *executor_); !s.ok()) return s;
      std::vector<ForwardItem> going;
      std::vector<std::size_t> going_slots;
      for (std::size_t i = 0; i < items.size(); ++i) {
        const std::size_t slot = slots[i];
        const float* const row = out.row(static_cast<std::int64_t>(i));
        const auto token = static_cast<std::int32_t>(std::max_element(row, row + vocabulary) - row);
        if (std::find(stop.begin(), stop.end(), token) != stop.end()) continue;
        answers[slot].push_back(token);
        if (static_cast<std::int64_t>(answers[slot].size()) == most) continue;
        next[slot] = token;
        const std::int64_t position = items[i].kv.first_position + std::ssize(items[i].tokens);
        going.push_back({std::span(&next[slot], 1), place(slot, position)});
        going_slots.push_back(slot);
      }
      items = std::move(going);
      slots = std::move(going_slots);
    }
    return {};
  }

  DenseModelPtr base_;
  std::int64_t max_tokens_ = 0;
  Executor* executor_;
  std::unique_ptr<prefillshare::ForwardWorkspace> workspace_;
  std::unique_ptr<prefillshare::HostKvStorage> storage_;
  std::vector<prefillshare::BlockId> blocks_;
};
static_assert(FinetuneBackend<FinetuneCpuBackend>);

}  // namespace codegemm::bench
