// SPDX-License-Identifier: Apache-2.0
//
// examples/06_quantize.cpp - quantize a model from the command line, calibrated on a text.
//
//   quantize MODEL OUT_DIR --calibration FILE [--format m1v4g64]
//
// MODEL is a GGUF file or a Hugging Face folder; OUT_DIR becomes a folder in CodeGEMM's format or, with one
// scale a row (g-1), in AQLM's. A run that was stopped goes on where it was when started again. The dense
// model is read a block at a time. 06_quantize_gpu.cu is the same with --device gpu.
// test: {model} {work}/model --format m1v8b4g-1 --calibration {source}/examples/data/river_report.txt --sequences 2 --length 64 --rounds 1 --beam 1 --codebook-steps 2 --finetune-steps 2 --quiet
// test: {model} {work}/regrouped --format m1v8b4g128 --regroup --method kmeans --quiet
// refused: {model} {work}/model --format m2v8g128 --method kmeans
// refused: {model} {work}/model --kind codegemm --format m2v8g-1 --calibration {source}/LICENSE

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/quantize/kmeans.hpp>
#include <codegemm/regroup.hpp>
#include <common/model_loader.hpp>
#include <common/model_tokenizer.hpp>
#include <common/model_writer.hpp>
#include <common/progress.hpp>
#include <common/quantize_options.hpp>
#include <common/run_program.hpp>
#include <common/text_quantizer.hpp>
#include <common/text_tokens.hpp>
#include <common/unwrap.hpp>

namespace {

using namespace prefillshare;
using namespace prefillshare::examples;

struct Options : QuantizeOptions {
  std::string model, out, format, calibration, kind = "auto", device = "cpu";
  bool regroup = false;
  bool keep_state = false;
  bool quiet = false;
};

#ifdef QUANTIZE_ON_GPU
QuantizeBackend gpu_backend();
#else
QuantizeBackend gpu_backend() {
  throw UserError("--device gpu: take quantize_gpu, which is built with CUDA");
}
#endif

codegemm::CheckpointKind kind_of(const Options& options, codegemm::Format format) {
  if (options.kind == "aqlm") return codegemm::CheckpointKind::kAqlm;
  if (options.kind == "codegemm") return codegemm::CheckpointKind::kCodeGemm;
  return format.g < 0 ? codegemm::CheckpointKind::kAqlm : codegemm::CheckpointKind::kCodeGemm;
}

/// The format that was asked for, or else the one that suits the model.
codegemm::Format wanted_format(const Options& options, const LoadedModel& loaded) {
  return unwrap(options.format.empty() ? default_format(kind_of(options, {}), *loaded.model)
                                       : codegemm::parse_format(options.format));
}

/// How layers of this format are written. What the folder cannot hold is said here, before anything is
/// computed. Throws UserError.
codegemm::Format stored_format(const Options& options, codegemm::Format format, const LoadedModel& loaded,
                               const TensorSource& source) {
  const codegemm::CheckpointKind kind = kind_of(options, format);
  check(source_config(source).status());
  check(check_target(source, options.out));
  const codegemm::Status fits = check_writable(kind, format, *loaded.model);
  if (fits.ok()) return format;
  const Result<codegemm::Format> other = writable_format(kind, format, *loaded.model);
  if (other.ok() && options.regroup) return *other;
  if (!other.ok()) throw UserError(fits.message());
  const std::string name = codegemm::format_name(*other);
  throw UserError(codegemm::concat(fits.message(), "; take ", name, ", or --regroup, which writes ",
                                   codegemm::format_name(format), " as ", name, " with equal scales"));
}

/// Without calibration: k-means, layer by layer.
QuantizedLayers quantize_plain(const Options& options, const LoadedModel& loaded, codegemm::Format format,
                               Executor& executor) {
  QuantizedLayers out;
  ProgressLine progress("quantizing to " + codegemm::format_name(format));
  const std::int64_t total = loaded.model->config.layers * 7;
  for_each_linear(*loaded.model, [&](const std::string& name, const DenseLinear&) {
    if (name != "lm_head") out.names.push_back(name);
  });
  for (std::int64_t i = 0; i < loaded.model->config.layers; ++i) {
    const LlamaLayer<DenseLinear> block = unwrap(loaded.read_block(i));
    for (const DenseLinear* const layer :
         {&block.q, &block.k, &block.v, &block.o, &block.gate, &block.up, &block.down}) {
      out.matrices.push_back(unwrap(
          codegemm::quantize_kmeans(layer->weights(), format, options.quantizer.layers.kmeans, executor)));
      progress.update(static_cast<std::int64_t>(out.matrices.size()), total, "layers");
    }
  }
  return out;
}

QuantizedLayers quantize_on_text(const Options& options, const LoadedModel& loaded, codegemm::Format format,
                                 const std::string& state, Executor& executor) {
  const Tokenizer tokenizer = unwrap(load_tokenizer(options.model));
  const auto sequences = sequences_of_file(options.calibration, options.sequences, options.length, tokenizer);
  std::printf("calibration: %zu sequences of %lld tokens of %s\n", sequences.size(),
              static_cast<long long>(options.length), options.calibration.c_str());
  ProgressLine progress("quantizing to " + codegemm::format_name(format));
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

int run(Options options) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  if (!options.format.empty()) check(codegemm::parse_format(options.format).status());
  if (options.device == "gpu" && options.method == "kmeans")
    throw UserError("--method kmeans: runs on the CPU");
  if (options.device == "gpu") options.quantizer.backend = gpu_backend();
  codegemm::ThreadPool pool(options.threads);
  const std::unique_ptr<TensorSource> source = unwrap(open_model(options.model));
  ProgressLine loading("loading " + options.model);
  const LoadedModel loaded = unwrap(load_model_by_blocks(
      *source, [&](std::int64_t done, std::int64_t total) { loading.update(done, total, "tensors"); }));
  const codegemm::Format format = wanted_format(options, loaded);
  const codegemm::Format stored = stored_format(options, format, loaded, *source);
  const std::string state = options.out + "/state";
  QuantizedLayers layers = options.method == "kmeans"
                               ? quantize_plain(options, loaded, format, pool)
                               : quantize_on_text(options, loaded, format, state, pool);
  if (stored.g != format.g) {
    for (codegemm::QuantizedMatrix& matrix : layers.matrices)
      matrix = unwrap(codegemm::regroup(matrix.view(), stored.g));
  }
  std::vector<codegemm::NamedMatrix> named;
  for (std::size_t i = 0; i < layers.names.size(); ++i)
    named.push_back({layers.names[i], layers.matrices[i].view()});
  check(write_quantized_model(*source, options.out, kind_of(options, format), named, layers.norms));
  if (!options.keep_state && options.method != "kmeans") remove_state(state);
  std::printf("%s: %zu layers in %s, %.3f bits a weight, in %.1f s\n", options.out.c_str(), named.size(),
              codegemm::format_name(stored).c_str(), bits_of(layers.matrices),
              std::chrono::duration<double>(Clock::now() - start).count());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{"Quantizes the linear layers of a Llama-family model to codebook formats."};
  app.add_option("model", options.model, "GGUF file or Hugging Face folder")->required();
  app.add_option("out", options.out, "folder for the quantized model")->required();
  app.add_option("--format", options.format,
                 "mMvVgG or mMvVbBgG, such as m1v4g128; without it m2v8 in the largest groups, up to 128, "
                 "that divide every layer's columns (m2v8g-1 for --kind aqlm)");
  app.add_option("--calibration", options.calibration, "text to calibrate on");
  app.add_option("--kind", options.kind, "file format; auto: aqlm for g-1, else codegemm")
      ->check(CLI::IsMember({"auto", "codegemm", "aqlm"}))
      ->capture_default_str();
  add_quantize_options(app, options);
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
  app.add_flag(
      "--regroup", options.regroup,
      "where a folder of that kind cannot hold the format's groups, write each scale for several smaller "
      "ones: the same weights, and what was quantized before can be written");
  app.add_option("--device", options.device, "cpu or gpu")
      ->check(CLI::IsMember({"cpu", "gpu"}))
      ->capture_default_str();
  app.add_flag("--keep-state", options.keep_state, "leave the folder OUT/state of finished layers");
  app.add_flag("--quiet", options.quiet, "no progress of the layers");
  return run_program(
      "quantize", app, argc, argv, [&] { return run(options); },
      [&] {
        if (options.method != "kmeans" && options.calibration.empty())
          throw CLI::RequiredError("--calibration (or --method kmeans)");
      });
}
