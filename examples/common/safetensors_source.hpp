// SPDX-License-Identifier: Apache-2.0
//
// common/safetensors_source.hpp - a Hugging Face model folder as a TensorSource.
// Layer: examples (host only).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <codegemm/io/json_file.hpp>
#include <codegemm/io/safetensors_folder.hpp>
#include <common/config_json.hpp>
#include <common/ggml_types.hpp>
#include <common/tensor_source_base.hpp>

namespace prefillshare::examples {

namespace detail {

/// kUnsupported for more than two dimensions.
[[nodiscard]] inline Result<TensorInfo> safetensors_info(const codegemm::SafetensorsFolder::Entry& entry) {
  const codegemm::SafetensorsTensor& tensor = *entry.tensor;
  const std::vector<std::int64_t>& shape = tensor.shape;
  if (shape.size() > 2) {
    return error(StatusCode::kUnsupported, entry.file->name(), ": tensor ", codegemm::quoted(tensor.name),
                 " has shape ", codegemm::shape_text(shape), ", only vectors and matrices are read");
  }
  TensorInfo out{1, 1, std::string(codegemm::to_string(tensor.dtype))};
  if (!shape.empty()) out.cols = shape.back();
  if (shape.size() == 2) out.rows = shape.front();
  return out;
}

/// Rows that are there, as fp32. kUnsupported for integers.
[[nodiscard]] inline Status read_safetensors_rows(const codegemm::SafetensorsFolder::Entry& entry,
                                                  const TensorInfo& shape, std::int64_t first,
                                                  std::int64_t count, float* out) {
  const codegemm::SafetensorsTensor& tensor = *entry.tensor;
  const auto row_bytes = static_cast<std::uint64_t>(shape.cols) * codegemm::item_size(tensor.dtype);
  const std::byte* from = tensor.data.data() + static_cast<std::uint64_t>(first) * row_bytes;
  const std::int64_t values = count * shape.cols;
  switch (tensor.dtype) {
    case codegemm::Dtype::kF64: convert<double>(from, values, out); return {};
    case codegemm::Dtype::kF32: convert<float>(from, values, out); return {};
    case codegemm::Dtype::kF16: convert<codegemm::Half>(from, values, out); return {};
    case codegemm::Dtype::kBF16: convert<codegemm::BFloat16>(from, values, out); return {};
    default:
      return error(StatusCode::kUnsupported, entry.file->name(), ": tensor ", codegemm::quoted(tensor.name),
                   " has dtype ", shape.type, ", converted to fp32 are F64, F32, F16, BF16");
  }
}

}  // namespace detail

/// Reads config.json and model.safetensors, or the shards that model.safetensors.index.json names, of one
/// folder.
class SafetensorsSource final : public TensorSource {
 public:
  /// Errors of SafetensorsFile::open and read_hyperparameters, and of the index.
  [[nodiscard]] static Result<std::unique_ptr<TensorSource>> open(const std::string& folder) {
    Result<codegemm::SafetensorsFolder> files = codegemm::SafetensorsFolder::open(folder);
    if (!files.ok()) return files.status();
    std::unique_ptr<SafetensorsSource> source(new SafetensorsSource(folder, *std::move(files)));
    Result<codegemm::MappedFile> config = codegemm::open_json_file(folder + "/config.json");
    if (!config.ok()) return config.status();
    Result<ModelHyperparameters> read =
        read_hyperparameters(codegemm::text_of(*config), config->path(),
                             [&](std::string_view name) { return source->contains(name); });
    if (!read.ok()) return read.status();
    source->hyperparameters_ = *std::move(read);
    return std::unique_ptr<TensorSource>(std::move(source));
  }

  [[nodiscard]] std::vector<std::string> names() const override {
    std::vector<std::string> out;
    for (const auto& [name, entry] : folder_.tensors()) out.push_back(name);
    return out;
  }
  [[nodiscard]] bool contains(std::string_view name) const override { return folder_.find(name) != nullptr; }
  [[nodiscard]] Result<TensorInfo> info(std::string_view name) const override {
    const codegemm::SafetensorsFolder::Entry* entry = folder_.find(name);
    return entry == nullptr ? no_tensor(name) : detail::safetensors_info(*entry);
  }

  [[nodiscard]] Status read_rows(std::string_view name, std::int64_t first, std::int64_t count,
                                 float* out) const override {
    const Result<TensorInfo> shape = info(name);
    if (!shape.ok()) return shape.status();
    if (Status status = check_rows(name, *shape, first, count); !status.ok()) return status;
    return detail::read_safetensors_rows(*folder_.find(name), *shape, first, count, out);
  }

 private:
  SafetensorsSource(std::string path, codegemm::SafetensorsFolder folder)
      : TensorSource(std::move(path)), folder_(std::move(folder)) {}

  codegemm::SafetensorsFolder folder_;
};

}  // namespace prefillshare::examples
