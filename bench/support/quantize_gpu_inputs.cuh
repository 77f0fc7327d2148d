// SPDX-License-Identifier: Apache-2.0
//
// bench/support/quantize_gpu_inputs.cuh - what the parts of the suite quantize-gpu share: a GPU, a model, and
// what is taken of its texts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <memory>
#include <utility>
#include <vector>

#include <codegemm/base/text.hpp>
#include <codegemm/base/thread_pool.hpp>
#include <common/gpu_quantizer.cuh>
#include <common/model_loader.hpp>
#include <common/model_tokenizer.hpp>
#include <common/text_tokens.hpp>
#include <common/unwrap.hpp>

#include "permuted_model.hpp"
#include "quantize_gpu_options.cuh"

namespace codegemm::bench {

struct QuantizeGpuInputs {
  using Sequences = prefillshare::examples::GpuQuantizer::Sequences;

  prefillshare::examples::GpuQuantizer gpu;  // first: without a GPU nothing is read
  ThreadPool pool;
  std::unique_ptr<prefillshare::examples::TensorSource> source;
  prefillshare::examples::LoadedModel loaded;
  prefillshare::examples::TextQuantizerOptions quantizer;
  Sequences windows;    // held out
  Sequences sequences;  // to calibrate on
  Sequences taught;     // to distill on
  Sequences judged;     // of the same text

  /// Throws UserError.
  explicit QuantizeGpuInputs(const QuantizeGpuOptions& options)
      : pool(options.threads),
        source(prefillshare::examples::unwrap(prefillshare::examples::open_model(options.model))),
        loaded(prefillshare::examples::unwrap(load(*source, options))),
        quantizer(options.quantizer) {
    if (options.permute > 0) {
      loaded.model = permuted_model(*loaded.model, options.permute);
      loaded.fingerprint += concat("-permuted-", options.permute);
    }
    const auto tokenizer =
        prefillshare::examples::unwrap(prefillshare::examples::load_tokenizer(options.model));
    windows = sequences_of_file(options.text, options.windows, options.window_length, tokenizer);
    sequences = sequences_of_file(options.calibration, options.sequences, options.length, tokenizer);
    // All of the text is learned from, but for a few stretches that only judge.
    taught = sequences_of_file(options.calibration, options.distill_sequences, options.length, tokenizer);
    const std::int64_t judges = std::min(options.judged, std::ssize(taught) - 1);
    for (std::int64_t i = judges; i > 0; --i) {
      const std::int64_t at = (2 * i - 1) * std::ssize(taught) / (2 * judges);
      judged.push_back(std::move(taught[static_cast<std::size_t>(at)]));
      taught.erase(taught.begin() + at);
    }
    quantizer.backend = gpu.backend();
    if (options.method == "kmeans") quantizer.layers.rounds = 0;
  }

 private:
  /// A block at a time, unless all of it is needed at once.
  [[nodiscard]] static Result<prefillshare::examples::LoadedModel> load(
      prefillshare::examples::TensorSource& source, const QuantizeGpuOptions& options) {
    if (options.permute > 0) return load_model(source);
    auto loaded = load_model_by_blocks(source);
    if (!loaded.ok() || loaded->model->config.tied_embeddings) return loaded;
    return load_model(source);
  }
};

}  // namespace codegemm::bench
