// SPDX-License-Identifier: Apache-2.0
//
// codegemm/io/model_checkpoint.hpp - reads quantized models as the CodeGEMM and AQLM projects store them.
// Layer: io (host only).
//
// Both are a folder with config.json and safetensors, single or sharded. A linear layer NAME of N x K is
//                   CodeGEMM, config.json "codegemm"          AQLM, config.json "quantization_config"
//   NAME.codes      I32 [m][K / v / 4][N], 4 codes a word     I8 or I16 [N][K / v][m], wrapped to signed
//   NAME.codebooks  F16 [m][2^b][v]                           F16 [m][2^b][1][v]
//   NAME.scales     F16 [K / g][N]                            F16 [N][1][1][1], one a row
// and everything else is an ordinary tensor. One (v, m, b, g) holds for the whole model.
// See: https://github.com/naver-aics/codegemm, codegemm/inference/codegemm_linear.py and run_convert.py;
//      https://github.com/Vahe1994/AQLM, inference_lib/src/aqlm/inference.py and convert_to_hf.py.
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

#include <codegemm/base/numerics.hpp>
#include <codegemm/base/status.hpp>
#include <codegemm/format.hpp>
#include <codegemm/io/aqlm_codes.hpp>
#include <codegemm/io/checkpoint.hpp>
#include <codegemm/io/json_file.hpp>
#include <codegemm/io/safetensors_folder.hpp>
#include <codegemm/quantized_matrix.hpp>

namespace codegemm {

/// Whose format a model's files are in.
enum class CheckpointKind { kCodeGemm, kAqlm };

/// As it is printed, and named in config.json.
[[nodiscard]] constexpr std::string_view to_string(CheckpointKind kind) noexcept {
  return kind == CheckpointKind::kCodeGemm ? "CodeGEMM" : "AQLM";
}

namespace detail {

/// What a config.json says of its quantized layers.
struct QuantizedConfig {
  CheckpointKind kind = CheckpointKind::kCodeGemm;
  Format format;
};

[[nodiscard]] inline Result<QuantizedConfig> read_codegemm_config(const nlohmann::json& config) {
  QuantizedConfig out{CheckpointKind::kCodeGemm, {}};
  struct Field {
    const char* name;
    int* value;
  };
  for (const Field field : {Field{"vec_len", &out.format.v}, Field{"num_codebooks", &out.format.m},
                            Field{"nbits_per_codebook", &out.format.b}, Field{"group_size", &out.format.g}}) {
    const Result<std::int64_t> value = json_integer(config, field.name, 1, 1 << 30);
    if (!value.ok()) return value.status().with_prefix("codegemm");
    *field.value = static_cast<int>(*value);
  }
  if (out.format.b > 8) {
    return error(StatusCode::kUnsupported, "codegemm: nbits_per_codebook is ", out.format.b,
                 ", a word holds four codes of at most 8 bits");
  }
  if (Status status = validate(out.format); !status.ok())
    return Status(StatusCode::kUnsupported, concat("codegemm: ", status.message()));
  return out;
}

[[nodiscard]] inline Result<QuantizedConfig> read_aqlm_config(const nlohmann::json& config) {
  QuantizedConfig out{CheckpointKind::kAqlm, {}};
  const auto method = config.find("quant_method");
  if (method == config.end() || !method->is_string())
    return error(StatusCode::kCorruptData, "quantization_config: has no text 'quant_method'");
  const auto& name = method->get_ref<const std::string&>();
  if (name != "aqlm") {
    return error(StatusCode::kUnsupported, "quantization_config: quant_method is ", codegemm::quoted(name),
                 ", only 'aqlm' is read");
  }
  int out_group = 1;
  struct Field {
    const char* name;
    int* value;
  };
  for (const Field field :
       {Field{"in_group_size", &out.format.v}, Field{"num_codebooks", &out.format.m},
        Field{"nbits_per_codebook", &out.format.b}, Field{"out_group_size", &out_group}}) {
    const Result<std::int64_t> value = json_integer(config, field.name, 1, 1 << 30);
    if (!value.ok()) return value.status().with_prefix("quantization_config");
    *field.value = static_cast<int>(*value);
  }
  if (out_group != 1) {
    return error(StatusCode::kUnsupported, "quantization_config: out_group_size is ", out_group,
                 ", codes for one output at a time are read");
  }
  out.format.g = -1;
  if (Status status = validate(out.format); !status.ok())
    return Status(StatusCode::kUnsupported, concat("quantization_config: ", status.message()));
  return out;
}

[[nodiscard]] inline Result<QuantizedConfig> read_quantized_config(const nlohmann::json& config) {
  const auto ours = config.find("codegemm");
  const auto aqlm = config.find("quantization_config");
  const bool has_ours = ours != config.end() && !ours->is_null();
  const bool has_aqlm = aqlm != config.end() && !aqlm->is_null();
  if (has_ours && has_aqlm)
    return error(StatusCode::kCorruptData, "has both 'codegemm' and 'quantization_config'");
  if (!has_ours && !has_aqlm) {
    return error(StatusCode::kNotFound,
                 "has neither 'codegemm' nor 'quantization_config': is no quantized model");
  }
  const nlohmann::json& value = has_ours ? *ours : *aqlm;
  if (!value.is_object()) {
    return error(StatusCode::kCorruptData, has_ours ? "'codegemm'" : "'quantization_config'", " is of type ",
                 value.type_name(), ", must be an object");
  }
  return has_ours ? read_codegemm_config(value) : read_aqlm_config(value);
}

/// Values as fp16, bit for bit where they are, else only if fp16 holds each of them exactly. `out` has as
/// many elements as the tensor.
[[nodiscard]] inline Status copy_halves(const SafetensorsTensor& tensor, std::span<Half> out) {
  CODEGEMM_ASSERT(static_cast<std::size_t>(tensor.elements()) == out.size());
  if (tensor.dtype == Dtype::kF16) {
    if (!out.empty()) std::memcpy(out.data(), tensor.data.data(), out.size_bytes());
    return {};
  }
  for (std::size_t i = 0; i < out.size(); ++i) {
    float value = 0.0F;
    if (tensor.dtype == Dtype::kF32) {
      std::memcpy(&value, tensor.data.data() + i * sizeof(float), sizeof(float));
    } else {
      BFloat16 narrow;
      std::memcpy(&narrow, tensor.data.data() + i * sizeof(narrow), sizeof(narrow));
      value = narrow.to_float();
    }
    out[i] = Half::from_float(value);
    if (out[i].to_float() == value) continue;
    return error(StatusCode::kUnsupported, "tensor ", codegemm::quoted(tensor.name), " has the ",
                 to_string(tensor.dtype), " value ", value, " at ", i, ", which fp16 does not hold exactly");
  }
  return {};
}

}  // namespace detail

/// An opened model folder, memory-mapped: every quantized layer is known to have its tensors, of the right
/// types and shapes.
class ModelCheckpoint {
 public:
  /// kNotFound for a folder that holds no quantized model; kUnsupported for a format that the canonical
  /// layout does not have; kCorruptData with the file, the tensor and the numbers where they contradict one
  /// another; errors of SafetensorsFolder::open.
  [[nodiscard]] static Result<ModelCheckpoint> open(const std::string& folder) {
    Result<MappedFile> file = open_json_file(folder + "/config.json");
    if (!file.ok()) return file.status();
    Result<nlohmann::json> config = parse_json_object(text_of(*file), file->path());
    if (!config.ok()) return config.status();
    // Before the tensors: a folder whose config says that it is no quantized model needs no look at them.
    if (const auto read = detail::read_quantized_config(*config); !read.ok())
      return read.status().with_prefix(file->path());
    Result<SafetensorsFolder> files = SafetensorsFolder::open(folder);
    if (!files.ok()) return files.status();
    return from(*std::move(files), *std::move(config));
  }

  /// From files and a config that have been parsed.
  [[nodiscard]] static Result<ModelCheckpoint> from(SafetensorsFolder files, nlohmann::json config) {
    const Result<detail::QuantizedConfig> read = detail::read_quantized_config(config);
    if (!read.ok()) return read.status().with_prefix(files.path());
    ModelCheckpoint out(std::move(files), std::move(config), read->kind, read->format);
    if (Status status = out.index(); !status.ok()) return status;
    return out;
  }

  [[nodiscard]] const std::string& path() const noexcept { return files_.path(); }  ///< the folder
  [[nodiscard]] CheckpointKind kind() const noexcept { return kind_; }  ///< whose format the files are in
  [[nodiscard]] Format format() const noexcept { return format_; }      ///< how the layers are quantized
  /// The whole of config.json.
  [[nodiscard]] const nlohmann::json& config() const noexcept { return config_; }
  /// All tensors, those of the quantized layers among them.
  [[nodiscard]] const SafetensorsFolder& files() const noexcept { return files_; }
  /// The quantized layers, sorted by name.
  [[nodiscard]] std::span<const CheckpointEntry> entries() const noexcept { return entries_; }
  /// Null where there is none of that name.
  [[nodiscard]] const CheckpointEntry* find(std::string_view name) const {
    return detail::find_entry(entries_, name);
  }
  /// The tensors that belong to no quantized layer, sorted by name. Their data live as long as this object.
  [[nodiscard]] std::vector<SafetensorsTensor> plain_tensors() const {
    std::vector<SafetensorsTensor> out;
    for (const auto& [name, entry] : files_.tensors()) {
      const std::size_t dot = name.rfind('.');
      const std::string_view ending = std::string_view(name).substr(dot == std::string::npos ? 0 : dot);
      const bool part = ending == ".codes" || ending == ".codebooks" || ending == ".scales";
      if (!part || find(std::string_view(name).substr(0, dot)) == nullptr) out.push_back(*entry.tensor);
    }
    return out;
  }

  /// Copies a layer out and checks its codes. kNotFound, kOutOfMemory, kCorruptData; kUnsupported for values
  /// in bf16 or fp32 that fp16 does not hold.
  [[nodiscard]] Result<QuantizedMatrix> load(std::string_view name) const {
    const CheckpointEntry* entry = find(name);
    if (entry == nullptr) {
      return error(StatusCode::kNotFound, path(), ": layer ", codegemm::quoted(name), " is missing");
    }
    Result<QuantizedMatrix> matrix = QuantizedMatrix::create(entry->format, entry->rows, entry->cols);
    if (!matrix.ok()) return matrix.status().with_prefix(path());
    const std::span<const std::byte> codes = part(*entry, ".codes").data;
    if (kind_ == CheckpointKind::kCodeGemm) {
      CODEGEMM_ASSERT(codes.size() == matrix->codes().size_bytes());
      if (!codes.empty()) std::memcpy(matrix->codes().data(), codes.data(), codes.size());
    } else if (format_.stored_code_bits() == 8) {
      detail::unpack_aqlm_codes<std::int8_t>(codes, *matrix);
    } else {
      detail::unpack_aqlm_codes<std::int16_t>(codes, *matrix);
    }
    Status status = detail::copy_halves(part(*entry, ".codebooks"), matrix->codebooks());
    if (status.ok()) status = detail::copy_halves(part(*entry, ".scales"), matrix->scales());
    if (status.ok()) status = matrix->validate();
    if (!status.ok()) return status.with_prefix(concat(path(), ": ", codegemm::quoted(name)));
    return matrix;
  }

 private:
  ModelCheckpoint(SafetensorsFolder files, nlohmann::json config, CheckpointKind kind, Format format)
      : files_(std::move(files)), config_(std::move(config)), kind_(kind), format_(format) {}

  [[nodiscard]] const SafetensorsTensor& part(const CheckpointEntry& entry, std::string_view ending) const {
    const SafetensorsFolder::Entry* found = files_.find(concat(entry.name, ending));
    CODEGEMM_ASSERT(found != nullptr);
    return *found->tensor;
  }

  Status index() {
    constexpr std::string_view kCodes = ".codes";
    for (const auto& [name, found] : files_.tensors()) {  // in the order of the names
      if (name.size() <= kCodes.size() || !std::string_view(name).ends_with(kCodes)) continue;
      CheckpointEntry entry;
      entry.name = name.substr(0, name.size() - kCodes.size());
      entry.format = format_;
      if (Status status = read_entry(*found.tensor, entry); !status.ok())
        return status.with_prefix(concat(path(), ": layer ", codegemm::quoted(entry.name)));
      entries_.push_back(std::move(entry));
    }
    // "a.codes" and "a-b.codes" sort by '.' and '-', "a" and "a-b" by their ends.
    std::sort(entries_.begin(), entries_.end(),
              [](const CheckpointEntry& a, const CheckpointEntry& b) { return a.name < b.name; });
    return {};
  }

  /// The shape from the codes, then everything else against it.
  Status read_entry(const SafetensorsTensor& codes, CheckpointEntry& entry) const {
    const Format f = format_;
    const bool ours = kind_ == CheckpointKind::kCodeGemm;
    if (codes.shape.size() != 3) {
      return error(StatusCode::kCorruptData, "codes have shape ", shape_text(codes.shape),
                   ", must have three dimensions");
    }
    entry.rows = ours ? codes.shape[2] : codes.shape[0];
    // A hostile file may give a dimension near 2^63 where another one is 0.
    if (!detail::checked_multiply(codes.shape[1], ours ? 4 * f.v : f.v, entry.cols)) {
      return error(StatusCode::kCorruptData, "codes have shape ", shape_text(codes.shape), ", too large");
    }
    if (const auto sizes = canonical_sizes(f, entry.rows, entry.cols); !sizes.ok())
      return Status(StatusCode::kCorruptData, sizes.status().message());
    if (ours && entry.cols % f.g != 0) {
      return error(StatusCode::kCorruptData, entry.cols, " columns are not a multiple of group_size ", f.g);
    }
    using Shape = std::vector<std::int64_t>;
    const Dtype code_type = ours ? Dtype::kI32 : f.stored_code_bits() == 8 ? Dtype::kI8 : Dtype::kI16;
    const Shape code_shape =
        ours ? Shape{f.m, entry.cols / f.v / 4, entry.rows} : Shape{entry.rows, entry.cols / f.v, f.m};
    if (codes.dtype != code_type || codes.shape != code_shape) {
      return error(StatusCode::kCorruptData, "codes are ", to_string(codes.dtype), " ",
                   shape_text(codes.shape), ", must be ", to_string(code_type), " ", shape_text(code_shape));
    }
    const Shape book_shape = ours ? Shape{f.m, f.centroids(), f.v} : Shape{f.m, f.centroids(), 1, f.v};
    const Shape scale_shape = ours ? Shape{entry.cols / f.g, entry.rows} : Shape{entry.rows, 1, 1, 1};
    if (Status status = check_part(entry, ".codebooks", book_shape); !status.ok()) return status;
    return check_part(entry, ".scales", scale_shape);
  }

  Status check_part(const CheckpointEntry& entry, std::string_view ending,
                    const std::vector<std::int64_t>& shape) const {
    const SafetensorsFolder::Entry* found = files_.find(concat(entry.name, ending));
    if (found == nullptr) return error(StatusCode::kCorruptData, "has no tensor '", ending.substr(1), "'");
    const SafetensorsTensor& tensor = *found->tensor;
    if (tensor.dtype != Dtype::kF16 && tensor.dtype != Dtype::kBF16 && tensor.dtype != Dtype::kF32) {
      return error(StatusCode::kUnsupported, ending.substr(1), " are ", to_string(tensor.dtype),
                   ", read are F16, BF16, F32");
    }
    if (tensor.shape == shape) return {};
    return error(StatusCode::kCorruptData, ending.substr(1), " have shape ", shape_text(tensor.shape),
                 ", must be ", shape_text(shape), " for ", to_string(kind_), " of ", entry.rows, " x ",
                 entry.cols);
  }

  SafetensorsFolder files_;
  nlohmann::json config_;
  CheckpointKind kind_;
  Format format_;
  std::vector<CheckpointEntry> entries_;
};

}  // namespace codegemm
