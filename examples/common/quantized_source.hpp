// SPDX-License-Identifier: Apache-2.0
//
// common/quantized_source.hpp - a quantized model folder (CodeGEMM or AQLM) as a TensorSource: its layers
// come back dequantized.
// Layer: examples (host only).
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <codegemm/io/model_checkpoint.hpp>
#include <codegemm/reference.hpp>
#include <common/config_json.hpp>
#include <common/safetensors_source.hpp>
#include <common/tensor_source_base.hpp>

namespace prefillshare::examples {

class QuantizedSource final : public TensorSource {
 public:
  /// Errors of ModelCheckpoint::open (kNotFound: no quantized model) and read_hyperparameters.
  [[nodiscard]] static Result<std::unique_ptr<TensorSource>> open(const std::string& folder) {
    Result<codegemm::ModelCheckpoint> model = codegemm::ModelCheckpoint::open(folder);
    if (!model.ok()) return model.status();
    std::unique_ptr<QuantizedSource> source(new QuantizedSource(folder, *std::move(model)));
    nlohmann::json config = source->model_.config();
    config.erase("quantization_config");
    using Json = nlohmann::json;
    Result<ModelHyperparameters> read = read_hyperparameters(
        config.dump(-1, ' ', false, Json::error_handler_t::replace), folder + "/config.json",
        [&](std::string_view name) { return source->contains(name); });
    if (!read.ok()) return read.status();
    source->hyperparameters_ = *std::move(read);
    return std::unique_ptr<TensorSource>(std::move(source));
  }

  [[nodiscard]] std::vector<std::string> names() const override {
    std::vector<std::string> out;
    for (const codegemm::SafetensorsTensor& tensor : model_.plain_tensors()) out.push_back(tensor.name);
    for (const codegemm::CheckpointEntry& entry : model_.entries()) out.push_back(entry.name + ".weight");
    std::sort(out.begin(), out.end());
    return out;
  }
  [[nodiscard]] bool contains(std::string_view name) const override {
    return find_layer(name) != nullptr || model_.files().find(name) != nullptr;
  }
  [[nodiscard]] Result<TensorInfo> info(std::string_view name) const override {
    if (const codegemm::CheckpointEntry* entry = find_layer(name); entry != nullptr)
      return TensorInfo{entry->rows, entry->cols, codegemm::format_name(entry->format)};
    const codegemm::SafetensorsFolder::Entry* entry = model_.files().find(name);
    return entry == nullptr ? no_tensor(name) : detail::safetensors_info(*entry);
  }
  [[nodiscard]] Status read_rows(std::string_view name, std::int64_t first, std::int64_t count,
                                 float* out) const override {
    const Result<TensorInfo> shape = info(name);
    if (!shape.ok()) return shape.status();
    if (Status status = check_rows(name, *shape, first, count); !status.ok()) return status;
    const codegemm::CheckpointEntry* entry = find_layer(name);
    if (entry == nullptr)
      return detail::read_safetensors_rows(*model_.files().find(name), *shape, first, count, out);
    const Result<codegemm::QuantizedMatrix> matrix = model_.load(entry->name);
    if (!matrix.ok()) return matrix.status();
    for (std::int64_t n = first; n < first + count; ++n) {
      for (std::int64_t k = 0; k < entry->cols; ++k)
        *out++ = static_cast<float>(codegemm::reference_weight(matrix->view(), n, k));
    }
    return {};
  }

 private:
  QuantizedSource(std::string path, codegemm::ModelCheckpoint model)
      : TensorSource(std::move(path)), model_(std::move(model)) {}

  /// The quantized layer that "NAME.weight" belongs to; null for an ordinary tensor.
  [[nodiscard]] const codegemm::CheckpointEntry* find_layer(std::string_view name) const {
    constexpr std::string_view kWeight = ".weight";
    if (!name.ends_with(kWeight)) return nullptr;
    return model_.find(name.substr(0, name.size() - kWeight.size()));
  }

  codegemm::ModelCheckpoint model_;
};

}  // namespace prefillshare::examples
