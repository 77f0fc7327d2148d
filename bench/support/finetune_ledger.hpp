// SPDX-License-Identifier: Apache-2.0
//
// bench/support/finetune_ledger.hpp - which runs of the suite finetune are done, what they measured and how
// long the stages took.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include <nlohmann/json.hpp>

#include "finetune_options.hpp"
#include "finetune_results.hpp"
#include "finetune_runs.hpp"

namespace codegemm::bench {

/// Runs by their names. Any thread may call.
class FinetuneLedger {
 public:
  /// Makes a run; the label says which it is.
  using Make = std::function<void(FinetuneRun& run, const std::string& label)>;

  /// `total`: of the runs that one() will be asked for. The options outlive this.
  FinetuneLedger(const FinetuneOptions& options, std::int64_t total)
      : o_(options), total_(total), runs_(options.work) {}

  /// A run that is not done yet and is in time: kept where an earlier suite left it under that key, or made.
  /// `whole`: whether what it leaves beside its numbers is there.
  void one(const std::string& stage, const std::string& name, const std::string& method,
           const std::string& key, const Make& make, bool whole = true) {
    std::string label;
    const double begin = seconds();
    {
      const std::lock_guard lock(mutex_);
      if (found_.contains(name)) return;
      if (std::optional<FinetuneRun> kept = runs_.find(name, key); kept && whole) {
        found_.emplace(name, *std::move(kept));
        ++stages_[stage].kept;
        ++done_;
        return;
      }
      if (stopped_ || (o_.time_limit > 0.0 && begin + longest_[method] > o_.time_limit)) {
        stopped_ = true;
        return;
      }
      label = concat("[", done_ + running_ + 1, "/", total_, "] ", name);
      ++running_;
    }
    FinetuneRun run;
    run.task = name.substr(0, name.find('-'));
    run.method = method;
    make(run, label);
    const double end = seconds();
    run.seconds = end - begin;
    const std::lock_guard lock(mutex_);
    runs_.keep(name, key, run);
    --running_;
    ++done_;
    longest_[method] = std::max(longest_[method], run.seconds);
    Stage& of = stages_[stage];
    of.begin = of.made == 0 ? begin : std::min(of.begin, begin);
    of.end = std::max(of.end, end);
    of.run_seconds += run.seconds;
    ++of.made;
    ++made_;
    std::string points;
    for (const auto& [sharing, accuracy] : run.accuracy) {
      char text[32];
      std::snprintf(text, sizeof(text), " %.1f%% at %.2f", accuracy, sharing);
      points += text;
    }
    const auto left = std::llround(end / static_cast<double>(made_) * static_cast<double>(total_ - done_));
    std::printf("%s: right%s; %.1f s, %lld:%02lld left\n", label.c_str(), points.c_str(), run.seconds,
                left / 60, left % 60);
    std::fflush(stdout);
    found_.emplace(name, std::move(run));
  }

  /// As FinetuneResults.
  [[nodiscard]] std::optional<double> best_rate(const std::string& task, const std::string& method) const {
    const std::lock_guard lock(mutex_);
    return FinetuneResults(o_, found_).best_rate(task, method);
  }
  [[nodiscard]] bool stopped() const {
    const std::lock_guard lock(mutex_);
    return stopped_;
  }
  [[nodiscard]] std::string path(const std::string& name) const { return runs_.path(name); }

  /// When nothing runs.
  [[nodiscard]] FinetuneResults results() const { return {o_, found_}; }
  [[nodiscard]] std::int64_t done() const { return done_; }
  [[nodiscard]] std::int64_t total() const { return total_; }
  /// Seconds from the first run's begin to the last one's end, of this process: of each stage, and in all.
  /// Stages overlap where several runs go side by side.
  [[nodiscard]] nlohmann::json times() const {
    nlohmann::json stages = nlohmann::json::array();
    for (const std::string& name : o_.stages) {
      const auto at = stages_.find(name);
      if (at == stages_.end()) continue;
      const Stage& stage = at->second;
      stages.push_back({{"stage", name},
                        {"seconds", stage.end - stage.begin},
                        {"begin", stage.begin},
                        {"runs", stage.made},
                        {"runs_kept", stage.kept},
                        {"run_seconds", stage.run_seconds}});
    }
    return {{"stages", stages}, {"wall_seconds", seconds()}};
  }

 private:
  using Clock = std::chrono::steady_clock;
  struct Stage {
    double begin = 0.0, end = 0.0;
    double run_seconds = 0.0;  // of all runs together
    std::int64_t made = 0, kept = 0;
  };

  [[nodiscard]] double seconds() const {
    return std::chrono::duration<double>(Clock::now() - start_).count();
  }

  const FinetuneOptions& o_;
  std::int64_t total_ = 0;
  const Clock::time_point start_ = Clock::now();
  mutable std::mutex mutex_;
  FinetuneRuns runs_;
  std::map<std::string, FinetuneRun> found_;
  std::map<std::string, double> longest_;  // seconds of a run, by method
  std::map<std::string, Stage> stages_;
  std::int64_t running_ = 0;
  std::int64_t done_ = 0;
  std::int64_t made_ = 0;  // by this process
  bool stopped_ = false;
};

}  // namespace codegemm::bench
