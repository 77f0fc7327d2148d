// SPDX-License-Identifier: Apache-2.0
//
// examples/common/quantized_model.hpp - a dense model with its linear layers as codebook codes, kept on disk.
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <codegemm/io/checkpoint.hpp>
#include <codegemm/quantize/kmeans.hpp>
#include <common/model_loader.hpp>
#include <prefillshare/model/codegemm_linear.hpp>
#include <prefillshare/model/dense_linear.hpp>

namespace prefillshare::examples {

using QuantizedModel = LlamaModel<CodeGemmLinear>;

namespace detail {

/// Raised when the quantizer makes other codes from the same weights, so that no old file is taken for new.
inline constexpr int kQuantizerVersion = 1;

/// The dense model's config, embedding and norms with empty linear layers.
[[nodiscard]] inline std::shared_ptr<QuantizedModel> without_linears(const LlamaModel<DenseLinear>& dense) {
  auto model = std::make_shared<QuantizedModel>();
  model->config = dense.config;
  model->embedding = dense.embedding;
  model->final_norm = dense.final_norm;
  for (const LlamaLayer<DenseLinear>& layer : dense.layers) {
    LlamaLayer<CodeGemmLinear>& out = model->layers.emplace_back();
    out.input_norm = layer.input_norm;
    out.post_attention_norm = layer.post_attention_norm;
    out.q_norm = layer.q_norm;
    out.k_norm = layer.k_norm;
  }
  return model;
}

struct LinearPair {
  std::string name;
  const DenseLinear* dense;
  CodeGemmLinear* quantized;
};

[[nodiscard]] inline std::vector<LinearPair> pair_linears(const LlamaModel<DenseLinear>& dense,
                                                          QuantizedModel& model) {
  std::vector<LinearPair> pairs;
  for_each_linear(dense, [&](const std::string& name, const DenseLinear& layer) {
    pairs.push_back({name, &layer, nullptr});
  });
  std::size_t i = 0;
  for_each_linear(model, [&](const std::string&, CodeGemmLinear& layer) { pairs[i++].quantized = &layer; });
  return pairs;
}

/// Packs a matrix into its layer; the bias stays fp32.
[[nodiscard]] inline Status install(const LinearPair& pair, const codegemm::QuantizedMatrix& matrix,
                                    codegemm::WeightArena& arena) {
  Result<codegemm::PackedMatrix> packed = codegemm::pack(matrix.view(), arena);
  if (!packed.ok()) return packed.status().with_prefix(pair.name);
  const std::span<const float> bias = pair.dense->bias();
  *pair.quantized = CodeGemmLinear(std::move(packed).value(), std::vector<float>(bias.begin(), bias.end()));
  return {};
}

[[nodiscard]] inline Status read_quantized(const std::string& path, codegemm::Format format,
                                           const std::vector<LinearPair>& pairs,
                                           codegemm::WeightArena& arena) {
  Result<codegemm::Checkpoint> checkpoint = codegemm::Checkpoint::open(path);
  if (!checkpoint.ok()) return checkpoint.status();
  for (const LinearPair& pair : pairs) {
    Result<codegemm::QuantizedMatrix> matrix = checkpoint->load(pair.name);
    if (!matrix.ok()) return matrix.status();
    if (!(matrix->format() == format) || matrix->rows() != pair.dense->rows() ||
        matrix->cols() != pair.dense->cols()) {
      return error(StatusCode::kCorruptData, path, ": '", pair.name, "' is ", matrix->rows(), " x ",
                   matrix->cols(), " in ", codegemm::format_name(matrix->format()), ", wanted ",
                   pair.dense->rows(), " x ", pair.dense->cols(), " in ", codegemm::format_name(format));
    }
    if (Status s = install(pair, *matrix, arena); !s.ok()) return s;
  }
  return {};
}

}  // namespace detail

/// All linear layers of `loaded`, the head included, in `format`: read from `folder` if they were made
/// before, else quantized by k-means and written there, whole or not at all. progress(layers done, layers).
[[nodiscard]] inline Result<std::shared_ptr<const QuantizedModel>> quantized_model(
    const LoadedModel& loaded, codegemm::Format format, const std::string& folder, Executor& executor,
    const LoadProgress& progress = {}) {
  const std::shared_ptr<QuantizedModel> model = detail::without_linears(*loaded.model);
  const std::vector<detail::LinearPair> pairs = detail::pair_linears(*loaded.model, *model);
  const auto total = static_cast<std::int64_t>(pairs.size());
  codegemm::WeightArena arena;  // layers side by side, in the order in which they are read
  const std::string path =
      codegemm::concat(folder, "/", loaded.fingerprint, "-", codegemm::format_name(format), "-v",
                       detail::kQuantizerVersion, ".safetensors");
  std::error_code failed;
  std::filesystem::create_directories(folder, failed);
  if (failed)
    return Status(StatusCode::kIoError, codegemm::concat(folder, ": ", failed.message()), failed.value());

  if (std::filesystem::exists(path, failed)) {
    const Status read = detail::read_quantized(path, format, pairs, arena);
    if (read.ok()) {
      if (progress) progress(total, total);
      return std::shared_ptr<const QuantizedModel>(model);
    }
    if (read.code() == StatusCode::kIoError) return read;
    std::fprintf(stderr, "%s; it is made anew\n", read.message().c_str());
  }

  std::vector<codegemm::QuantizedMatrix> matrices;
  matrices.reserve(pairs.size());
  for (const detail::LinearPair& pair : pairs) {
    Result<codegemm::QuantizedMatrix> matrix =
        codegemm::quantize_kmeans(pair.dense->weights(), format, {}, executor);
    if (!matrix.ok()) return matrix.status().with_prefix(pair.name);
    if (Status s = detail::install(pair, *matrix, arena); !s.ok()) return s;
    matrices.push_back(std::move(matrix).value());
    if (progress) progress(static_cast<std::int64_t>(matrices.size()), total);
  }
  std::vector<codegemm::NamedMatrix> named;
  for (std::size_t i = 0; i < pairs.size(); ++i) named.push_back({pairs[i].name, matrices[i].view()});
  if (Status s = codegemm::save_checkpoint(path, named); !s.ok()) return s;
  return std::shared_ptr<const QuantizedModel>(model);
}

/// Bits a weight of all linear layers, as their packed memory has it.
[[nodiscard]] inline double packed_bits(const LlamaModel<CodeGemmLinear>& model) {
  return 8.0 * static_cast<double>(linear_bytes(model)) / static_cast<double>(linear_weights(model));
}

}  // namespace prefillshare::examples
