// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/trainer.hpp - fine-tunes a decode module on the base's cache.
// Layer: train (host only).
// See: PrefillShare (arXiv 2602.12029) sections 3.2 and A; examples/09_finetune.cpp
#pragma once

#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/quantize/additive.hpp>
#include <prefillshare/train/adamw.hpp>
#include <prefillshare/train/examples.hpp>
#include <prefillshare/train/pass.hpp>
#include <prefillshare/train/state.hpp>

namespace prefillshare {

/// How a decode module is trained.
struct TrainOptions {
  std::int64_t steps = 100;  ///< updates, those of an earlier run included
  std::int64_t batch = 16;   ///< examples of a step
  std::int64_t pass_tokens =
      2048;  ///< rows computed at once; a step takes as many passes as its examples need
  std::int64_t max_tokens = 1024;                 ///< of prompt and target together
  double sharing = 1.0;                           ///< share of the prompt read from the base: shared_tokens()
  double rate = 2e-5;                             ///< highest learning rate
  double warmup = 0.03;                           ///< share of the steps
  RateSchedule schedule = RateSchedule::kCosine;  ///< from the highest rate on
  double clip = 0.0;                              ///< highest norm of the gradient; 0: none
  AdamWOptions adam;                              ///< the optimizer's
  std::uint64_t seed = 1;                         ///< of the order of the examples
};

/// How far a training run is.
struct TrainProgress {
  std::int64_t step = 0;           ///< done
  std::int64_t steps = 0;          ///< of the run
  double loss = 0.0;               ///< mean over the step's target tokens, before its update
  double rate = 0.0;               ///< learning rate of this step
  double tokens_per_second = 0.0;  ///< prompt and target, of this run
  double seconds_left = 0.0;       ///< of the run, at this speed
};

namespace detail {

[[nodiscard]] inline Status check_train_options(const TrainOptions& o) {
  const auto wrong = [](const char* name, const auto& value, const char* must) {
    return error(StatusCode::kInvalidArgument, "TrainOptions::", name, " is ", value, ", must be ", must);
  };
  if (o.steps < 0) return wrong("steps", o.steps, "0 or more");
  if (o.batch < 1) return wrong("batch", o.batch, "1 or more");
  if (o.pass_tokens < 1) return wrong("pass_tokens", o.pass_tokens, "1 or more");
  if (o.max_tokens < 2) return wrong("max_tokens", o.max_tokens, "2 or more");
  if (!(o.sharing >= 0.0 && o.sharing <= 1.0)) return wrong("sharing", o.sharing, "in 0..1");
  if (!(o.rate > 0.0) || !std::isfinite(o.rate)) return wrong("rate", o.rate, "positive");
  if (!(o.warmup >= 0.0 && o.warmup <= 1.0)) return wrong("warmup", o.warmup, "in 0..1");
  if (!(o.clip >= 0.0)) return wrong("clip", o.clip, "0 or more");
  return {};
}

/// One number for all examples, the same on every machine.
[[nodiscard]] inline std::uint64_t hash_examples(std::span<const TrainingExample> examples) {
  std::uint64_t state = 0x243F6A8885A308D3ULL;
  const auto mix = [&](std::uint64_t value) {
    state = (state ^ value) * 0x9E3779B97F4A7C15ULL;
    state ^= state >> 29U;
  };
  for (const TrainingExample& example : examples) {
    for (const auto* ids : {&example.prompt, &example.target}) {
      mix(ids->size());
      for (const std::int32_t id : *ids) mix(static_cast<std::uint32_t>(id));
    }
  }
  return state;
}

/// All that a run's result depends on, in words.
[[nodiscard]] inline std::string run_of(const std::string& run, std::span<const TrainingExample> examples,
                                        const TrainOptions& o) {
  return codegemm::concat(
      run, ", examples ", examples.size(), " ", hash_examples(examples), ", steps ", o.steps, ", batch ",
      o.batch, ", pass ", o.pass_tokens, ", sharing ", o.sharing, ", rate ", o.rate, ", warm-up ", o.warmup,
      ", schedule ", static_cast<int>(o.schedule), ", clip ", o.clip, ", betas ", o.adam.beta1, " ",
      o.adam.beta2, ", epsilon ", o.adam.epsilon, ", decay ", o.adam.weight_decay, ", seed ", o.seed);
}

/// The examples of each step: a stream of one shuffle of the data after the other, which depends on nothing
/// but the seed.
class ExampleOrder {
 public:
  ExampleOrder() = default;
  ExampleOrder(std::int64_t examples, const TrainOptions& options)
      : batch_(options.batch), seed_(options.seed), order_(static_cast<std::size_t>(examples)) {}

  [[nodiscard]] std::vector<std::size_t> of_step(std::int64_t step) {
    const auto count = static_cast<std::int64_t>(order_.size());
    std::vector<std::size_t> out;
    for (std::int64_t i = step * batch_; i < (step + 1) * batch_; ++i) {
      if (i / count != epoch_) shuffle(i / count);
      out.push_back(order_[static_cast<std::size_t>(i % count)]);
    }
    return out;
  }

 private:
  void shuffle(std::int64_t epoch) {
    for (std::size_t i = 0; i < order_.size(); ++i) order_[i] = i;
    codegemm::detail::SplitMix random(seed_ * 0x9E3779B97F4A7C15ULL + static_cast<std::uint64_t>(epoch));
    for (std::size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[random.next() % i]);
    epoch_ = epoch;
  }

  std::int64_t batch_ = 1;
  std::uint64_t seed_ = 1;
  std::vector<std::size_t> order_;  // of the epoch at hand
  std::int64_t epoch_ = -1;
};

/// Trainer::run() of whatever has step(), done() and save().
template <class AnyTrainer>
[[nodiscard]] Status run_steps(AnyTrainer& trainer, const std::string& path, std::int64_t save_every,
                               const std::function<void(const TrainProgress&)>& progress) {
  while (!trainer.done()) {
    const Result<TrainProgress> now = trainer.step();
    if (!now.ok()) {
      if (!path.empty() && now.status().code() == StatusCode::kInvalidArgument) {
        if (Status s = trainer.save(path); !s.ok()) return s;
      }
      return now.status();
    }
    if (progress) progress(*now);
    if (!path.empty() && (trainer.done() || (save_every > 0 && now->step % save_every == 0))) {
      if (Status s = trainer.save(path); !s.ok()) return s;
    }
  }
  return {};
}

}  // namespace detail

/// Minimizes -sum log P(y_t | y_<t, C_base) over the target tokens of examples. The base's cache of the first
/// shared_tokens() of each prompt is a constant; what follows the model runs itself, as it does when it
/// serves. A step's examples are the next of a stream of shuffled passes over the data, which depends on
/// nothing but the seed and the step, so that a run that goes on from a saved state gives the same bits as
/// one that was never stopped, for any number of workers.
template <LinearLayer Base>
class Trainer {
 public:
  /// `model` and `executor` must outlive the trainer. `run` names the base and the model (their
  /// fingerprints); options and data are added to it. Errors: kIncompatible for a base whose cache the model
  /// cannot read; kInvalidArgument for options, and for an example with its number (from 0); kOutOfMemory.
  [[nodiscard]] static Result<Trainer> create(TrainableModel<float>& model,
                                              std::shared_ptr<const LlamaModel<Base>> base,
                                              std::vector<TrainingExample> examples,
                                              const TrainOptions& options, const std::string& run,
                                              Executor& executor) {
    if (base == nullptr) return error(StatusCode::kNullPointer, "Trainer: no base");
    if (Status s = detail::check_train_options(options); !s.ok()) return s;
    if (Status s = check_compatible(base->config, model.config()); !s.ok()) return s;
    const ModelConfig& c = model.config();
    const std::int64_t most = std::min({options.max_tokens, c.context_length, base->config.context_length});
    if (examples.empty()) return error(StatusCode::kInvalidArgument, "Trainer: no examples");
    for (std::size_t i = 0; i < examples.size(); ++i) {
      if (Status s = validate(examples[i], most, c.vocab_size); !s.ok())
        return s.with_prefix(codegemm::concat("example ", i));
    }
    Result<FrozenBase<Base>> frozen = FrozenBase<Base>::create(std::move(base), most, executor.workers());
    if (!frozen.ok()) return frozen.status();
    Result<TrainPass<float>> pass =
        TrainPass<float>::create(c, std::max(options.pass_tokens, most), most, executor);
    if (!pass.ok()) return pass.status();
    try {
      Trainer out(model, *std::move(frozen), *std::move(pass), options, executor);
      out.run_ = detail::run_of(run, examples, options);
      out.examples_ = std::move(examples);
      out.order_ = detail::ExampleOrder(static_cast<std::int64_t>(out.examples_.size()), options);
      return out;
    } catch (const std::bad_alloc&) {
      return error(StatusCode::kOutOfMemory, "Trainer: no memory for the optimizer's moments of ",
                   model.parameter_count(), " parameters");
    }
  }

  /// Steps done, those of an earlier run included.
  [[nodiscard]] std::int64_t steps_done() const noexcept { return optimizer_.steps(); }
  [[nodiscard]] bool done() const noexcept { return steps_done() >= options_.steps; }  ///< all steps are done

  /// One step. kInvalidArgument where a loss or a gradient is not finite: the message names the step and the
  /// example or the parameter, and the parameters are those of the last good step. Other errors as those of
  /// TrainPass and FrozenBase.
  [[nodiscard]] Result<TrainProgress> step() {
    const std::int64_t number = steps_done();
    if (done()) return error(StatusCode::kInvalidArgument, "Trainer: all ", number, " steps are done");
    model_->zero_gradients();
    if (own_steps_ == 0) start_ = Clock::now();
    const std::vector<std::size_t> chosen = order_.of_step(number);
    std::int64_t targets = 0;
    for (const std::size_t i : chosen) targets += static_cast<std::int64_t>(examples_[i].target.size());
    double loss = 0.0;
    const Status status =
        for_passes(chosen, examples_, options_.sharing, true, 1.0F / static_cast<float>(targets),
                   [&](std::size_t example, std::span<const double> losses) {
                     for (std::size_t t = 0; t < losses.size(); ++t) {
                       if (!std::isfinite(losses[t])) {
                         return error(StatusCode::kInvalidArgument, "the loss became ", losses[t],
                                      " in step ", number + 1, ", example ", example, ", target token ", t,
                                      "; the parameters are those after ", number, " steps");
                       }
                       loss += losses[t];
                     }
                     tokens_ += examples_[example].tokens();
                     return Status();
                   });
    if (!status.ok()) return status;
    double squares = 0.0;
    for (const Parameter<float>& p : model_->parameters()) {
      double own = 0.0;
      for (const float g : p.gradient.span()) own += static_cast<double>(g) * static_cast<double>(g);
      if (!std::isfinite(own)) {
        return error(StatusCode::kInvalidArgument, "the gradient of ", p.name, " is not finite in step ",
                     number + 1, "; the parameters are those after ", number, " steps");
      }
      squares += own;
    }
    if (options_.clip > 0.0 && std::sqrt(squares) > options_.clip)
      scale_gradients(options_.clip / std::sqrt(squares));
    TrainProgress progress;
    progress.rate = options_.rate * rate_share(options_.schedule, number, options_.steps, options_.warmup);
    optimizer_.update(model_->parameters(), progress.rate, {}, *executor_);
    ++own_steps_;
    progress.step = number + 1;
    progress.steps = options_.steps;
    progress.loss = loss / static_cast<double>(targets);
    const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
    progress.tokens_per_second = seconds > 0.0 ? static_cast<double>(tokens_) / seconds : 0.0;
    progress.seconds_left =
        seconds / static_cast<double>(own_steps_) * static_cast<double>(options_.steps - progress.step);
    return progress;
  }

  /// All steps that are left, and saves the state to `path` (none if empty) every `save_every` steps and in
  /// the end, also where a loss is not finite: then that of the last good step.
  [[nodiscard]] Status run(const std::string& path, std::int64_t save_every,
                           const std::function<void(const TrainProgress&)>& progress = {}) {
    return detail::run_steps(*this, path, save_every, progress);
  }

  /// All that a resumed run needs, in one file that replaces the old one when it is whole.
  [[nodiscard]] Status save(const std::string& path) {
    return save_state(path, run_, model_->parameters(), optimizer_);
  }
  /// Goes on from a saved state of the same run. Errors of load_state().
  [[nodiscard]] Status load(const std::string& path) {
    if (Status s = load_state(path, run_, model_->parameters(), optimizer_); !s.ok()) return s;
    return {};
  }

  /// Mean loss over the target tokens of other examples, reading `sharing` of each prompt from the base:
  /// naive sharing is a model that was trained with 0 and is judged with 1. Errors as step().
  [[nodiscard]] Result<double> evaluate(std::span<const TrainingExample> examples, double sharing) {
    const std::int64_t most = std::min(pass_.max_context(), options_.max_tokens);
    std::vector<std::size_t> all(examples.size());
    for (std::size_t i = 0; i < examples.size(); ++i) {
      all[i] = i;
      if (Status s = validate(examples[i], most, model_->config().vocab_size); !s.ok())
        return s.with_prefix(codegemm::concat("example ", i));
    }
    double sum = 0.0;
    std::int64_t count = 0;
    const Status status =
        for_passes(all, examples, sharing, false, 1.0F, [&](std::size_t, std::span<const double> losses) {
          for (const double loss : losses) sum += loss;
          count += static_cast<std::int64_t>(losses.size());
          return Status();
        });
    if (!status.ok()) return status;
    return count > 0 ? sum / static_cast<double>(count) : 0.0;
  }

 private:
  using Clock = std::chrono::steady_clock;

  Trainer(TrainableModel<float>& model, FrozenBase<Base> base, TrainPass<float> pass,
          const TrainOptions& options, Executor& executor)
      : model_(&model),
        executor_(&executor),
        base_(std::move(base)),
        pass_(std::move(pass)),
        options_(options),
        optimizer_(model.parameters(), options.adam) {}

  /// Runs examples[chosen] in passes packed by length, and calls visit(example, losses of its target).
  template <class Visit>
  Status for_passes(const std::vector<std::size_t>& chosen, std::span<const TrainingExample> examples,
                    double sharing, bool backward, float scale, Visit&& visit) {
    try {
      std::vector<std::int64_t> rows;
      rows.reserve(chosen.size());
      for (const std::size_t i : chosen) rows.push_back(example_rows(examples[i], sharing));
      std::vector<double> losses;
      for (const std::vector<std::size_t>& pack : pack_by_length(rows, options_.pass_tokens)) {
        LossBatch<float> batch;
        std::vector<BaseKv> caches;
        for (const std::size_t at : pack) {
          const TrainingExample& example = examples[chosen[at]];
          const std::int64_t shared =
              shared_tokens(static_cast<std::int64_t>(example.prompt.size()), sharing);
          Result<BaseKv> kv =
              base_.run(std::span(example.prompt).first(static_cast<std::size_t>(shared)), *executor_);
          if (!kv.ok()) return kv.status();
          caches.push_back(*std::move(kv));
        }
        for (std::size_t i = 0; i < pack.size(); ++i)
          append_example(examples[chosen[pack[i]]], caches[i], batch);
        if (Status s = pass_.run(*model_, batch, backward, scale, losses); !s.ok()) return s;
        std::size_t first = 0;
        for (const std::size_t at : pack) {
          const std::size_t count = examples[chosen[at]].target.size();
          if (Status s = visit(chosen[at], std::span<const double>(losses).subspan(first, count)); !s.ok())
            return s;
          first += count;
        }
      }
      return {};
    } catch (const std::bad_alloc&) {
      return error(StatusCode::kOutOfMemory, "Trainer: no memory for a step of ", chosen.size(), " examples");
    }
  }

  void scale_gradients(double factor) {
    for (Parameter<float>& p : model_->parameters()) {
      detail::for_elements(p.gradient.size(), *executor_, [&](std::int64_t first, std::int64_t count) {
        detail::TrainArray<float>(p.gradient.data() + first, count) *= static_cast<float>(factor);
      });
    }
  }

  TrainableModel<float>* model_;
  Executor* executor_;
  FrozenBase<Base> base_;
  TrainPass<float> pass_;
  TrainOptions options_;
  AdamW<float> optimizer_;
  std::string run_;
  std::vector<TrainingExample> examples_;
  detail::ExampleOrder order_;
  std::int64_t own_steps_ = 0;  // of this run
  std::int64_t tokens_ = 0;
  Clock::time_point start_ = Clock::now();
};

}  // namespace prefillshare
