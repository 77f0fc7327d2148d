// SPDX-License-Identifier: Apache-2.0
//
// bench/support/explore_options.hpp - what the suite explore is told.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include <common/quantize_options.hpp>
#include <support/window_options.hpp>

namespace codegemm::bench {

struct ExploreOptions : prefillshare::examples::QuantizeOptions {
  std::string model, text, calibration, cache, json_path, csv, plot, gpu, gpu_plot;
  std::vector<std::string> distilled;
  std::vector<std::string> formats = {"m1v8g128", "m1v4b4g64", "m2v4b4g64", "m2v8g128", "m1v4g64",
                                      "m1v4g32",  "m3v4b4g64", "m2v4g64",   "m1v2g64",  "m2v2b4g64"};
  std::vector<std::string> peers = {"Q2_K", "Q3_K_M", "Q4_K_M"};
  std::vector<std::string> blocks = {"IQ2_XS", "Q2_K", "Q3_K", "Q4_K"};
  std::int64_t windows = 32;
  std::int64_t window_length = 512;
  double memory = 0.0;   // MiB; 0: no limit
  double latency = 0.0;  // microseconds; 0: no limit
  std::string on = "cpu";
  bool quick = false;
  bool peers_too = true;
  bool only_distilled = false;
  bool gpu_arguments = false;

  ExploreOptions() {
    sequences = 12;
    quantizer.layers.rounds = 3;
    quantizer.layers.beam = 1;
    quantizer.layers.tolerance = 0.02;
  }
};

/// What `quick` is: to see that it runs.
inline void make_quick(ExploreOptions& options) {
  options.formats = {"m2v4b4g64", "m1v8b4g64"};
  options.method = "kmeans";
  options.quantizer.correct = false;  // it needs more tokens than this
  options.sequences = 4;
  options.length = options.window_length = 128;
  options.windows = 8;
  options.blocks = {"Q2_K"};
  options.peers = {"Q2_K"};
}

/// `options` must outlive the parsing.
inline void add_options(CLI::App& app, ExploreOptions& options) {
  app.add_option("--model", options.model, "GGUF file or Hugging Face folder")->required();
  app.add_option("--text", options.text, "text to measure perplexity on")->required();
  app.add_option("--calibration", options.calibration, "text to calibrate on, another one")->required();
  app.add_option("--cache", options.cache, "folder that keeps what is made and measured")->required();
  app.add_option("--format", options.formats, "formats of the linear layers")->capture_default_str();
  add_quantize_options(app, options);
  add_window_options(app, options.windows, options.window_length);
  app.add_option("--peer", options.peers, "file types of llama.cpp")->capture_default_str();
  app.add_option("--blocks", options.blocks, "block types of ggml")->capture_default_str();
  app.add_flag("!--no-peers", options.peers_too, "neither of them");
  app.add_option("--memory", options.memory, "MiB that the linear layers may take")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--latency", options.latency, "microseconds that a token may take in them")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--on", options.on, "where --latency is meant: cpu, or gpu with the times of --gpu")
      ->check(CLI::IsMember({"cpu", "gpu"}))
      ->capture_default_str();
  app.add_option("--gpu", options.gpu,
                 "results of codegemm-gpu on this model's shapes (--shape NxK --tokens 1): adds its times");
  app.add_option("--distilled", options.distilled,
                 "results of quantize-gpu on the same text and windows: adds its formats");
  app.add_flag("--only-distilled", options.only_distilled, "of our formats these alone");
  app.add_option("--json", options.json_path, "write the results there");
  app.add_option("--csv", options.csv, "write the table there");
  app.add_option("--plot", options.plot, "draw perplexity over time into this SVG file");
  app.add_option("--gpu-plot", options.gpu_plot, "the same with the times of --gpu");
  app.add_flag("--gpu-arguments", options.gpu_arguments,
               "only prints what codegemm-gpu is to be asked for --gpu: shapes and formats");
  app.add_flag("--quick", options.quick, "two formats, little text: to see that it runs");
}

}  // namespace codegemm::bench
