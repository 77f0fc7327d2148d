// SPDX-License-Identifier: Apache-2.0
//
// common/model_writer.hpp - writes a quantized model folder: quantized layers, the other tensors in fp16, the
// config and the tokenizer's files.
// Layer: examples (host only).
#pragma once

#include <cmath>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <map>
#include <set>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <codegemm/io/model_checkpoint_writer.hpp>
#include <common/config_json_writer.hpp>
#include <common/tensor_source.hpp>
#include <prefillshare/model/dense_linear.hpp>
#include <prefillshare/model/llama.hpp>

namespace prefillshare::examples {

/// Values in place of a source's tensors, by name.
using ReplacedTensors = std::map<std::string, std::vector<float>>;

namespace detail {

/// A tensor as fp16, or as fp32 where fp16 cannot hold one of its values.
[[nodiscard]] inline Result<codegemm::SafetensorsTensor> narrow_tensor(
    const TensorSource& source, const std::string& name, const ReplacedTensors& replaced,
    std::deque<std::vector<std::byte>>& owned) {
  Result<TensorInfo> info = source.info(name);
  if (!info.ok()) return info.status();
  std::vector<float> values(static_cast<std::size_t>(info->rows * info->cols));
  if (const auto at = replaced.find(name); at != replaced.end()) {
    if (at->second.size() != values.size()) {
      return error(StatusCode::kShapeMismatch, name, ": ", at->second.size(), " values in place of ",
                   values.size());
    }
    values = at->second;
  } else if (Status s = source.read_rows(name, 0, info->rows, values.data()); !s.ok()) {
    return s;
  }
  std::vector<codegemm::Half> halves(values.size());
  bool fits = true;
  for (std::size_t i = 0; i < values.size(); ++i) {
    halves[i] = codegemm::Half::from_float(values[i]);
    fits = fits && std::isfinite(halves[i].to_float());
  }
  const auto bytes = fits ? std::as_bytes(std::span(halves)) : std::as_bytes(std::span(values));
  owned.emplace_back(bytes.begin(), bytes.end());
  codegemm::SafetensorsTensor out;
  out.name = name;
  out.dtype = fits ? codegemm::Dtype::kF16 : codegemm::Dtype::kF32;
  if (info->rows > 1) out.shape.push_back(info->rows);
  out.shape.push_back(info->cols);
  out.data = owned.back();
  return out;
}

}  // namespace detail

/// Whether a folder of that kind can hold the model with its layers in this format, to be asked before they
/// are quantized. kUnsupported names the first layer that it cannot hold, and why.
[[nodiscard]] inline Status check_writable(codegemm::CheckpointKind kind, codegemm::Format format,
                                           const LlamaModel<DenseLinear>& model) {
  Status first;
  for_each_linear(model, [&](const std::string& name, const DenseLinear& layer) {
    if (name == "lm_head" || !first.ok()) return;
    first = codegemm::check_saved_shape(kind, name, format, layer.rows(), layer.cols());
  });
  return first;
}

/// The format itself where check_writable() allows it, else the same with the next smaller groups, halved as
/// often as need be, to which regroup() takes it without loss. Else check_writable()'s error.
[[nodiscard]] inline Result<codegemm::Format> writable_format(codegemm::CheckpointKind kind,
                                                              codegemm::Format format,
                                                              const LlamaModel<DenseLinear>& model) {
  const Status status = check_writable(kind, format, model);
  if (status.ok()) return format;
  for (codegemm::Format other = format; other.g > other.v && other.g % (2 * other.v) == 0;) {
    other.g /= 2;
    if (check_writable(kind, other, model).ok()) return other;
  }
  return status;
}

/// What layers are quantized to where no format was asked for: m2v8 in the largest groups, from 128 down by
/// halves, that divide every layer's K; for AQLM's folders with one scale a row. check_writable()'s error for
/// m2v8g128 where a K is no multiple of 8.
[[nodiscard]] inline Result<codegemm::Format> default_format(codegemm::CheckpointKind kind,
                                                             const LlamaModel<DenseLinear>& model) {
  const bool rows = kind == codegemm::CheckpointKind::kAqlm;
  return writable_format(kind, {8, 2, 8, rows ? -1 : 128}, model);
}

/// The config.json of a source: its own, or one made for a GGUF file.
[[nodiscard]] inline Result<nlohmann::json> source_config(const TensorSource& source) {
  if (source.gguf() != nullptr) return config_json(source.hyperparameters());
  const Result<codegemm::MappedFile> file = codegemm::open_json_file(source.path() + "/config.json");
  if (!file.ok()) return file.status();
  return codegemm::parse_json_object(codegemm::text_of(*file), file->path());
}

/// kInvalidArgument where `folder` is the source's own, whose files would be written over.
[[nodiscard]] inline Status check_target(const TensorSource& source, const std::string& folder) {
  std::error_code ignored;
  if (!std::filesystem::equivalent(source.path(), folder, ignored)) return {};
  return error(StatusCode::kInvalidArgument, folder, ": holds the model itself; take another folder");
}

/// Writes `source` with the layers of `matrices` ("NAME" for NAME.weight) quantized into `folder`, which is
/// made; tensors of `replaced` (tuned norms) take the place of the source's. Tokenizer files of a source
/// folder are copied. Errors of check_target, save_model_checkpoint and of the files.
[[nodiscard]] inline Status write_quantized_model(const TensorSource& source, const std::string& folder,
                                                  codegemm::CheckpointKind kind,
                                                  std::span<const codegemm::NamedMatrix> matrices,
                                                  const ReplacedTensors& replaced = {}) {
  std::error_code failed;
  std::filesystem::create_directories(folder, failed);
  if (failed)
    return Status(StatusCode::kIoError, codegemm::concat(folder, ": ", failed.message()), failed.value());
  if (Status s = check_target(source, folder); !s.ok()) return s;
  Result<nlohmann::json> config = source_config(source);
  if (!config.ok()) return config.status();
  std::set<std::string> quantized;
  for (const codegemm::NamedMatrix& named : matrices) quantized.insert(named.name + ".weight");
  std::deque<std::vector<std::byte>> owned;
  std::vector<codegemm::SafetensorsTensor> plain;
  for (const std::string& name : source.names()) {
    if (quantized.count(name) > 0) continue;
    Result<codegemm::SafetensorsTensor> tensor = detail::narrow_tensor(source, name, replaced, owned);
    if (!tensor.ok()) return tensor.status();
    plain.push_back(*std::move(tensor));
  }
  if (Status s = codegemm::save_model_checkpoint(folder, kind, *config, matrices, plain); !s.ok()) return s;
  if (source.gguf() != nullptr) return {};
  for (const char* name :
       {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json",
        "merges.txt", "added_tokens.json", "chat_template.jinja", "generation_config.json"}) {
    const std::filesystem::path from = std::filesystem::path(source.path()) / name;
    if (!std::filesystem::exists(from, failed)) continue;
    std::filesystem::copy_file(from, std::filesystem::path(folder) / name,
                               std::filesystem::copy_options::overwrite_existing, failed);
    if (failed)
      return Status(StatusCode::kIoError, codegemm::concat(from.string(), ": ", failed.message()),
                    failed.value());
  }
  return {};
}

}  // namespace prefillshare::examples
