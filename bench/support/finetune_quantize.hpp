// SPDX-License-Identifier: Apache-2.0
//
// bench/support/finetune_quantize.hpp - a fine-tuned module in a few bits: quantized on its task's own texts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <codegemm/format.hpp>
#include <codegemm/quantize/kmeans.hpp>
#include <codegemm/reference.hpp>
#include <common/text_quantizer.hpp>
#include <common/unwrap.hpp>

#include "finetune_backend.hpp"

namespace codegemm::bench {

/// A format of the suite's list: its name, and "-calibrated" behind it where codes are searched for the
/// outputs on the task's texts and codebooks and scales are fitted to them, not to the weights alone.
struct ModuleFormat {
  Format format;
  bool calibrated = false;

  /// kInvalidArgument.
  [[nodiscard]] static Result<ModuleFormat> parse(std::string name) {
    constexpr std::string_view kEnd = "-calibrated";
    ModuleFormat out;
    out.calibrated = name.ends_with(kEnd);
    if (out.calibrated) name.resize(name.size() - kEnd.size());
    const Result<Format> format = parse_format(name);
    if (!format.ok()) return format.status();
    out.format = *format;
    return out;
  }
};

/// The linear layers of the blocks: k-means weighted by the inputs on `texts`, then the rounds of the
/// calibrated quantizer if so asked; the weights are corrected for the errors of the layers before them where
/// there are tokens enough. Layers that are done stay in `folder`.
[[nodiscard]] inline Matrices quantize_module(const DenseModelPtr& dense, const std::string& fingerprint,
                                              const ModuleFormat& format, const CalibratedOptions& quantizer,
                                              const std::vector<Tokens>& texts, const std::string& folder,
                                              prefillshare::examples::QuantizeBackend backend,
                                              Executor& executor) {
  using namespace prefillshare::examples;
  TextQuantizerOptions options;
  options.layers = quantizer;
  if (!format.calibrated) options.layers.rounds = 0;
  options.backend = std::move(backend);
  std::int64_t tokens = 0;
  for (const Tokens& text : texts) tokens += static_cast<std::int64_t>(text.size());
  options.correct = tokens >= 2 * dense->config.intermediate_size;
  QuantizedLayers made =
      quantize_on_sequences({dense, fingerprint}, format.format, texts, options, folder, executor, {});
  Matrices out;
  for (std::size_t i = 0; i < made.names.size(); ++i) out.emplace(made.names[i], std::move(made.matrices[i]));
  return out;
}

/// The same by plain k-means, without texts: what the demo does with a specialist.
[[nodiscard]] inline Matrices quantize_plainly(const DenseModel& dense, Format format, Executor& executor) {
  Matrices out;
  prefillshare::for_each_linear(dense, [&](const std::string& name, const prefillshare::DenseLinear& layer) {
    if (name == "lm_head") return;
    out.emplace(name, prefillshare::examples::unwrap(quantize_kmeans(layer.weights(), format, {}, executor)));
  });
  return out;
}

/// The model with these layers as their codes say.
[[nodiscard]] inline DenseModelPtr dequantize_module(const DenseModel& dense, const Matrices& matrices) {
  auto out = std::make_shared<DenseModel>(dense);
  prefillshare::for_each_linear(*out, [&](const std::string& name, prefillshare::DenseLinear& layer) {
    const auto at = matrices.find(name);
    if (at == matrices.end()) return;
    auto values = std::make_shared<std::vector<float>>(static_cast<std::size_t>(layer.rows() * layer.cols()));
    reference_dequantize(at->second.view(), MatrixView<float>(values->data(), layer.rows(), layer.cols()));
    layer = prefillshare::DenseLinear(std::move(values), layer.rows(), layer.cols(),
                                      std::vector<float>(layer.bias().begin(), layer.bias().end()));
  });
  return out;
}

}  // namespace codegemm::bench
