// SPDX-License-Identifier: Apache-2.0
//
// common/safetensors_source.hpp - a Hugging Face model folder as a TensorSource.
// Layer: examples (host only).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <codegemm/io/mapped_file.hpp>
#include <codegemm/io/safetensors.hpp>
#include <common/config_json.hpp>
#include <common/ggml_types.hpp>
#include <common/tensor_source_base.hpp>

namespace prefillshare::examples {

/// Reads config.json and model.safetensors, or the shards that model.safetensors.index.json names, of one
/// folder.
class SafetensorsSource final : public TensorSource {
 public:
  /// Errors of SafetensorsFile::open and read_hyperparameters, and of the index.
  [[nodiscard]] static Result<std::unique_ptr<TensorSource>> open(const std::string& folder) {
    std::unique_ptr<SafetensorsSource> source(new SafetensorsSource(folder));
    if (Status status = source->open_files(); !status.ok()) return status;
    Result<codegemm::MappedFile> config = open_text(folder + "/config.json");
    if (!config.ok()) return config.status();
    Result<ModelHyperparameters> read = read_hyperparameters(
        text(*config), config->path(), [&](std::string_view name) { return source->contains(name); });
    if (!read.ok()) return read.status();
    source->hyperparameters_ = *std::move(read);
    return std::unique_ptr<TensorSource>(std::move(source));
  }

  [[nodiscard]] std::vector<std::string> names() const override {
    std::vector<std::string> out;
    for (const auto& [name, entry] : tensors_) out.push_back(name);
    return out;
  }
  [[nodiscard]] bool contains(std::string_view name) const override {
    return tensors_.find(name) != tensors_.end();
  }
  [[nodiscard]] Result<TensorInfo> info(std::string_view name) const override {
    const auto at = tensors_.find(name);
    if (at == tensors_.end()) return no_tensor(name);
    const codegemm::SafetensorsTensor& tensor = *at->second.tensor;
    const std::vector<std::int64_t>& shape = tensor.shape;
    if (shape.size() > 2) {
      return error(StatusCode::kUnsupported, at->second.file->name(), ": tensor ", codegemm::quoted(name),
                   " has shape ", codegemm::shape_text(shape), ", only vectors and matrices are read");
    }
    TensorInfo out{1, 1, std::string(codegemm::to_string(tensor.dtype))};
    if (!shape.empty()) out.cols = shape.back();
    if (shape.size() == 2) out.rows = shape.front();
    return out;
  }

  [[nodiscard]] Status read_rows(std::string_view name, std::int64_t first, std::int64_t count,
                                 float* out) const override {
    const Result<TensorInfo> shape = info(name);
    if (!shape.ok()) return shape.status();
    if (Status status = check_rows(name, *shape, first, count); !status.ok()) return status;
    const Entry& entry = tensors_.find(name)->second;
    const auto row_bytes = static_cast<std::uint64_t>(shape->cols) * codegemm::item_size(entry.tensor->dtype);
    const std::byte* from = entry.tensor->data.data() + static_cast<std::uint64_t>(first) * row_bytes;
    const std::int64_t values = count * shape->cols;
    switch (entry.tensor->dtype) {
      case codegemm::Dtype::kF64: detail::convert<double>(from, values, out); return {};
      case codegemm::Dtype::kF32: detail::convert<float>(from, values, out); return {};
      case codegemm::Dtype::kF16: detail::convert<codegemm::Half>(from, values, out); return {};
      case codegemm::Dtype::kBF16: detail::convert<codegemm::BFloat16>(from, values, out); return {};
      default:
        return error(StatusCode::kUnsupported, entry.file->name(), ": tensor ", codegemm::quoted(name),
                     " has dtype ", shape->type, ", converted to fp32 are F64, F32, F16, BF16");
    }
  }

 private:
  struct Entry {
    const codegemm::SafetensorsFile* file = nullptr;
    const codegemm::SafetensorsTensor* tensor = nullptr;
  };

  static constexpr std::size_t kMostJsonBytes = std::size_t{64} << 20;

  explicit SafetensorsSource(std::string folder) : TensorSource(std::move(folder)) {}

  static Result<codegemm::MappedFile> open_text(std::string path) {
    Result<codegemm::MappedFile> file = codegemm::MappedFile::open(std::move(path));
    if (file.ok() && file->bytes().size() > kMostJsonBytes) {
      return error(StatusCode::kCorruptData, file->path(), ": has ", file->bytes().size(), " bytes, at most ",
                   kMostJsonBytes, " are allowed");
    }
    return file;
  }
  static std::string_view text(const codegemm::MappedFile& file) {
    return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
  }

  Status open_files() {
    Result<const codegemm::SafetensorsFile*> single = open_file("model.safetensors");
    if (single.ok()) {
      for (const codegemm::SafetensorsTensor& tensor : (*single)->tensors()) {
        tensors_.emplace(tensor.name, Entry{*single, &tensor});
      }
      return {};
    }
    if (single.status().code() != StatusCode::kNotFound) return single.status();
    Result<codegemm::MappedFile> index = open_text(path_ + "/model.safetensors.index.json");
    if (index.ok()) return open_shards(*index);
    if (index.status().code() != StatusCode::kNotFound) return index.status();
    return error(StatusCode::kNotFound, path_,
                 ": holds neither model.safetensors nor model.safetensors.index.json");
  }

  Status open_shards(const codegemm::MappedFile& index) {
    const nlohmann::json json = nlohmann::json::parse(text(index), nullptr, false);
    if (json.is_discarded()) return error(StatusCode::kCorruptData, index.path(), ": is no JSON");
    const auto* root = json.get_ptr<const nlohmann::json::object_t*>();
    const auto map = root != nullptr ? root->find("weight_map") : nlohmann::json::object_t::const_iterator{};
    if (root == nullptr || map == root->end() || !map->second.is_object()) {
      return error(StatusCode::kCorruptData, index.path(), ": has no object 'weight_map'");
    }
    std::map<std::string, const codegemm::SafetensorsFile*, std::less<>> shards;
    for (const auto& [name, value] : map->second.items()) {
      const auto* shard = value.get_ptr<const nlohmann::json::string_t*>();
      if (shard == nullptr) {
        return error(StatusCode::kCorruptData, index.path(), ": weight_map ", codegemm::quoted(name),
                     " is of type ", value.type_name(), ", expected a string");
      }
      // Only files of this very folder: the index may not send the reader elsewhere.
      if (shard->empty() || *shard == "." || *shard == ".." ||
          shard->find_first_of(std::string_view("/\\\0", 3)) != std::string::npos) {
        return error(StatusCode::kCorruptData, index.path(), ": weight_map ", codegemm::quoted(name),
                     " names the shard ", codegemm::quoted(*shard), ", must be a file name without folders");
      }
      const codegemm::SafetensorsFile*& file = shards[*shard];
      if (file == nullptr) {
        Result<const codegemm::SafetensorsFile*> opened = open_file(*shard);
        if (!opened.ok()) return opened.status();
        file = *opened;
      }
      const codegemm::SafetensorsTensor* tensor = file->find(name);
      if (tensor == nullptr) {
        return error(StatusCode::kCorruptData, file->name(), ": has no tensor ", codegemm::quoted(name),
                     ", which ", index.path(), " places there");
      }
      tensors_.emplace(name, Entry{file, tensor});
    }
    return {};
  }

  Result<const codegemm::SafetensorsFile*> open_file(const std::string& name) {
    Result<codegemm::SafetensorsFile> file = codegemm::SafetensorsFile::open(path_ + "/" + name);
    if (!file.ok()) return file.status();
    files_.push_back(std::make_unique<const codegemm::SafetensorsFile>(*std::move(file)));
    return files_.back().get();
  }

  std::vector<std::unique_ptr<const codegemm::SafetensorsFile>> files_;
  std::map<std::string, Entry, std::less<>> tensors_;
};

}  // namespace prefillshare::examples
