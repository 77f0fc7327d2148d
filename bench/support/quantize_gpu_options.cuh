// SPDX-License-Identifier: Apache-2.0
//
// bench/support/quantize_gpu_options.cuh - what the suite quantize-gpu is told.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include <common/quantize_options.hpp>
#include <prefillshare/train/cuda/code_moves.cuh>
#include <prefillshare/train/trainer.hpp>
#include <support/window_options.hpp>

namespace codegemm::bench {

struct QuantizeGpuOptions : prefillshare::examples::QuantizeOptions {
  std::string model, text, calibration, cache, json_path, out, aqlm;
  std::vector<std::string> formats = {"m1v4g64"};
  bool block_8b = false;
  std::uint64_t permute = 0;
  std::vector<std::string> blocks;
  std::int64_t windows = 16;
  std::int64_t window_length = 512;
  std::int64_t distill_sequences = 1 << 20;
  std::int64_t judged = 8;
  std::vector<std::int64_t> steps = {400};
  std::vector<double> rates = {4e-3};
  prefillshare::TrainOptions distill;
  std::vector<double> code_rates = {0.0};
  std::vector<double> label_shares = {0.0};
  prefillshare::cuda::CodeMoveOptions moves;

  QuantizeGpuOptions() {
    quantizer.layers.rounds = 6;
    quantizer.layers.beam = 4;
    // Rounds on the GPU cost less than a good beginning on the host.
    quantizer.layers.kmeans.iterations = 8;
    quantizer.layers.kmeans.rounds = 4;
    quantizer.layers.kmeans.refits = 1;
    quantizer.layers.kmeans.sample = 32768;
    distill.batch = 8;
    distill.pass_tokens = 4096;
    distill.clip = 1.0;
    distill.adam.beta2 = 0.98;
    distill.adam.weight_decay = 0.0;
  }
};

/// `options` must outlive the parsing.
inline void add_options(CLI::App& app, QuantizeGpuOptions& options) {
  app.add_option("--model", options.model, "GGUF file or Hugging Face folder")->required();
  app.add_option("--text", options.text, "text to measure perplexity on")->required();
  app.add_option("--calibration", options.calibration, "text to calibrate and distill on")->required();
  app.add_option("--cache", options.cache, "folder that keeps layers that are quantized")->required();
  app.add_option("--format", options.formats, "formats of the linear layers")->capture_default_str();
  app.add_flag("--block-8b", options.block_8b,
               "also times a block of Llama-3-8B's shape in the first format, on random weights");
  app.add_option(
         "--permute", options.permute,
         "put the model's channels into an order drawn from this seed, which changes nothing but what "
         "lies beside what; 0: as they are")
      ->capture_default_str();
  app.add_option("--blocks", options.blocks,
                 "also in blocks of these types of ggml's (Q4_K, ...), by its libraries in CODEGEMM_GGML");
  app.add_option(
      "--aqlm", options.aqlm,
      "a clone of github.com/Vahe1994/AQLM: also quantizes layers with its code, for their errors");
  add_quantize_options(app, options);
  app.add_option("--distill-steps", options.steps, "0: none; of several each by itself")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  app.add_option("--distill-batch", options.distill.batch, "sequences of a step")
      ->check(CLI::Range(1, 1 << 16))
      ->capture_default_str();
  app.add_option("--distill-rate", options.rates,
                 "highest learning rates, of each tensor's root mean square; of several each by itself")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--code-rate", options.code_rates,
                 "highest rates of codes that follow the gradient, in shares of the weights' size; 0: codes "
                 "stay; of several each by itself")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option(
         "--distill-labels", options.label_shares,
         "share of the text's own next tokens in what is learned, the rest what the dense model says; "
         "of several each by itself")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--code-every", options.moves.every, "steps between changes of codes")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--pass-tokens", options.distill.pass_tokens, "rows computed at once")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  add_window_options(app, options.windows, options.window_length);
  app.add_option("--out", options.out, "write the models there, a folder for each format");
  app.add_option("--json", options.json_path, "write the results there");
}

}  // namespace codegemm::bench
