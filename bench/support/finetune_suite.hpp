// SPDX-License-Identifier: Apache-2.0
//
// bench/support/finetune_suite.hpp - PrefillShare's claim, measured: the same tasks by the base, by full
// fine-tuning, by cache-conditioned fine-tuning and by naive sharing; then over the sharing ratio, in a few
// bits, and as specialists of low rank.
// See: PrefillShare (arXiv 2602.12029) table 1 and figure 2.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <common/low_rank.hpp>
#include <common/model_loader.hpp>
#include <common/progress.hpp>
#include <common/tokenizer.hpp>

#include "finetune_data.hpp"
#include "finetune_plot.hpp"
#include "finetune_quantize.hpp"
#include "finetune_results.hpp"
#include "finetune_runs.hpp"

namespace codegemm::bench {

template <FinetuneBackend Backend>
class FinetuneSuite {
 public:
  /// All that is passed by reference outlives the suite. Throws UserError.
  FinetuneSuite(const FinetuneOptions& options, const prefillshare::examples::LoadedModel& loaded,
                const prefillshare::examples::Tokenizer& tokenizer, Executor& executor, Suite frame)
      : o_(options),
        loaded_(loaded),
        tokenizer_(tokenizer),
        executor_(executor),
        frame_(std::move(frame)),
        runs_(options.work) {
    std::int64_t most = 0;
    for (const std::string& name : o_.tasks) {
      data_.push_back(FinetuneData::make(name, o_, tokenizer));
      most = std::max(most, data_.back().most_tokens(o_.answer_tokens));
    }
    max_tokens_ = most;
    backend_.emplace(unwrap(Backend::create(loaded.model, most, executor)));
    total_ = count_runs();
  }

  /// All runs that are not done yet, as far as the time goes; then the results. Whether all are done.
  bool run() {
    if (o_.has_stage("claim")) claim();
    if (o_.has_stage("specialists")) specialists();
    if (o_.has_stage("quantized")) quantized();
    if (o_.has_stage("curve")) curve();
    const std::vector<FinetuneRow> table = rows();
    print_rows(table);
    if (stopped_) {
      std::printf("\nstopped after %lld of %lld runs (--time-limit); the same command goes on from %s\n",
                  static_cast<long long>(done_), static_cast<long long>(total_), o_.work.c_str());
    }
    write(table);
    return !stopped_;
  }

  /// What is known so far.
  [[nodiscard]] std::vector<FinetuneRow> rows() const { return results().rows(); }

 private:
  using Clock = std::chrono::steady_clock;
  using Module = typename Backend::Module;

  template <class T>
  static T unwrap(Result<T> result) {
    return prefillshare::examples::unwrap(std::move(result));
  }

  // ---- The stages.

  void claim() {
    for (const FinetuneData& data : data_) {
      one(concat(data.task->name, "-base"), "base", [&](FinetuneRun& run) {
        const Module module = unwrap(backend_->load(loaded_.model));
        judge(data, module, {0.0}, run);
      });
    }
    for (const FinetuneData& data : data_) both(data, o_.first_rate(), 1);
    for (const double rate : o_.rates) {
      for (const FinetuneData& data : data_) both(data, rate, 1);
    }
    for (std::int64_t seed = 2; seed <= o_.seeds; ++seed) {
      for (const FinetuneData& data : data_) {
        for (const char* method : {"full", kSharedRuns}) {
          if (const auto rate = best_rate(data.task->name, method))
            trained(data, method, method == std::string("full") ? 0.0 : 1.0, *rate, seed);
        }
      }
    }
  }
  void both(const FinetuneData& data, double rate, std::int64_t seed) {
    trained(data, "full", 0.0, rate, seed);
    trained(data, kSharedRuns, 1.0, rate, seed);
  }

  /// Modules that are trained for each ratio of the curve; naive sharing is judged with its model.
  void curve() {
    for (std::int64_t seed = 1; seed <= std::min(o_.seeds, o_.curve_seeds); ++seed) {
      for (const FinetuneData& data : data_) {
        const auto rate = best_rate(data.task->name, kSharedRuns);
        for (const double sharing : o_.sharing) {
          if (rate) trained(data, shared_at(sharing), sharing, *rate, seed);
        }
      }
    }
  }

  void specialists() {
    for (const FinetuneData& data : data_) {
      for (const double rate : o_.low_rank_rates) {
        const std::string name = run_name(data.task->name, "low-rank", rate, 1);
        const std::string file = runs_.path(name + ".safetensors");
        one(
            name, "low-rank",
            [&](FinetuneRun& run) {
              TrainJob job = job_of(data, 1.0, rate, 1);
              job.kind = ParameterKind::kLowRank;
              const std::optional<Module> module = train(data, job, run);
              if (!module) return;
              prefillshare::examples::Specialist made{data.task->name, loaded_.fingerprint,
                                                      unwrap(backend_->low_rank(*module))};
              prefillshare::examples::check(write_specialist(file, made));
            },
            o_.specialists.empty() || std::filesystem::exists(file));
      }
      const auto rate = best_rate(data.task->name, "low-rank");
      if (!rate) continue;
      const std::string file = runs_.path(run_name(data.task->name, "low-rank", *rate, 1) + ".safetensors");
      const std::string method = concat("low-rank-", kSpecialistFormat);
      one(run_name(data.task->name, method, *rate, 1), method, [&](FinetuneRun& run) {
        const auto kept =
            unwrap(prefillshare::examples::read_specialist(file, *loaded_.model, loaded_.fingerprint));
        const DenseModelPtr merged = unwrap(prefillshare::examples::merge(*loaded_.model, kept.deltas));
        const Matrices matrices =
            quantize_plainly(*merged, unwrap(parse_format(kSpecialistFormat)), executor_);
        judge(data, unwrap(backend_->load(dequantize_module(*merged, matrices))), {1.0}, run);
        run.rate = *rate;
      });
      if (o_.specialists.empty() || !std::filesystem::exists(file)) continue;
      std::filesystem::create_directories(o_.specialists);
      std::filesystem::copy_file(file, concat(o_.specialists, "/", data.task->name, ".safetensors"),
                                 std::filesystem::copy_options::overwrite_existing);
    }
  }

  void quantized() {
    for (std::int64_t seed = 1; seed <= std::min(o_.seeds, o_.quantized_seeds); ++seed) {
      for (const std::string& format : o_.formats) {
        for (const FinetuneData& data : data_) quantized(data, format, seed);
      }
    }
  }
  void quantized(const FinetuneData& data, const std::string& format, std::int64_t seed) {
    const std::string task = data.task->name;
    const auto rate = best_rate(task, kSharedRuns);
    if (!rate) return;
    const std::string plain = concat(kSharedRuns, "-", format);
    const std::string key = concat(key_of(task), ", ", run_name(task, plain, *rate, seed));
    const std::string folder = runs_.path(concat("layers-", std::hash<std::string>()(key)));
    DenseModelPtr dense;
    Matrices matrices;
    const auto prepare = [&] {
      if (dense != nullptr) return;
      dense = tuned(data, *rate, seed);
      matrices = quantize_module(dense, key, unwrap(ModuleFormat::parse(format)),
                                 data.texts(o_.calibration_items), folder, executor_);
    };
    // One rate, the tuned module's, names them all; the rate of the adaptation stands in the method.
    one(run_name(task, plain, *rate, seed), plain, [&](FinetuneRun& run) {
      prepare();
      judge(data, unwrap(backend_->load(dequantize_module(*dense, matrices))), {1.0}, run);
      run.rate = *rate;
      run.seed = seed;
    });
    for (const double adapt : o_.adapt_rates) {
      if (seed > 1 && best_rate(task, plain + "-adapted") != adapt) continue;
      const std::string method = plain + "-adapted";
      one(run_name(task, method, adapt, seed), method, [&](FinetuneRun& run) {
        prepare();
        TrainJob job = job_of(data, 1.0, adapt, seed);
        job.start = dense;
        job.kind = ParameterKind::kCodebooks;
        job.matrices = &matrices;
        job.options.steps = o_.adapt_steps;
        (void)train(data, job, run);
      });
    }
    std::error_code ignored;
    if (!stopped_) std::filesystem::remove_all(folder, ignored);
  }

  // ---- Runs.

  [[nodiscard]] std::int64_t count_runs() const {
    const auto size = [](const auto& list) { return static_cast<std::int64_t>(list.size()); };
    std::int64_t each = 0;
    if (o_.has_stage("claim")) each += 1 + 2 * (size(o_.rates) + o_.seeds - 1);
    if (o_.has_stage("specialists")) each += size(o_.low_rank_rates) + 1;
    if (o_.has_stage("curve")) each += size(o_.sharing) * std::min(o_.seeds, o_.curve_seeds);
    if (o_.has_stage("quantized")) {
      each += size(o_.formats) * (1 + size(o_.adapt_rates));
      each += (std::min(o_.seeds, o_.quantized_seeds) - 1) * size(o_.formats) * 2;
    }
    return each * size(o_.tasks);
  }

  /// Does what is not done yet and is in time. `whole`: whether what the run leaves beside its numbers is
  /// there.
  void one(const std::string& name, const std::string& method, const std::function<void(FinetuneRun&)>& make,
           bool whole = true) {
    if (find(name) != nullptr) return;
    const std::string task = name.substr(0, name.find('-'));
    const std::string key = key_of(task);
    if (std::optional<FinetuneRun> kept = runs_.find(name, key); kept && whole) {
      found_.emplace(name, *std::move(kept));
      ++done_;
      return;
    }
    const double spent = seconds_since(start_);
    double& longest = longest_[method];
    if (stopped_ || (o_.time_limit > 0.0 && spent + longest > o_.time_limit)) {
      stopped_ = true;
      return;
    }
    const auto begin = Clock::now();
    FinetuneRun run;
    run.task = task;
    run.method = method;
    label_ = concat("[", done_ + 1, "/", total_, "] ", name);
    make(run);
    run.seconds = seconds_since(begin);
    longest = std::max(longest, run.seconds);
    runs_.keep(name, key, run);
    ++done_;
    ++made_;
    const double left =
        seconds_since(start_) / static_cast<double>(made_) * static_cast<double>(total_ - done_);
    std::string points;
    for (const auto& [sharing, accuracy] : run.accuracy) {
      char text[32];
      std::snprintf(text, sizeof(text), " %.1f%% at %.2f", accuracy, sharing);
      points += text;
    }
    std::printf("%s: right%s; %.1f s, %lld:%02lld left\n", label_.c_str(), points.c_str(), run.seconds,
                std::llround(left) / 60, std::llround(left) % 60);
    std::fflush(stdout);
    found_.emplace(name, std::move(run));
  }

  [[nodiscard]] TrainJob job_of(const FinetuneData& data, double sharing, double rate,
                                std::int64_t seed) const {
    TrainJob job;
    job.start = loaded_.model;
    job.kind = o_.low_rank ? ParameterKind::kLowRank : ParameterKind::kFull;
    job.low_rank.rank = o_.rank;
    job.low_rank.alpha = o_.alpha;
    job.low_rank.seed = static_cast<std::uint64_t>(seed);
    job.examples = data.train.examples;
    job.options.steps = o_.steps;
    job.options.batch = o_.batch;
    job.options.pass_tokens = o_.pass_tokens;
    job.options.max_tokens = max_tokens_;
    job.options.sharing = sharing;
    job.options.rate = rate;
    job.options.warmup = o_.warmup;
    job.options.clip = o_.clip;
    job.options.seed = static_cast<std::uint64_t>(seed);
    return job;
  }

  /// Trains and judges, at the ratio of the training and, if that is 0, at all others too. Nothing where the
  /// loss did not stay finite: no answer counts then.
  std::optional<Module> train(const FinetuneData& data, TrainJob& job, FinetuneRun& run) {
    run.rate = job.options.rate;
    run.seed = static_cast<std::int64_t>(job.options.seed);
    run.trained_at = job.options.sharing;
    prefillshare::examples::ProgressLine line(label_);
    job.progress = [&](const prefillshare::TrainProgress& now) {
      char text[96];
      std::snprintf(text, sizeof(text), "loss %.4f, %.0f tokens/s, %.0f s left", now.loss,
                    now.tokens_per_second, now.seconds_left);
      line.update(now.step, now.steps, text);
      run.tokens_per_second = now.tokens_per_second;
    };
    std::vector<double> sharing = {run.trained_at};
    if (run.trained_at == 0.0) {
      sharing.insert(sharing.end(), o_.sharing.begin(), o_.sharing.end());
      sharing.push_back(1.0);
    }
    Result<Module> module = backend_->train(job);
    if (!module.ok() && module.status().code() == StatusCode::kInvalidArgument &&
        module.status().message().find("parameters are those after") != std::string::npos) {
      std::fprintf(stderr, "%s: %s\n", label_.c_str(), module.status().message().c_str());
      run.loss = 1e9;
      for (const double at : sharing) run.accuracy[at] = 0.0;
      return std::nullopt;
    }
    Module trained = unwrap(std::move(module));
    judge(data, trained, sharing, run);
    return trained;
  }

  /// Full fine-tuning (sharing 0), or a module for the base's cache.
  void trained(const FinetuneData& data, const std::string& method, double sharing, double rate,
               std::int64_t seed) {
    one(run_name(data.task->name, method, rate, seed), method, [&](FinetuneRun& run) {
      TrainJob job = job_of(data, sharing, rate, seed);
      const std::optional<Module> module = train(data, job, run);
      if (!module || method != kSharedRuns || !o_.has_stage("quantized") || seed > o_.quantized_seeds) return;
      Tuned& kept = tuned_[concat(data.task->name, seed)];
      if (kept.dense == nullptr || FinetuneResults::better(run, kept.run))
        kept = {run, unwrap(backend_->dense(*module))};
    });
  }

  /// The module of PrefillShare with that rate and seed: kept, or trained again.
  [[nodiscard]] DenseModelPtr tuned(const FinetuneData& data, double rate, std::int64_t seed) {
    Tuned& kept = tuned_[concat(data.task->name, seed)];
    if (kept.dense == nullptr || kept.run.rate != rate) {
      TrainJob job = job_of(data, 1.0, rate, seed);
      kept.run.rate = rate;
      kept.dense = unwrap(backend_->dense(unwrap(backend_->train(job))));
    }
    return kept.dense;
  }

  /// Answers of the module: on the development items at the ratio of its training, on the test items at all.
  void judge(const FinetuneData& data, const Module& module, const std::vector<double>& sharing,
             FinetuneRun& run) {
    const double own = sharing.front();
    run.trained_at = own;
    run.development = points(data, module, data.development, own);
    run.loss = unwrap(backend_->loss(module, data.development.examples, own));
    for (const double at : sharing) run.accuracy[at] = points(data, module, data.test, at);
  }
  [[nodiscard]] double points(const FinetuneData& data, const Module& module, const FinetuneItems& items,
                              double sharing) {
    const std::vector<Tokens> answers =
        unwrap(backend_->generate(module, items.prompts, sharing, o_.answer_tokens, data.stop));
    std::vector<std::string> texts;
    texts.reserve(answers.size());
    for (const Tokens& answer : answers) texts.push_back(unwrap(tokenizer_.decode(answer, false)));
    const std::int64_t right = prefillshare::examples::count_right(*data.task, items.items, texts);
    return 100.0 * static_cast<double>(right) / static_cast<double>(items.items.size());
  }

  /// All that a run's numbers depend on beside its own name.
  [[nodiscard]] std::string key_of(const std::string& task) {
    std::string& key = keys_[task];
    if (!key.empty()) return key;
    for (const FinetuneData& data : data_) {
      if (task != data.task->name) continue;
      key = concat("base ", loaded_.fingerprint, ", on ", backend_->device(), ", items ", data.hash(),
                   ", answers ", o_.answer_tokens, ", stop ", data.stop.size(), ", steps ", o_.steps,
                   ", batch ", o_.batch, ", pass ", o_.pass_tokens, ", warm-up ", o_.warmup, ", clip ",
                   o_.clip, ", low rank ", o_.low_rank, " ", o_.rank, " ", o_.alpha, ", calibration ",
                   o_.calibration_items, ", adapt ", o_.adapt_steps, ", sharing");
      for (const double sharing : o_.sharing) key += concat(" ", sharing);
      key += ", version 1";
    }
    return key;
  }

  [[nodiscard]] FinetuneResults results() const { return {o_, found_}; }
  [[nodiscard]] const FinetuneRun* find(const std::string& name) const { return results().find(name); }
  [[nodiscard]] std::optional<double> best_rate(const std::string& task, const std::string& method) const {
    return results().best_rate(task, method);
  }

  void write(const std::vector<FinetuneRow>& table) {
    if (!o_.json_path.empty()) {
      nlohmann::json out = frame_json(frame_, rows_json(table));
      out["device"] = backend_->device();
      out["base"] = loaded_.fingerprint;
      out["complete"] = !stopped_;
      out.update(results().summary());
      prefillshare::examples::check(write_text(out.dump(2) + '\n', o_.json_path));
    }
    if (o_.plot.empty()) return;
    prefillshare::examples::check(write_text(finetune_svg(bars_of(table), curves_of(table)), o_.plot));
  }

  struct Tuned {
    FinetuneRun run;
    DenseModelPtr dense;
  };

  FinetuneOptions o_;
  const prefillshare::examples::LoadedModel& loaded_;
  const prefillshare::examples::Tokenizer& tokenizer_;
  Executor& executor_;
  Suite frame_;
  FinetuneRuns runs_;
  std::vector<FinetuneData> data_;
  std::int64_t max_tokens_ = 0;
  std::optional<Backend> backend_;
  std::map<std::string, FinetuneRun> found_;  // by name
  std::map<std::string, std::string> keys_;   // by task
  std::map<std::string, double> longest_;     // seconds of a run, by method
  std::map<std::string, Tuned> tuned_;        // by task and seed
  std::string label_;
  Clock::time_point start_ = Clock::now();
  std::int64_t total_ = 0;
  std::int64_t done_ = 0;
  std::int64_t made_ = 0;  // by this process
  bool stopped_ = false;
};

}  // namespace codegemm::bench
