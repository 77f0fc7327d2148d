// SPDX-License-Identifier: Apache-2.0
//
// bench/explore.cpp - formats against one another on a real model: bits, memory, time of one token through
// the linear layers, and perplexity on a text that the quantizer did not see, beside llama.cpp's own
// quantization. Says which format to take for a budget. What is made and measured is kept: a sweep that was
// stopped goes on.

#if !defined(NDEBUG) && !defined(__clang_analyzer__)
#error "Benchmarks must be built in Release mode: cmake --preset bench"
#endif

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <codegemm/base/thread_pool.hpp>
#include <common/layer_quantizer.hpp>
#include <common/model_loader.hpp>
#include <common/model_tokenizer.hpp>
#include <common/perplexity.hpp>
#include <common/progress.hpp>
#include <common/text_quantizer.hpp>
#include <common/text_tokens.hpp>

#include "support/explore_latency.hpp"
#include "support/explore_options.hpp"
#include "support/explore_plot.hpp"
#include "support/explore_table.hpp"
#include "support/ggml_blocks.hpp"
#include "support/peer_process.hpp"
#include "support/report.hpp"

namespace codegemm::bench {
namespace {

using namespace prefillshare;
using namespace prefillshare::examples;
using nlohmann::json;
using Windows = std::vector<std::vector<std::int32_t>>;

std::string hex(std::uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(value));
  return text;
}
std::uint64_t hash_text(const std::string& text) {  // FNV-1a
  std::uint64_t state = 0xcbf29ce484222325ULL;
  for (const char c : text) state = (state ^ static_cast<unsigned char>(c)) * 0x100000001b3ULL;
  return state;
}

/// What codegemm-gpu is to be asked for --gpu: the shapes of a block's linear layers, and the formats.
std::string gpu_arguments(const ExploreOptions& options) {
  const ModelConfig c = unwrap(model_config(unwrap(open_model(options.model))->hyperparameters()));
  std::set<std::string> shapes;
  for (const auto& [rows, cols] :
       {std::pair(c.q_size(), c.hidden_size), std::pair(c.kv_size(), c.hidden_size),
        std::pair(c.hidden_size, c.q_size()), std::pair(c.intermediate_size, c.hidden_size),
        std::pair(c.hidden_size, c.intermediate_size)})
    shapes.insert(concat(rows, 'x', cols));
  std::set<std::string> formats;
  if (!options.only_distilled || options.distilled.empty()) {
    for (const std::string& format : options.formats)
      formats.insert(format_name(unwrap(parse_format(format))));
  }
  for (const std::string& path : options.distilled) {
    const json file = json::parse(std::ifstream(path), nullptr, false);
    if (!file.is_object()) throw UserError(path + ": no results of quantize-gpu");
    for (const json& row : file.at("rows")) formats.insert(row.at("name").get<std::string>());
  }
  std::string out = "--tokens 1 --no-cublas";
  for (const std::string& shape : shapes) out += " --shape " + shape;
  for (const std::string& format : formats) out += " --format " + format;
  return out;
}

class Explorer {
 public:
  explicit Explorer(const ExploreOptions& options)
      : options_(options),
        pool_(options.threads),
        source_(unwrap(open_model(options.model))),
        loaded_(unwrap(load_model(*source_))),
        folder_(options.cache + "/explore"),
        effort_{options.quick ? kColdBytes / 4.0 : kColdBytes, options.quick ? 0.1 : 1.0},
        ggml_(effort_, pool_) {
    std::filesystem::create_directories(folder_);
    suite_.name = "explore";
    suite_.machine = machine_json(pool_);
    suite_.memory = measure_memory(pool_);
    const Tokenizer tokenizer = unwrap(load_tokenizer(options.model));
    windows_ = sequences_of_file(options.text, options.windows, options.window_length, tokenizer);
    sequences_ = sequences_of_file(options.calibration, options.sequences, options.length, tokenizer);
    quantizer_ = options.quantizer;
    if (options.method == "kmeans") quantizer_.layers.rounds = 0;
    const LlamaLayer<DenseLinear>& block = loaded_.model->layers.front();
    const auto shape = [&](const char* name, const DenseLinear& layer) {
      layers_.push_back({name, {layer.rows(), layer.cols()}});
    };
    shape("q_proj", block.q);
    shape("k_proj", block.k);
    shape("v_proj", block.v);
    shape("o_proj", block.o);
    shape("gate_proj", block.gate);
    shape("up_proj", block.up);
    shape("down_proj", block.down);
    for (const LayerShape& layer : layers_)
      weights_ += layer.shape.rows * layer.shape.cols * loaded_.model->config.layers;
    if (!options.gpu.empty()) gpu_ = json::parse(std::ifstream(options.gpu));
    for (const std::string& path : options.distilled) read_distilled(path);
  }

  void run() {
    const std::int64_t vocabulary = loaded_.model->config.vocab_size;
    std::printf("%zu windows of %zu tokens of %s; %s on %zu sequences of %zu tokens of %s\n", windows_.size(),
                windows_.front().size(), file_name(options_.text).c_str(), method_text().c_str(),
                sequences_.size(), sequences_.front().size(), file_name(options_.calibration).c_str());
    std::printf(
        "linear layers of the blocks: %lld weights; embeddings and head (%lld x %lld) stay as they are\n",
        static_cast<long long>(weights_), static_cast<long long>(vocabulary),
        static_cast<long long>(loaded_.model->config.hidden_size));
    add_file(*source_, loaded_.model, "source", "the model as given", folder_ + "/" + loaded_.fingerprint);
    if (!options_.only_distilled || options_.distilled.empty()) {
      for (std::size_t i = 0; i < options_.formats.size(); ++i) add_format(i);
    }
    for (const json& row : distilled_) add_distilled(row);
    if (options_.peers_too) {
      for (const std::string& type : options_.peers) add_peer(type);
      for (const std::string& type : options_.blocks) add_blocks(type);
    }
    finish();
  }

 private:
  using Clock = std::chrono::steady_clock;

  [[nodiscard]] std::string method_text() const {
    const char* const corrected = quantizer_.correct ? ", corrected weights" : "";
    if (options_.method == "kmeans") return concat("k-means weighted by the inputs", corrected);
    return concat("calibrated, at most ", quantizer_.layers.rounds, " rounds, beam ", quantizer_.layers.beam,
                  corrected);
  }

  /// The perplexity in `path`.perplexity.json if it is of these windows; else of the model that make() gives,
  /// kept there.
  void measure_perplexity(Candidate& out, const std::string& path,
                          const std::function<std::shared_ptr<const DenseModel>()>& make) {
    const std::string file = path + ".perplexity.json";
    const std::string key = hex(hash_tokens(windows_));
    if (std::filesystem::exists(file)) {
      const json kept = json::parse(std::ifstream(file), nullptr, false);
      if (kept.is_object() && kept.value("windows", std::string()) == key) {
        out.perplexity = kept.at("perplexity").get<double>();
        out.perplexity_error = kept.at("error").get<double>();
        return;
      }
    }
    const std::shared_ptr<const DenseModel> model = make();
    ProgressLine progress("perplexity of " + out.name);
    const auto start = Clock::now();
    const auto total = static_cast<std::int64_t>(windows_.size());
    const PerplexitySums sums =
        score_windows(*model, windows_, pool_, [&](std::int64_t done, const PerplexitySums& now) {
          const double left =
              seconds_since(start) * static_cast<double>(total - done) / static_cast<double>(done);
          progress.update(done, total, concat(now.perplexity(), ", ", time_left(left)));
        });
    out.perplexity = sums.perplexity();
    out.perplexity_error = sums.error();
    const json kept = {{"windows", key}, {"perplexity", out.perplexity}, {"error", out.perplexity_error}};
    check(write_text(kept.dump(2) + '\n', file));
  }

  /// A model file: its own types, and ggml's products for the time where that library is there.
  void add_file(const TensorSource& source, const std::shared_ptr<const DenseModel>& model,
                const std::string& family, const std::string& method, const std::string& path) {
    Candidate out;
    out.name = family == "source" ? "source" : file_name(path).substr(loaded_.fingerprint.size() + 1);
    out.family = family;
    out.method = method;
    json types = json::object();
    if (const GgufFile* const file = source.gguf(); file != nullptr) {
      double us = 0.0;
      for (const GgufTensor& tensor : file->tensors()) {
        if (tensor.name.substr(0, 4) != "blk." || tensor.rank != 2) continue;
        out.bytes += static_cast<std::int64_t>(tensor.data.size());
        const std::string type(tensor.type->name);
        types[type] = types.value(type, std::int64_t{0}) + tensor.rows() * tensor.row_elements();
        us += ggml_.us(static_cast<int>(tensor.type->number), {tensor.rows(), tensor.row_elements()});
      }
      out.bits_per_weight = 8.0 * static_cast<double>(out.bytes) / static_cast<double>(weights_);
      out.cpu_us = us;
    }
    measure_perplexity(out, path,
                       [&] { return model ? model : unwrap(load_model(*open_again(source))).model; });
    json row = to_json(out);
    row["weights_by_type"] = std::move(types);
    add(std::move(out), std::move(row));
  }
  [[nodiscard]] std::unique_ptr<TensorSource> open_again(const TensorSource& source) const {
    return unwrap(open_model(source.path()));
  }

  /// Rows of quantize-gpu, which must have judged by the same windows.
  void read_distilled(const std::string& path) {
    const json file = json::parse(std::ifstream(path), nullptr, false);
    const std::string windows = concat(hash_tokens(windows_));
    if (!file.is_object() || file.value("windows", std::string()) != windows) {
      throw UserError(concat(path, ": no results of quantize-gpu on ", windows_.size(), " windows of ",
                             windows_.front().size(), " tokens of ", file_name(options_.text)));
    }
    for (const json& row : file.at("rows")) {
      if (row.contains("perplexity")) distilled_.push_back(row);
    }
  }

  void add_distilled(const json& from) {
    const Format format = unwrap(parse_format(from.at("name").get<std::string>()));
    Candidate out;
    out.name = format_name(format) + " distilled";
    out.family = "codegemm distilled";
    out.method =
        concat("calibrated and distilled on a GPU, ", from.at("distill_steps").get<std::int64_t>(), " steps");
    json layers = measure_times(format, out);
    out.perplexity = from.at("perplexity").get<double>();
    out.perplexity_error = from.at("perplexity_error").get<double>();
    json row = to_json(out);
    row["layers"] = std::move(layers);
    add(std::move(out), std::move(row));
  }

  void add_format(std::size_t index) {
    const Format format = unwrap(parse_format(options_.formats[index]));
    Candidate out;
    out.name = format_name(format);
    out.family = "codegemm";
    out.method = method_text();
    json layers = measure_times(format, out);
    const std::string path = format_path(format);
    measure_perplexity(out, path, [&] { return quantize(format, index, path); });
    json row = to_json(out);
    row["layers"] = std::move(layers);
    add(std::move(out), std::move(row));
  }

  /// Sizes and times of a format; each layer's time in a row of its own.
  json measure_times(Format format, Candidate& out) {
    const auto blocks = loaded_.model->config.layers;
    double bits = 0.0;
    for (const LayerShape& layer : layers_) {
      bits += static_cast<double>(layer.shape.rows * layer.shape.cols * blocks) *
              bits_per_weight(format, layer.shape.rows, layer.shape.cols);
    }
    out.bits_per_weight = bits / static_cast<double>(weights_);
    const BlockTimes times = time_block(format, layers_, effort_, pool_);
    json rows = json::array();
    std::vector<std::string> shapes;
    out.cpu_us = 0.0;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      out.cpu_us += times.us[i] * static_cast<double>(blocks);
      out.bytes += times.bytes[i] * blocks;
      shapes.push_back(concat(layers_[i].shape.rows, 'x', layers_[i].shape.cols));
      rows.push_back({{"name", layers_[i].name}, {"shape", shapes.back()}, {"median_us", times.us[i]}});
    }
    if (gpu_.is_object())
      out.gpu_us = gpu_us(gpu_, format_name(format), shapes) * static_cast<double>(blocks);
    return rows;
  }

  /// Where a format's layers are kept: other options, another folder.
  [[nodiscard]] std::string format_path(Format format) const {
    return concat(folder_, '/', loaded_.fingerprint, '-', format_name(format), '-',
                  hex(hash_text(run_name(loaded_, format, sequences_, quantizer_))));
  }

  std::shared_ptr<const DenseModel> quantize(Format format, std::size_t index, const std::string& path) {
    ProgressLine progress(
        concat("quantizing as ", format_name(format), " (", index + 1, " of ", options_.formats.size(), ")"));
    std::size_t behind = 0;  // formats still to be made after this one
    for (std::size_t i = index + 1; i < options_.formats.size(); ++i) {
      const Format other = unwrap(parse_format(options_.formats[i]));
      if (!std::filesystem::exists(format_path(other) + ".perplexity.json")) ++behind;
    }
    const auto start = Clock::now();
    const QuantizedLayers layers = quantize_on_sequences(
        loaded_, format, sequences_, quantizer_, path, pool_, [&](const QuantizeProgress& now) {
          std::string left;
          if (now.seconds_left >= 0.0) {
            const double whole = seconds_since(start) + now.seconds_left;  // of this one
            const double each = made_ > 0 ? made_seconds_ / static_cast<double>(made_) : whole;
            left = time_left(now.seconds_left + each * static_cast<double>(behind)) + " in all";
          }
          progress.update(static_cast<std::int64_t>(now.share * 1000.0), 1000,
                          concat(now.layer, " error ", now.error, left.empty() ? "" : ", ", left));
        });
    made_seconds_ += seconds_since(start);
    ++made_;
    std::map<std::string, const QuantizedMatrix*> by_name;
    for (std::size_t i = 0; i < layers.names.size(); ++i) by_name[layers.names[i]] = &layers.matrices[i];
    return with_weights(*loaded_.model, [&](const std::string& name, const DenseLinear& dense) {
      return dequantized(*by_name.at(name), dense, pool_);
    });
  }

  /// The file that llama.cpp itself makes of the model.
  void add_peer(const std::string& type) {
    if (source_->gguf() == nullptr) return;
    const std::string path = concat(folder_, '/', loaded_.fingerprint, '-', type);
    const std::string file = path + ".gguf";
    if (!std::filesystem::exists(file) &&
        run_peer("", "llama_quantize_peer.py",
                 concat('\'', options_.model, "' '", file, "' ", type, ' ', pool_.workers()), 1)
            .empty()) {
      std::fprintf(stderr, "llama.cpp's %s is left out: the peer is not installed, or failed\n",
                   type.c_str());
      return;
    }
    add_file(*unwrap(open_model(file)), nullptr, "llama.cpp", "its own, no importance matrix", path);
  }

  /// ggml's block type for every layer, also where llama.cpp would take another because rows are no whole
  /// blocks.
  void add_blocks(const std::string& name) {
    if (!ggml_.library().loaded()) return;
    for (const Ggml::Type& type : Ggml::file_types()) {
      if (name != type.name) continue;
      Candidate out;
      out.name = name + " blocks";
      out.family = "ggml blocks";
      out.method = "over the rows' ends, importance from the calibration text";
      out.bits_per_weight = 8.0 * type.bytes / type.block;
      out.bytes = weights_ / type.block * type.bytes;
      const std::string path =
          concat(folder_, '/', loaded_.fingerprint, '-', name, "-blocks-", hex(hash_tokens(sequences_)));
      measure_perplexity(out, path, [&] {
        ProgressLine progress("quantizing in blocks of " + name);
        std::int64_t done = 0;
        const std::int64_t all = loaded_.model->config.layers * static_cast<std::int64_t>(layers_.size());
        BlockReplacer replacer{ggml_.library(), type, pool_, [&] { progress.update(++done, all, "layers"); }};
        CalibrationRunOptions run_options;
        run_options.correct = false;
        CalibrationRun run =
            unwrap(CalibrationRun::create(loaded_.model, sequences_, pool_.workers(), run_options));
        while (run.blocks_done() < loaded_.model->config.layers) check(run.next_block(replacer, pool_));
        return with_weights(*loaded_.model, [&](const std::string& layer, const DenseLinear&) {
          return replacer.made.at(layer);
        });
      });
      json row = to_json(out);
      add(std::move(out), std::move(row));
      return;
    }
    throw UserError(name + ": no block type of that name is known here");
  }

  void add(Candidate candidate, json row) {
    std::printf("%-12s %-14s %5.2f bits %7.1f MiB", candidate.family.c_str(), candidate.name.c_str(),
                candidate.bits_per_weight, static_cast<double>(candidate.bytes) / (1024.0 * 1024.0));
    if (std::isfinite(candidate.cpu_us)) std::printf("  CPU %7.0f us", candidate.cpu_us);
    if (std::isfinite(candidate.gpu_us)) std::printf("  GPU %7.0f us", candidate.gpu_us);
    std::printf("  perplexity %.3f +- %.3f\n", candidate.perplexity, candidate.perplexity_error);
    std::fflush(stdout);
    all_.push_back(std::move(candidate));
    rows_.push_back(std::move(row));
  }

  /// The front, the advice, the files.
  void finish() {
    const json cpu_front = front_json("this CPU", &Candidate::cpu_us);
    json gpu_front;
    if (gpu_.is_object()) gpu_front = front_json("the GPU", &Candidate::gpu_us);
    std::vector<Candidate> ours;
    for (const Candidate& one : all_) {
      if (one.family.starts_with("codegemm")) ours.push_back(one);
    }
    double Candidate::*const time = options_.on == "gpu" ? &Candidate::gpu_us : &Candidate::cpu_us;
    std::vector<Budget> budgets(1);
    if (options_.memory > 0.0) budgets.front().bytes = options_.memory * 1024.0 * 1024.0;
    if (options_.latency > 0.0) budgets.front().us = options_.latency;
    // Without limits of the user's: what each size that is worth having gives.
    json by_size = json::array();
    for (const std::size_t i : size_front(ours)) {
      by_size.push_back(ours[i].name);
      if (options_.memory > 0.0 || options_.latency > 0.0) continue;
      budgets.emplace_back().bytes = static_cast<double>(ours[i].bytes);
    }
    json words = json::array();
    for (const Budget& budget : budgets) {
      words.push_back(advice(ours, budget, time));
      std::printf("%s\n", words.back().get<std::string>().c_str());
    }
    if (!options_.json_path.empty()) {
      json out = frame_json(suite_, rows_);
      out["model"] = file_name(options_.model);
      out["held_out_text"] = text_json(options_.text, windows_);
      out["calibration_text"] = text_json(options_.calibration, sequences_);
      out["linear_weights"] = weights_;
      out["cpu_front"] = cpu_front;
      if (gpu_.is_object()) {
        out["gpu_front"] = std::move(gpu_front);
        for (const char* const key : {"machine", "commit", "date"})
          out["gpu"][key] = gpu_.value(key, std::string("unknown"));
      }
      out["size_front"] = std::move(by_size);
      out["advice_for"] = options_.on;
      out["advice"] = std::move(words);
      check(write_text(out.dump(2) + '\n', options_.json_path));
    }
    if (!options_.csv.empty()) check(write_text(to_csv(all_), options_.csv));
    const std::string title = concat(file_name(options_.model), ", ", file_name(options_.text));
    const std::string x = "us for one token through the linear layers, ";
    if (!options_.plot.empty()) {
      check(write_text(explore_svg(all_, &Candidate::cpu_us, title, concat(x, pool_.workers(), " thread(s)")),
                       options_.plot));
    }
    if (!options_.gpu_plot.empty() && gpu_.is_object()) {
      const auto card = gpu_.value("machine", std::string("GPU"));
      check(write_text(explore_svg(all_, &Candidate::gpu_us, title, x + card.substr(0, card.find(','))),
                       options_.gpu_plot));
    }
  }

  /// The names of the front, printed too.
  [[nodiscard]] json front_json(const char* where, double Candidate::*time) const {
    json front = json::array();
    std::printf("no other is both faster and better on %s:", where);
    for (const std::size_t i : pareto_front(all_, time)) {
      front.push_back(all_[i].name);
      std::printf(" %s", all_[i].name.c_str());
    }
    std::printf("\n");
    return front;
  }

  const ExploreOptions& options_;
  ThreadPool pool_;
  std::unique_ptr<TensorSource> source_;
  LoadedModel loaded_;
  std::string folder_;
  LatencyEffort effort_;
  GgmlTimes ggml_;
  Suite suite_;
  Windows windows_;    // held out
  Windows sequences_;  // to calibrate on
  TextQuantizerOptions quantizer_;
  std::vector<LayerShape> layers_;  // of one block
  std::int64_t weights_ = 0;        // of all blocks' linear layers
  json gpu_;
  std::vector<json> distilled_;  // rows of quantize-gpu
  std::vector<Candidate> all_;
  json rows_ = json::array();
  double made_seconds_ = 0.0;
  std::int64_t made_ = 0;
};

}  // namespace
}  // namespace codegemm::bench

int main(int argc, char** argv) {
  codegemm::bench::ExploreOptions options;
  CLI::App app{"Formats by size, time and perplexity on a model, and which to take for a budget"};
  codegemm::bench::add_options(app, options);
  CLI11_PARSE(app, argc, argv);
  if (options.quick) codegemm::bench::make_quick(options);
  try {
    if (options.gpu_arguments) {
      std::puts(codegemm::bench::gpu_arguments(options).c_str());
    } else {
      codegemm::bench::Explorer(options).run();
    }
    return 0;
  } catch (const std::exception& e) {
    std::fflush(stdout);
    std::fprintf(stderr, "explore: %s\n", e.what());
    return 2;
  }
}
