// SPDX-License-Identifier: Apache-2.0
//
// common/layer_quantizer.hpp - quantizes a model's layers one by one and keeps each on disk, so that an
// interrupted run goes on where it was.
// Layer: examples (host only).
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <codegemm/io/checkpoint.hpp>
#include <codegemm/quantize/calibrated.hpp>
#include <codegemm/reference.hpp>
#include <common/layer_pace.hpp>
#include <prefillshare/model/calibrate.hpp>
#include <prefillshare/model/dense_linear.hpp>
#include <prefillshare/train/tune_block.hpp>

namespace prefillshare::examples {

/// How far a run is. The share counts work, not layers; the time left is LayerPace's.
struct QuantizeProgress {
  double share = 0.0;         // 0 to 1
  double seconds_left = 0.0;  // negative: not known yet
  std::string layer;          // the one at hand
  double error = 0.0;         // its relative error so far
};

/// codegemm::quantize_calibrated(), or the same on a GPU.
using QuantizeLayer = std::function<Result<codegemm::QuantizedMatrix>(
    MatrixView<const float> weights, MatrixView<const float> gram, codegemm::Format format,
    const codegemm::CalibratedOptions& options, Executor& executor, codegemm::CalibratedReport* report)>;

/// A layer's weights as its codes say, beside the dense one's bias.
[[nodiscard]] inline DenseLinear dequantized(const codegemm::QuantizedMatrix& matrix,
                                             const DenseLinear& dense, Executor& executor) {
  auto values = std::make_shared<std::vector<float>>(static_cast<std::size_t>(matrix.rows() * matrix.cols()));
  codegemm::parallel_for(executor, matrix.rows(), [&](std::int64_t n, int) {
    float* const row = values->data() + n * matrix.cols();
    for (std::int64_t k = 0; k < matrix.cols(); ++k)
      row[k] = static_cast<float>(codegemm::reference_weight(matrix.view(), n, k));
  });
  return {std::move(values), matrix.rows(), matrix.cols(),
          std::vector<float>(dense.bias().begin(), dense.bias().end())};
}

/// A LayerReplacer that quantizes, and a BlockFinisher that tunes each block's codebooks, scales and norms if
/// asked to. Every finished layer is one file of `folder`, whole or not at all, that names the run it belongs
/// to; find() takes it for done only if that is this run. A tuned block is two more, NAME.norms and
/// NAME.tuned.
class LayerQuantizer {
 public:
  /// `run` says all that the result depends on: the model, the options, the calibration tokens.
  LayerQuantizer(const LlamaModel<DenseLinear>& model, codegemm::Format format,
                 codegemm::CalibratedOptions options, BlockTuneOptions tune, std::string folder,
                 std::string run, Executor& executor, std::function<void(const QuantizeProgress&)> progress,
                 QuantizeLayer quantize = codegemm::quantize_calibrated)
      : format_(format),
        quantize_(std::move(quantize)),
        options_(std::move(options)),
        tune_(tune),
        folder_(std::move(folder)),
        run_(std::move(run)),
        executor_(executor),
        progress_(std::move(progress)) {
    for (const LlamaLayer<DenseLinear>& layer : model.layers) {
      for (const DenseLinear* linear :
           {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
        total_ += cost(*linear) + tune_cost(*linear);
        pace_.expect(cost(*linear));
      }
      if (finishes()) pace_.expect(tune_cost(layer));
    }
  }

  [[nodiscard]] Result<std::optional<DenseLinear>> find(const std::string& name, const DenseLinear& dense) {
    const Result<std::optional<codegemm::QuantizedMatrix>> kept = load(name);
    if (!kept.ok()) return kept.status();
    if (!kept->has_value()) return std::optional<DenseLinear>();
    pace_.found(cost(dense));
    done_ += cost(dense);
    return std::optional<DenseLinear>(dequantized(**kept, dense, executor_));
  }

  [[nodiscard]] Result<DenseLinear> make(const std::string& name, const DenseLinear& dense,
                                         MatrixView<const float> gram) {
    codegemm::CalibratedOptions options = options_;
    options.progress = [&](double share, double error) { tell(name, done_ + share * cost(dense), error); };
    codegemm::CalibratedReport report;
    pace_.begin(seconds(), cost(dense));
    Result<codegemm::QuantizedMatrix> made =
        quantize_(dense.weights(), gram, format_, options, executor_, &report);
    if (!made.ok()) return made.status();
    const codegemm::NamedMatrix named{name, made->view()};
    const codegemm::SafetensorsText texts[] = {{"run", run_},
                                               {"error", codegemm::concat(report.error)},
                                               {"kmeans_error", codegemm::concat(report.kmeans_error)},
                                               {"rounds", codegemm::concat(report.rounds)}};
    if (Status s = codegemm::save_checkpoint(path(name), {&named, 1}, texts); !s.ok()) return s;
    done_ += cost(dense);
    pace_.end(seconds());
    tell(name, done_, report.error);
    return dequantized(*made, dense, executor_);
  }

  [[nodiscard]] bool finishes() const noexcept { return tune_.steps > 0; }

  /// Tunes a block, or takes it as an earlier run left it.
  [[nodiscard]] Status finish(const ReplacedBlock& block, LlamaLayer<DenseLinear>& layer) {
    const std::string name = codegemm::concat("model.layers.", block.index);
    const double work = tune_cost(layer);
    std::error_code ignored;
    const bool found = std::filesystem::exists(path(name + ".tuned"), ignored);
    if (!found) {
      pace_.begin(seconds(), work);
      QuantizedBlock quantized{{}, layer.input_norm, layer.post_attention_norm, layer.q_norm, layer.k_norm};
      for (const Part& part : parts(name, layer)) {
        Result<std::optional<codegemm::QuantizedMatrix>> matrix = load(part.name);
        if (!matrix.ok()) return matrix.status();
        if (!matrix->has_value()) return error(StatusCode::kNotFound, path(part.name), ": has vanished");
        quantized.linears.push_back(**std::move(matrix));
      }
      BlockTuneReport report;
      const Result<QuantizedBlock> tuned =
          tune_block(block.config, quantized, layer, {block.lengths, block.inputs, block.targets}, tune_,
                     executor_, &report);
      if (!tuned.ok()) return tuned.status();
      if (Status s = save(name, layer, *tuned, report); !s.ok()) return s;
      done_ += work;
      pace_.end(seconds());
      tell(codegemm::concat(name, " tuned"), done_, report.after);
    } else {
      pace_.found(work);
      done_ += work;
    }
    return take(name, layer);
  }

  /// A layer as it is to be written: tuned where blocks are. kNotFound where it is not done.
  [[nodiscard]] Result<codegemm::QuantizedMatrix> result(const std::string& name) const {
    std::string file = name;
    if (finishes()) {  // "model.layers.3.mlp.up_proj" is in "model.layers.3.tuned"
      const std::size_t end = name.find('.', std::string("model.layers.").size());
      file = name.substr(0, end) + ".tuned";
    }
    Result<std::optional<codegemm::QuantizedMatrix>> matrix = load_from(file, name);
    if (!matrix.ok()) return matrix.status();
    if (!matrix->has_value()) return error(StatusCode::kNotFound, path(file), ": is not there");
    return **std::move(matrix);
  }

  /// The tuned norms of block `index` by the names of their tensors; none where blocks are not tuned.
  [[nodiscard]] Result<std::map<std::string, std::vector<float>>> norms(std::int64_t index) const {
    std::map<std::string, std::vector<float>> out;
    if (!finishes()) return out;
    const Result<codegemm::SafetensorsFile> file =
        codegemm::SafetensorsFile::open(path(codegemm::concat("model.layers.", index, ".norms")));
    if (!file.ok()) return file.status();
    if (Status s = check_run(*file); !s.ok()) return s;
    for (const codegemm::SafetensorsTensor& tensor : file->tensors()) {
      if (tensor.dtype != codegemm::Dtype::kF32)
        return error(StatusCode::kCorruptData, file->name(), ": ", codegemm::quoted(tensor.name),
                     " is not F32");
      std::vector<float>& values = out[tensor.name];
      values.resize(tensor.data.size() / sizeof(float));
      if (!values.empty()) std::memcpy(values.data(), tensor.data.data(), tensor.data.size());
    }
    return out;
  }

  /// A finished layer of this run, not tuned; nothing where there is none. kIncompatible for one of another
  /// run.
  [[nodiscard]] Result<std::optional<codegemm::QuantizedMatrix>> load(const std::string& name) const {
    return load_from(name, name);
  }

 private:
  using Clock = std::chrono::steady_clock;
  struct Part {
    std::string name;
    DenseLinear* linear;
  };

  [[nodiscard]] static std::vector<Part> parts(const std::string& block, LlamaLayer<DenseLinear>& layer) {
    return {{block + ".self_attn.q_proj", &layer.q}, {block + ".self_attn.k_proj", &layer.k},
            {block + ".self_attn.v_proj", &layer.v}, {block + ".self_attn.o_proj", &layer.o},
            {block + ".mlp.gate_proj", &layer.gate}, {block + ".mlp.up_proj", &layer.up},
            {block + ".mlp.down_proj", &layer.down}};
  }
  struct NormPart {
    const char* name;
    std::vector<float> LlamaLayer<DenseLinear>::*of_layer;
    std::vector<float> QuantizedBlock::*of_block;
  };
  static constexpr NormPart kNorms[] = {
      {".input_layernorm.weight", &LlamaLayer<DenseLinear>::input_norm, &QuantizedBlock::input_norm},
      {".post_attention_layernorm.weight", &LlamaLayer<DenseLinear>::post_attention_norm,
       &QuantizedBlock::post_attention_norm},
      {".self_attn.q_norm.weight", &LlamaLayer<DenseLinear>::q_norm, &QuantizedBlock::q_norm},
      {".self_attn.k_norm.weight", &LlamaLayer<DenseLinear>::k_norm, &QuantizedBlock::k_norm}};

  [[nodiscard]] Status check_run(const codegemm::SafetensorsFile& file) const {
    const std::string* run = file.find_metadata("run");
    if (run != nullptr && *run == run_) return {};
    return error(StatusCode::kIncompatible, file.name(), ": belongs to another run (",
                 run == nullptr ? "unnamed" : codegemm::quoted(*run, 200), "), this one is ",
                 codegemm::quoted(run_, 200), "; remove its folder or go on with its options");
  }

  [[nodiscard]] Result<std::optional<codegemm::QuantizedMatrix>> load_from(const std::string& stem,
                                                                           const std::string& name) const {
    std::error_code ignored;
    if (!std::filesystem::exists(path(stem), ignored)) return std::optional<codegemm::QuantizedMatrix>();
    const Result<codegemm::Checkpoint> file = codegemm::Checkpoint::open(path(stem));
    if (!file.ok()) return file.status();
    if (Status s = check_run(file->file()); !s.ok()) return s;
    Result<codegemm::QuantizedMatrix> matrix = file->load(name);
    if (!matrix.ok()) return matrix.status();
    return std::optional<codegemm::QuantizedMatrix>(*std::move(matrix));
  }

  /// The norms first: the matrices' file says that the block is done.
  [[nodiscard]] Status save(const std::string& name, LlamaLayer<DenseLinear>& layer,
                            const QuantizedBlock& block, const BlockTuneReport& report) const {
    const codegemm::SafetensorsText texts[] = {{"run", run_},
                                               {"error before", codegemm::concat(report.before)},
                                               {"error after", codegemm::concat(report.after)}};
    std::vector<codegemm::SafetensorsTensor> tensors;
    for (const NormPart& norm : kNorms) {
      const std::vector<float>& values = block.*norm.of_block;
      if (values.empty()) continue;
      tensors.push_back({name + norm.name,
                         codegemm::Dtype::kF32,
                         {static_cast<std::int64_t>(values.size())},
                         std::as_bytes(std::span(values))});
    }
    if (Status s = codegemm::write_safetensors(path(name + ".norms"), tensors, texts); !s.ok()) return s;
    std::vector<codegemm::NamedMatrix> named;
    std::size_t i = 0;
    for (const Part& part : parts(name, layer)) named.push_back({part.name, block.linears[i++].view()});
    return codegemm::save_checkpoint(path(name + ".tuned"), named, texts);
  }

  /// The block's files become the layer, so that one found and one made give the same.
  [[nodiscard]] Status take(const std::string& name, LlamaLayer<DenseLinear>& layer) const {
    for (const Part& part : parts(name, layer)) {
      const Result<codegemm::QuantizedMatrix> matrix = result(part.name);
      if (!matrix.ok()) return matrix.status();
      *part.linear = dequantized(*matrix, *part.linear, executor_);
    }
    const Result<std::map<std::string, std::vector<float>>> kept =
        norms(std::stoll(name.substr(std::string("model.layers.").size())));
    if (!kept.ok()) return kept.status();
    for (const NormPart& norm : kNorms) {
      std::vector<float>& values = layer.*norm.of_layer;
      if (values.empty()) continue;
      const auto at = kept->find(name + norm.name);
      if (at == kept->end() || at->second.size() != values.size()) {
        return error(StatusCode::kCorruptData, path(name + ".norms"), ": has no ", name, norm.name, " of ",
                     values.size(), " values");
      }
      values = at->second;
    }
    return {};
  }

  [[nodiscard]] std::string path(const std::string& name) const {
    return codegemm::concat(folder_, "/", name, ".safetensors");
  }

  /// Products with H and the search of codes, in about the same unit.
  [[nodiscard]] static double cost(const DenseLinear& linear) {
    return static_cast<double>(linear.rows()) * static_cast<double>(linear.cols()) *
           (static_cast<double>(linear.cols()) + 2000.0);
  }

  /// Adam's steps on a layer, in the same unit.
  [[nodiscard]] double tune_cost(const DenseLinear& linear) const {
    return static_cast<double>(linear.rows()) * static_cast<double>(linear.cols()) * tune_.steps *
           static_cast<double>(tune_.tokens) * 0.012;
  }

  [[nodiscard]] double tune_cost(const LlamaLayer<DenseLinear>& layer) const {
    double out = 0.0;
    for (const DenseLinear* linear :
         {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down})
      out += tune_cost(*linear);
    return out;
  }

  void tell(const std::string& name, double done, double error) const {
    if (!progress_) return;
    progress_({total_ > 0.0 ? done / total_ : 1.0, pace_.seconds_left(seconds()), name, error});
  }
  /// Since the run began.
  [[nodiscard]] double seconds() const {
    return std::chrono::duration<double>(Clock::now() - start_).count();
  }

  codegemm::Format format_;
  QuantizeLayer quantize_;
  codegemm::CalibratedOptions options_;
  BlockTuneOptions tune_;
  std::string folder_;
  std::string run_;
  Executor& executor_;
  std::function<void(const QuantizeProgress&)> progress_;
  Clock::time_point start_ = Clock::now();
  double total_ = 0.0;
  double done_ = 0.0;  // found or made
  LayerPace pace_;
};
static_assert(BlockFinisher<LayerQuantizer>);

}  // namespace prefillshare::examples
