// SPDX-License-Identifier: Apache-2.0
//
// common/tensor_source.hpp - a model's tensors under one set of names, whatever file they come from.
// Layer: examples (host only).
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <codegemm/io/mapped_file.hpp>
#include <common/gguf_source.hpp>
#include <common/quantized_source.hpp>
#include <common/safetensors_source.hpp>
#include <common/tensor_source_base.hpp>

namespace prefillshare::examples {

namespace detail {

/// Whether a folder's config.json speaks of CodeGEMM's or AQLM's quantization. What is wrong with the file is
/// found by whoever reads it.
[[nodiscard]] inline bool is_quantized_folder(const std::string& folder) {
  const Result<codegemm::MappedFile> file = codegemm::open_json_file(folder + "/config.json");
  if (!file.ok()) return false;
  const auto config = codegemm::parse_json_object(codegemm::text_of(*file), file->path());
  if (!config.ok()) return false;
  const auto quantization = config->find("quantization_config");
  return config->contains("codegemm") || (quantization != config->end() && quantization->is_object() &&
                                          quantization->value("quant_method", nlohmann::json()) == "aqlm");
}

}  // namespace detail

/// Opens a GGUF file or a folder with config.json and model.safetensors (or its shards), dense or quantized
/// as CodeGEMM and AQLM do it. Everything that can be checked without reading the weights has been: headers,
/// hyperparameters, tensor types.
[[nodiscard]] inline Result<std::unique_ptr<TensorSource>> open_model(const std::string& path) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) return codegemm::io_error("open", path, errno);
  if (S_ISDIR(info.st_mode))
    return detail::is_quantized_folder(path) ? QuantizedSource::open(path) : SafetensorsSource::open(path);
  constexpr std::string_view kSafetensors = ".safetensors";
  if (path.size() >= kSafetensors.size() &&
      std::string_view(path).substr(path.size() - kSafetensors.size()) == kSafetensors) {
    return error(StatusCode::kInvalidArgument, path,
                 ": give its folder, with config.json beside the tensors, instead");
  }
  return GgufSource::open(path);
}

}  // namespace prefillshare::examples
