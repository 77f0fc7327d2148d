// SPDX-License-Identifier: Apache-2.0
//
// bench/support/finetune_options.hpp - what the suites finetune and finetune-gpu are told.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include <codegemm/quantize/calibrated.hpp>
#include <common/tasks.hpp>

namespace codegemm::bench {

struct FinetuneOptions {
  std::string model, work = "finetune-work", json_path, plot, specialists;
  std::vector<std::string> tasks = {"arithmetic", "tools", "shell"};
  std::vector<std::string> stages = {"claim", "specialists", "quantized", "curve"};
  bool low_rank = false;  // train deltas where it says "all weights"

  std::int64_t train_items = 0;  // 0: as many as a run takes
  std::int64_t development_items = 256;
  std::int64_t test_items = 1000;
  std::int64_t answer_tokens = 96;  // the longest answer; a base says much
  std::int64_t seeds = 3;
  std::vector<double> rates = {1e-4, 3e-4, 1e-3};  // the first run takes the middle one
  std::vector<double> sharing = {0.25, 0.5, 0.75};
  std::int64_t curve_seeds = 1;  // at most `seeds`

  std::int64_t steps = 500;
  std::int64_t batch = 64;
  std::int64_t pass_tokens = 16384;
  double warmup = 0.05;
  double clip = 1.0;

  std::int64_t rank = 8;
  double alpha = 16.0;
  std::vector<double> low_rank_rates = {1e-3, 3e-3};

  std::vector<std::string> formats = {"m1v4g64", "m2v2b4g64"};
  std::int64_t calibration_items = 64;
  CalibratedOptions quantizer;  // its rounds are those of formats that are calibrated
  std::int64_t adapt_steps = 300;
  std::vector<double> adapt_rates = {1e-3};
  std::int64_t quantized_seeds = 1;

  double time_limit = 0.0;  // seconds; 0: none
  std::int64_t jobs = 1;    // runs side by side
  int threads = 0;          // of all jobs

  FinetuneOptions() {
    quantizer.rounds = 1;
    quantizer.beam = 1;
  }
  [[nodiscard]] double first_rate() const { return rates[rates.size() / 2]; }
  [[nodiscard]] bool has_stage(const char* name) const {
    for (const std::string& stage : stages) {
      if (stage == name) return true;
    }
    return false;
  }
};

/// The options of both suites.
inline void add_options(CLI::App& app, FinetuneOptions& o) {
  const auto positive = CLI::Range(1.0, 1e9);
  const auto list = [&](const char* name, auto& to, const char* text) {
    return app.add_option(name, to, text)->delimiter(',')->capture_default_str();
  };
  const auto number = [&](const char* name, auto& to, const char* text) {
    return app.add_option(name, to, text)->capture_default_str();
  };
  app.add_option("--model", o.model, "GGUF file or Hugging Face folder of the base")->required();
  number("--work", o.work, "folder for what finished runs leave: the same command goes on from there");
  app.add_option("--json", o.json_path, "where the results go");
  app.add_option("--plot", o.plot, "SVG: accuracy of the methods, and over the sharing ratio");
  app.add_option("--write-specialists", o.specialists, "folder for the deltas, TASK.safetensors");
  list("--tasks", o.tasks, "of arithmetic, tools and shell")
      ->check(CLI::IsMember({"arithmetic", "tools", "shell"}));
  list("--stages", o.stages, "of claim, specialists, quantized and curve")
      ->check(CLI::IsMember({"claim", "specialists", "quantized", "curve"}));
  number("--low-rank", o.low_rank, "deltas of low rank in place of all weights");
  number("--train-items", o.train_items, "of a task; 0: each is seen once");
  number("--development-items", o.development_items, "to choose the learning rate by")->check(positive);
  number("--test-items", o.test_items, "held out, to judge by")->check(positive);
  number("--answer-tokens", o.answer_tokens, "of the longest answer")->check(positive);
  number("--seeds", o.seeds, "runs of each method")->check(positive);
  list("--rates", o.rates, "learning rates to choose from, the same for every method")
      ->check(CLI::PositiveNumber);
  list("--sharing", o.sharing, "ratios between 0 and 1 of the curve")->check(CLI::Range(0.0, 1.0));
  number("--curve-seeds", o.curve_seeds, "runs trained for each ratio of the curve, at most --seeds")
      ->check(positive);
  number("--steps", o.steps, "of a training run")->check(positive);
  number("--batch", o.batch, "examples of a step")->check(positive);
  number("--pass-tokens", o.pass_tokens, "rows computed at once")->check(positive);
  number("--warmup", o.warmup, "share of the steps")->check(CLI::Range(0.0, 1.0));
  number("--clip", o.clip, "highest norm of the gradient; 0: none")->check(CLI::NonNegativeNumber);
  number("--rank", o.rank, "of the specialists' deltas")->check(positive);
  number("--alpha", o.alpha, "their scale times the rank")->check(CLI::PositiveNumber);
  list("--low-rank-rates", o.low_rank_rates, "learning rates of the specialists")->check(CLI::PositiveNumber);
  list("--formats", o.formats,
       "of quantized decode modules; \"-calibrated\" behind a name: codes for the outputs on the task's "
       "texts");
  number("--calibration-items", o.calibration_items, "that the quantizer sees")->check(positive);
  number("--rounds", o.quantizer.rounds, "of the quantizer where it calibrates")->check(CLI::Range(1, 1000));
  number("--adapt-steps", o.adapt_steps, "of quantization-aware adaptation")->check(positive);
  list("--adapt-rates", o.adapt_rates, "its learning rates")->check(CLI::PositiveNumber);
  number("--quantized-seeds", o.quantized_seeds, "how many seeds' modules are quantized")->check(positive);
  number("--time-limit", o.time_limit, "seconds; ends between two runs before they are over; 0: none")
      ->check(CLI::NonNegativeNumber);
  number("--jobs", o.jobs, "runs side by side; each has memory of its own")->check(CLI::Range(1, 64));
  number("--threads", o.threads, "of all jobs together; 0: one for each processor")
      ->check(CLI::Range(0, 1024));
}

}  // namespace codegemm::bench
