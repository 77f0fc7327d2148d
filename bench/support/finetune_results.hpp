// SPDX-License-Identifier: Apache-2.0
//
// bench/support/finetune_results.hpp - finished runs of the suite finetune put together: the learning rate of
// each method, seeds, rows and curves.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <common/low_rank.hpp>

#include "finetune_options.hpp"
#include "finetune_plot.hpp"
#include "finetune_runs.hpp"

namespace codegemm::bench {

inline constexpr const char* kSharedRuns = "shared";  // PrefillShare's, in the names of runs
using prefillshare::examples::kSpecialistFormat;

[[nodiscard]] inline std::string run_name(const std::string& task, const std::string& method, double rate,
                                          std::int64_t seed) {
  return concat(task, "-", method, "-", rate, "-seed", seed);
}
/// Runs that were trained for that ratio.
[[nodiscard]] inline std::string shared_at(double sharing) { return concat(kSharedRuns, "-at-", sharing); }

class FinetuneResults {
 public:
  /// Runs by their names; both outlive this.
  FinetuneResults(const FinetuneOptions& options, const std::map<std::string, FinetuneRun>& runs)
      : o_(options), runs_(runs) {}

  [[nodiscard]] const FinetuneRun* find(const std::string& name) const {
    const auto at = runs_.find(name);
    return at != runs_.end() ? &at->second : nullptr;
  }
  /// On the development items.
  [[nodiscard]] static bool better(const FinetuneRun& a, const FinetuneRun& b) {
    return a.development != b.development ? a.development > b.development : a.loss < b.loss;
  }
  /// The rate of the first seed's run that does best on the development items; none before there is one.
  [[nodiscard]] std::optional<double> best_rate(const std::string& task, const std::string& method) const {
    const FinetuneRun* best = nullptr;
    for (const auto& [name, run] : runs_) {
      if (run.task != task || run.method != method || run.seed != 1) continue;
      if (best == nullptr || better(run, *best)) best = &run;
    }
    if (best == nullptr) return std::nullopt;
    return best->rate;
  }

  /// What is known so far.
  [[nodiscard]] std::vector<FinetuneRow> rows() const {
    std::vector<FinetuneRow> out;
    for (const std::string& task : o_.tasks) {
      if (const FinetuneRun* base = find(task + "-base")) out.push_back(row(*base, "base", 0.0, {base}));
      const auto add = [&](const std::string& from, const std::string& method, double sharing) {
        std::vector<const FinetuneRun*> seeds;
        const std::optional<double> rate = best_rate(task, from);
        for (std::int64_t seed = 1; rate && seed <= o_.seeds; ++seed) {
          const FinetuneRun* const one = find(run_name(task, from, *rate, seed));
          if (one != nullptr && one->accuracy.contains(sharing)) seeds.push_back(one);
        }
        if (!seeds.empty()) out.push_back(row(*seeds.front(), method, sharing, seeds));
      };
      add("full", "full", 0.0);
      add(kSharedRuns, "prefillshare", 1.0);
      add("full", "naive", 1.0);
      for (const double sharing : o_.sharing) add("full", "naive", sharing);
      for (const double sharing : o_.sharing) add(shared_at(sharing), "prefillshare", sharing);
      for (const std::string& format : o_.formats) {
        add(concat(kSharedRuns, "-", format), concat("prefillshare ", format), 1.0);
        add(concat(kSharedRuns, "-", format, "-adapted"), concat("prefillshare ", format, " adapted"), 1.0);
      }
      add("low-rank", "low rank", 1.0);
      add(concat("low-rank-", kSpecialistFormat), concat("low rank ", kSpecialistFormat), 1.0);
    }
    return out;
  }

  /// What was asked for, and how long it took.
  [[nodiscard]] nlohmann::json summary() const {
    double seconds = 0.0;
    std::map<std::string, double> speed;
    for (const auto& [name, run] : runs_) {
      seconds += run.seconds;
      if (run.tokens_per_second > 0.0) speed[run.method] = std::max(speed[run.method], run.tokens_per_second);
    }
    return {{"parameters", o_.low_rank ? concat("low rank ", o_.rank) : std::string("all")},
            {"steps", o_.steps},
            {"batch", o_.batch},
            {"rates", o_.rates},
            {"low_rank_rates", o_.low_rank_rates},
            {"rank", o_.rank},
            {"adapt_steps", o_.adapt_steps},
            {"adapt_rates", o_.adapt_rates},
            {"development_items", o_.development_items},
            {"seconds", seconds},
            {"tokens_per_second", speed}};
  }

 private:
  [[nodiscard]] FinetuneRow row(const FinetuneRun& first, const std::string& method, double sharing,
                                const std::vector<const FinetuneRun*>& seeds) const {
    FinetuneRow out{first.task, method, sharing, first.rate, {}, o_.test_items};
    for (const FinetuneRun* one : seeds) out.accuracy.push_back(one->accuracy.at(sharing));
    return out;
  }

  const FinetuneOptions& o_;
  const std::map<std::string, FinetuneRun>& runs_;
};

/// The rows that are methods as they serve.
[[nodiscard]] inline std::vector<FinetuneRow> bars_of(const std::vector<FinetuneRow>& rows) {
  std::vector<FinetuneRow> out;
  for (const FinetuneRow& row : rows) {
    if (row.sharing == 1.0 || (row.sharing == 0.0 && row.method != "naive")) out.push_back(row);
  }
  return out;
}

/// Accuracy over the sharing ratio; at 0 naive sharing and PrefillShare are full fine-tuning.
[[nodiscard]] inline std::vector<FinetuneRow> curves_of(const std::vector<FinetuneRow>& rows) {
  std::vector<FinetuneRow> out;
  for (const FinetuneRow& row : rows) {
    if (row.method == "naive" || row.method == "prefillshare") out.push_back(row);
    if (row.method != "full") continue;
    for (const char* method : {"naive", "prefillshare"}) {
      out.push_back(row);
      out.back().method = method;
    }
  }
  return out;
}

}  // namespace codegemm::bench
