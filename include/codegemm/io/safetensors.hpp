// SPDX-License-Identifier: Apache-2.0
//
// codegemm/io/safetensors.hpp - reads safetensors files.
// Layer: io (host only).
//
// The format: https://github.com/huggingface/safetensors, README and safetensors/src/tensor.rs: eight bytes
// of header length, a JSON header, then the tensors' bytes without gap or overlap. Every byte is taken for
// hostile.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <codegemm/base/status.hpp>
#include <codegemm/io/mapped_file.hpp>
#include <codegemm/io/safetensors_header.hpp>

namespace codegemm {

static_assert(std::endian::native == std::endian::little,
              "safetensors data are read as they lie in a little-endian file");

/// A parsed safetensors file. The tensors' data are views into the file's bytes; they live as long as this
/// object where open() made it, else as long as the bytes given to parse().
class SafetensorsFile {
 public:
  /// Maps and parses a file. Errors of MappedFile::open and of parse.
  [[nodiscard]] static Result<SafetensorsFile> open(std::string path) {
    Result<MappedFile> mapped = MappedFile::open(std::move(path));
    if (!mapped.ok()) return mapped.status();
    Result<SafetensorsFile> file = parse(mapped->bytes(), mapped->path());
    if (file.ok()) file->file_ = *std::move(mapped);
    return file;
  }

  /// Parses bytes that stay with the caller; `name` is for messages. kCorruptData with the tensor, the field
  /// and the numbers where the bytes contradict the format, kUnsupported for an unknown dtype.
  [[nodiscard]] static Result<SafetensorsFile> parse(std::span<const std::byte> bytes, std::string name) {
    SafetensorsFile file;
    file.name_ = std::move(name);
    std::uint64_t length = 0;
    if (bytes.size() < sizeof(length)) {
      return error(StatusCode::kCorruptData, file.name_, ": the header length needs ", sizeof(length),
                   " bytes, the file has ", bytes.size());
    }
    std::memcpy(&length, bytes.data(), sizeof(length));
    const std::size_t rest = bytes.size() - sizeof(length);
    if (length > kMostSafetensorsHeader) {
      return error(StatusCode::kCorruptData, file.name_, ": the header length is ", length, ", at most ",
                   kMostSafetensorsHeader, " is allowed");
    }
    if (length > rest) {
      return error(StatusCode::kCorruptData, file.name_, ": the header length is ", length, ", but only ",
                   rest, " bytes follow it");
    }
    const auto header = static_cast<std::size_t>(length);
    const std::string_view json(reinterpret_cast<const char*>(bytes.data()) + sizeof(length), header);
    const std::span<const std::byte> data = bytes.subspan(sizeof(length) + header);
    Result<detail::SafetensorsLayout> layout =
        detail::parse_safetensors_header(json, data.size(), file.name_);
    if (!layout.ok()) return layout.status();
    file.tensors_.reserve(layout->entries.size());
    for (detail::SafetensorsHeader::Entry& entry : layout->entries) {
      entry.tensor.data = data.subspan(static_cast<std::size_t>(entry.offsets[0]),
                                       static_cast<std::size_t>(entry.offsets[1] - entry.offsets[0]));
      file.tensors_.push_back(std::move(entry.tensor));
    }
    file.metadata_ = std::move(layout->metadata);
    return file;
  }

  [[nodiscard]] const std::string& name() const noexcept { return name_; }  ///< the file's name
  /// Sorted by name.
  [[nodiscard]] std::span<const SafetensorsTensor> tensors() const noexcept { return tensors_; }
  /// The texts under "__metadata__", sorted by key.
  [[nodiscard]] std::span<const SafetensorsText> metadata() const noexcept { return metadata_; }

  /// Null where there is none of that name.
  [[nodiscard]] const SafetensorsTensor* find(std::string_view name) const { return find_in(tensors_, name); }
  /// The text under that key of "__metadata__"; null where there is none.
  [[nodiscard]] const std::string* find_metadata(std::string_view key) const {
    const SafetensorsText* text = find_in(metadata_, key);
    return text != nullptr ? &text->value : nullptr;
  }

 private:
  template <class T>
  static const T* find_in(const std::vector<T>& sorted, std::string_view name) {
    const auto at =
        std::lower_bound(sorted.begin(), sorted.end(), name,
                         [](const T& item, std::string_view wanted) { return item.name < wanted; });
    return at != sorted.end() && at->name == name ? &*at : nullptr;
  }

  std::string name_;
  std::vector<SafetensorsTensor> tensors_;
  std::vector<SafetensorsText> metadata_;
  MappedFile file_;  // empty when parse() was given the bytes
};

}  // namespace codegemm
