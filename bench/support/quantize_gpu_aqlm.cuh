// SPDX-License-Identifier: Apache-2.0
//
// bench/support/quantize_gpu_aqlm.cuh - errors of layers quantized on a GPU beside those of AQLM's own code.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <Eigen/Core>
#include <nlohmann/json.hpp>

#include <codegemm/base/matrix_view.hpp>
#include <codegemm/quantize/calibrated.hpp>
#include <codegemm/reference.hpp>
#include <common/unwrap.hpp>
#include <prefillshare/model/dense_linear.hpp>

#include "machine.hpp"
#include "peer_process.hpp"
#include "quantize_gpu_inputs.cuh"

namespace codegemm::bench {
namespace detail {

/// tr((W - W^) H (W - W^)^T) / tr(W H W^T) in double.
inline double relative_error(MatrixView<const float> weights, MatrixView<const float> gram,
                             const QuantizedMatrix& quantized) {
  const std::int64_t k = weights.cols;
  std::vector<float> values(static_cast<std::size_t>(weights.rows * k));
  reference_dequantize(quantized.view(), MatrixView<float>(values.data(), weights.rows, k));
  using Dense = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using Single = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const Dense w = Eigen::Map<const Single>(weights.data, weights.rows, k).cast<double>();
  const Dense h = Eigen::Map<const Single>(gram.data, k, k).cast<double>();
  const Dense off = w - Eigen::Map<const Single>(values.data(), weights.rows, k).cast<double>();
  return (off * h).cwiseProduct(off).sum() / (w * h).cwiseProduct(w).sum();
}

/// Replaces nothing: shows one layer for each of a block's inputs, with its weights and H, to `look`.
struct LayerLooker {
  std::function<void(const std::string& name, const prefillshare::DenseLinear& dense,
                     MatrixView<const float> gram)>
      look;
  std::string prefix;

  Result<std::optional<prefillshare::DenseLinear>> find(const std::string& name,
                                                        const prefillshare::DenseLinear& dense) const {
    for (const char* part : {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}) {
      if (name == prefix + part) return std::optional<prefillshare::DenseLinear>();
    }
    return std::optional<prefillshare::DenseLinear>(dense);
  }
  Result<prefillshare::DenseLinear> make(const std::string& name, const prefillshare::DenseLinear& dense,
                                         MatrixView<const float> gram) const {
    look(name, dense, gram);
    return dense;
  }
};

inline void write_floats(const std::string& path, MatrixView<const float> matrix) {
  std::ofstream file(path, std::ios::binary);
  for (std::int64_t n = 0; n < matrix.rows; ++n) {
    file.write(reinterpret_cast<const char*>(matrix.row(n)),
               static_cast<std::streamsize>(static_cast<std::size_t>(matrix.cols) * sizeof(float)));
  }
  if (!file) throw prefillshare::examples::UserError(path + ": cannot be written");
}

}  // namespace detail

/// The layers of a middle block by AQLM's own code and by ours, on the same H: m2v8g-1, its 2x8.
/// `add` gets a row for each.
inline void compare_with_aqlm(QuantizeGpuInputs& in, const QuantizeGpuOptions& options,
                              const std::function<void(nlohmann::json)>& add) {
  using nlohmann::json;
  using prefillshare::examples::unwrap;
  const Format format = unwrap(parse_format("m2v8g-1"));
  const std::int64_t block = in.loaded.model->config.layers / 2;
  const std::string path = concat(options.cache, "/aqlm");
  const auto look = [&](const std::string& name, const prefillshare::DenseLinear& dense,
                        MatrixView<const float> gram) {
    const MatrixView<const float> w = dense.weights();
    json row = {{"name", name}, {"format", format_name(format)}};
    std::printf("%s, %lld x %lld, %s:", name.c_str(), static_cast<long long>(w.rows),
                static_cast<long long>(w.cols), format_name(format).c_str());
    // AQLM's does not damp H: neither may ours much.
    for (const auto& [beam, damping] : {std::pair(1, 0.1), std::pair(1, 0.01), std::pair(4, 0.01)}) {
      CalibratedOptions layers;
      layers.beam = beam;
      layers.damping = damping;
      const auto start = std::chrono::steady_clock::now();
      const QuantizedMatrix made =
          unwrap(in.quantizer.backend.quantize(w, gram, format, layers, in.pool, nullptr));
      const double seconds = seconds_since(start);
      const double error = detail::relative_error(w, gram, made);
      std::printf(" ours with beam %d, damping %g %.5f in %.1f s,", beam, damping, error, seconds);
      row["ours"].push_back({{"beam", beam}, {"damping", damping}, {"error", error}, {"seconds", seconds}});
    }
    detail::write_floats(path + ".weights", w);
    detail::write_floats(path + ".gram", gram);
    const std::vector<double> peer =
        run_peer("", "aqlm_quantize_peer.py",
                 concat('\'', options.aqlm, "' '", path, ".weights' '", path, ".gram' ", w.rows, ' ', w.cols,
                        ' ', format.v, ' ', format.m, ' ', format.b),
                 2);
    if (peer.empty()) {
      std::printf(" AQLM's code is left out: it is not there, or failed\n");
    } else {
      std::printf(" AQLM's %.5f in %.1f s\n", peer[0], peer[1]);
      row["aqlm_error"] = peer[0];
      row["aqlm_seconds"] = peer[1];
    }
    std::fflush(stdout);
    add(std::move(row));
  };
  detail::LayerLooker looker{look, concat("model.layers.", block, ".")};
  prefillshare::CalibrationRunOptions run_options;
  run_options.correct = false;
  in.gpu.calibrate(in.loaded, in.sequences, run_options, looker, block + 1);
}

}  // namespace codegemm::bench
