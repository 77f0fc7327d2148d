// SPDX-License-Identifier: Apache-2.0
//
// bench/support/finetune_gpu_backend.cuh - FinetuneBackend on the GPU: DeviceTrainer and DeviceGenerator in
// bf16.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <common/gpu_quantizer.cuh>
#include <prefillshare/train/cuda/generator.cuh>
#include <prefillshare/train/cuda/trainer.cuh>

#include "finetune_backend.hpp"
#include "gpu_timing.cuh"

namespace codegemm::bench {

class FinetuneGpuBackend {
  using S = __nv_bfloat16;
  using Host = prefillshare::TrainableModel<float>;
  using Trained = prefillshare::cuda::DeviceTrainable<S>;
  using Frozen = prefillshare::cuda::DeviceFrozenWeights<S>;

  /// What a TrainableModel was made of.
  struct Origin {
    DenseModelPtr start;
    ParameterKind kind = ParameterKind::kFull;
    prefillshare::LowRankOptions low_rank;
    std::shared_ptr<const Matrices> matrices;

    [[nodiscard]] Result<Host> host() const {
      switch (kind) {
        case ParameterKind::kLowRank: return Host::low_rank(start, low_rank);
        case ParameterKind::kCodebooks: return Host::codebooks(start, *matrices);
        default: return Host::full(start);
      }
    }
  };

 public:
  /// Weights on the device, and what else it takes to bring them back.
  struct Module {
    Origin origin;
    std::shared_ptr<const Trained> trained;  // or
    std::shared_ptr<const Frozen> frozen;    // as they were given

    [[nodiscard]] prefillshare::cuda::detail::DeviceWeightsView<S> view() const {
      return trained != nullptr ? trained->view() : frozen->view();
    }
  };

  [[nodiscard]] static Result<FinetuneGpuBackend> create(DenseModelPtr base, std::int64_t max_tokens,
                                                         Executor& executor) {
    using namespace prefillshare;
    const Result<codegemm::cuda::Device> device = codegemm::cuda::query_device(0);
    if (!device.ok()) return device.status();
    FinetuneGpuBackend out(std::move(base), max_tokens, executor, *device);
    cudaStream_t stream = nullptr;
    if (Status s = codegemm::cuda::cuda_status(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking),
                                               "cudaStreamCreate");
        !s.ok()) {
      return s;
    }
    out.stream_.reset(stream);
    Result<Frozen> frozen = Frozen::create(*out.base_, out.device_, stream);
    if (!frozen.ok()) return frozen.status();
    out.frozen_ = std::make_shared<const Frozen>(*std::move(frozen));
    return out;
  }

  [[nodiscard]] std::string device() const { return describe_card(device_); }

  [[nodiscard]] Result<Module> load(DenseModelPtr model) const {
    if (Status s = prefillshare::check_compatible(base_->config, model->config); !s.ok()) return s;
    if (model == base_) return Module{{std::move(model), {}, {}, {}}, nullptr, frozen_};
    Result<Frozen> frozen = Frozen::create(*model, device_, stream_.get());
    if (!frozen.ok()) return frozen.status();
    return Module{
        {std::move(model), {}, {}, {}}, nullptr, std::make_shared<const Frozen>(*std::move(frozen))};
  }

  [[nodiscard]] Result<Module> train(const TrainJob& job) {
    using namespace prefillshare;
    if (Status s = take_origin(job); !s.ok()) return s;
    std::vector<TrainingExample> examples(job.examples.begin(), job.examples.end());
    auto trainer = prefillshare::cuda::DeviceTrainer<S>::create(
        *host_, frozen_, std::move(examples), job.options, "of a benchmark", device_, stream_.get());
    if (!trainer.ok()) return trainer.status();
    trainer->use_graphs(job.alone);
    if (Status s = trainer->run("", 0, job.progress); !s.ok()) return s;
    return Module{*origin_, std::make_shared<const Trained>(trainer->take_weights()), nullptr};
  }

  [[nodiscard]] Result<double> loss(const Module& module,
                                    std::span<const prefillshare::TrainingExample> examples, double sharing) {
    using namespace prefillshare;
    if (!judge_.has_value()) {
      constexpr std::int64_t kPassTokens = 4096;
      auto made = prefillshare::cuda::DeviceExamples<S>::create(
          base_->config, frozen_, max_tokens_, kPassTokens, prefillshare::cuda::Activations::kRecomputed,
          device_, stream_.get());
      if (!made.ok()) return made.status();
      judge_.emplace(*std::move(made));
      judge_->use_graphs(false);  // a few passes for each module
    }
    return judge_->evaluate(module.view(), examples, sharing);
  }

  [[nodiscard]] Result<std::vector<Tokens>> generate(const Module& module, std::span<const Tokens> prompts,
                                                     double sharing, std::int64_t most,
                                                     std::span<const std::int32_t> stop) {
    if (!generator_.has_value()) {
      constexpr std::int64_t kSequences = 1024;
      auto made = prefillshare::cuda::DeviceGenerator<S>::create(base_->config, base_->config, kSequences,
                                                                 max_tokens_, device_, stream_.get());
      if (!made.ok()) return made.status();
      generator_.emplace(*std::move(made));
    }
    return generator_->generate(frozen_->view(), module.view(), prompts, sharing, most, stop);
  }

  [[nodiscard]] Result<DenseModelPtr> dense(const Module& module) const {
    if (module.trained == nullptr) return module.origin.start;
    Result<Host> host = download(module);
    if (!host.ok()) return host.status();
    return host->dense(*executor_);
  }

  [[nodiscard]] Result<std::vector<prefillshare::examples::LowRankDelta>> low_rank(
      const Module& module) const {
    std::vector<prefillshare::examples::LowRankDelta> out;
    if (module.trained == nullptr || module.origin.kind != ParameterKind::kLowRank) return out;
    Result<Host> host = download(module);
    if (!host.ok()) return host.status();
    const std::string end = ".lora_A.weight";
    for (const prefillshare::Parameter<float>& p : host->parameters()) {
      const std::span<const float> values = p.value.span();
      if (p.name.ends_with(end)) {
        out.push_back({p.name.substr(0, p.name.size() - end.size()),
                       p.shape[0],
                       host->low_rank_scale(),
                       std::vector<float>(values.begin(), values.end()),
                       {}});
      } else {
        out.back().b.assign(values.begin(), values.end());
      }
    }
    return out;
  }

  [[nodiscard]] prefillshare::examples::QuantizeBackend quantizer() {
    if (quantizer_ == nullptr) quantizer_ = std::make_unique<prefillshare::examples::GpuQuantizer>();
    return quantizer_->backend();
  }

 private:
  struct DestroyStream {
    void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
  };

  FinetuneGpuBackend(DenseModelPtr base, std::int64_t max_tokens, Executor& executor,
                     const codegemm::cuda::Device& device)
      : base_(std::move(base)), max_tokens_(max_tokens), executor_(&executor), device_(device) {}

  /// The parameters that a job begins with, on the host. Jobs that begin alike share them, since a trainer
  /// that is never asked for a state leaves them as they are.
  [[nodiscard]] Status take_origin(const TrainJob& job) {
    if (job.kind == ParameterKind::kCodebooks && job.matrices == nullptr)
      return error(StatusCode::kNullPointer, "TrainJob: no matrices");
    const bool alike = origin_ != nullptr && origin_->start == job.start && origin_->kind == job.kind &&
                       matrices_ == job.matrices && origin_->low_rank.rank == job.low_rank.rank &&
                       origin_->low_rank.alpha == job.low_rank.alpha &&
                       origin_->low_rank.seed == job.low_rank.seed;
    if (alike && job.kind != ParameterKind::kCodebooks)
      return {};  // matrices may have changed where they lie
    host_.reset();
    auto origin = std::make_unique<Origin>(Origin{job.start, job.kind, job.low_rank, nullptr});
    if (job.kind == ParameterKind::kCodebooks)
      origin->matrices = std::make_shared<const Matrices>(*job.matrices);
    Result<Host> host = origin->host();
    if (!host.ok()) return host.status();
    host_.emplace(*std::move(host));
    origin_ = std::move(origin);
    matrices_ = job.matrices;
    return {};
  }

  [[nodiscard]] Result<Host> download(const Module& module) const {
    Result<Host> host = module.origin.host();
    if (!host.ok()) return host.status();
    auto ts = prefillshare::cuda::detail::TrainStream::create(device_, stream_.get());
    if (!ts.ok()) return ts.status();
    if (Status s = module.trained->download(*host, *ts); !s.ok()) return s;
    return host;
  }

  DenseModelPtr base_;
  std::int64_t max_tokens_ = 0;
  Executor* executor_;
  codegemm::cuda::Device device_;
  std::unique_ptr<std::remove_pointer_t<cudaStream_t>, DestroyStream> stream_;
  std::shared_ptr<const Frozen> frozen_;
  std::unique_ptr<Origin> origin_;
  std::optional<Host> host_;
  const Matrices* matrices_ = nullptr;
  std::optional<prefillshare::cuda::DeviceExamples<S>> judge_;
  std::optional<prefillshare::cuda::DeviceGenerator<S>> generator_;
  std::unique_ptr<prefillshare::examples::GpuQuantizer> quantizer_;
};
static_assert(FinetuneBackend<FinetuneGpuBackend>);

}  // namespace codegemm::bench
