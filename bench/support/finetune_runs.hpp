// SPDX-License-Identifier: Apache-2.0
//
// bench/support/finetune_runs.hpp - finished runs of the suite finetune, each a small file; and the table of
// them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <common/unwrap.hpp>

#include "report.hpp"

namespace codegemm::bench {

/// What one run measured.
struct FinetuneRun {
  std::string task, method;
  double rate = 0.0;         // 0: nothing was trained
  std::int64_t seed = 1;     // of the order of the training items
  double trained_at = 0.0;   // sharing ratio in training
  double development = 0.0;  // accuracy in points, at the ratio of training
  double loss = 0.0;         // on the development items, there
  std::map<double, double>
      accuracy;  // in points on the test items, by the sharing ratio that they were answered at
  double seconds = 0.0;
  double tokens_per_second = 0.0;  // of the training
};

inline void to_json(nlohmann::json& to, const FinetuneRun& run) {
  nlohmann::json accuracy = nlohmann::json::array();
  for (const auto& [sharing, points] : run.accuracy) accuracy.push_back({sharing, points});
  to = {{"task", run.task},
        {"method", run.method},
        {"rate", run.rate},
        {"seed", run.seed},
        {"trained_at", run.trained_at},
        {"development", run.development},
        {"loss", run.loss},
        {"accuracy", accuracy},
        {"seconds", run.seconds},
        {"tokens_per_second", run.tokens_per_second}};
}
inline void from_json(const nlohmann::json& from, FinetuneRun& run) {
  from.at("task").get_to(run.task);
  from.at("method").get_to(run.method);
  from.at("rate").get_to(run.rate);
  from.at("seed").get_to(run.seed);
  from.at("trained_at").get_to(run.trained_at);
  from.at("development").get_to(run.development);
  from.at("loss").get_to(run.loss);
  run.accuracy.clear();
  for (const nlohmann::json& pair : from.at("accuracy"))
    run.accuracy[pair.at(0).get<double>()] = pair.at(1).get<double>();
  from.at("seconds").get_to(run.seconds);
  from.at("tokens_per_second").get_to(run.tokens_per_second);
}

/// A folder of runs. A file counts if it was made under the same key, which says all that the result depends
/// on; others are made anew.
class FinetuneRuns {
 public:
  explicit FinetuneRuns(std::string folder) : folder_(std::move(folder)) {
    std::error_code failed;
    std::filesystem::create_directories(folder_, failed);
    if (failed) throw prefillshare::examples::UserError(folder_ + ": " + failed.message());
  }

  [[nodiscard]] std::string path(const std::string& name) const { return folder_ + "/" + name; }

  [[nodiscard]] std::optional<FinetuneRun> find(const std::string& name, const std::string& key) const {
    std::ifstream file(path(name + ".json"));
    if (!file) return std::nullopt;
    const nlohmann::json kept = nlohmann::json::parse(file, nullptr, false);
    if (!kept.is_object() || kept.value("key", nlohmann::json()) != key) return std::nullopt;
    try {
      return kept.at("run").get<FinetuneRun>();
    } catch (const nlohmann::json::exception&) {
      return std::nullopt;  // not whole: made anew
    }
  }
  void keep(const std::string& name, const std::string& key, const FinetuneRun& run) const {
    const nlohmann::json file = {{"key", key}, {"run", run}};
    prefillshare::examples::check(write_text(file.dump(2) + '\n', path(name + ".json")));
  }

 private:
  std::string folder_;
};

/// A line of the results.
struct FinetuneRow {
  std::string task, method;
  double sharing = 0.0;  // what the answers were made at
  double rate = 0.0;
  std::vector<double> accuracy;  // of each seed, points
  std::int64_t items = 0;

  [[nodiscard]] double mean() const {
    double sum = 0.0;
    for (const double x : accuracy) sum += x;
    return accuracy.empty() ? 0.0 : sum / static_cast<double>(accuracy.size());
  }
  /// Of the sample; 0 for a single seed.
  [[nodiscard]] double deviation() const {
    double sum = 0.0;
    for (const double x : accuracy) sum += (x - mean()) * (x - mean());
    return accuracy.size() < 2 ? 0.0 : std::sqrt(sum / static_cast<double>(accuracy.size() - 1));
  }
};

[[nodiscard]] inline nlohmann::json rows_json(const std::vector<FinetuneRow>& rows) {
  nlohmann::json out = nlohmann::json::array();
  for (const FinetuneRow& row : rows) {
    out.push_back({{"task", row.task},
                   {"method", row.method},
                   {"sharing", row.sharing},
                   {"accuracy_mean", row.mean()},
                   {"accuracy_sd", row.deviation()},
                   {"accuracies", row.accuracy},
                   {"seeds", row.accuracy.size()},
                   {"rate", row.rate},
                   {"n", row.items}});
  }
  return out;
}

inline void print_rows(const std::vector<FinetuneRow>& rows) {
  std::printf("\n%-12s %-34s %8s %9s %6s %6s %9s\n", "task", "method", "sharing", "accuracy", "sd", "seeds",
              "rate");
  for (const FinetuneRow& row : rows) {
    std::printf("%-12s %-34s %8.2f %8.2f%% %6.2f %6zu %9.3g\n", row.task.c_str(), row.method.c_str(),
                row.sharing, row.mean(), row.deviation(), row.accuracy.size(), row.rate);
  }
}

}  // namespace codegemm::bench
