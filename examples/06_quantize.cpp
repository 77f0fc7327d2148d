// SPDX-License-Identifier: Apache-2.0
//
// examples/06_quantize.cpp - quantize a model from the command line, calibrated on a text.
//
//   quantize MODEL OUT_DIR --format m2v8g128 --calibration FILE
//
// MODEL is a GGUF file or a Hugging Face folder; OUT_DIR becomes a folder in CodeGEMM's format or, with one
// scale a row (g-1), in AQLM's. A run that was stopped goes on where it was when started again.
// test: {model} {work}/model --format m1v8b4g-1 --calibration {source}/examples/data/river_report.txt --sequences 2 --length 64 --rounds 1 --beam 1 --codebook-steps 2 --finetune-steps 2 --quiet

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/quantize/kmeans.hpp>
#include <common/layer_quantizer.hpp>
#include <common/model_loader.hpp>
#include <common/model_tokenizer.hpp>
#include <common/model_writer.hpp>
#include <common/progress.hpp>
#include <common/text_tokens.hpp>
#include <common/unwrap.hpp>

namespace {

using namespace prefillshare;
using namespace prefillshare::examples;

struct Options {
  std::string model, out, format = "m2v8g128", calibration, kind = "auto", method = "calibrated";
  std::int64_t sequences = 64;
  std::int64_t length = 512;
  int threads = 0;
  bool no_correction = false;
  bool keep_state = false;
  bool quiet = false;
  codegemm::CalibratedOptions quantizer;
  BlockTuneOptions tune{.steps = 0};  // off: what it does for perplexity is not known yet
};

std::string time_text(double seconds) {
  if (seconds < 0.0) return "";
  const auto whole = std::llround(seconds);
  char text[32];
  std::snprintf(text, sizeof(text), ", %lld:%02lld left", whole / 60, whole % 60);
  return text;
}

std::uint64_t hash_tokens(const std::vector<std::vector<std::int32_t>>& sequences) {
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

codegemm::CheckpointKind kind_of(const Options& options, codegemm::Format format) {
  if (options.kind == "aqlm") return codegemm::CheckpointKind::kAqlm;
  if (options.kind == "codegemm") return codegemm::CheckpointKind::kCodeGemm;
  return format.g < 0 ? codegemm::CheckpointKind::kAqlm : codegemm::CheckpointKind::kCodeGemm;
}

struct Layers {
  std::vector<std::string> names;
  std::vector<codegemm::QuantizedMatrix> matrices;
  ReplacedTensors norms;  // tuned with them
};

/// Without calibration: k-means, layer by layer.
Layers quantize_plain(const Options& options, const LoadedModel& loaded, codegemm::Format format,
                      Executor& executor) {
  Layers out;
  ProgressLine progress("quantizing");
  const std::int64_t total = loaded.model->config.layers * 7;
  for_each_linear(*loaded.model, [&](const std::string& name, const DenseLinear& layer) {
    if (name == "lm_head") return;
    out.matrices.push_back(
        unwrap(codegemm::quantize_kmeans(layer.weights(), format, options.quantizer.kmeans, executor)));
    out.names.push_back(name);
    progress.update(static_cast<std::int64_t>(out.names.size()), total, "layers");
  });
  return out;
}

Layers quantize_on_text(const Options& options, const LoadedModel& loaded, codegemm::Format format,
                        const std::string& state, Executor& executor) {
  const Tokenizer tokenizer = unwrap(load_tokenizer(options.model));
  const std::vector<std::int32_t> ids = tokens_of_file(options.calibration, tokenizer);
  auto sequences = spread_sequences(ids, options.sequences, options.length, tokenizer);
  if (sequences.empty()) {
    throw UserError(codegemm::concat(options.calibration, ": has ", ids.size(),
                                     " tokens, fewer than one sequence of ", options.length));
  }
  std::printf("calibration: %zu sequences of %lld tokens out of %zu of %s\n", sequences.size(),
              static_cast<long long>(options.length), ids.size(), options.calibration.c_str());
  std::filesystem::create_directories(state);
  const codegemm::CalibratedOptions& q = options.quantizer;
  BlockTuneOptions t = options.tune;
  t.seed = q.kmeans.seed;
  const std::string run = codegemm::concat(
      "model ", loaded.fingerprint, ", format ", codegemm::format_name(format), ", tokens ",
      hash_tokens(sequences), ", seed ", q.kmeans.seed, ", rounds ", q.rounds, ", beam ", q.beam,
      ", tolerance ", q.tolerance, ", damping ", q.damping, ", codebook steps ", q.codebook_steps,
      ", corrected ", !options.no_correction, ", tune steps ", t.steps, ", rate ", t.rate, ", tune tokens ",
      t.tokens, ", held out ", t.held_out, ", version 2");

  ProgressLine progress("quantizing");
  LayerQuantizer quantizer(
      *loaded.model, format, q, t, state, run, executor, [&](const QuantizeProgress& now) {
        if (options.quiet) return;
        char error[32];
        std::snprintf(error, sizeof(error), "error %.4f", now.error);
        progress.update(static_cast<std::int64_t>(now.share * 1000.0), 1000,
                        codegemm::concat(now.layer, " ", error, time_text(now.seconds_left)));
      });
  CalibrationRunOptions run_options;
  run_options.correct = !options.no_correction;
  CalibrationRun calibration =
      unwrap(CalibrationRun::create(loaded.model, sequences, executor.workers(), run_options));
  while (calibration.blocks_done() < loaded.model->config.layers)
    check(calibration.next_block(quantizer, executor));

  Layers out;
  for_each_linear(*loaded.model, [&](const std::string& name, const DenseLinear&) {
    if (name == "lm_head") return;
    out.matrices.push_back(unwrap(quantizer.result(name)));
    out.names.push_back(name);
  });
  for (std::int64_t i = 0; i < loaded.model->config.layers; ++i) out.norms.merge(unwrap(quantizer.norms(i)));
  return out;
}

int run(const Options& options) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  const codegemm::Format format = unwrap(codegemm::parse_format(options.format));
  codegemm::ThreadPool pool(options.threads);
  const std::unique_ptr<TensorSource> source = unwrap(open_model(options.model));
  ProgressLine loading("loading " + options.model);
  const LoadedModel loaded = unwrap(load_model(
      *source, [&](std::int64_t done, std::int64_t total) { loading.update(done, total, "tensors"); }));
  const std::string state = options.out + "/state";
  const Layers layers = options.method == "kmeans" ? quantize_plain(options, loaded, format, pool)
                                                   : quantize_on_text(options, loaded, format, state, pool);
  std::vector<codegemm::NamedMatrix> named;
  double bits = 0.0;
  double weights = 0.0;
  for (std::size_t i = 0; i < layers.names.size(); ++i) {
    const codegemm::QuantizedMatrix& matrix = layers.matrices[i];
    named.push_back({layers.names[i], matrix.view()});
    const double count = static_cast<double>(matrix.rows()) * static_cast<double>(matrix.cols());
    bits += count * codegemm::bits_per_weight(format, matrix.rows(), matrix.cols());
    weights += count;
  }
  check(write_quantized_model(*source, options.out, kind_of(options, format), named, layers.norms));
  if (!options.keep_state && options.method != "kmeans") std::filesystem::remove_all(state);
  std::printf("%s: %zu layers in %s, %.3f bits a weight, in %.1f s\n", options.out.c_str(), named.size(),
              options.format.c_str(), bits / weights,
              std::chrono::duration<double>(Clock::now() - start).count());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{"Quantizes the linear layers of a Llama-family model to codebook formats."};
  app.add_option("model", options.model, "GGUF file or Hugging Face folder")->required();
  app.add_option("out", options.out, "folder for the quantized model")->required();
  app.add_option("--format", options.format, "mMvVgG or mMvVbBgG, such as m1v4g128")->capture_default_str();
  app.add_option("--method", options.method, "calibrated, or kmeans: no calibration text")
      ->check(CLI::IsMember({"calibrated", "kmeans"}))
      ->capture_default_str();
  app.add_option("--calibration", options.calibration, "text to calibrate on");
  app.add_option("--kind", options.kind, "file format; auto: aqlm for g-1, else codegemm")
      ->check(CLI::IsMember({"auto", "codegemm", "aqlm"}))
      ->capture_default_str();
  app.add_option("--sequences", options.sequences, "stretches of the text, evenly spread")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--length", options.length, "tokens in each")
      ->check(CLI::Range(2, 1 << 17))
      ->capture_default_str();
  app.add_option("--rounds", options.quantizer.rounds, "most rounds for a layer")
      ->check(CLI::Range(0, 1000))
      ->capture_default_str();
  app.add_option("--tolerance", options.quantizer.tolerance, "gain of a round below which they end")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--beam", options.quantizer.beam, "paths of the code search")
      ->check(CLI::Range(1, 16))
      ->capture_default_str();
  app.add_option("--codebook-steps", options.quantizer.codebook_steps, "conjugate gradient steps of a fit")
      ->check(CLI::Range(0, 1000))
      ->capture_default_str();
  app.add_option("--finetune-steps", options.tune.steps,
                 "Adam steps on each block's codebooks, scales and norms, once its layers are quantized")
      ->check(CLI::Range(0, 100000))
      ->capture_default_str();
  app.add_option("--finetune-rate", options.tune.rate, "their highest rate, of each tensor's size")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--finetune-tokens", options.tune.tokens, "tokens of each such step")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--seed", options.quantizer.kmeans.seed, "of the k-means beginning")->capture_default_str();
  app.add_option("--threads", options.threads, "0: one for each processor")->check(CLI::Range(0, 1024));
  app.add_flag("--no-correction", options.no_correction,
               "quantize the weights as they are, not corrected for the layers before");
  app.add_flag("--keep-state", options.keep_state, "leave the folder OUT/state of finished layers");
  app.add_flag("--quiet", options.quiet, "no progress of the layers");
  try {
    app.parse(argc, argv);
    if (options.method != "kmeans" && options.calibration.empty())
      throw CLI::RequiredError("--calibration (or --method kmeans)");
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  try {
    return run(options);
  } catch (const std::exception& e) {
    std::fflush(stdout);
    std::fprintf(stderr, "quantize: %s\n", e.what());
    return 2;
  }
}
