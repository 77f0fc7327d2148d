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
#include <common/model_loader.hpp>
#include <common/model_tokenizer.hpp>
#include <common/model_writer.hpp>
#include <common/progress.hpp>
#include <common/text_quantizer.hpp>
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
  bool keep_state = false;
  bool quiet = false;
  TextQuantizerOptions quantizer;
};

codegemm::CheckpointKind kind_of(const Options& options, codegemm::Format format) {
  if (options.kind == "aqlm") return codegemm::CheckpointKind::kAqlm;
  if (options.kind == "codegemm") return codegemm::CheckpointKind::kCodeGemm;
  return format.g < 0 ? codegemm::CheckpointKind::kAqlm : codegemm::CheckpointKind::kCodeGemm;
}

/// Without calibration: k-means, layer by layer.
QuantizedLayers quantize_plain(const Options& options, const LoadedModel& loaded, codegemm::Format format,
                               Executor& executor) {
  QuantizedLayers out;
  ProgressLine progress("quantizing");
  const std::int64_t total = loaded.model->config.layers * 7;
  for_each_linear(*loaded.model, [&](const std::string& name, const DenseLinear& layer) {
    if (name == "lm_head") return;
    out.matrices.push_back(unwrap(
        codegemm::quantize_kmeans(layer.weights(), format, options.quantizer.layers.kmeans, executor)));
    out.names.push_back(name);
    progress.update(static_cast<std::int64_t>(out.names.size()), total, "layers");
  });
  return out;
}

QuantizedLayers quantize_on_text(const Options& options, const LoadedModel& loaded, codegemm::Format format,
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
  ProgressLine progress("quantizing");
  return quantize_on_sequences(
      loaded, format, sequences, options.quantizer, state, executor, [&](const QuantizeProgress& now) {
        if (options.quiet) return;
        char error[32];
        std::snprintf(error, sizeof(error), "error %.4f", now.error);
        const std::string left = time_left(now.seconds_left);
        progress.update(static_cast<std::int64_t>(now.share * 1000.0), 1000,
                        codegemm::concat(now.layer, " ", error, left.empty() ? "" : ", ", left));
      });
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
  const QuantizedLayers layers = options.method == "kmeans"
                                     ? quantize_plain(options, loaded, format, pool)
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
  app.add_option("--rounds", options.quantizer.layers.rounds, "most rounds for a layer")
      ->check(CLI::Range(0, 1000))
      ->capture_default_str();
  app.add_option("--tolerance", options.quantizer.layers.tolerance, "gain of a round below which they end")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--beam", options.quantizer.layers.beam, "paths of the code search")
      ->check(CLI::Range(1, 16))
      ->capture_default_str();
  app.add_option("--codebook-steps", options.quantizer.layers.codebook_steps,
                 "conjugate gradient steps of a fit")
      ->check(CLI::Range(0, 1000))
      ->capture_default_str();
  app.add_option("--finetune-steps", options.quantizer.tune.steps,
                 "Adam steps on each block's codebooks, scales and norms, once its layers are quantized")
      ->check(CLI::Range(0, 100000))
      ->capture_default_str();
  app.add_option("--finetune-rate", options.quantizer.tune.rate, "their highest rate, of each tensor's size")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--finetune-tokens", options.quantizer.tune.tokens, "tokens of each such step")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--seed", options.quantizer.layers.kmeans.seed, "of the k-means beginning")
      ->capture_default_str();
  app.add_option("--threads", options.threads, "0: one for each processor")->check(CLI::Range(0, 1024));
  app.add_flag("!--no-correction", options.quantizer.correct,
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
