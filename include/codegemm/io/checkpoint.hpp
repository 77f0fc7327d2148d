// SPDX-License-Identifier: Apache-2.0
//
// codegemm/io/checkpoint.hpp - quantized matrices in a safetensors file.
// Layer: io (host only).
//
// A matrix NAME of format (v, m, b, g), N rows and K columns is three tensors in the canonical layout:
//   NAME.codes      I32 [m][ceil((K / v) / codes_per_word)][N]
//   NAME.codebooks  F16 [m][2^b][v]
//   NAME.scales     F16 [ceil(K / g)][N]
// and an entry in the JSON text that __metadata__ has under "codegemm":
//   {"version": 1, "matrices": {"NAME": {"format": "m1v4g128", "rows": N, "cols": K}, ...}}
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <codegemm/base/quoted.hpp>
#include <codegemm/base/status.hpp>
#include <codegemm/format.hpp>
#include <codegemm/io/safetensors.hpp>
#include <codegemm/io/safetensors_writer.hpp>
#include <codegemm/quantized_matrix.hpp>

namespace codegemm {

/// Of the metadata that describe the matrices.
inline constexpr std::string_view kCheckpointKey = "codegemm";
inline constexpr std::int64_t kCheckpointVersion = 1;  ///< of those metadata

/// A matrix to be saved. The view's memory must last as long as the call.
struct NamedMatrix {
  std::string name;            ///< what its tensors' names begin with
  QuantizedMatrixView matrix;  ///< the weights, in the caller's memory
};

/// What a checkpoint says of one of its matrices.
struct CheckpointEntry {
  std::string name;       ///< what its tensors' names begin with
  Format format;          ///< how it is quantized
  std::int64_t rows = 0;  ///< N
  std::int64_t cols = 0;  ///< K
};

namespace detail {

/// Null where there is none of that name; `entries` are sorted by name.
[[nodiscard]] inline const CheckpointEntry* find_entry(std::span<const CheckpointEntry> entries,
                                                       std::string_view name) {
  const auto at =
      std::lower_bound(entries.begin(), entries.end(), name,
                       [](const CheckpointEntry& e, std::string_view wanted) { return e.name < wanted; });
  return at != entries.end() && at->name == name ? &*at : nullptr;
}
/// The three tensors of a matrix, without data.
inline void checkpoint_tensors(const CheckpointEntry& entry, SafetensorsTensor (&tensors)[3]) {
  const Format f = entry.format;
  const std::int64_t words = (entry.cols / f.v + f.codes_per_word() - 1) / f.codes_per_word();
  tensors[0] = {entry.name + ".codes", Dtype::kI32, {f.m, words, entry.rows}, {}};
  tensors[1] = {entry.name + ".codebooks", Dtype::kF16, {f.m, f.centroids(), f.v}, {}};
  tensors[2] = {entry.name + ".scales", Dtype::kF16, {f.scale_groups(entry.cols), entry.rows}, {}};
}

}  // namespace detail

/// Writes a checkpoint, whole or not at all. `metadata` goes along (the reader's file().find_metadata()); it
/// may not use the key "codegemm". kInvalidArgument or kCorruptData for a matrix that validate() refuses,
/// else the errors of write_safetensors().
[[nodiscard]] inline Status save_checkpoint(std::string path, std::span<const NamedMatrix> matrices,
                                            std::span<const SafetensorsText> metadata = {}) {
  std::vector<SafetensorsTensor> tensors;
  std::string description = concat("{\"version\":", kCheckpointVersion, ",\"matrices\":{");
  for (const NamedMatrix& named : matrices) {
    const QuantizedMatrixView& w = named.matrix;
    if (Status status = validate(w); !status.ok())
      return status.with_prefix(concat(path, ": ", codegemm::quoted(named.name)));
    const CheckpointEntry entry{named.name, w.format, w.rows, w.cols};
    if (&named != matrices.data()) description += ',';
    detail::append_json(description, entry.name);
    description += concat(":{\"format\":\"", format_name(entry.format), "\",\"rows\":", entry.rows,
                          ",\"cols\":", entry.cols, "}");

    SafetensorsTensor parts[3];
    detail::checkpoint_tensors(entry, parts);
    const void* const data[3] = {w.codes, w.codebooks, w.scales};
    for (int i = 0; i < 3; ++i) {
      std::uint64_t bytes = 0;
      if (!shape_bytes(parts[i].shape, parts[i].dtype, bytes)) {
        return error(StatusCode::kInvalidArgument, path, ": ", codegemm::quoted(parts[i].name),
                     " is too large");
      }
      parts[i].data = {static_cast<const std::byte*>(data[i]), static_cast<std::size_t>(bytes)};
      tensors.push_back(std::move(parts[i]));
    }
  }
  description += "}}";
  std::vector<SafetensorsText> texts(metadata.begin(), metadata.end());
  texts.push_back({std::string(kCheckpointKey), std::move(description)});
  return write_safetensors(std::move(path), tensors, texts);
}

/// An opened checkpoint: every matrix is known to have its tensors, of the right types and shapes.
class Checkpoint {
 public:
  /// Maps a file. Errors of SafetensorsFile::open and of from().
  [[nodiscard]] static Result<Checkpoint> open(std::string path) {
    Result<SafetensorsFile> file = SafetensorsFile::open(std::move(path));
    if (!file.ok()) return file.status();
    return from(*std::move(file));
  }

  /// kCorruptData with the matrix, the field and the numbers where the file contradicts itself, kUnsupported
  /// for another version.
  [[nodiscard]] static Result<Checkpoint> from(SafetensorsFile file) {
    Checkpoint checkpoint(std::move(file));
    if (Status status = checkpoint.read_description(); !status.ok())
      return status.with_prefix(checkpoint.file_.name());
    return checkpoint;
  }

  /// Sorted by name.
  [[nodiscard]] std::span<const CheckpointEntry> entries() const noexcept { return entries_; }
  /// Null where there is none of that name.
  [[nodiscard]] const CheckpointEntry* find(std::string_view name) const {
    return detail::find_entry(entries_, name);
  }
  /// The file with all its tensors, also those that belong to no matrix, and its metadata.
  [[nodiscard]] const SafetensorsFile& file() const noexcept { return file_; }

  /// Copies a matrix out and checks its codes. kNotFound, kOutOfMemory, kCorruptData.
  [[nodiscard]] Result<QuantizedMatrix> load(std::string_view name) const {
    const CheckpointEntry* entry = find(name);
    if (entry == nullptr) {
      return error(StatusCode::kNotFound, file_.name(), ": matrix ", codegemm::quoted(name), " is missing");
    }
    Result<QuantizedMatrix> matrix = QuantizedMatrix::create(entry->format, entry->rows, entry->cols);
    if (!matrix.ok()) return matrix.status().with_prefix(file_.name());
    copy(entry->name + ".codes", matrix->codes());
    copy(entry->name + ".codebooks", matrix->codebooks());
    copy(entry->name + ".scales", matrix->scales());
    if (Status status = matrix->validate(); !status.ok()) {
      return status.with_prefix(concat(file_.name(), ": ", codegemm::quoted(name)));
    }
    return matrix;
  }

 private:
  using Json = nlohmann::json;
  static constexpr std::size_t kMostDescriptionBytes = std::size_t{16} << 20;

  explicit Checkpoint(SafetensorsFile file) : file_(std::move(file)) {}

  template <class T>
  void copy(const std::string& name, std::span<T> out) const {
    const SafetensorsTensor* tensor = file_.find(name);
    CODEGEMM_ASSERT(tensor != nullptr && tensor->data.size() == out.size_bytes());
    if (!out.empty()) std::memcpy(out.data(), tensor->data.data(), out.size_bytes());
  }

  /// Null where `object` has no such member or it is no T.
  template <class T>
  static const T* member(const Json::object_t& object, const char* name) {
    const auto at = object.find(name);
    return at != object.end() ? at->second.template get_ptr<const T*>() : nullptr;
  }

  Status read_description() {
    const std::string* text = file_.find_metadata(kCheckpointKey);
    if (text == nullptr) {
      return error(StatusCode::kCorruptData, "is no CodeGEMM checkpoint: no '", kCheckpointKey,
                   "' in __metadata__");
    }
    if (text->size() > kMostDescriptionBytes) {
      return error(StatusCode::kCorruptData, "metadata '", kCheckpointKey, "' has ", text->size(),
                   " bytes, at most ", kMostDescriptionBytes, " are allowed");
    }
    const Json json = Json::parse(*text, nullptr, false);
    const auto* root = json.get_ptr<const Json::object_t*>();
    if (root == nullptr)
      return error(StatusCode::kCorruptData, "metadata '", kCheckpointKey, "' is no JSON object");
    const auto* version = member<Json::number_unsigned_t>(*root, "version");
    if (version == nullptr)
      return error(StatusCode::kCorruptData, "metadata '", kCheckpointKey, "' has no 'version'");
    if (*version != static_cast<std::uint64_t>(kCheckpointVersion)) {
      return error(StatusCode::kUnsupported, "checkpoint version is ", *version, ", only ",
                   kCheckpointVersion, " is read");
    }
    const auto* matrices = member<Json::object_t>(*root, "matrices");
    if (matrices == nullptr)
      return error(StatusCode::kCorruptData, "metadata '", kCheckpointKey, "' has no 'matrices'");
    entries_.reserve(matrices->size());
    for (const auto& [name, value] : *matrices) {  // in the order of the names
      CheckpointEntry entry;
      entry.name = name;
      if (Status status = read_entry(value, entry); !status.ok()) {
        return status.with_prefix(concat("matrix ", codegemm::quoted(name)));
      }
      entries_.push_back(std::move(entry));
    }
    return {};
  }

  Status read_entry(const Json& value, CheckpointEntry& entry) const {
    const auto* fields = value.get_ptr<const Json::object_t*>();
    if (fields == nullptr)
      return error(StatusCode::kCorruptData, "is of type ", value.type_name(), ", must be an object");
    const auto* format = member<Json::string_t>(*fields, "format");
    if (format == nullptr) return error(StatusCode::kCorruptData, "has no text 'format'");
    const Result<Format> parsed = parse_format(*format);
    if (!parsed.ok()) return parsed.status();
    entry.format = *parsed;
    for (const auto& [name, out] : {std::pair{"rows", &entry.rows}, std::pair{"cols", &entry.cols}}) {
      const auto* number = member<Json::number_unsigned_t>(*fields, name);
      if (number == nullptr)
        return error(StatusCode::kCorruptData, "has no number '", name, "' of at least 0");
      if (*number > static_cast<std::uint64_t>(INT64_MAX)) {
        return error(StatusCode::kCorruptData, "'", name, "' is ", *number, ", must be below 2^63");
      }
      *out = static_cast<std::int64_t>(*number);
    }
    // Refuses shapes whose sizes would overflow, before anything is computed from them.
    const Result<CanonicalSizes> sizes = canonical_sizes(entry.format, entry.rows, entry.cols);
    if (!sizes.ok()) return Status(StatusCode::kCorruptData, sizes.status().message());

    SafetensorsTensor expected[3];
    detail::checkpoint_tensors(entry, expected);
    for (const SafetensorsTensor& want : expected) {
      const SafetensorsTensor* got = file_.find(want.name);
      if (got == nullptr)
        return error(StatusCode::kCorruptData, "tensor ", codegemm::quoted(want.name), " is missing");
      if (got->dtype != want.dtype || got->shape != want.shape) {
        return error(StatusCode::kCorruptData, "tensor ", codegemm::quoted(want.name), " is ",
                     to_string(got->dtype), " ", shape_text(got->shape), ", must be ", to_string(want.dtype),
                     " ", shape_text(want.shape), " for ", format_name(entry.format), " of ", entry.rows,
                     " x ", entry.cols);
      }
    }
    return {};
  }

  SafetensorsFile file_;
  std::vector<CheckpointEntry> entries_;
};

}  // namespace codegemm
