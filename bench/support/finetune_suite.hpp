// SPDX-License-Identifier: Apache-2.0
//
// bench/support/finetune_suite.hpp - PrefillShare's claim, measured: the same tasks by the base, by full
// fine-tuning, by cache-conditioned fine-tuning and by naive sharing; then over the sharing ratio, in a few
// bits, and as specialists of low rank.
// See: PrefillShare (arXiv 2602.12029) table 1 and figure 2.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <codegemm/base/thread_pool.hpp>
#include <common/low_rank.hpp>
#include <common/model_loader.hpp>
#include <common/tokenizer.hpp>

#include "finetune_data.hpp"
#include "finetune_ledger.hpp"
#include "finetune_plot.hpp"
#include "finetune_quantize.hpp"
#include "finetune_queue.hpp"
#include "finetune_results.hpp"
#include "finetune_runs.hpp"
#include "finetune_worker.hpp"

namespace codegemm::bench {

[[nodiscard]] inline int threads_of(const FinetuneOptions& options) {
  return options.threads > 0 ? options.threads : static_cast<int>(std::thread::hardware_concurrency());
}

/// Pools for `jobs` runs side by side. Half of the runs need one at a time (FinetuneQueue): each gets the
/// threads for that.
[[nodiscard]] inline std::vector<std::unique_ptr<ThreadPool>> make_pools(const FinetuneOptions& options) {
  const int jobs = static_cast<int>(options.jobs);
  const int busy = std::max(1, jobs / 2);  // pools at a time; the other runs need a thread each
  const int threads = std::max(1, (threads_of(options) - (jobs - busy)) / busy);
  std::vector<std::unique_ptr<ThreadPool>> out;
  for (std::int64_t job = 0; job < options.jobs; ++job) out.push_back(std::make_unique<ThreadPool>(threads));
  return out;
}

template <FinetuneBackend Backend>
class FinetuneSuite {
 public:
  using Pools = std::span<const std::unique_ptr<ThreadPool>>;

  /// As many runs side by side as there are pools. All that is passed by reference outlives the suite. Throws
  /// UserError.
  FinetuneSuite(const FinetuneOptions& options, const prefillshare::examples::LoadedModel& loaded,
                const prefillshare::examples::Tokenizer& tokenizer, Pools pools, Suite frame)
      : o_(options),
        loaded_(loaded),
        tokenizer_(tokenizer),
        frame_(std::move(frame)),
        ledger_(o_, count_runs(options)) {
    std::vector<std::future<FinetuneData>> made;  // seconds each
    for (const std::string& name : o_.tasks) {
      made.push_back(std::async(pools.size() > 1 ? std::launch::async : std::launch::deferred,
                                [&, name] { return FinetuneData::make(name, o_, tokenizer); }));
    }
    for (std::future<FinetuneData>& data : made) {
      data_.push_back(data.get());
      max_tokens_ = std::max(max_tokens_, data_.back().most_tokens(o_.answer_tokens));
    }
    workers_.reserve(pools.size());
    const bool alone = pools.size() == 1;
    for (const std::unique_ptr<ThreadPool>& pool : pools) {
      workers_.emplace_back(o_, tokenizer, *pool, unwrap(Backend::create(loaded.model, max_tokens_, *pool)),
                            alone);
    }
    for (const FinetuneData& data : data_) keys_[data.task->name] = key_of(data);
  }

  /// All runs that are not done yet, as far as the time goes; then the results. Whether all are done.
  bool run() {
    FinetuneQueue queue;
    std::map<std::string, Jobs> first_seed;  // the jobs that choose a rate, by task and method
    if (o_.has_stage("claim")) claim(queue, first_seed);
    if (o_.has_stage("quantized")) quantized(queue, first_seed);
    if (o_.has_stage("specialists")) specialists(queue);
    if (o_.has_stage("curve")) curve(queue, first_seed);
    queue.run(workers_.size());
    const std::vector<FinetuneRow> table = rows();
    print_rows(table);
    print_times();
    if (ledger_.stopped()) {
      std::printf("\nstopped after %lld of %lld runs (--time-limit); the same command goes on from %s\n",
                  static_cast<long long>(ledger_.done()), static_cast<long long>(ledger_.total()),
                  o_.work.c_str());
    }
    write(table);
    return !ledger_.stopped();
  }

  /// What is known so far.
  [[nodiscard]] std::vector<FinetuneRow> rows() const { return ledger_.results().rows(); }

 private:
  using Worker = FinetuneWorker<Backend>;
  using Module = typename Backend::Module;
  using Jobs = std::vector<std::size_t>;

  /// A module that is quantized later.
  struct Tuned {
    std::mutex mutex;
    FinetuneRun run;
    DenseModelPtr dense;
  };
  /// The run at hand.
  struct Context {
    const FinetuneData& data;
    Worker& worker;
    FinetuneRun& run;
    const std::string& label;

    [[nodiscard]] std::optional<Module> train(TrainJob& job) const {
      return worker.train(data, job, run, label);
    }
    void judge(const Module& module) const { worker.judge(data, module, {1.0}, run); }
  };
  using Make = std::function<void(const Context&)>;

  template <class T>
  static T unwrap(Result<T> result) {
    return prefillshare::examples::unwrap(std::move(result));
  }

  // ---- The stages.

  void claim(FinetuneQueue& queue, std::map<std::string, Jobs>& first_seed) {
    for (const FinetuneData& data : data_) {
      queue.add([this, &data](std::size_t worker) {
        one(worker, data, "claim", concat(data.task->name, "-base"), "base", [this](const Context& c) {
          c.worker.judge(c.data, unwrap(c.worker.backend().load(loaded_.model)), {0.0}, c.run);
        });
      });
    }
    std::vector<double> rates = {o_.first_rate()};
    for (const double rate : o_.rates) {
      if (rate != rates.front()) rates.push_back(rate);
    }
    for (const double rate : rates) {
      for (const FinetuneData& data : data_) {
        for (const char* method : {"full", kSharedRuns}) {
          first_seed[concat(data.task->name, method)].push_back(
              queue.add([this, &data, method, rate](std::size_t worker) {
                trained(worker, data, "claim", method, method == std::string("full") ? 0.0 : 1.0, rate, 1);
              }));
        }
      }
    }
    for (std::int64_t seed = 2; seed <= o_.seeds; ++seed) {
      for (const FinetuneData& data : data_) {
        for (const char* method : {"full", kSharedRuns}) {
          const auto job = [this, &data, method, seed](std::size_t worker) {
            if (const auto rate = ledger_.best_rate(data.task->name, method))
              trained(worker, data, "claim", method, method == std::string("full") ? 0.0 : 1.0, *rate, seed);
          };
          const std::size_t added = queue.add(job, first_seed[concat(data.task->name, method)]);
          if (method == std::string(kSharedRuns) && seed <= o_.quantized_seeds)
            first_seed[concat(data.task->name, seed)].push_back(added);
        }
      }
    }
  }

  /// Modules that are trained for each ratio of the curve; naive sharing is judged with its model.
  void curve(FinetuneQueue& queue, std::map<std::string, Jobs>& first_seed) {
    for (std::int64_t seed = 1; seed <= std::min(o_.seeds, o_.curve_seeds); ++seed) {
      for (const FinetuneData& data : data_) {
        for (const double sharing : o_.sharing) {
          const auto job = [this, &data, sharing, seed](std::size_t worker) {
            if (const auto rate = ledger_.best_rate(data.task->name, kSharedRuns))
              trained(worker, data, "curve", shared_at(sharing), sharing, *rate, seed);
          };
          queue.add(job, first_seed[concat(data.task->name, kSharedRuns)]);
        }
      }
    }
  }

  void specialists(FinetuneQueue& queue) {
    for (const FinetuneData& data : data_) {
      Jobs rates;
      for (const double rate : o_.low_rank_rates) {
        rates.push_back(queue.add([this, &data, rate](std::size_t worker) { low_rank(worker, data, rate); }));
      }
      queue.add([this, &data](std::size_t worker) { specialist(worker, data); }, rates, true);
    }
  }
  void low_rank(std::size_t worker, const FinetuneData& data, double rate) {
    const std::string name = run_name(data.task->name, "low-rank", rate, 1);
    const std::string file = ledger_.path(name + ".safetensors");
    const Make make = [&](const Context& c) {
      TrainJob job = job_of(data, 1.0, rate, 1);
      job.kind = ParameterKind::kLowRank;
      const std::optional<Module> module = c.train(job);
      if (!module) return;
      prefillshare::examples::Specialist made{data.task->name, loaded_.fingerprint,
                                              unwrap(c.worker.backend().low_rank(*module))};
      prefillshare::examples::check(write_specialist(file, made));
    };
    one(worker, data, "specialists", name, "low-rank", make,
        o_.specialists.empty() || std::filesystem::exists(file));
  }
  /// The best one of a task, stored small.
  void specialist(std::size_t worker, const FinetuneData& data) {
    const auto rate = ledger_.best_rate(data.task->name, "low-rank");
    if (!rate) return;
    const std::string file = ledger_.path(run_name(data.task->name, "low-rank", *rate, 1) + ".safetensors");
    const std::string method = concat("low-rank-", kSpecialistFormat);
    const auto make = [&](const Context& c) {
      const auto kept =
          unwrap(prefillshare::examples::read_specialist(file, *loaded_.model, loaded_.fingerprint));
      const DenseModelPtr merged = unwrap(prefillshare::examples::merge(*loaded_.model, kept.deltas));
      const Matrices matrices =
          quantize_plainly(*merged, unwrap(parse_format(kSpecialistFormat)), c.worker.pool());
      c.judge(unwrap(c.worker.backend().load(dequantize_module(*merged, matrices))));
      c.run.rate = *rate;
    };
    one(worker, data, "specialists", run_name(data.task->name, method, *rate, 1), method, make);
    if (o_.specialists.empty() || !std::filesystem::exists(file)) return;
    std::filesystem::create_directories(o_.specialists);
    std::filesystem::copy_file(file, concat(o_.specialists, "/", data.task->name, ".safetensors"),
                               std::filesystem::copy_options::overwrite_existing);
  }

  void quantized(FinetuneQueue& queue, std::map<std::string, Jobs>& first_seed) {
    std::map<std::string, std::size_t> first;  // jobs of the first seed, by task and format
    for (std::int64_t seed = 1; seed <= std::min(o_.seeds, o_.quantized_seeds); ++seed) {
      for (const std::string& format : o_.formats) {
        for (const FinetuneData& data : data_) {
          Jobs after = first_seed[concat(data.task->name, kSharedRuns)];
          if (seed > 1) {
            const Jobs& tuned = first_seed[concat(data.task->name, seed)];
            after.insert(after.end(), tuned.begin(), tuned.end());
            after.push_back(first.at(concat(data.task->name, format)));
          }
          const auto job = [this, &data, format, seed](std::size_t worker) {
            quantized(worker, data, format, seed);
          };
          const std::size_t added = queue.add(job, after, true);
          if (seed == 1) first[concat(data.task->name, format)] = added;
        }
      }
    }
  }
  void quantized(std::size_t worker, const FinetuneData& data, const std::string& format, std::int64_t seed) {
    const std::string task = data.task->name;
    const auto rate = ledger_.best_rate(task, kSharedRuns);
    if (!rate) return;
    const std::string plain = concat(kSharedRuns, "-", format);
    const std::string key = concat(keys_.at(task), ", ", run_name(task, plain, *rate, seed));
    const std::string folder = ledger_.path(concat("layers-", std::hash<std::string>()(key)));
    DenseModelPtr dense;
    Matrices matrices;
    const auto prepare = [&](const Context& c) {
      if (dense != nullptr) return;
      dense = tuned(c, *rate, seed);
      matrices = quantize_module(dense, key, unwrap(ModuleFormat::parse(format)), o_.quantizer,
                                 data.texts(o_.calibration_items), folder, c.worker.backend().quantizer(),
                                 c.worker.pool());
    };
    // One rate, the tuned module's, names them all; the rate of the adaptation stands in the method.
    one(worker, data, "quantized", run_name(task, plain, *rate, seed), plain, [&](const Context& c) {
      prepare(c);
      c.judge(unwrap(c.worker.backend().load(dequantize_module(*dense, matrices))));
      c.run.rate = *rate;
      c.run.seed = seed;
    });
    for (const double adapt : o_.adapt_rates) {
      if (seed > 1 && ledger_.best_rate(task, plain + "-adapted") != adapt) continue;
      const std::string method = plain + "-adapted";
      one(worker, data, "quantized", run_name(task, method, adapt, seed), method, [&](const Context& c) {
        prepare(c);
        TrainJob job = job_of(data, 1.0, adapt, seed);
        job.start = dense;
        job.kind = ParameterKind::kCodebooks;
        job.matrices = &matrices;
        job.options.steps = o_.adapt_steps;
        (void)c.train(job);
      });
    }
    std::error_code ignored;
    if (!ledger_.stopped()) std::filesystem::remove_all(folder, ignored);
  }

  // ---- Runs.

  [[nodiscard]] static std::int64_t count_runs(const FinetuneOptions& o) {
    const auto size = [](const auto& list) { return static_cast<std::int64_t>(list.size()); };
    std::int64_t each = 0;
    if (o.has_stage("claim")) each += 1 + 2 * (size(o.rates) + o.seeds - 1);
    if (o.has_stage("specialists")) each += size(o.low_rank_rates) + 1;
    if (o.has_stage("curve")) each += size(o.sharing) * std::min(o.seeds, o.curve_seeds);
    if (o.has_stage("quantized")) {
      each += size(o.formats) * (1 + size(o.adapt_rates));
      each += (std::min(o.seeds, o.quantized_seeds) - 1) * size(o.formats) * 2;
    }
    return each * size(o.tasks);
  }

  /// As FinetuneLedger::one().
  void one(std::size_t worker, const FinetuneData& data, const char* stage, const std::string& name,
           const std::string& method, const Make& make, bool whole = true) {
    ledger_.one(
        stage, name, method, keys_.at(data.task->name),
        [&](FinetuneRun& run, const std::string& label) {
          make({data, workers_[worker], run, label});
        },
        whole);
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

  /// Full fine-tuning (sharing 0), or a module for the base's cache.
  void trained(std::size_t worker, const FinetuneData& data, const char* stage, const std::string& method,
               double sharing, double rate, std::int64_t seed) {
    one(worker, data, stage, run_name(data.task->name, method, rate, seed), method, [&](const Context& c) {
      TrainJob job = job_of(data, sharing, rate, seed);
      const std::optional<Module> module = c.train(job);
      if (!module || method != kSharedRuns || !o_.has_stage("quantized") || seed > o_.quantized_seeds) return;
      Tuned& kept = tuned_of(data, seed);
      const std::lock_guard lock(kept.mutex);
      if (kept.dense != nullptr && !FinetuneResults::better(c.run, kept.run)) return;
      kept.run = c.run;
      kept.dense = unwrap(c.worker.backend().dense(*module));
    });
  }

  [[nodiscard]] Tuned& tuned_of(const FinetuneData& data, std::int64_t seed) {
    const std::lock_guard lock(tuned_mutex_);
    return tuned_[concat(data.task->name, seed)];
  }
  /// The module of PrefillShare with that rate and seed: kept, or trained again.
  [[nodiscard]] DenseModelPtr tuned(const Context& c, double rate, std::int64_t seed) {
    Tuned& kept = tuned_of(c.data, seed);
    const std::lock_guard lock(kept.mutex);
    if (kept.dense == nullptr || kept.run.rate != rate) {
      TrainJob job = job_of(c.data, 1.0, rate, seed);
      job.alone = workers_.size() == 1;
      kept.run.rate = rate;
      kept.dense = unwrap(c.worker.backend().dense(unwrap(c.worker.backend().train(job))));
    }
    return kept.dense;
  }

  /// All that a run's numbers depend on beside its own name.
  [[nodiscard]] std::string key_of(const FinetuneData& data) const {
    std::string key = concat("base ", loaded_.fingerprint, ", on ", workers_.front().backend().device(),
                             ", items ", data.hash(), ", answers ", o_.answer_tokens, ", stop ",
                             data.stop.size(), ", steps ", o_.steps, ", batch ", o_.batch, ", pass ",
                             o_.pass_tokens, ", warm-up ", o_.warmup, ", clip ", o_.clip, ", low rank ",
                             o_.low_rank, " ", o_.rank, " ", o_.alpha, ", calibration ", o_.calibration_items,
                             ", rounds ", o_.quantizer.rounds, ", adapt ", o_.adapt_steps, ", sharing");
    for (const double sharing : o_.sharing) key += concat(" ", sharing);
    return key + ", version 2";
  }

  void print_times() const {
    const nlohmann::json times = ledger_.times();
    for (const nlohmann::json& stage : times.at("stages")) {
      std::printf("%s: %.0f s, %d runs made, %d kept from before\n",
                  stage.at("stage").get<std::string>().c_str(), stage.at("seconds").get<double>(),
                  stage.at("runs").get<int>(), stage.at("runs_kept").get<int>());
    }
    std::printf("all: %.0f s, %zu runs side by side\n", times.at("wall_seconds").get<double>(),
                workers_.size());
  }

  void write(const std::vector<FinetuneRow>& table) {
    if (!o_.json_path.empty()) {
      nlohmann::json out = frame_json(frame_, rows_json(table));
      out["device"] = workers_.front().backend().device();
      out["base"] = loaded_.fingerprint;
      out["complete"] = !ledger_.stopped();
      out["jobs"] = workers_.size();
      out["threads"] = threads_of(o_);
      out.update(ledger_.results().summary());
      out.update(ledger_.times());
      prefillshare::examples::check(write_text(out.dump(2) + '\n', o_.json_path));
    }
    if (o_.plot.empty()) return;
    prefillshare::examples::check(write_text(finetune_svg(bars_of(table), curves_of(table)), o_.plot));
  }

  FinetuneOptions o_;
  const prefillshare::examples::LoadedModel& loaded_;
  const prefillshare::examples::Tokenizer& tokenizer_;
  Suite frame_;
  FinetuneLedger ledger_;
  std::vector<FinetuneData> data_;
  std::int64_t max_tokens_ = 0;
  std::vector<Worker> workers_;
  std::map<std::string, std::string> keys_;  // by task
  std::mutex tuned_mutex_;
  std::map<std::string, Tuned> tuned_;  // by task and seed
};

}  // namespace codegemm::bench
