// SPDX-License-Identifier: Apache-2.0
//
// common/finetune_options.hpp - the command-line options of a program that fine-tunes a decode module.
// Layer: examples (host only).
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

#include <CLI/CLI.hpp>

#include <prefillshare/train/trainer.hpp>

namespace prefillshare::examples {

/// What they say.
struct FinetuneOptions {
  std::string model, base, data, held_out, out, method = "prefillshare", parameters = "full", device = "cpu";
  double sharing = -1.0;
  std::int64_t limit = 0;
  std::int64_t save_every = 50;
  int threads = 0;
  bool plain = false;
  bool constant = false;
  TrainOptions train;
  LowRankOptions low_rank;

  /// What follows for the trainer from the others.
  void complete() {
    train.schedule = constant ? RateSchedule::kConstant : RateSchedule::kCosine;
    train.sharing = sharing >= 0.0 ? sharing : method == "full" ? 0.0 : 1.0;
    if (method == "naive-eval") train.steps = 0;
  }
};

/// `options` must outlive the parsing.
inline void add_finetune_options(CLI::App& app, FinetuneOptions& options) {
  app.add_option("--model", options.model, "GGUF file or Hugging Face folder to begin with")->required();
  app.add_option("--base", options.base, "the frozen base, where it is not the model");
  app.add_option("--data", options.data, "JSONL with prompt and target")->required();
  app.add_option("--held-out", options.held_out, "JSONL to judge by; none: the data");
  app.add_option("--out", options.out, "folder for the tuned model");
  app.add_option("--method", options.method, "prefillshare, full or naive-eval")
      ->check(CLI::IsMember({"prefillshare", "full", "naive-eval"}))
      ->capture_default_str();
  app.add_option("--parameters", options.parameters, "full, lora or codebooks")
      ->check(CLI::IsMember({"full", "lora", "codebooks"}))
      ->capture_default_str();
  app.add_option("--device", options.device, "cpu or gpu")
      ->check(CLI::IsMember({"cpu", "gpu"}))
      ->capture_default_str();
  app.add_option("--sharing", options.sharing, "share of each prompt read from the base; none: by the method")
      ->check(CLI::Range(0.0, 1.0));
  app.add_option("--steps", options.train.steps, "updates")
      ->check(CLI::Range(0, 1 << 30))
      ->capture_default_str();
  app.add_option("--batch", options.train.batch, "examples of a step")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--pass-tokens", options.train.pass_tokens, "tokens computed at once")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--max-tokens", options.train.max_tokens, "of prompt and target")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  app.add_option("--rate", options.train.rate, "highest learning rate")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--warmup", options.train.warmup, "share of the steps")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_flag("--constant", options.constant, "no cosine after the warm-up");
  app.add_option("--weight-decay", options.train.adam.weight_decay)->capture_default_str();
  app.add_option("--clip", options.train.clip, "highest norm of the gradient; 0: none")
      ->capture_default_str();
  app.add_option("--rank", options.low_rank.rank, "of low-rank deltas")->capture_default_str();
  app.add_option("--alpha", options.low_rank.alpha, "their scale times the rank")->capture_default_str();
  app.add_option("--seed", options.train.seed, "of the order of the examples")->capture_default_str();
  app.add_option("--limit", options.limit, "most examples of a file; 0: all")->check(CLI::NonNegativeNumber);
  app.add_option("--save-every", options.save_every, "steps between saved states")->capture_default_str();
  app.add_option("--threads", options.threads, "0: one for each processor")->check(CLI::Range(0, 1024));
  app.add_flag("--plain", options.plain, "prompts as they are, not in the chat template");
}

/// For a line of progress.
[[nodiscard]] inline std::string words_of(const TrainProgress& now) {
  char text[96];
  std::snprintf(text, sizeof(text), "loss %.4f, %.0f tokens/s, %.0f s left", now.loss, now.tokens_per_second,
                now.seconds_left);
  return text;
}

}  // namespace prefillshare::examples
