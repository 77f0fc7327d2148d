// SPDX-License-Identifier: Apache-2.0
//
// common/text_quantizer.hpp - a model's layers quantized on calibration tokens, each kept on disk when done.
// Layer: examples (host only).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <string>
#include <system_error>
#include <vector>

#include <common/layer_quantizer.hpp>
#include <common/model_loader.hpp>
#include <common/model_writer.hpp>
#include <common/unwrap.hpp>

namespace prefillshare::examples {

/// Where layers are quantized. On the host unless said otherwise.
struct QuantizeBackend {
  std::string name;  // part of the run's name; empty: the host
  QuantizeLayer quantize = codegemm::quantize_calibrated;
  /// Runs the model block by block as CalibrationRun does; null: that. Throws UserError.
  std::function<void(const LoadedModel& loaded, const std::vector<std::vector<std::int32_t>>& sequences,
                     const CalibrationRunOptions& options, LayerQuantizer& quantizer, Executor& executor)>
      calibrate;
};

struct TextQuantizerOptions {
  codegemm::CalibratedOptions layers;
  BlockTuneOptions tune{.steps = 0};  // off: what it does for perplexity is not known yet
  bool correct = true;                // weights corrected for the errors of the layers before
  QuantizeBackend backend;
};

/// The linear layers of the blocks in for_each_linear()'s order, and the norms tuned with them.
struct QuantizedLayers {
  std::vector<std::string> names;
  std::vector<codegemm::QuantizedMatrix> matrices;
  ReplacedTensors norms;
};

/// Bits per weight of all matrices together.
[[nodiscard]] inline double bits_of(const std::vector<codegemm::QuantizedMatrix>& matrices) {
  double bits = 0.0;
  double weights = 0.0;
  for (const codegemm::QuantizedMatrix& matrix : matrices) {
    const double count = static_cast<double>(matrix.rows()) * static_cast<double>(matrix.cols());
    bits += count * codegemm::bits_per_weight(matrix.format(), matrix.rows(), matrix.cols());
    weights += count;
  }
  return bits / weights;
}

/// The same for the same tokens in the same order, on every machine.
[[nodiscard]] inline std::uint64_t hash_tokens(const std::vector<std::vector<std::int32_t>>& sequences) {
  std::uint64_t state = 0x243F6A8885A308D3ULL;
  for (const auto& sequence : sequences) {
    for (const std::int32_t token : sequence) {
      state = (state ^ static_cast<std::uint32_t>(token)) * 0x9E3779B97F4A7C15ULL;
      state ^= state >> 29U;
    }
    state = (state ^ sequence.size()) * 0x9E3779B97F4A7C15ULL;
  }
  return state;
}

/// All that the result depends on, in words.
[[nodiscard]] inline std::string run_name(const LoadedModel& loaded, codegemm::Format format,
                                          const std::vector<std::vector<std::int32_t>>& sequences,
                                          const TextQuantizerOptions& options) {
  const codegemm::CalibratedOptions& q = options.layers;
  const BlockTuneOptions& t = options.tune;
  return codegemm::concat("model ", loaded.fingerprint, ", format ", codegemm::format_name(format),
                          ", tokens ", hash_tokens(sequences), ", seed ", q.kmeans.seed, ", rounds ",
                          q.rounds, ", beam ", q.beam, ", tolerance ", q.tolerance, ", damping ", q.damping,
                          ", codebook steps ", q.codebook_steps, ", corrected ", options.correct,
                          ", tune steps ", t.steps, ", rate ", t.rate, ", tune tokens ", t.tokens,
                          ", held out ", t.held_out, options.backend.name.empty() ? "" : ", on ",
                          options.backend.name, ", version 4");
}

/// "4:07 left", or nothing where the time is not known (negative).
[[nodiscard]] inline std::string time_left(double seconds) {
  if (!(seconds >= 0.0)) return "";
  const auto whole = std::llround(seconds);
  char text[32];
  std::snprintf(text, sizeof(text), "%lld:%02lld left", whole / 60, whole % 60);
  return text;
}

/// Quantizes block by block, or goes on with what an earlier run of the same name left in folder `state`.
/// Where all is there already nothing is run. Throws UserError.
[[nodiscard]] inline QuantizedLayers quantize_on_sequences(
    const LoadedModel& loaded, codegemm::Format format,
    const std::vector<std::vector<std::int32_t>>& sequences, const TextQuantizerOptions& options,
    const std::string& state, Executor& executor,
    const std::function<void(const QuantizeProgress&)>& progress) {
  std::filesystem::create_directories(state);
  BlockTuneOptions tune = options.tune;
  tune.seed = options.layers.kmeans.seed;
  LayerQuantizer quantizer(*loaded.model, format, options.layers, tune, state,
                           run_name(loaded, format, sequences, options), executor, progress,
                           options.backend.quantize);
  bool complete = true;
  const auto collect = [&](QuantizedLayers& out) {
    for_each_linear(*loaded.model, [&](const std::string& name, const DenseLinear&) {
      if (name == "lm_head" || !complete) return;
      Result<codegemm::QuantizedMatrix> matrix = quantizer.result(name);
      complete = matrix.ok() || matrix.status().code() != StatusCode::kNotFound;
      if (!complete) return;
      out.matrices.push_back(unwrap(std::move(matrix)));
      out.names.push_back(name);
    });
  };
  QuantizedLayers out;
  collect(out);
  if (!complete) {
    CalibrationRunOptions run_options;
    run_options.correct = options.correct;
    if (options.backend.calibrate) {
      options.backend.calibrate(loaded, sequences, run_options, quantizer, executor);
    } else {
      CalibrationRun calibration = unwrap(CalibrationRun::create(loaded.model, sequences, executor.workers(),
                                                                 run_options, loaded.read_block));
      while (calibration.blocks_done() < loaded.model->config.layers)
        check(calibration.next_block(quantizer, executor));
    }
    out = {};
    complete = true;
    collect(out);
    if (!complete) throw UserError(codegemm::concat(state, ": a finished layer has vanished"));
  }
  for (std::int64_t i = 0; i < loaded.model->config.layers; ++i) out.norms.merge(unwrap(quantizer.norms(i)));
  return out;
}

/// Removes what quantize_on_sequences() keeps in folder `state`, and the folder if that was all in it.
inline void remove_state(const std::string& state) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  std::vector<fs::path> own;
  for (fs::directory_iterator at(state, ignored), end; !ignored && at != end; at.increment(ignored)) {
    const std::string name = at->path().filename().string();
    if (name.starts_with("model.layers.") && name.find(".safetensors") != std::string::npos)
      own.push_back(at->path());
  }
  for (const fs::path& file : own) fs::remove(file, ignored);
  fs::remove(state, ignored);  // only an empty one goes
}

}  // namespace prefillshare::examples
