// SPDX-License-Identifier: Apache-2.0
//
// bench/quantize_gpu.cu - suite quantize-gpu: a real model quantized and distilled on a GPU: how long it
// takes and what its perplexity is, step by step, for some formats. Also how long a block of a larger model
// takes, and the layers' errors beside those of AQLM's own code.

// Eigen is for the host alone here; as CUDA code it would do without vector instructions.
#define EIGEN_NO_CUDA
#pragma nv_diag_suppress 20012, 1675, 550, 2810, 3189

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <codegemm/base/thread_pool.hpp>
#include <common/gpu_quantizer.cuh>
#include <common/model_loader.hpp>

#include "support/ggml_blocks.hpp"
#include "support/gpu_timing.cuh"
#include "support/quantize_gpu_aqlm.cuh"
#include "support/quantize_gpu_block.cuh"
#include "support/quantize_gpu_inputs.cuh"
#include "support/quantize_gpu_options.cuh"
#include "support/report.hpp"

namespace codegemm::bench {
namespace {

using namespace prefillshare;
using namespace prefillshare::examples;
using nlohmann::json;
using Clock = std::chrono::steady_clock;

class QuantizeSuite {
 public:
  explicit QuantizeSuite(const QuantizeGpuOptions& options) : options_(options), in_(options) {
    std::filesystem::create_directories(options.cache);
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    suite_.name = "quantize-gpu";
    suite_.machine = describe_card(in_.gpu.device());
    suite_.memory = measure_bandwidth(stream, in_.gpu.device().multiprocessors);
    check(cudaStreamDestroy(stream), "cudaStreamDestroy");
  }

  void run() {
    if (!options_.out.empty()) {
      for (const std::string& name : options_.formats)
        check(check_writable(CheckpointKind::kCodeGemm, unwrap(parse_format(name)), *in_.loaded.model));
    }
    dense_ = in_.gpu.score(in_.loaded, in_.windows);
    std::printf("%zu windows of %zu tokens of %s: perplexity of the model as given %.3f +- %.3f\n",
                in_.windows.size(), in_.windows.front().size(), file_name(options_.text).c_str(),
                dense_.perplexity(), dense_.error());
    std::printf("%s: calibrated on %zu sequences of %zu tokens, distilled on %zu, judged on %zu\n",
                file_name(options_.calibration).c_str(), in_.sequences.size(), in_.sequences.front().size(),
                in_.taught.size(), in_.judged.size());
    std::fflush(stdout);
    if (!options_.aqlm.empty()) {
      compare_with_aqlm(in_, options_, [&](json row) {
        aqlm_rows_.push_back(std::move(row));
        write();
      });
    }
    if (options_.block_8b) {
      block_8b_ = time_block_8b(in_, options_);
      write();
    }
    for (const std::string& name : options_.blocks) add_blocks(name);
    for (const std::string& name : options_.formats) {
      add_format(unwrap(parse_format(name)));
      write();  // what is measured is kept
    }
  }

 private:
  /// All layers in blocks of ggml's, importance from the calibration text.
  void add_blocks(const std::string& name) {
    const Ggml library;
    const auto& types = Ggml::file_types();
    const auto type =
        std::find_if(types.begin(), types.end(), [&](const Ggml::Type& own) { return name == own.name; });
    if (type == types.end()) throw UserError(name + ": no block type of that name is known here");
    if (!library.quantizes()) throw UserError("--blocks: CODEGEMM_GGML names no folder of ggml's libraries");
    BlockReplacer replacer{library, *type, in_.pool, {}};
    CalibrationRunOptions run_options;
    run_options.correct = false;
    in_.gpu.calibrate(in_.loaded, in_.sequences, run_options, replacer, in_.loaded.model->config.layers);
    const auto model = with_weights(*in_.loaded.model, [&](const std::string& layer, const DenseLinear&) {
      return replacer.made.at(layer);
    });
    const LoadedModel in_blocks{model};
    const PerplexitySums sums = in_.gpu.score(in_blocks, in_.windows);
    const double bits = 8.0 * type->bytes / type->block;
    const double held_out = in_.gpu.divergence(in_blocks, in_.loaded, in_.windows);
    std::printf("%s blocks, %.2f bits: held out divergence %.4f, perplexity %.3f +- %.3f\n", name.c_str(),
                bits, held_out, sums.perplexity(), sums.error());
    std::fflush(stdout);
    rows_.push_back({{"name", name + " blocks"},
                     {"bits_per_weight", bits},
                     {"method", "ggml's blocks over the rows' ends, importance from the calibration text"},
                     {"held_out_divergence", held_out},
                     {"perplexity", sums.perplexity()},
                     {"perplexity_error", sums.error()}});
    write();
  }

  void add_format(Format format) {
    const std::string name = format_name(format);
    const std::string folder =
        concat(options_.cache, "/", in_.loaded.fingerprint, "-", name, "-", hash_tokens(in_.sequences));
    // The layers' own errors, before the rounds and after: means over those that are made now.
    double kmeans_error = 0.0;
    double layer_error = 0.0;
    int made = 0;
    TextQuantizerOptions quantizer = in_.quantizer;
    quantizer.backend.quantize = [&](MatrixView<const float> w, MatrixView<const float> gram, Format f,
                                     const CalibratedOptions& options, Executor& executor,
                                     CalibratedReport* report) {
      auto out = in_.quantizer.backend.quantize(w, gram, f, options, executor, report);
      kmeans_error += report->kmeans_error;
      layer_error += report->error;
      ++made;
      return out;
    };
    const auto start = Clock::now();
    double told = 0.0;
    const QuantizedLayers layers = quantize_on_sequences(
        in_.loaded, format, in_.sequences, quantizer, folder, in_.pool, [&](const auto& now) {
          if (now.layer.ends_with("down_proj") && now.share >= told + 0.1) {
            told = now.share;
            std::printf("  %s: %.0f%% in %.1f s, error %.4f\n", now.layer.c_str(), 100.0 * told,
                        seconds_since(start), now.error);
            std::fflush(stdout);
          }
        });
    const double seconds = seconds_since(start);
    const double bits = bits_of(layers.matrices);
    const PerplexitySums calibrated =
        in_.gpu.score(GpuQuantizer::with_layers(in_.loaded, layers, in_.pool), in_.windows);
    std::printf(
        "%-11s %.2f bits: quantized in %.1f s, layers' error %.4f (k-means %.4f), perplexity %.3f +- %.3f\n",
        name.c_str(), bits, seconds, made > 0 ? layer_error / made : 0.0,
        made > 0 ? kmeans_error / made : 0.0, calibrated.perplexity(), calibrated.error());
    std::fflush(stdout);
    QuantizedLayers best;     // to be written
    double least = HUGE_VAL;  // the held-out text does not choose
    for (const Distillation& how : distillations()) {
      json row = {{"name", name},
                  {"bits_per_weight", bits},
                  {"method", options_.method},
                  {"rounds", in_.quantizer.layers.rounds},
                  {"beam", in_.quantizer.layers.beam},
                  {"quantize_seconds", seconds},
                  {"kmeans_layer_error", made > 0 ? json(kmeans_error / made) : json()},
                  {"layer_error", made > 0 ? json(layer_error / made) : json()},
                  {"calibrated_perplexity", calibrated.perplexity()},
                  {"calibrated_perplexity_error", calibrated.error()}};
      QuantizedLayers tuned = layers;
      if (how.steps > 0) distill(name, how, tuned, row);
      if (!options_.out.empty() && (best.names.empty() || row.value("divergence", least) < least)) {
        least = row.value("divergence", least);
        best = std::move(tuned);
      }
      rows_.push_back(std::move(row));
      write();
    }
    if (options_.out.empty()) return;
    std::vector<NamedMatrix> named;
    for (std::size_t i = 0; i < best.names.size(); ++i)
      named.push_back({best.names[i], best.matrices[i].view()});
    check(write_quantized_model(*in_.source, concat(options_.out, "/", name), CheckpointKind::kCodeGemm,
                                named, best.norms));
  }

  struct Distillation {
    std::int64_t steps = 0;
    double rate = 0.0;
    double code_rate = 0.0;
    double label_share = 0.0;
  };
  /// All that were asked for with one another.
  [[nodiscard]] std::vector<Distillation> distillations() const {
    std::vector<Distillation> out;
    for (const std::int64_t steps : options_.steps) {
      for (const double rate : options_.rates) {
        for (const double code_rate : options_.code_rates) {
          for (const double share : options_.label_shares) out.push_back({steps, rate, code_rate, share});
        }
      }
    }
    return out;
  }

  void distill(const std::string& name, const Distillation& how, QuantizedLayers& layers, json& row) {
    prefillshare::cuda::CodeMoveOptions moves = options_.moves;
    moves.rate = how.code_rate;
    TrainOptions options = options_.distill;
    options.steps = how.steps;
    options.rate = how.rate;
    const auto start = Clock::now();
    TrainProgress last;
    const GpuQuantizer::Distilled done =
        in_.gpu.distill(in_.loaded, layers, in_.taught, in_.judged, options, moves, how.label_share,
                        [&](const TrainProgress& now) {
                          last = now;
                          if (now.step == 1 || now.step % 200 == 0)
                            std::printf("  step %lld: loss %.4f, %.0f tokens/s\n",
                                        static_cast<long long>(now.step), now.loss, now.tokens_per_second);
                        });
    const double seconds = seconds_since(start);
    const LoadedModel model = GpuQuantizer::with_layers(in_.loaded, layers, in_.pool);
    const PerplexitySums sums = in_.gpu.score(model, in_.windows);
    const double held_out = in_.gpu.divergence(model, in_.loaded, in_.windows);
    std::printf(
        "%-11s rate %g, codes' %g, labels %g: %lld steps in %.1f s, %lld codes moved, divergence %.4f to "
        "%.4f, held out %.4f, perplexity %.3f +- %.3f\n",
        name.c_str(), how.rate, how.code_rate, how.label_share, static_cast<long long>(options.steps),
        seconds, static_cast<long long>(done.codes_moved), done.before, done.after, held_out,
        sums.perplexity(), sums.error());
    std::fflush(stdout);
    row["distill_steps"] = options.steps;
    row["distill_rate"] = how.rate;
    row["distill_batch"] = options.batch;
    row["code_rate"] = how.code_rate;
    row["label_share"] = how.label_share;
    row["codes_moved"] = done.codes_moved;
    row["distill_seconds"] = seconds;
    row["distill_tokens_per_s"] = last.tokens_per_second;
    row["divergence_before"] = done.before;
    row["divergence"] = done.after;
    row["held_out_divergence"] = held_out;
    row["perplexity"] = sums.perplexity();
    row["perplexity_error"] = sums.error();
  }

  void write() const {
    if (options_.json_path.empty()) return;
    json out = frame_json(suite_, rows_);
    rusage usage = {};
    getrusage(RUSAGE_SELF, &usage);
    out["model"] = file_name(options_.model);
    out["perplexity_as_given"] = dense_.perplexity();
    out["perplexity_as_given_error"] = dense_.error();
    out["held_out_text"] = text_json(options_.text, in_.windows);
    out["calibration_text"] = text_json(options_.calibration, in_.sequences);
    out["distillation_text"] = text_json(options_.calibration, in_.taught);
    out["windows"] = concat(hash_tokens(in_.windows));
    out["host_peak_mib"] = static_cast<double>(usage.ru_maxrss) / 1024.0;
    out["threads"] = in_.pool.workers();
    if (options_.permute > 0) out["channels_permuted_by_seed"] = options_.permute;
    if (!aqlm_rows_.empty()) out["beside_aqlm"] = aqlm_rows_;
    if (!block_8b_.empty()) out["block_8b"] = block_8b_;
    check(write_text(out.dump(2) + '\n', options_.json_path));
  }

  const QuantizeGpuOptions& options_;
  QuantizeGpuInputs in_;
  Suite suite_;
  PerplexitySums dense_;  // of the model as given
  json rows_ = json::array();
  json aqlm_rows_ = json::array();
  json block_8b_ = json::object();
};

}  // namespace
}  // namespace codegemm::bench

int main(int argc, char** argv) {
  codegemm::bench::QuantizeGpuOptions options;
  CLI::App app{"Quantizes a model on a GPU and distills it on what the dense one says"};
  codegemm::bench::add_options(app, options);
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
