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
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <optional>
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
#include <common/quantize_options.hpp>
#include <common/text_tokens.hpp>

#include "support/ggml_blocks.hpp"
#include "support/gpu_timing.cuh"
#include "support/peer_process.hpp"
#include "support/permuted_model.hpp"
#include "support/random_dense.hpp"
#include "support/report.hpp"

namespace codegemm::bench {
namespace {

using namespace prefillshare;
using namespace prefillshare::examples;
using nlohmann::json;
using Clock = std::chrono::steady_clock;

struct Options : QuantizeOptions {
  std::string model, text, calibration, cache, json_path, out, aqlm;
  std::vector<std::string> formats = {"m1v4g64"};
  bool block_8b = false;
  std::uint64_t permute = 0;
  std::vector<std::string> blocks;
  std::int64_t windows = 16;
  std::int64_t window_length = 512;
  std::int64_t distill_sequences = 1 << 20;
  std::int64_t judged = 8;
  std::vector<std::int64_t> steps = {400};
  std::vector<double> rates = {4e-3};
  TrainOptions distill;
  std::vector<double> code_rates = {0.0};
  std::vector<double> label_shares = {0.0};
  prefillshare::cuda::CodeMoveOptions moves;
};

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// A block of Llama-3-8B's shape and an embedding of some tokens, weights at random.
LoadedModel random_block_8b() {
  ModelConfig c;
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
  LoadedModel loaded;
  loaded.model = random_dense_model(c, 1.0);
  loaded.fingerprint = "random-block-8b";
  return loaded;
}

/// tr((W - W^) H (W - W^)^T) / tr(W H W^T) in double.
double relative_error(MatrixView<const float> weights, MatrixView<const float> gram,
                      const codegemm::QuantizedMatrix& quantized) {
  const std::int64_t k = weights.cols;
  std::vector<float> values(static_cast<std::size_t>(weights.rows * k));
  codegemm::reference_dequantize(quantized.view(), MatrixView<float>(values.data(), weights.rows, k));
  using Dense = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using Single = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const Dense w = Eigen::Map<const Single>(weights.data, weights.rows, k).cast<double>();
  const Dense h = Eigen::Map<const Single>(gram.data, k, k).cast<double>();
  const Dense off = w - Eigen::Map<const Single>(values.data(), weights.rows, k).cast<double>();
  return (off * h).cwiseProduct(off).sum() / (w * h).cwiseProduct(w).sum();
}

/// Replaces nothing: shows one layer for each of a block's inputs, with its weights and H, to `look`.
struct LayerLooker {
  std::function<void(const std::string& name, const DenseLinear& dense, MatrixView<const float> gram)> look;
  std::string prefix;

  Result<std::optional<DenseLinear>> find(const std::string& name, const DenseLinear& dense) const {
    for (const char* part : {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}) {
      if (name == prefix + part) return std::optional<DenseLinear>();
    }
    return std::optional<DenseLinear>(dense);
  }
  Result<DenseLinear> make(const std::string& name, const DenseLinear& dense,
                           MatrixView<const float> gram) const {
    look(name, dense, gram);
    return dense;
  }
};

class QuantizeSuite {
 public:
  explicit QuantizeSuite(const Options& options)
      : options_(options),
        pool_(options.threads),
        source_(unwrap(open_model(options.model))),
        loaded_(unwrap(load(*source_, options))) {
    if (options.permute > 0) {
      loaded_.model = permuted_model(*loaded_.model, options.permute);
      loaded_.fingerprint += concat("-permuted-", options.permute);
    }
    const Tokenizer tokenizer = unwrap(load_tokenizer(options.model));
    windows_ = sequences_of_file(options.text, options.windows, options.window_length, tokenizer);
    sequences_ = sequences_of_file(options.calibration, options.sequences, options.length, tokenizer);
    // All of the text is learned from, but for a few stretches that only judge.
    taught_ = sequences_of_file(options.calibration, options.distill_sequences, options.length, tokenizer);
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
    if (!options_.out.empty()) {
      for (const std::string& name : options_.formats)
        check(check_writable(CheckpointKind::kCodeGemm, unwrap(parse_format(name)), *loaded_.model));
    }
    dense_ = gpu_.score(loaded_, windows_);
    const PerplexitySums& dense = dense_;
    std::printf("%zu windows of %zu tokens of %s: perplexity of the model as given %.3f +- %.3f\n",
                windows_.size(), windows_.front().size(), file_name(options_.text).c_str(),
                dense.perplexity(), dense.error());
    std::printf("%s: calibrated on %zu sequences of %zu tokens, distilled on %zu, judged on %zu\n",
                file_name(options_.calibration).c_str(), sequences_.size(), sequences_.front().size(),
                taught_.size(), judged_.size());
    std::fflush(stdout);
    if (!options_.aqlm.empty()) compare_with_aqlm(dense);
    if (options_.block_8b) add_block_8b(dense);
    for (const std::string& name : options_.blocks) add_blocks(name);
    for (const std::string& name : options_.formats) {
      add_format(unwrap(parse_format(name)));
      write(dense);  // what is measured is kept
    }
  }

 private:
  /// The layers of a middle block by AQLM's own code and by ours, on the same H: m2v8g-1, its 2x8.
  void compare_with_aqlm(const PerplexitySums& perplexity) {
    const Format format = unwrap(parse_format("m2v8g-1"));
    const std::int64_t block = loaded_.model->config.layers / 2;
    const std::string path = concat(options_.cache, "/aqlm");
    const auto look = [&](const std::string& name, const DenseLinear& dense, MatrixView<const float> gram) {
      const MatrixView<const float> w = dense.weights();
      json row = {{"name", name}, {"format", format_name(format)}};
      std::printf("%s, %lld x %lld, %s:", name.c_str(), static_cast<long long>(w.rows),
                  static_cast<long long>(w.cols), format_name(format).c_str());
      // AQLM's does not damp H: neither may ours much.
      for (const auto& [beam, damping] : {std::pair(1, 0.1), std::pair(1, 0.01), std::pair(4, 0.01)}) {
        CalibratedOptions layers;
        layers.beam = beam;
        layers.damping = damping;
        const auto start = Clock::now();
        const QuantizedMatrix made =
            unwrap(quantizer_.backend.quantize(w, gram, format, layers, pool_, nullptr));
        const double seconds = seconds_since(start);
        const double error = relative_error(w, gram, made);
        std::printf(" ours with beam %d, damping %g %.5f in %.1f s,", beam, damping, error, seconds);
        row["ours"].push_back({{"beam", beam}, {"damping", damping}, {"error", error}, {"seconds", seconds}});
      }
      write_floats(path + ".weights", w);
      write_floats(path + ".gram", gram);
      const std::vector<double> peer =
          run_peer("", "aqlm_quantize_peer.py",
                   concat('\'', options_.aqlm, "' '", path, ".weights' '", path, ".gram' ", w.rows, ' ',
                          w.cols, ' ', format.v, ' ', format.m, ' ', format.b),
                   2);
      if (peer.empty()) {
        std::printf(" AQLM's code is left out: it is not there, or failed\n");
      } else {
        std::printf(" AQLM's %.5f in %.1f s\n", peer[0], peer[1]);
        row["aqlm_error"] = peer[0];
        row["aqlm_seconds"] = peer[1];
      }
      std::fflush(stdout);
      aqlm_rows_.push_back(std::move(row));
      write(perplexity);
    };
    LayerLooker looker{look, concat("model.layers.", block, ".")};
    CalibrationRunOptions run_options;
    run_options.correct = false;
    gpu_.calibrate(loaded_, sequences_, run_options, looker, block + 1, pool_);
  }

  static void write_floats(const std::string& path, MatrixView<const float> matrix) {
    std::ofstream file(path, std::ios::binary);
    for (std::int64_t n = 0; n < matrix.rows; ++n) {
      file.write(reinterpret_cast<const char*>(matrix.row(n)),
                 static_cast<std::streamsize>(static_cast<std::size_t>(matrix.cols) * sizeof(float)));
    }
    if (!file) throw UserError(path + ": cannot be written");
  }

  /// How long a block of Llama-3-8B takes in the first of the formats, with the calibration; times its 32.
  void add_block_8b(const PerplexitySums& perplexity) {
    const Format format = unwrap(parse_format(options_.formats.front()));
    const LoadedModel block = random_block_8b();
    codegemm::detail::SplitMix random(2);
    std::vector<std::vector<std::int32_t>> sequences = sequences_;
    for (auto& tokens : sequences) {
      for (std::int32_t& token : tokens) {
        token =
            static_cast<std::int32_t>(random.uniform() * static_cast<double>(block.model->config.vocab_size));
      }
    }
    double inside = 0.0;  // of the layers' quantizers
    json layers = json::array();
    TextQuantizerOptions quantizer = quantizer_;
    quantizer.backend.quantize = [&](MatrixView<const float> w, MatrixView<const float> gram, Format f,
                                     const CalibratedOptions& options, Executor& executor,
                                     CalibratedReport* report) {
      const auto start = Clock::now();
      auto made = quantizer_.backend.quantize(w, gram, f, options, executor, report);
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
    const std::string folder = concat(options_.cache, "/block-8b-", format_name(format));
    std::filesystem::remove_all(folder);
    const auto start = Clock::now();
    static_cast<void>(
        quantize_on_sequences(block, format, sequences, quantizer, folder, pool_, [](const auto&) {}));
    const double seconds = seconds_since(start);
    std::filesystem::remove_all(folder);
    constexpr double kBlocks = 32.0;
    std::printf(
        "a block of Llama-3-8B's shape in %s: %.1f s, of which the quantizer %.1f; 32 take %.0f min\n",
        format_name(format).c_str(), seconds, inside, kBlocks * seconds / 60.0);
    std::fflush(stdout);
    block_8b_ = {{"format", format_name(format)},
                 {"tokens", std::ssize(sequences) * std::ssize(sequences.front())},
                 {"seconds", seconds},
                 {"quantizer_seconds", inside},
                 {"seconds_of_32_blocks", kBlocks * seconds},
                 {"layers", std::move(layers)}};
    write(perplexity);
  }

  /// All layers in blocks of ggml's, importance from the calibration text.
  void add_blocks(const std::string& name) {
    const Ggml library;
    const auto& types = Ggml::file_types();
    const auto type =
        std::find_if(types.begin(), types.end(), [&](const Ggml::Type& own) { return name == own.name; });
    if (type == types.end()) throw UserError(name + ": no block type of that name is known here");
    if (!library.quantizes()) throw UserError("--blocks: CODEGEMM_GGML names no folder of ggml's libraries");
    BlockReplacer replacer{library, *type, pool_, {}};
    CalibrationRunOptions run_options;
    run_options.correct = false;
    gpu_.calibrate(loaded_, sequences_, run_options, replacer, loaded_.model->config.layers, pool_);
    const auto model = with_weights(*loaded_.model, [&](const std::string& layer, const DenseLinear&) {
      return replacer.made.at(layer);
    });
    const LoadedModel in_blocks{model};
    const PerplexitySums sums = gpu_.score(in_blocks, windows_);
    const double bits = 8.0 * type->bytes / type->block;
    const double held_out = gpu_.divergence(in_blocks, loaded_, windows_);
    std::printf("%s blocks, %.2f bits: held out divergence %.4f, perplexity %.3f +- %.3f\n", name.c_str(),
                bits, held_out, sums.perplexity(), sums.error());
    std::fflush(stdout);
    rows_.push_back({{"name", name + " blocks"},
                     {"bits_per_weight", bits},
                     {"method", "ggml's blocks over the rows' ends, importance from the calibration text"},
                     {"held_out_divergence", held_out},
                     {"perplexity", sums.perplexity()},
                     {"perplexity_error", sums.error()}});
    write(dense_);
  }

  /// A block at a time, unless all of it is needed at once.
  [[nodiscard]] static Result<LoadedModel> load(TensorSource& source, const Options& options) {
    if (options.permute > 0) return load_model(source);
    Result<LoadedModel> loaded = load_model_by_blocks(source);
    if (!loaded.ok() || loaded->model->config.tied_embeddings) return loaded;
    return load_model(source);
  }

  void add_format(Format format) {
    const std::string name = format_name(format);
    const std::string folder =
        concat(options_.cache, "/", loaded_.fingerprint, "-", name, "-", hash_tokens(sequences_));
    // The layers' own errors, before the rounds and after: means over those that are made now.
    double kmeans_error = 0.0;
    double layer_error = 0.0;
    int made = 0;
    TextQuantizerOptions quantizer = quantizer_;
    quantizer.backend.quantize = [&](MatrixView<const float> w, MatrixView<const float> gram, Format f,
                                     const CalibratedOptions& options, Executor& executor,
                                     CalibratedReport* report) {
      auto out = quantizer_.backend.quantize(w, gram, f, options, executor, report);
      kmeans_error += report->kmeans_error;
      layer_error += report->error;
      ++made;
      return out;
    };
    const auto start = Clock::now();
    double told = 0.0;
    const QuantizedLayers layers =
        quantize_on_sequences(loaded_, format, sequences_, quantizer, folder, pool_, [&](const auto& now) {
          if (now.layer.ends_with("down_proj") && now.share >= told + 0.1) {
            told = now.share;
            std::printf("  %s: %.0f%% in %.1f s, error %.4f\n", now.layer.c_str(), 100.0 * told,
                        seconds_since(start), now.error);
            std::fflush(stdout);
          }
        });
    const double seconds = seconds_since(start);
    const double bits = bits_of(layers.matrices);
    const PerplexitySums calibrated = gpu_.score(GpuQuantizer::with_layers(loaded_, layers, pool_), windows_);
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
                  {"rounds", quantizer_.layers.rounds},
                  {"beam", quantizer_.layers.beam},
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
      write(dense_);
    }
    if (options_.out.empty()) return;
    std::vector<NamedMatrix> named;
    for (std::size_t i = 0; i < best.names.size(); ++i)
      named.push_back({best.names[i], best.matrices[i].view()});
    check(write_quantized_model(*source_, concat(options_.out, "/", name), CheckpointKind::kCodeGemm, named,
                                best.norms));
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
    const GpuQuantizer::Distilled done = gpu_.distill(
        loaded_, layers, taught_, judged_, options, moves, how.label_share, [&](const TrainProgress& now) {
          last = now;
          if (now.step == 1 || now.step % 200 == 0)
            std::printf("  step %lld: loss %.4f, %.0f tokens/s\n", static_cast<long long>(now.step), now.loss,
                        now.tokens_per_second);
        });
    const double seconds = seconds_since(start);
    const LoadedModel model = GpuQuantizer::with_layers(loaded_, layers, pool_);
    const PerplexitySums sums = gpu_.score(model, windows_);
    const double held_out = gpu_.divergence(model, loaded_, windows_);
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
    if (options_.permute > 0) out["channels_permuted_by_seed"] = options_.permute;
    if (!aqlm_rows_.empty()) out["beside_aqlm"] = aqlm_rows_;
    if (!block_8b_.empty()) out["block_8b"] = block_8b_;
    check(write_text(out.dump(2) + '\n', options_.json_path));
  }

  const Options& options_;
  GpuQuantizer gpu_;  // first: without a GPU nothing is read
  ThreadPool pool_;
  std::unique_ptr<TensorSource> source_;
  LoadedModel loaded_;
  TextQuantizerOptions quantizer_;
  Suite suite_;
  PerplexitySums dense_;                              // of the model as given
  std::vector<std::vector<std::int32_t>> windows_;    // held out
  std::vector<std::vector<std::int32_t>> sequences_;  // to calibrate on
  std::vector<std::vector<std::int32_t>> taught_;     // to distill on
  std::vector<std::vector<std::int32_t>> judged_;     // of the same text
  json rows_ = json::array();
  json aqlm_rows_ = json::array();
  json block_8b_ = json::object();
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
  app.add_flag("--block-8b", options.block_8b,
               "also times a block of Llama-3-8B's shape in the first format, on random weights");
  app.add_option(
         "--permute", options.permute,
         "put the model's channels into an order drawn from this seed, which changes nothing but what "
         "lies beside what; 0: as they are")
      ->capture_default_str();
  app.add_option("--blocks", options.blocks,
                 "also in blocks of these types of ggml's (Q4_K, ...), by its libraries in CODEGEMM_GGML");
  app.add_option(
      "--aqlm", options.aqlm,
      "a clone of github.com/Vahe1994/AQLM: also quantizes layers with its code, for their errors");
  add_quantize_options(app, options);
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
  app.add_option("--code-rate", options.code_rates,
                 "highest rates of codes that follow the gradient, in shares of the weights' size; 0: codes "
                 "stay; of several each by itself")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option(
         "--distill-labels", options.label_shares,
         "share of the text's own next tokens in what is learned, the rest what the dense model says; "
         "of several each by itself")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--code-every", options.moves.every, "steps between changes of codes")
      ->check(CLI::Range(1, 1 << 20))
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
