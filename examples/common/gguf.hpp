// SPDX-License-Identifier: Apache-2.0
//
// common/gguf.hpp - reads GGUF model files, versions 2 and 3, little-endian.
// Layer: examples (host only).
//
// The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every byte is taken for hostile: no
// count, length, offset or dimension is used before it is known to fit into the file.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <codegemm/base/quoted.hpp>
#include <codegemm/base/status.hpp>
#include <codegemm/io/mapped_file.hpp>
#include <common/ggml_types.hpp>
#include <common/gguf_value.hpp>

namespace prefillshare::examples {

using codegemm::Result;

/// A tensor of a GGUF file. dims[0] varies fastest: a matrix of R rows of C is {C, R}. Unused dims are 1.
struct GgufTensor {
  static constexpr int kMostDims = 4;

  std::string_view name;
  const GgmlTypeInfo* type = nullptr;  // never null, its size is known
  int rank = 0;
  std::array<std::int64_t, kMostDims> dims{1, 1, 1, 1};  // each at least 1
  std::uint64_t offset = 0;                              // of the data in the file
  std::span<const std::byte> data;

  [[nodiscard]] std::int64_t row_elements() const noexcept { return dims[0]; }
  [[nodiscard]] std::int64_t rows() const noexcept { return dims[1] * dims[2] * dims[3]; }
};

/// A parsed GGUF file. Names, strings and data are views into the file's bytes: no tensor is copied. The
/// views live as long as this object where open() made it, else as long as the bytes given to parse().
class GgufFile {
 public:
  /// Maps and parses a file. Errors of MappedFile::open and of parse.
  [[nodiscard]] static Result<GgufFile> open(std::string path);

  /// Parses bytes that stay with the caller; `name` is for messages. kCorruptData with the field and the
  /// numbers where the bytes contradict the format, kUnsupported for a version, byte order or tensor type not
  /// read here.
  [[nodiscard]] static Result<GgufFile> parse(std::span<const std::byte> bytes, std::string name);

  [[nodiscard]] const std::string& name() const noexcept { return name_; }
  [[nodiscard]] std::uint32_t version() const noexcept { return version_; }
  [[nodiscard]] std::uint64_t alignment() const noexcept { return alignment_; }
  [[nodiscard]] std::span<const GgufEntry> metadata() const noexcept { return metadata_; }
  [[nodiscard]] std::span<const GgufTensor> tensors() const noexcept { return tensors_; }

  /// Null where there is none of that name.
  [[nodiscard]] const GgufValue* find(std::string_view key) const {
    const GgufEntry* entry = find_by_name(metadata_, metadata_order_, key);
    return entry != nullptr ? &entry->value : nullptr;
  }
  [[nodiscard]] const GgufTensor* find_tensor(std::string_view name) const {
    return find_by_name(tensors_, tensor_order_, name);
  }

  // A metadata value of the wanted kind: kNotFound where the key is missing, kCorruptData where it is of
  // another.
  [[nodiscard]] Result<bool> boolean(std::string_view key) const {
    return get(key, "a bool", [](const GgufValue& value) { return value.as_bool(); });
  }
  [[nodiscard]] Result<std::int64_t> integer(std::string_view key) const {
    return get(key, "an integer below 2^63", [](const GgufValue& value) { return value.as_integer(); });
  }
  [[nodiscard]] Result<double> number(std::string_view key) const {
    return get(key, "a number", [](const GgufValue& value) { return value.as_number(); });
  }
  [[nodiscard]] Result<std::string_view> string(std::string_view key) const {
    return get(key, "a string", [](const GgufValue& value) { return value.as_string(); });
  }
  [[nodiscard]] Result<std::vector<std::string_view>> strings(std::string_view key) const {
    return get(key, "an array of strings", [](const GgufValue& value) { return value.as_strings(); });
  }
  [[nodiscard]] Result<std::vector<std::int64_t>> integers(std::string_view key) const {
    return get(key, "an array of integers below 2^63",
               [](const GgufValue& value) { return value.as_integers(); });
  }
  [[nodiscard]] Result<std::vector<float>> numbers(std::string_view key) const {
    return get(key, "an array of numbers", [](const GgufValue& value) { return value.as_numbers(); });
  }

  /// Rows [first, first + count) of a tensor of this file as fp32 into out[count][row_elements()].
  [[nodiscard]] Status read_rows(const GgufTensor& tensor, std::int64_t first, std::int64_t count,
                                 float* out) const;

 private:
  class Parser;

  template <class T>
  static const T* find_by_name(const std::vector<T>& items, const std::vector<std::size_t>& order,
                               std::string_view name) {
    const auto at =
        std::lower_bound(order.begin(), order.end(), name,
                         [&](std::size_t i, std::string_view wanted) { return items[i].name < wanted; });
    return at != order.end() && items[*at].name == name ? &items[*at] : nullptr;
  }

  template <class Convert>
  auto get(std::string_view key, const char* wanted, const Convert& convert) const
      -> Result<typename decltype(convert(std::declval<const GgufValue&>()))::value_type> {
    const GgufValue* value = find(key);
    if (value == nullptr) {
      return error(StatusCode::kNotFound, name_, ": metadata ", codegemm::quoted(key), " is missing");
    }
    auto converted = convert(*value);
    if (!converted.has_value()) {
      return error(StatusCode::kCorruptData, name_, ": metadata ", codegemm::quoted(key), " is ",
                   value->describe(), ", expected ", wanted);
    }
    return *std::move(converted);
  }

  std::string name_;
  std::uint32_t version_ = 0;
  std::uint64_t alignment_ = 32;
  std::vector<GgufEntry> metadata_;
  std::vector<GgufTensor> tensors_;
  std::vector<std::size_t> metadata_order_;  // indices by name
  std::vector<std::size_t> tensor_order_;
  codegemm::MappedFile file_;  // empty when parse() was given the bytes
};

/// Builds a GgufFile. Each step returns false once status() says why.
class GgufFile::Parser {
 public:
  Parser(std::span<const std::byte> bytes, GgufFile& file) : cursor_(bytes, file.name_), file_(file) {}

  Status run() {
    if (header() && metadata() && tensor_infos() && place_tensors()) return {};
    return cursor_.status();
  }

 private:
  bool header() {
    std::uint32_t magic = 0;
    if (!cursor_.read(magic, "the magic 'GGUF'") || !cursor_.read(file_.version_, "the version"))
      return false;
    if (magic != kMagic) {
      return cursor_.fail(StatusCode::kCorruptData, "not a GGUF file: it does not start with 'GGUF'");
    }
    // A big-endian file has its small version number in the upper half.
    if ((file_.version_ & 0xFFFFU) == 0 && file_.version_ != 0) {
      return cursor_.fail(StatusCode::kUnsupported, "big-endian GGUF is not read (version field ",
                          file_.version_, ")");
    }
    if (file_.version_ < 2 || file_.version_ > 3) {
      return cursor_.fail(StatusCode::kUnsupported, "GGUF version is ", file_.version_,
                          ", only 2 and 3 are read");
    }
    if (!cursor_.read(tensor_count_, "the tensor count") ||
        !cursor_.read(entry_count_, "the metadata count")) {
      return false;
    }
    return cursor_.fits(entry_count_, kLeastEntryBytes, "the metadata count") &&
           cursor_.fits(tensor_count_, kLeastTensorBytes, "the tensor count");
  }

  bool metadata() {
    for (std::uint64_t i = 0; i < entry_count_; ++i) {
      GgufEntry entry;
      cursor_.set_subject("metadata number", i);
      if (!cursor_.read_string(entry.name, "the key")) return false;
      cursor_.set_subject("metadata", entry.name);
      std::uint32_t type = 0;
      if (!cursor_.read(type, "the value's type")) return false;
      if (!cursor_.read_value(type, entry.value)) return false;
      file_.metadata_.push_back(entry);
    }
    cursor_.set_subject({});
    if (!sort_names(file_.metadata_, file_.metadata_order_, "metadata")) return false;
    if (const GgufValue* value = file_.find("general.alignment"); value != nullptr) {
      const std::optional<std::int64_t> alignment = value->as_integer();
      if (!alignment.has_value() || *alignment < 1 ||
          *alignment > std::numeric_limits<std::uint32_t>::max() ||
          !std::has_single_bit(static_cast<std::uint64_t>(*alignment))) {
        return cursor_.fail(StatusCode::kCorruptData, "metadata 'general.alignment' is ", value->describe(),
                            ", must be a power of two below 2^32");
      }
      file_.alignment_ = static_cast<std::uint64_t>(*alignment);
    }
    return true;
  }

  bool tensor_infos() {
    for (std::uint64_t i = 0; i < tensor_count_; ++i) {
      GgufTensor tensor;
      cursor_.set_subject("tensor number", i);
      if (!cursor_.read_string(tensor.name, "the name")) return false;
      cursor_.set_subject("tensor", tensor.name);
      std::uint32_t rank = 0;
      if (!cursor_.read(rank, "the number of dimensions")) return false;
      if (rank > GgufTensor::kMostDims) {
        return cursor_.fail(StatusCode::kCorruptData, "has ", rank, " dimensions, at most ",
                            GgufTensor::kMostDims, " are allowed");
      }
      tensor.rank = static_cast<int>(rank);
      std::int64_t elements = 1;
      for (std::uint32_t d = 0; d < rank; ++d) {
        std::uint64_t dim = 0;
        if (!cursor_.read(dim, "a dimension")) return false;
        if (dim == 0 || dim > static_cast<std::uint64_t>(kMostElements / elements)) {
          return cursor_.fail(StatusCode::kCorruptData, "dimension ", d, " is ", dim,
                              dim == 0 ? ", must be at least 1" : ", which gives more than 2^62 elements");
        }
        tensor.dims[d] = static_cast<std::int64_t>(dim);
        elements *= tensor.dims[d];
      }
      std::uint32_t type = 0;
      if (!cursor_.read(type, "the type") || !cursor_.read(tensor.offset, "the offset")) return false;
      tensor.type = find_ggml_type(type);
      if (tensor.type == nullptr) {
        return cursor_.fail(StatusCode::kUnsupported, "has the unknown type number ", type, ", known are 0..",
                            std::size(kGgmlTypes) - 1);
      }
      if (tensor.type->block_bytes == 0) {
        return cursor_.fail(StatusCode::kUnsupported, "has type ", type, " (", tensor.type->name,
                            "), which ggml has removed");
      }
      if (tensor.dims[0] % tensor.type->block_elements != 0) {
        return cursor_.fail(StatusCode::kCorruptData, "has rows of ", tensor.dims[0],
                            " elements, not a multiple of ", tensor.type->block_elements, " as its type ",
                            tensor.type->name, " needs");
      }
      if (tensor.offset % file_.alignment_ != 0) {
        return cursor_.fail(StatusCode::kCorruptData, "has offset ", tensor.offset,
                            ", not a multiple of the alignment ", file_.alignment_);
      }
      file_.tensors_.push_back(tensor);
    }
    cursor_.set_subject({});
    return sort_names(file_.tensors_, file_.tensor_order_, "tensor");
  }

  /// Offsets count from the end of the header, rounded up to the alignment.
  bool place_tensors() {
    const std::span<const std::byte> bytes = cursor_.bytes();
    const std::uint64_t start = (cursor_.position() + file_.alignment_ - 1) & ~(file_.alignment_ - 1);
    for (GgufTensor& tensor : file_.tensors_) {
      const std::uint64_t room = start <= bytes.size() ? bytes.size() - start : 0;
      const auto blocks =
          static_cast<std::uint64_t>(tensor.row_elements() / tensor.type->block_elements * tensor.rows());
      const auto block_bytes = static_cast<std::uint64_t>(tensor.type->block_bytes);
      if (tensor.offset > room || blocks > (room - tensor.offset) / block_bytes) {
        return cursor_.fail(StatusCode::kCorruptData, "tensor ", codegemm::quoted(tensor.name), ": ", blocks,
                            " blocks of ", block_bytes, " bytes at offset ", tensor.offset,
                            " of the tensor data do not fit: the data start at byte ", start, " of ",
                            bytes.size());
      }
      tensor.offset += start;
      tensor.data = bytes.subspan(static_cast<std::size_t>(tensor.offset),
                                  static_cast<std::size_t>(blocks * block_bytes));
    }
    // No known writer shares data between tensors; two that overlap are a sign of a damaged header.
    std::vector<const GgufTensor*> order;
    order.reserve(file_.tensors_.size());
    for (const GgufTensor& tensor : file_.tensors_) order.push_back(&tensor);
    std::sort(order.begin(), order.end(),
              [](const GgufTensor* a, const GgufTensor* b) { return a->offset < b->offset; });
    for (std::size_t i = 1; i < order.size(); ++i) {
      const GgufTensor& before = *order[i - 1];
      if (before.offset + before.data.size() > order[i]->offset) {
        return cursor_.fail(StatusCode::kCorruptData, "tensors ", codegemm::quoted(before.name), " (bytes ",
                            before.offset, "..", before.offset + before.data.size(), ") and ",
                            codegemm::quoted(order[i]->name), " (from byte ", order[i]->offset, ") overlap");
      }
    }
    return true;
  }

  template <class T>
  bool sort_names(const std::vector<T>& items, std::vector<std::size_t>& order, const char* what) {
    order.resize(items.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::sort(order.begin(), order.end(),
              [&](std::size_t a, std::size_t b) { return items[a].name < items[b].name; });
    for (std::size_t i = 1; i < order.size(); ++i) {
      const std::string_view name = items[order[i]].name;
      if (items[order[i - 1]].name == name) {
        return cursor_.fail(StatusCode::kCorruptData, what, " ", codegemm::quoted(name), " is there twice");
      }
    }
    return true;
  }

  static constexpr std::uint32_t kMagic = 0x46554747;  // "GGUF"
  static constexpr std::uint64_t kLeastEntryBytes = 8 + 4 + 1;
  static constexpr std::uint64_t kLeastTensorBytes = 8 + 4 + 4 + 8;
  static constexpr std::int64_t kMostElements = std::int64_t{1} << 62;

  GgufCursor cursor_;
  GgufFile& file_;
  std::uint64_t tensor_count_ = 0;
  std::uint64_t entry_count_ = 0;
};

inline Result<GgufFile> GgufFile::parse(std::span<const std::byte> bytes, std::string name) {
  GgufFile file;
  file.name_ = std::move(name);
  if (Status status = Parser(bytes, file).run(); !status.ok()) return status;
  return file;
}

inline Result<GgufFile> GgufFile::open(std::string path) {
  Result<codegemm::MappedFile> mapped = codegemm::MappedFile::open(std::move(path));
  if (!mapped.ok()) return mapped.status();
  Result<GgufFile> file = parse(mapped->bytes(), mapped->path());
  if (file.ok()) file->file_ = *std::move(mapped);
  return file;
}

inline Status GgufFile::read_rows(const GgufTensor& tensor, std::int64_t first, std::int64_t count,
                                  float* out) const {
  if (first < 0 || count < 0 || first > tensor.rows() || count > tensor.rows() - first) {
    return error(StatusCode::kInvalidArgument, name_, ": tensor ", codegemm::quoted(tensor.name), " has ",
                 tensor.rows(), " rows, asked for ", count, " from row ", first);
  }
  if (tensor.type->dequantize == nullptr) {
    return error(StatusCode::kUnsupported, name_, ": tensor ", codegemm::quoted(tensor.name), " has type ",
                 tensor.type->number, " (", tensor.type->name, "), converted to fp32 are ",
                 convertible_ggml_types());
  }
  const std::int64_t blocks = tensor.row_elements() / tensor.type->block_elements;  // of one row
  const std::byte* from =
      tensor.data.data() + static_cast<std::size_t>(first * blocks * tensor.type->block_bytes);
  tensor.type->dequantize(from, count * blocks, out);
  return {};
}

}  // namespace prefillshare::examples
