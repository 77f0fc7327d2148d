// SPDX-License-Identifier: Apache-2.0
//
// bench/support/quantize_gpu_block.cuh - how long a block of a larger model takes to quantize on a GPU.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <codegemm/base/matrix_view.hpp>
#include <codegemm/base/text.hpp>
#include <codegemm/quantize/additive.hpp>
#include <common/text_quantizer.hpp>
#include <common/unwrap.hpp>

#include "machine.hpp"
#include "quantize_gpu_inputs.cuh"
#include "random_dense.hpp"

namespace codegemm::bench {
namespace detail {

/// A block of Llama-3-8B's shape and an embedding of some tokens, weights at random.
inline prefillshare::examples::LoadedModel random_block_8b() {
  prefillshare::ModelConfig c;
  c.vocab_size = 4096;
  c.hidden_size = 4096;
  c.intermediate_size = 14336;
  c.layers = 1;
  c.heads = 32;
  c.kv_heads = 8;
  c.head_dim = 128;
  c.context_length = 8192;
  c.tied_embeddings = true;
  c.rope.head_dim = 128;
  c.rope.theta = 500000.0;
  prefillshare::examples::LoadedModel loaded;
  loaded.model = random_dense_model(c, 1.0);
  loaded.fingerprint = "random-block-8b";
  return loaded;
}

}  // namespace detail

/// How long a block of Llama-3-8B takes in the first of the formats, with the calibration; times its 32.
inline nlohmann::json time_block_8b(QuantizeGpuInputs& in, const QuantizeGpuOptions& told) {
  using nlohmann::json;
  using Clock = std::chrono::steady_clock;
  const Format format = prefillshare::examples::unwrap(parse_format(told.formats.front()));
  const prefillshare::examples::LoadedModel block = detail::random_block_8b();
  codegemm::detail::SplitMix random(2);
  std::vector<std::vector<std::int32_t>> sequences = in.sequences;
  for (auto& tokens : sequences) {
    for (std::int32_t& token : tokens) {
      token =
          static_cast<std::int32_t>(random.uniform() * static_cast<double>(block.model->config.vocab_size));
    }
  }
  double inside = 0.0;  // of the layers' quantizers
  json layers = json::array();
  prefillshare::examples::TextQuantizerOptions quantizer = in.quantizer;
  quantizer.backend.quantize = [&](MatrixView<const float> w, MatrixView<const float> gram, Format f,
                                   const CalibratedOptions& options, Executor& executor,
                                   CalibratedReport* report) {
    const auto start = Clock::now();
    auto made = in.quantizer.backend.quantize(w, gram, f, options, executor, report);
    const double seconds = seconds_since(start);
    inside += seconds;
    std::printf("  %lld x %lld: %.1f s, %d rounds, error %.4f\n", static_cast<long long>(w.rows),
                static_cast<long long>(w.cols), seconds, report->rounds, report->error);
    std::fflush(stdout);
    layers.push_back({{"shape", concat(w.rows, 'x', w.cols)},
                      {"seconds", seconds},
                      {"rounds", report->rounds},
                      {"error", report->error}});
    return made;
  };
  const std::string folder = concat(told.cache, "/block-8b-", format_name(format));
  std::filesystem::remove_all(folder);
  const auto start = Clock::now();
  static_cast<void>(
      quantize_on_sequences(block, format, sequences, quantizer, folder, in.pool, [](const auto&) {}));
  const double seconds = seconds_since(start);
  std::filesystem::remove_all(folder);
  constexpr double kBlocks = 32.0;
  std::printf("a block of Llama-3-8B's shape in %s: %.1f s, of which the quantizer %.1f; 32 take %.0f min\n",
              format_name(format).c_str(), seconds, inside, kBlocks * seconds / 60.0);
  std::fflush(stdout);
  return {{"format", format_name(format)},
          {"tokens", std::ssize(sequences) * std::ssize(sequences.front())},
          {"seconds", seconds},
          {"quantizer_seconds", inside},
          {"seconds_of_32_blocks", kBlocks * seconds},
          {"layers", std::move(layers)}};
}

}  // namespace codegemm::bench
