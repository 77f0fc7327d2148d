// SPDX-License-Identifier: Apache-2.0
//
// common/quantize_options.hpp - the command-line options that programs have in common which quantize a model
// on a text.
// Layer: examples (host only).
#pragma once

#include <cstdint>
#include <string>

#include <CLI/CLI.hpp>

#include <common/text_quantizer.hpp>

namespace prefillshare::examples {

/// What they say; a program sets its own defaults before add_quantize_options().
struct QuantizeOptions {
  std::string method = "calibrated";  // or "kmeans"
  std::int64_t sequences = 64;        // stretches of the calibration text
  std::int64_t length = 512;          // tokens in each
  int threads = 0;                    // 0: one for each processor
  TextQuantizerOptions quantizer;
};

/// --method, --sequences, --length, --rounds, --tolerance, --beam, --codebook-steps, --seed, --no-correction,
/// --threads. `options` must outlive the parsing.
inline void add_quantize_options(CLI::App& app, QuantizeOptions& options) {
  codegemm::CalibratedOptions& layers = options.quantizer.layers;
  app.add_option("--method", options.method,
                 "calibrated, or kmeans: only what calibration begins with, quicker and worse")
      ->check(CLI::IsMember({"calibrated", "kmeans"}))
      ->capture_default_str();
  app.add_option("--sequences", options.sequences, "stretches of the calibration text, evenly spread")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--length", options.length, "tokens in each")
      ->check(CLI::Range(2, 1 << 17))
      ->capture_default_str();
  app.add_option("--rounds", layers.rounds, "most rounds for a layer")
      ->check(CLI::Range(0, 1000))
      ->capture_default_str();
  app.add_option("--tolerance", layers.tolerance, "gain of a round below which they end")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--beam", layers.beam, "paths of the code search")
      ->check(CLI::Range(1, 16))
      ->capture_default_str();
  app.add_option("--codebook-steps", layers.codebook_steps, "conjugate gradient steps of a fit")
      ->check(CLI::Range(0, 1000))
      ->capture_default_str();
  app.add_option("--seed", layers.kmeans.seed, "of the k-means beginning")->capture_default_str();
  app.add_flag("!--no-correction", options.quantizer.correct,
               "quantize the weights as they are, not corrected for the layers before");
  app.add_option("--threads", options.threads, "0: one for each processor")->check(CLI::Range(0, 1024));
}

}  // namespace prefillshare::examples
