// SPDX-License-Identifier: Apache-2.0
//
// codegemm/io/safetensors_folder.hpp - the tensors of a model folder: model.safetensors, or shards and their
// index.
// Layer: io (host only).
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <codegemm/base/status.hpp>
#include <codegemm/io/json_file.hpp>
#include <codegemm/io/safetensors.hpp>
#include <codegemm/io/safetensors_writer.hpp>

namespace codegemm {

/// The file of a model that is not cut into shards.
inline constexpr std::string_view kSafetensorsFileName = "model.safetensors";
/// The file that names the shards.
inline constexpr std::string_view kSafetensorsIndexName = "model.safetensors.index.json";

/// All tensors of a folder, memory-mapped. Move-only; tensors and files stay where they are when it is moved.
class SafetensorsFolder {
 public:
  /// A tensor, and the file it lies in; both belong to the folder.
  struct Entry {
    const SafetensorsFile* file = nullptr;      ///< the file
    const SafetensorsTensor* tensor = nullptr;  ///< the tensor in it
  };

  /// Opens model.safetensors or, where there is none, the shards that model.safetensors.index.json names, all
  /// of this very folder. kNotFound where neither is there; kCorruptData for an index that contradicts itself
  /// or its shards; errors of SafetensorsFile::open.
  [[nodiscard]] static Result<SafetensorsFolder> open(std::string path) {
    SafetensorsFolder folder;
    folder.path_ = std::move(path);
    if (Status status = folder.open_files(); !status.ok()) return status;
    return folder;
  }

  /// A folder that consists of one file, which has been parsed; its name is the path.
  [[nodiscard]] static SafetensorsFolder of(SafetensorsFile file) {
    SafetensorsFolder folder;
    folder.path_ = file.name();
    folder.files_.push_back(std::make_unique<const SafetensorsFile>(std::move(file)));
    folder.add(folder.files_.back().get());
    return folder;
  }

  [[nodiscard]] const std::string& path() const noexcept { return path_; }  ///< the folder
  /// By name.
  [[nodiscard]] const std::map<std::string, Entry, std::less<>>& tensors() const noexcept { return tensors_; }
  [[nodiscard]] std::size_t file_count() const noexcept { return files_.size(); }  ///< files mapped

  /// Null where there is none of that name.
  [[nodiscard]] const Entry* find(std::string_view name) const {
    const auto at = tensors_.find(name);
    return at != tensors_.end() ? &at->second : nullptr;
  }

 private:
  SafetensorsFolder() = default;

  void add(const SafetensorsFile* file) {
    for (const SafetensorsTensor& tensor : file->tensors())
      tensors_.emplace(tensor.name, Entry{file, &tensor});
  }

  Status open_files() {
    Result<const SafetensorsFile*> single = open_file(std::string(kSafetensorsFileName));
    if (single.ok()) {
      add(*single);
      return {};
    }
    if (single.status().code() != StatusCode::kNotFound) return single.status();
    Result<MappedFile> index = open_json_file(concat(path_, "/", kSafetensorsIndexName));
    if (index.ok()) return open_shards(*index);
    if (index.status().code() != StatusCode::kNotFound) return index.status();
    return error(StatusCode::kNotFound, path_, ": holds neither ", kSafetensorsFileName, " nor ",
                 kSafetensorsIndexName);
  }

  Status open_shards(const MappedFile& index) {
    const Result<nlohmann::json> root = parse_json_object(text_of(index), index.path());
    if (!root.ok()) return root.status();
    const auto map = root->find("weight_map");
    if (map == root->end() || !map->is_object()) {
      return error(StatusCode::kCorruptData, index.path(), ": has no object 'weight_map'");
    }
    std::map<std::string, const SafetensorsFile*, std::less<>> shards;
    for (const auto& [name, value] : map->items()) {
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
      const SafetensorsFile*& file = shards[*shard];
      if (file == nullptr) {
        Result<const SafetensorsFile*> opened = open_file(*shard);
        if (!opened.ok()) return opened.status();
        file = *opened;
      }
      const SafetensorsTensor* tensor = file->find(name);
      if (tensor == nullptr) {
        return error(StatusCode::kCorruptData, file->name(), ": has no tensor ", codegemm::quoted(name),
                     ", which ", index.path(), " places there");
      }
      tensors_.emplace(name, Entry{file, tensor});
    }
    return {};
  }

  Result<const SafetensorsFile*> open_file(const std::string& name) {
    Result<SafetensorsFile> file = SafetensorsFile::open(path_ + "/" + name);
    if (!file.ok()) return file.status();
    files_.push_back(std::make_unique<const SafetensorsFile>(*std::move(file)));
    return files_.back().get();
  }

  std::string path_;
  std::vector<std::unique_ptr<const SafetensorsFile>> files_;
  std::map<std::string, Entry, std::less<>> tensors_;
};

namespace detail {

/// Removes a file that what was just written replaces; that it was never there is success.
[[nodiscard]] inline Status remove_stale(const std::string& path) {
  if (std::remove(path.c_str()) == 0 || errno == ENOENT) return {};
  return io_error("remove", path, errno);
}

/// [first, last) of each shard: as many tensors as fit into `most` bytes, at least one.
[[nodiscard]] inline std::vector<std::pair<std::size_t, std::size_t>> cut_shards(
    std::span<const SafetensorsTensor> tensors, std::uint64_t most) {
  std::vector<std::pair<std::size_t, std::size_t>> shards;
  std::size_t first = 0;
  std::uint64_t bytes = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::uint64_t size = tensors[i].data.size();
    if (i > first && (size > most || bytes > most - size)) {
      shards.emplace_back(first, i);
      first = i;
      bytes = 0;
    }
    bytes += size;
  }
  shards.emplace_back(first, tensors.size());
  return shards;
}

[[nodiscard]] inline std::string five_digits(std::size_t number) {
  const std::string digits = concat(number);
  return digits.size() < 5 ? std::string(5 - digits.size(), '0') + digits : digits;
}
[[nodiscard]] inline std::string shard_name(std::size_t index, std::size_t count) {
  return concat("model-", five_digits(index + 1), "-of-", five_digits(count), ".safetensors");
}

/// Removes a folder's index if it may name one of `count` shards that are about to be written.
[[nodiscard]] inline Status remove_index_of(const std::string& folder, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    if (::access(concat(folder, "/", shard_name(i, count)).c_str(), F_OK) == 0)
      return remove_stale(concat(folder, "/", kSafetensorsIndexName));
  }
  return {};
}

}  // namespace detail

/// Writes tensors into an existing folder under the names that Hugging Face uses: model.safetensors, or, if
/// they hold more than `most_shard_bytes`, model-00001-of-0000N.safetensors and so on with their index. Every
/// file appears whole or not at all, the index last, and then model.safetensors or the index of an earlier
/// model goes where this one has none. An index whose shards are written over goes first, so that a killed
/// run leaves no mixture of two models that could be opened. Each file says "format": "pt" in its metadata,
/// without which transformers refuses it. Errors of write_safetensors; kInvalidArgument for a limit of 0.
[[nodiscard]] inline Status write_safetensors_folder(const std::string& folder,
                                                     std::span<const SafetensorsTensor> tensors,
                                                     std::uint64_t most_shard_bytes) {
  if (most_shard_bytes == 0)
    return error(StatusCode::kInvalidArgument, folder, ": shards of 0 bytes were asked for");
  const SafetensorsText metadata[] = {{"format", "pt"}};
  const std::string single = concat(folder, "/", kSafetensorsFileName);
  const std::string index = concat(folder, "/", kSafetensorsIndexName);
  const auto shards = detail::cut_shards(tensors, most_shard_bytes);
  if (shards.size() == 1) {
    if (Status status = write_safetensors(single, tensors, metadata); !status.ok()) return status;
    return detail::remove_stale(index);
  }
  if (Status status = detail::remove_index_of(folder, shards.size()); !status.ok()) return status;
  nlohmann::json map = nlohmann::json::object();
  std::uint64_t total = 0;
  for (std::size_t i = 0; i < shards.size(); ++i) {
    const std::string name = detail::shard_name(i, shards.size());
    const auto part = tensors.subspan(shards[i].first, shards[i].second - shards[i].first);
    for (const SafetensorsTensor& tensor : part) {
      if (map.contains(tensor.name)) {
        return error(StatusCode::kInvalidArgument, folder, ": tensor ", codegemm::quoted(tensor.name),
                     " is there twice");
      }
      map[tensor.name] = name;
      total += tensor.data.size();
    }
    if (Status status = write_safetensors(concat(folder, "/", name), part, metadata); !status.ok())
      return status;
  }
  const nlohmann::json root = {{"metadata", {{"total_size", total}}}, {"weight_map", map}};
  using Json = nlohmann::json;
  const std::string text = root.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
  if (Status status = write_file(index, text); !status.ok()) return status;
  return detail::remove_stale(single);
}

}  // namespace codegemm
