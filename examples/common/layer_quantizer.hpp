// SPDX-License-Identifier: Apache-2.0
//
// common/layer_quantizer.hpp - quantizes a model's layers one by one and keeps each on disk, so that an
// interrupted run goes on where it was.
// Layer: examples (host only).
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <codegemm/io/checkpoint.hpp>
#include <codegemm/quantize/calibrated.hpp>
#include <codegemm/reference.hpp>
#include <prefillshare/model/calibrate.hpp>

namespace prefillshare::examples {

/// How far a run is. The share counts work, not layers; the time left is extrapolated from this run's pace.
struct QuantizeProgress {
  double share = 0.0;         // 0 to 1
  double seconds_left = 0.0;  // negative: not known yet
  std::string layer;          // the one at hand
  double error = 0.0;         // its relative error so far
};

/// A LayerReplacer that quantizes. Every finished layer is one file of `folder`, whole or not at all, that
/// names the run it belongs to; find() takes it for done only if that is this run.
class LayerQuantizer {
 public:
  /// `run` says all that the result depends on: the model, the options, the calibration tokens.
  LayerQuantizer(const LlamaModel<DenseLinear>& model, codegemm::Format format,
                 codegemm::CalibratedOptions options, std::string folder, std::string run, Executor& executor,
                 std::function<void(const QuantizeProgress&)> progress)
      : format_(format),
        options_(std::move(options)),
        folder_(std::move(folder)),
        run_(std::move(run)),
        executor_(executor),
        progress_(std::move(progress)) {
    for (const LlamaLayer<DenseLinear>& layer : model.layers) {
      for (const DenseLinear* linear :
           {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down})
        total_ += cost(*linear);
    }
  }

  [[nodiscard]] Result<std::optional<DenseLinear>> find(const std::string& name, const DenseLinear& dense) {
    const Result<std::optional<codegemm::QuantizedMatrix>> kept = load(name);
    if (!kept.ok()) return kept.status();
    if (!kept->has_value()) return std::optional<DenseLinear>();
    found_ += cost(dense);
    done_ += cost(dense);
    return std::optional<DenseLinear>(dequantized(**kept, dense));
  }

  [[nodiscard]] Result<DenseLinear> make(const std::string& name, const DenseLinear& dense,
                                         MatrixView<const float> gram) {
    codegemm::CalibratedOptions options = options_;
    options.progress = [&](double share, double error) { tell(name, done_ + share * cost(dense), error); };
    codegemm::CalibratedReport report;
    Result<codegemm::QuantizedMatrix> made =
        codegemm::quantize_calibrated(dense.weights(), gram, format_, options, executor_, &report);
    if (!made.ok()) return made.status();
    const codegemm::NamedMatrix named{name, made->view()};
    const codegemm::SafetensorsText texts[] = {{"run", run_},
                                               {"error", codegemm::concat(report.error)},
                                               {"kmeans_error", codegemm::concat(report.kmeans_error)},
                                               {"rounds", codegemm::concat(report.rounds)}};
    if (Status s = codegemm::save_checkpoint(path(name), {&named, 1}, texts); !s.ok()) return s;
    done_ += cost(dense);
    tell(name, done_, report.error);
    return dequantized(*made, dense);
  }

  /// A finished layer of this run; nothing where there is none. kIncompatible for one of another run.
  [[nodiscard]] Result<std::optional<codegemm::QuantizedMatrix>> load(const std::string& name) const {
    std::error_code ignored;
    if (!std::filesystem::exists(path(name), ignored)) return std::optional<codegemm::QuantizedMatrix>();
    const Result<codegemm::Checkpoint> file = codegemm::Checkpoint::open(path(name));
    if (!file.ok()) return file.status();
    const std::string* run = file->file().find_metadata("run");
    if (run == nullptr || *run != run_) {
      return error(StatusCode::kIncompatible, path(name), ": belongs to another run (",
                   run == nullptr ? "unnamed" : codegemm::quoted(*run, 200), "), this one is ",
                   codegemm::quoted(run_, 200), "; remove its folder or go on with its options");
    }
    Result<codegemm::QuantizedMatrix> matrix = file->load(name);
    if (!matrix.ok()) return matrix.status();
    return std::optional<codegemm::QuantizedMatrix>(*std::move(matrix));
  }

 private:
  using Clock = std::chrono::steady_clock;

  [[nodiscard]] std::string path(const std::string& name) const {
    return codegemm::concat(folder_, "/", name, ".safetensors");
  }

  /// Products with H and the search of codes, in about the same unit.
  [[nodiscard]] static double cost(const DenseLinear& linear) {
    return static_cast<double>(linear.rows()) * static_cast<double>(linear.cols()) *
           (static_cast<double>(linear.cols()) + 2000.0);
  }

  [[nodiscard]] static DenseLinear dequantized(const codegemm::QuantizedMatrix& matrix,
                                               const DenseLinear& dense) {
    auto values =
        std::make_shared<std::vector<float>>(static_cast<std::size_t>(matrix.rows() * matrix.cols()));
    codegemm::reference_dequantize(matrix.view(),
                                   MatrixView<float>(values->data(), matrix.rows(), matrix.cols()));
    return {std::move(values), matrix.rows(), matrix.cols(),
            std::vector<float>(dense.bias().begin(), dense.bias().end())};
  }

  void tell(const std::string& name, double done, double error) const {
    if (!progress_) return;
    QuantizeProgress now{total_ > 0.0 ? done / total_ : 1.0, -1.0, name, error};
    const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
    if (done > found_) now.seconds_left = seconds * (total_ - done) / (done - found_);
    progress_(now);
  }

  codegemm::Format format_;
  codegemm::CalibratedOptions options_;
  std::string folder_;
  std::string run_;
  Executor& executor_;
  std::function<void(const QuantizeProgress&)> progress_;
  Clock::time_point start_ = Clock::now();
  double total_ = 0.0;
  double done_ = 0.0;   // found or made
  double found_ = 0.0;  // by an earlier run
};
static_assert(LayerReplacer<LayerQuantizer>);

}  // namespace prefillshare::examples
