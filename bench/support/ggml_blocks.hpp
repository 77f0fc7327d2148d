// SPDX-License-Identifier: Apache-2.0
//
// bench/support/ggml_blocks.hpp - a model's layers in ggml's blocks, with what the layers' inputs are on
// calibration data.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/base/executor.hpp>
#include <codegemm/base/matrix_view.hpp>
#include <prefillshare/model/dense_linear.hpp>
#include <prefillshare/model/llama.hpp>

#include "cpu_peers.hpp"

namespace codegemm::bench {

using DenseModel = prefillshare::LlamaModel<prefillshare::DenseLinear>;

/// Of a LayerReplacer: makes each layer of blocks, and keeps it.
struct BlockReplacer {
  const Ggml& library;
  const Ggml::Type& type;
  Executor& executor;
  std::function<void()> done;
  std::map<std::string, prefillshare::DenseLinear> made = {};

  Result<std::optional<prefillshare::DenseLinear>> find(const std::string&,
                                                        const prefillshare::DenseLinear&) {
    return std::optional<prefillshare::DenseLinear>();
  }
  Result<prefillshare::DenseLinear> make(const std::string& name, const prefillshare::DenseLinear& dense,
                                         MatrixView<const float> gram) {
    std::vector<float> importance;
    for (std::int64_t k = 0; k < gram.cols; ++k) importance.push_back(gram.row(k)[k]);
    std::vector<float> values = library.requantize(type, dense.weights(), importance, executor);
    if (values.empty()) {
      return error(StatusCode::kUnsupported, name, ": ", dense.rows(), " x ", dense.cols(),
                   " are no blocks of ", type.block);
    }
    if (done) done();
    prefillshare::DenseLinear out(std::make_shared<const std::vector<float>>(std::move(values)), dense.rows(),
                                  dense.cols(), std::vector<float>(dense.bias().begin(), dense.bias().end()));
    made[name] = out;
    return out;
  }
};

/// The dense model with other weights in the linear layers of its blocks.
[[nodiscard]] inline std::shared_ptr<const DenseModel> with_weights(
    const DenseModel& dense,
    const std::function<prefillshare::DenseLinear(const std::string& name,
                                                  const prefillshare::DenseLinear& dense)>& replace) {
  auto model = std::make_shared<DenseModel>(dense);
  for_each_linear(*model, [&](const std::string& name, prefillshare::DenseLinear& layer) {
    if (name != "lm_head") layer = replace(name, layer);
  });
  return model;
}

}  // namespace codegemm::bench
