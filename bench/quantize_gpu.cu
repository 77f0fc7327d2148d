// SPDX-License-Identifier: Apache-2.0
//
// bench/quantize_gpu.cu - suite quantize-gpu: a real model quantized and distilled on a GPU: how long it
// takes and what its perplexity is, step by step, for some formats.

// Eigen is for the host alone here; as CUDA code it would do without vector instructions.
#define EIGEN_NO_CUDA
#pragma nv_diag_suppress 20012, 1675, 550, 2810, 3189

#include <sys/resource.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/quantize/additive.hpp>
#include <common/gpu_quantizer.cuh>
#include <common/model_loader.hpp>
#include <common/model_tokenizer.hpp>
#include <common/text_tokens.hpp>

#include "support/gpu_timing.cuh"
#include "support/report.hpp"

namespace codegemm::bench {
namespace {

using namespace prefillshare;
using namespace prefillshare::examples;
using nlohmann::json;
using Clock = std::chrono::steady_clock;

struct Options {
  std::string model, text, calibration, cache, json_path, out;
  std::vector<std::string> formats = {"m1v4g64"};
  std::vector<std::string> layers;  // "NxK"
  std::int64_t sequences = 64;
  std::int64_t length = 512;
  std::int64_t windows = 16;
  std::int64_t window_length = 512;
  std::int64_t distill_sequences = 1 << 20;
  std::int64_t judged = 8;
  std::vector<std::int64_t> steps = {400};
  std::vector<double> rates = {4e-3};
  TrainOptions distill;
  TextQuantizerOptions quantizer;
  std::string method = "calibrated";
  int threads = 0;
};

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

class QuantizeSuite {
 public:
  explicit QuantizeSuite(const Options& options)
      : options_(options),
        pool_(options.threads),
        source_(unwrap(open_model(options.model))),
        loaded_(unwrap(load_model(*source_))) {
    const Tokenizer tokenizer = unwrap(load_tokenizer(options.model));
    const auto cut = [&](const std::string& path, std::int64_t count, std::int64_t length) {
      const std::vector<std::int32_t> ids = tokens_of_file(path, tokenizer);
      auto out = spread_sequences(ids, count, length, tokenizer);
      if (out.empty()) throw UserError(concat(path, ": has ", ids.size(), " tokens, needs ", length));
      return out;
    };
    windows_ = cut(options.text, options.windows, options.window_length);
    sequences_ = cut(options.calibration, options.sequences, options.length);
    // All of the text is learned from, but for a few stretches that only judge.
    taught_ = cut(options.calibration, options.distill_sequences, options.length);
    const std::int64_t judged = std::min(options.judged, std::ssize(taught_) - 1);
    for (std::int64_t i = judged; i > 0; --i) {
      const std::int64_t at = (2 * i - 1) * std::ssize(taught_) / (2 * judged);
      judged_.push_back(std::move(taught_[static_cast<std::size_t>(at)]));
      taught_.erase(taught_.begin() + at);
    }
    quantizer_ = options.quantizer;
    quantizer_.backend = gpu_.backend();
    if (options.method == "kmeans") quantizer_.layers.rounds = 0;
    std::filesystem::create_directories(options.cache);
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    suite_.name = "quantize-gpu";
    suite_.machine = describe_card(gpu_.device());
    suite_.memory = measure_bandwidth(stream, gpu_.device().multiprocessors);
    check(cudaStreamDestroy(stream), "cudaStreamDestroy");
  }

  void run() {
    const PerplexitySums dense = gpu_.score(*loaded_.model, windows_);
    std::printf("%zu windows of %zu tokens of %s: perplexity of the model as given %.3f +- %.3f\n",
                windows_.size(), windows_.front().size(), file_name(options_.text).c_str(),
                dense.perplexity(), dense.error());
    std::printf("%s: calibrated on %zu sequences of %zu tokens, distilled on %zu, judged on %zu\n",
                file_name(options_.calibration).c_str(), sequences_.size(), sequences_.front().size(),
                taught_.size(), judged_.size());
    std::fflush(stdout);
    for (const std::string& layer : options_.layers) add_layer(layer);
    for (const std::string& name : options_.formats) {
      add_format(unwrap(parse_format(name)));
      write(dense);  // what is measured is kept
    }
  }

 private:
  /// How long a layer of a larger model takes, in the first of the formats: random weights, and inputs of
  /// which neighbours are alike.
  void add_layer(const std::string& shape) {
    const std::size_t cross = shape.find('x');
    const std::int64_t rows = std::stoll(shape);
    const std::int64_t cols = cross == std::string::npos ? 0 : std::stoll(shape.substr(cross + 1));
    if (rows < 1 || cols < 1) throw UserError(concat("--layer ", shape, ": no shape, such as 4096x4096"));
    std::vector<float> weights(static_cast<std::size_t>(rows * cols));
    codegemm::detail::SplitMix random(1);
    for (float& x : weights)
      x = static_cast<float>(random.uniform() + random.uniform() + random.uniform() - 1.5);
    std::vector<float> powers(static_cast<std::size_t>(cols));
    for (std::int64_t i = 0; i < cols; ++i)
      powers[static_cast<std::size_t>(i)] = std::pow(0.7F, static_cast<float>(i));
    std::vector<float> gram(static_cast<std::size_t>(cols * cols));
    for (std::int64_t i = 0; i < cols; ++i) {
      for (std::int64_t j = 0; j < cols; ++j)
        gram[static_cast<std::size_t>(i * cols + j)] = powers[static_cast<std::size_t>(std::abs(i - j))];
    }
    const Format format = unwrap(parse_format(options_.formats.front()));
    CalibratedReport report;
    const auto start = Clock::now();
    static_cast<void>(unwrap(quantizer_.backend.quantize(MatrixView<const float>(weights.data(), rows, cols),
                                                         MatrixView<const float>(gram.data(), cols, cols),
                                                         format, quantizer_.layers, pool_, &report)));
    const double seconds = seconds_since(start);
    std::printf("%s, %s: quantized in %.2f s, %d rounds, error %.4f\n", shape.c_str(),
                format_name(format).c_str(), seconds, report.rounds, report.error);
    std::fflush(stdout);
    layer_rows_.push_back({{"shape", shape},
                           {"format", format_name(format)},
                           {"seconds", seconds},
                           {"rounds", report.rounds},
                           {"error", report.error}});
  }

  void add_format(Format format) {
    const std::string name = format_name(format);
    const std::string folder =
        concat(options_.cache, "/", loaded_.fingerprint, "-", name, "-", hash_tokens(sequences_));
    const auto start = Clock::now();
    double told = 0.0;
    const QuantizedLayers layers =
        quantize_on_sequences(loaded_, format, sequences_, quantizer_, folder, pool_, [&](const auto& now) {
          if (now.layer.ends_with("down_proj") && now.share >= told + 0.1) {
            told = now.share;
            std::printf("  %s: %.0f%% in %.1f s, error %.4f\n", now.layer.c_str(), 100.0 * told,
                        seconds_since(start), now.error);
            std::fflush(stdout);
          }
        });
    const double seconds = seconds_since(start);
    double bits = 0.0;
    double weights = 0.0;
    for (const QuantizedMatrix& matrix : layers.matrices) {
      const double count = static_cast<double>(matrix.rows()) * static_cast<double>(matrix.cols());
      bits += count * bits_per_weight(format, matrix.rows(), matrix.cols());
      weights += count;
    }
    const PerplexitySums calibrated = gpu_.score(GpuQuantizer::with_layers(*loaded_.model, layers), windows_);
    std::printf("%-11s %.2f bits: quantized in %.1f s, perplexity %.3f +- %.3f\n", name.c_str(),
                bits / weights, seconds, calibrated.perplexity(), calibrated.error());
    std::fflush(stdout);
    QuantizedLayers best = layers;
    double least = HUGE_VAL;  // the held-out text does not choose
    for (const std::int64_t steps : options_.steps) {
      for (const double rate : options_.rates) {
        json row = {{"name", name},
                    {"bits_per_weight", bits / weights},
                    {"method", options_.method},
                    {"quantize_seconds", seconds},
                    {"calibrated_perplexity", calibrated.perplexity()},
                    {"calibrated_perplexity_error", calibrated.error()}};
        QuantizedLayers tuned = layers;
        if (steps > 0) distill(name, steps, rate, tuned, row);
        if (row.value("divergence", least) < least) {
          least = row.at("divergence").get<double>();
          best = std::move(tuned);
        }
        rows_.push_back(std::move(row));
      }
    }
    if (options_.out.empty()) return;
    std::vector<NamedMatrix> named;
    for (std::size_t i = 0; i < best.names.size(); ++i)
      named.push_back({best.names[i], best.matrices[i].view()});
    check(write_quantized_model(*source_, concat(options_.out, "/", name), CheckpointKind::kCodeGemm, named,
                                best.norms));
  }

  void distill(const std::string& name, std::int64_t steps, double rate, QuantizedLayers& layers, json& row) {
    TrainOptions options = options_.distill;
    options.steps = steps;
    options.rate = rate;
    const auto start = Clock::now();
    TrainProgress last;
    const GpuQuantizer::Distilled done =
        gpu_.distill(loaded_.model, layers, taught_, judged_, options, [&](const TrainProgress& now) {
          last = now;
          if (now.step == 1 || now.step % 200 == 0)
            std::printf("  step %lld: divergence %.4f, %.0f tokens/s\n", static_cast<long long>(now.step),
                        now.loss, now.tokens_per_second);
        });
    const double seconds = seconds_since(start);
    const PerplexitySums sums = gpu_.score(GpuQuantizer::with_layers(*loaded_.model, layers), windows_);
    std::printf("%-11s rate %g: %lld steps in %.1f s, divergence %.4f to %.4f, perplexity %.3f +- %.3f\n",
                name.c_str(), rate, static_cast<long long>(options.steps), seconds, done.before, done.after,
                sums.perplexity(), sums.error());
    std::fflush(stdout);
    row["distill_steps"] = options.steps;
    row["distill_rate"] = rate;
    row["distill_batch"] = options.batch;
    row["distill_seconds"] = seconds;
    row["distill_tokens_per_s"] = last.tokens_per_second;
    row["divergence_before"] = done.before;
    row["divergence"] = done.after;
    row["perplexity"] = sums.perplexity();
    row["perplexity_error"] = sums.error();
  }

  void write(const PerplexitySums& dense) const {
    if (options_.json_path.empty()) return;
    json out = frame_json(suite_, rows_);
    rusage usage = {};
    getrusage(RUSAGE_SELF, &usage);
    out["model"] = file_name(options_.model);
    out["perplexity_as_given"] = dense.perplexity();
    out["perplexity_as_given_error"] = dense.error();
    out["held_out_text"] = text_json(options_.text, windows_);
    out["calibration_text"] = text_json(options_.calibration, sequences_);
    out["distillation_text"] = text_json(options_.calibration, taught_);
    out["windows"] = concat(hash_tokens(windows_));
    out["host_peak_mib"] = static_cast<double>(usage.ru_maxrss) / 1024.0;
    out["threads"] = pool_.workers();
    out["layers"] = layer_rows_;
    check(write_text(out.dump(2) + '\n', options_.json_path));
  }

  const Options& options_;
  ThreadPool pool_;
  std::unique_ptr<TensorSource> source_;
  LoadedModel loaded_;
  GpuQuantizer gpu_;
  TextQuantizerOptions quantizer_;
  Suite suite_;
  std::vector<std::vector<std::int32_t>> windows_;    // held out
  std::vector<std::vector<std::int32_t>> sequences_;  // to calibrate on
  std::vector<std::vector<std::int32_t>> taught_;     // to distill on
  std::vector<std::vector<std::int32_t>> judged_;     // of the same text
  json rows_ = json::array();
  json layer_rows_ = json::array();
};

}  // namespace
}  // namespace codegemm::bench

int main(int argc, char** argv) {
  using codegemm::bench::Options;
  Options options;
  options.quantizer.layers.rounds = 6;
  options.quantizer.layers.beam = 4;
  // Rounds on the GPU cost less than a good beginning on the host.
  options.quantizer.layers.kmeans.iterations = 8;
  options.quantizer.layers.kmeans.rounds = 4;
  options.quantizer.layers.kmeans.refits = 1;
  options.quantizer.layers.kmeans.sample = 32768;
  options.distill.batch = 8;
  options.distill.pass_tokens = 4096;
  options.distill.clip = 1.0;
  options.distill.adam.beta2 = 0.98;
  options.distill.adam.weight_decay = 0.0;
  CLI::App app{"Quantizes a model on a GPU and distills it on what the dense one says"};
  app.add_option("--model", options.model, "GGUF file or Hugging Face folder")->required();
  app.add_option("--text", options.text, "text to measure perplexity on")->required();
  app.add_option("--calibration", options.calibration, "text to calibrate and distill on")->required();
  app.add_option("--cache", options.cache, "folder that keeps layers that are quantized")->required();
  app.add_option("--format", options.formats, "formats of the linear layers")->capture_default_str();
  app.add_option("--layer", options.layers,
                 "also times layers of these shapes (NxK) in the first format, on random weights");
  app.add_option("--method", options.method, "calibrated, or kmeans: only what calibration begins with")
      ->check(CLI::IsMember({"calibrated", "kmeans"}))
      ->capture_default_str();
  app.add_option("--sequences", options.sequences, "stretches of the text to calibrate on")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--length", options.length, "tokens in each, as in those to distill on")
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
  app.add_option("--pass-tokens", options.distill.pass_tokens, "rows computed at once")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--windows", options.windows, "stretches of the text measured on")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--window-length", options.window_length, "tokens in each")
      ->check(CLI::Range(4, 1 << 17))
      ->capture_default_str();
  app.add_option("--out", options.out, "write the models there, a folder for each format");
  app.add_option("--threads", options.threads, "0: one for each processor")->check(CLI::Range(0, 1024));
  app.add_option("--json", options.json_path, "write the results there");
  CLI11_PARSE(app, argc, argv);
  try {
    codegemm::bench::QuantizeSuite(options).run();
    return 0;
  } catch (const std::exception& e) {
    std::fflush(stdout);
    std::fprintf(stderr, "quantize-gpu: %s\n", e.what());
    return 2;
  }
}
