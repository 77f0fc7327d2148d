// SPDX-License-Identifier: Apache-2.0
//
// codegemm/io/model_checkpoint_writer.hpp - writes quantized models as the CodeGEMM and AQLM projects read
// them, and converts one into the other.
// Layer: io (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <numeric>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <codegemm/base/status.hpp>
#include <codegemm/io/aqlm_codes.hpp>
#include <codegemm/io/atomic_file.hpp>
#include <codegemm/io/model_checkpoint.hpp>
#include <codegemm/io/safetensors_folder.hpp>
#include <codegemm/quantized_matrix.hpp>
#include <codegemm/regroup.hpp>

namespace codegemm {

/// What save_model() may be told.
struct SaveModelOptions {
  std::uint64_t most_shard_bytes = 5'000'000'000;  ///< what transformers takes for a file
};

namespace detail {

/// kUnsupported: a kind cannot hold a layer, and why.
[[nodiscard]] inline Status refused(CheckpointKind kind, const std::string& name, Format f, std::int64_t rows,
                                    std::int64_t cols, const auto&... words) {
  return error(StatusCode::kUnsupported, codegemm::quoted(name), " is ", rows, " x ", cols, " in ",
               format_name(f), ", and ", to_string(kind), " ", words...);
}

}  // namespace detail

/// Whether a checkpoint of this kind can hold a layer of rows x cols in format f; to be asked before it is
/// quantized. kUnsupported with the layer's name and the reason where it cannot.
[[nodiscard]] inline Status check_saved_shape(CheckpointKind kind, const std::string& name, Format f,
                                              std::int64_t rows, std::int64_t cols) {
  const auto refuse = [&](const auto&... words) {
    return detail::refused(kind, name, f, rows, cols, words...);
  };
  if (kind == CheckpointKind::kAqlm) {
    if (f.g != -1) return refuse("has one scale a row: regroup() to g = -1 first, if the scales allow it");
    return {};
  }
  if (f.b > 8) return refuse("packs four codes of at most 8 bits into a word");
  if (f.g < 0) return refuse("has no group size of -1: regroup() to one that divides every K first");
  if (cols % f.g != 0) return refuse("needs a K that is a multiple of g = ", f.g);
  const std::int64_t word = std::int64_t{4} * f.v;
  if (cols % word != 0) return refuse("needs a K that is a multiple of 4 v = ", word);
  return {};
}

namespace detail {

/// The config of the model without what says how it is quantized.
[[nodiscard]] inline nlohmann::json without_quantization(nlohmann::json config) {
  if (!config.is_object()) config = nlohmann::json::object();
  config.erase("codegemm");
  config.erase("quantization_config");
  config["torch_dtype"] = "float16";
  if (config.contains("dtype")) config["dtype"] = "float16";
  return config;
}

/// One format for all matrices, or the error that names the one that differs.
[[nodiscard]] inline Result<Format> common_format(CheckpointKind kind,
                                                  std::span<const NamedMatrix> matrices) {
  if (matrices.empty()) return error(StatusCode::kInvalidArgument, "there is no quantized layer to save");
  const Format f = matrices.front().matrix.format;
  for (const NamedMatrix& named : matrices) {
    const QuantizedMatrixView& w = named.matrix;
    if (Status status = validate(w); !status.ok()) return status.with_prefix(codegemm::quoted(named.name));
    if (!(w.format == f)) {
      return refused(kind, named.name, w.format, w.rows, w.cols,
                     "has one format for the whole model: ", codegemm::quoted(matrices.front().name), " is ",
                     format_name(f));
    }
    if (Status status = check_saved_shape(kind, named.name, f, w.rows, w.cols); !status.ok()) return status;
  }
  return f;
}

/// CodeGEMM's loader replaces the same modules in every layer "model.layers.N." and knows no others.
[[nodiscard]] inline Result<std::vector<std::string>> codegemm_modules(
    std::span<const NamedMatrix> matrices) {
  constexpr std::string_view kPrefix = "model.layers.";
  std::vector<std::string> modules;  // in the order of the matrices
  std::map<std::string, std::set<std::string>> layers_of;
  std::set<std::string> layers;
  for (const NamedMatrix& named : matrices) {
    const std::string_view name = named.name;
    const std::size_t dot =
        name.starts_with(kPrefix) ? name.find('.', kPrefix.size()) : std::string_view::npos;
    const std::string_view layer =
        dot == std::string_view::npos ? "" : name.substr(kPrefix.size(), dot - kPrefix.size());
    if (layer.empty() || layer.find_first_not_of("0123456789") != std::string_view::npos) {
      return error(StatusCode::kUnsupported, codegemm::quoted(name), " is not of the form ", kPrefix,
                   "N.MODULE, and CodeGEMM quantizes nothing else");
    }
    std::string module(name.substr(dot + 1));
    layers.emplace(layer);
    if (layers_of.find(module) == layers_of.end()) modules.push_back(module);
    layers_of[std::move(module)].emplace(layer);
  }
  for (const auto& [module, where] : layers_of) {
    if (where.size() == layers.size()) continue;
    return error(StatusCode::kUnsupported, codegemm::quoted(module), " is quantized in ", where.size(),
                 " of ", layers.size(), " layers, and CodeGEMM makes all layers alike");
  }
  return modules;
}

[[nodiscard]] inline Result<nlohmann::json> quantized_config(CheckpointKind kind, Format f,
                                                             nlohmann::json config,
                                                             std::span<const NamedMatrix> matrices,
                                                             std::span<const SafetensorsTensor> plain) {
  config = without_quantization(std::move(config));
  if (kind == CheckpointKind::kCodeGemm) {
    const Result<std::vector<std::string>> modules = codegemm_modules(matrices);
    if (!modules.ok()) return modules.status();
    config["codegemm"] = {
        {"arch_config", {{"layers_name", "layers"}, {"model_name", "model"}, {"module_names", *modules}}},
        {"group_size", f.g},
        {"vec_len", f.v},
        {"num_codebooks", f.m},
        {"nbits_per_codebook", f.b}};
    return config;
  }
  // Older versions of transformers compare the names of weights, newer ones those of modules.
  std::set<std::string> dense{"lm_head", "lm_head.weight"};
  for (const SafetensorsTensor& tensor : plain) {
    dense.insert(tensor.name);
    constexpr std::string_view kWeight = ".weight";
    if (tensor.name.ends_with(kWeight))
      dense.insert(tensor.name.substr(0, tensor.name.size() - kWeight.size()));
  }
  config["quantization_config"] = {{"quant_method", "aqlm"}, {"nbits_per_codebook", f.b},
                                   {"num_codebooks", f.m},   {"out_group_size", 1},
                                   {"in_group_size", f.v},   {"linear_weights_not_to_quantize", dense}};
  return config;
}

/// The three tensors of a matrix. AQLM's codes are made in `owned`; everything else lies in the matrix.
inline void add_matrix(CheckpointKind kind, const NamedMatrix& named,
                       std::deque<std::vector<std::byte>>& owned, std::vector<SafetensorsTensor>& tensors) {
  const QuantizedMatrixView& w = named.matrix;
  const Format f = w.format;
  const auto bytes = [](const auto* data, std::int64_t count) {
    return std::as_bytes(std::span(data, static_cast<std::size_t>(count)));
  };
  const auto books = bytes(w.codebooks, f.m * f.centroids() * f.v);
  const auto scales = bytes(w.scales, f.scale_groups(w.cols) * w.rows);
  if (kind == CheckpointKind::kCodeGemm) {
    const std::int64_t words = w.vectors() / 4;
    tensors.push_back(
        {named.name + ".codes", Dtype::kI32, {f.m, words, w.rows}, bytes(w.codes, f.m * words * w.rows)});
    tensors.push_back({named.name + ".codebooks", Dtype::kF16, {f.m, f.centroids(), f.v}, books});
    tensors.push_back({named.name + ".scales", Dtype::kF16, {w.cols / f.g, w.rows}, scales});
    return;
  }
  owned.push_back(aqlm_codes(w));
  tensors.push_back({named.name + ".codes",
                     f.stored_code_bits() == 8 ? Dtype::kI8 : Dtype::kI16,
                     {w.rows, w.vectors(), f.m},
                     owned.back()});
  tensors.push_back({named.name + ".codebooks", Dtype::kF16, {f.m, f.centroids(), 1, f.v}, books});
  tensors.push_back({named.name + ".scales", Dtype::kF16, {w.rows, 1, 1, 1}, scales});
}

}  // namespace detail

/// Writes a quantized model into an existing folder: safetensors first, then config.json, each file whole or
/// not at all. `config` is the config.json of the dense model, to which the quantization is added; `plain`
/// are all other tensors (embeddings, norms, biases). kUnsupported, with the layer and the reason, for what
/// the kind cannot say; kInvalidArgument or kCorruptData for a matrix that validate() refuses; errors of
/// write_safetensors_folder.
[[nodiscard]] inline Status save_model_checkpoint(const std::string& folder, CheckpointKind kind,
                                                  const nlohmann::json& config,
                                                  std::span<const NamedMatrix> matrices,
                                                  std::span<const SafetensorsTensor> plain,
                                                  const SaveModelOptions& options = {}) {
  const Result<Format> format = detail::common_format(kind, matrices);
  if (!format.ok()) return format.status().with_prefix(folder);
  const Result<nlohmann::json> text = detail::quantized_config(kind, *format, config, matrices, plain);
  if (!text.ok()) return text.status().with_prefix(folder);
  std::deque<std::vector<std::byte>> owned;
  std::vector<SafetensorsTensor> tensors;
  tensors.reserve(matrices.size() * 3 + plain.size());
  for (const NamedMatrix& named : matrices) detail::add_matrix(kind, named, owned, tensors);
  tensors.insert(tensors.end(), plain.begin(), plain.end());
  if (Status status = write_safetensors_folder(folder, tensors, options.most_shard_bytes); !status.ok())
    return status;
  using Json = nlohmann::json;
  return write_file(folder + "/config.json",
                    text->dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
}

/// Writes the model `from` as the other kind (or the same) into an existing folder, every weight the same
/// bits. To CodeGEMM, row scales are repeated for groups of the largest size that divides every K. To AQLM,
/// the scales of a row must be equal: kUnsupported says which are not. Else errors as load() and
/// save_model_checkpoint(). Holds all codes in memory; the other tensors stay mapped.
[[nodiscard]] inline Status convert_model_checkpoint(const ModelCheckpoint& from, const std::string& folder,
                                                     CheckpointKind kind,
                                                     const SaveModelOptions& options = {}) {
  std::int64_t group = 0;
  for (const CheckpointEntry& entry : from.entries()) group = std::gcd(group, entry.cols);
  std::vector<QuantizedMatrix> matrices;
  std::vector<NamedMatrix> named;
  matrices.reserve(from.entries().size());
  for (const CheckpointEntry& entry : from.entries()) {
    Result<QuantizedMatrix> matrix = from.load(entry.name);
    if (!matrix.ok()) return matrix.status();
    if (kind != from.kind()) {
      const int wanted =
          kind == CheckpointKind::kAqlm ? -1 : static_cast<int>(std::min<std::int64_t>(group, 1 << 30));
      matrix = regroup(matrix->view(), wanted);
      if (!matrix.ok())
        return matrix.status().with_prefix(concat(from.path(), ": ", codegemm::quoted(entry.name)));
    }
    matrices.push_back(*std::move(matrix));
    named.push_back({entry.name, matrices.back().view()});
  }
  return save_model_checkpoint(folder, kind, from.config(), named, from.plain_tensors(), options);
}

}  // namespace codegemm
