// SPDX-License-Identifier: Apache-2.0
//
// bench/support/finetune_worker.hpp - who makes the runs of the suite finetune one after the other: trains a
// module and judges what it answers.
#pragma once

#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/base/thread_pool.hpp>
#include <common/progress.hpp>
#include <common/tokenizer.hpp>
#include <common/unwrap.hpp>

#include "finetune_backend.hpp"
#include "finetune_data.hpp"
#include "finetune_runs.hpp"

namespace codegemm::bench {

template <FinetuneBackend Backend>
class FinetuneWorker {
 public:
  using Module = typename Backend::Module;

  /// `alone`: whether there is no other worker. All that is passed by reference outlives this.
  FinetuneWorker(const FinetuneOptions& options, const prefillshare::examples::Tokenizer& tokenizer,
                 ThreadPool& pool, Backend backend, bool alone)
      : o_(&options), tokenizer_(&tokenizer), pool_(&pool), backend_(std::move(backend)), alone_(alone) {}

  [[nodiscard]] Backend& backend() { return backend_; }
  [[nodiscard]] const Backend& backend() const { return backend_; }
  [[nodiscard]] ThreadPool& pool() const { return *pool_; }

  /// Trains and judges, at the ratio of the training and, if that is 0, at all others too. Nothing where the
  /// loss did not stay finite: no answer counts then.
  [[nodiscard]] std::optional<Module> train(const FinetuneData& data, TrainJob& job, FinetuneRun& run,
                                            const std::string& label) {
    run.rate = job.options.rate;
    run.seed = static_cast<std::int64_t>(job.options.seed);
    run.trained_at = job.options.sharing;
    prefillshare::examples::ProgressLine line(label);
    job.progress = [&](const prefillshare::TrainProgress& now) {
      run.tokens_per_second = now.tokens_per_second;
      if (!alone_) return;  // lines of several runs would be mixed
      char text[96];
      std::snprintf(text, sizeof(text), "loss %.4f, %.0f tokens/s, %.0f s left", now.loss,
                    now.tokens_per_second, now.seconds_left);
      line.update(now.step, now.steps, text);
    };
    job.alone = alone_;
    std::vector<double> sharing = {run.trained_at};
    if (run.trained_at == 0.0) {
      sharing.insert(sharing.end(), o_->sharing.begin(), o_->sharing.end());
      sharing.push_back(1.0);
    }
    Result<Module> module = backend_.train(job);
    if (!module.ok() && module.status().code() == StatusCode::kInvalidArgument &&
        module.status().message().find("parameters are those after") != std::string::npos) {
      std::fprintf(stderr, "%s: %s\n", label.c_str(), module.status().message().c_str());
      run.loss = 1e9;
      for (const double at : sharing) run.accuracy[at] = 0.0;
      return std::nullopt;
    }
    Module trained = unwrap(std::move(module));
    judge(data, trained, sharing, run);
    return trained;
  }

  /// Answers of the module: on the development items at the ratio of its training, on the test items at all.
  void judge(const FinetuneData& data, const Module& module, const std::vector<double>& sharing,
             FinetuneRun& run) {
    const double own = sharing.front();
    run.trained_at = own;
    run.development = points(data, module, data.development, own);
    run.loss = unwrap(backend_.loss(module, data.development.examples, own));
    for (const double at : sharing) run.accuracy[at] = points(data, module, data.test, at);
  }

 private:
  template <class T>
  static T unwrap(Result<T> result) {
    return prefillshare::examples::unwrap(std::move(result));
  }

  [[nodiscard]] double points(const FinetuneData& data, const Module& module, const FinetuneItems& items,
                              double sharing) {
    const std::vector<Tokens> answers =
        unwrap(backend_.generate(module, items.prompts, sharing, o_->answer_tokens, data.stop));
    std::vector<std::string> texts;
    texts.reserve(answers.size());
    for (const Tokens& answer : answers) texts.push_back(unwrap(tokenizer_->decode(answer, false)));
    const std::int64_t right = prefillshare::examples::count_right(*data.task, items.items, texts);
    return 100.0 * static_cast<double>(right) / static_cast<double>(items.items.size());
  }

  const FinetuneOptions* o_;
  const prefillshare::examples::Tokenizer* tokenizer_;
  ThreadPool* pool_;
  Backend backend_;
  bool alone_ = true;
};

}  // namespace codegemm::bench
