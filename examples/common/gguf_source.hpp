// SPDX-License-Identifier: Apache-2.0
//
// common/gguf_source.hpp - a GGUF file as a TensorSource.
// Layer: examples (host only).
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <common/gguf.hpp>
#include <common/gguf_hyperparameters.hpp>
#include <common/tensor_source_base.hpp>

namespace prefillshare::examples {

namespace detail {

struct NamePair {
  std::string_view gguf;
  std::string_view hugging_face;
};
// Tensor names of the converter, gguf-py/gguf/tensor_mapping.py of https://github.com/ggml-org/llama.cpp.
inline constexpr NamePair kModelNames[] = {
    {"token_embd", "model.embed_tokens"},
    {"output_norm", "model.norm"},
    {"output", "lm_head"},
};
inline constexpr NamePair kLayerNames[] = {
    {"attn_norm", "input_layernorm"},    {"attn_q", "self_attn.q_proj"},
    {"attn_k", "self_attn.k_proj"},      {"attn_v", "self_attn.v_proj"},
    {"attn_output", "self_attn.o_proj"}, {"attn_q_norm", "self_attn.q_norm"},
    {"attn_k_norm", "self_attn.k_norm"}, {"ffn_norm", "post_attention_layernorm"},
    {"ffn_gate", "mlp.gate_proj"},       {"ffn_up", "mlp.up_proj"},
    {"ffn_down", "mlp.down_proj"},
};

/// "blk.7.attn_q.weight" -> "model.layers.7.self_attn.q_proj.weight"; empty for a name that has no
/// counterpart.
[[nodiscard]] inline std::string hugging_face_name(std::string_view name) {
  const std::size_t dot = name.rfind('.');
  if (dot == std::string_view::npos) return {};
  const std::string_view kind = name.substr(dot);
  if (kind != ".weight" && kind != ".bias") return {};
  const std::string_view stem = name.substr(0, dot);
  for (const NamePair& pair : kModelNames) {
    if (stem == pair.gguf) return codegemm::concat(pair.hugging_face, kind);
  }
  constexpr std::string_view kBlock = "blk.";
  if (stem.substr(0, kBlock.size()) != kBlock) return {};
  const std::size_t end = stem.find('.', kBlock.size());
  if (end == std::string_view::npos) return {};
  const std::string_view layer = stem.substr(kBlock.size(), end - kBlock.size());
  const bool digits =
      !layer.empty() && std::all_of(layer.begin(), layer.end(), [](char c) { return c >= '0' && c <= '9'; });
  if (!digits || (layer.size() > 1 && layer.front() == '0'))
    return {};  // "00" would be layer 0 a second time
  for (const NamePair& pair : kLayerNames) {
    if (stem.substr(end + 1) == pair.gguf)
      return codegemm::concat("model.layers.", layer, ".", pair.hugging_face, kind);
  }
  return {};
}

}  // namespace detail

/// Reads from a mapped GGUF file.
///
/// The converter reorders the rows of the q and k projections of the architecture "llama" for RoPE on
/// neighbouring pairs; here they come back in the order of the original model, rotate-half: within a head of
/// D rows, row half * D/2 + i is row 2 * i + half of the file.
class GgufSource final : public TensorSource {
 public:
  /// Errors of GgufFile::open and read_hyperparameters; kUnsupported for a weight whose type has no
  /// conversion.
  [[nodiscard]] static Result<std::unique_ptr<TensorSource>> open(const std::string& path) {
    Result<GgufFile> file = GgufFile::open(path);
    if (!file.ok()) return file.status();
    return from(*std::move(file));
  }

  /// From a file that has been parsed.
  [[nodiscard]] static Result<std::unique_ptr<TensorSource>> from(GgufFile file) {
    std::unique_ptr<GgufSource> source(new GgufSource(std::move(file)));
    if (Status status = source->index(); !status.ok()) return status;
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
    return describe(*at->second.tensor);
  }

  [[nodiscard]] Status read_rows(std::string_view name, std::int64_t first, std::int64_t count,
                                 float* out) const override {
    const auto at = tensors_.find(name);
    if (at == tensors_.end()) return no_tensor(name);
    const GgufTensor& tensor = *at->second.tensor;
    if (!at->second.reordered) return file_.read_rows(tensor, first, count, out);

    const TensorInfo shape = describe(tensor);
    if (Status status = check_rows(name, shape, first, count); !status.ok()) return status;
    if (shape.rows == 1) {  // a bias: its elements stand for rows
      if (count == 0) return {};
      std::vector<float> in_file_order(static_cast<std::size_t>(shape.cols));
      if (Status status = file_.read_rows(tensor, 0, 1, in_file_order.data()); !status.ok()) return status;
      for (std::int64_t i = 0; i < shape.cols; ++i)
        out[i] = in_file_order[static_cast<std::size_t>(row_in_file(i))];
      return {};
    }
    for (std::int64_t i = 0; i < count; ++i) {
      Status status = file_.read_rows(tensor, row_in_file(first + i), 1, out + i * shape.cols);
      if (!status.ok()) return status;
    }
    return {};
  }

  [[nodiscard]] const GgufFile* gguf() const noexcept override { return &file_; }

 private:
  struct Entry {
    const GgufTensor* tensor = nullptr;
    bool reordered = false;
  };

  explicit GgufSource(GgufFile file) : TensorSource(file.name()), file_(std::move(file)) {}

  static TensorInfo describe(const GgufTensor& tensor) {
    return {tensor.rows(), tensor.row_elements(), std::string(tensor.type->name)};
  }

  [[nodiscard]] std::int64_t row_in_file(std::int64_t row) const {
    const std::int64_t half_size = hyperparameters_.head_dim / 2;
    const std::int64_t in_head = row % hyperparameters_.head_dim;
    return row - in_head + 2 * (in_head % half_size) + in_head / half_size;
  }

  Status index() {
    for (const GgufTensor& tensor : file_.tensors()) {
      std::string name = detail::hugging_face_name(tensor.name);
      if (!name.empty()) tensors_.emplace(std::move(name), Entry{&tensor, false});
    }
    Result<ModelHyperparameters> read =
        read_hyperparameters(file_, [this](std::string_view name) { return contains(name); });
    if (!read.ok()) return read.status();
    hyperparameters_ = *std::move(read);
    for (auto& [name, entry] : tensors_) {
      const GgufTensor& tensor = *entry.tensor;
      if (tensor.type->dequantize == nullptr) {
        return error(StatusCode::kUnsupported, path_, ": tensor ", codegemm::quoted(tensor.name),
                     " has type ", tensor.type->number, " (", tensor.type->name, "), converted to fp32 are ",
                     convertible_ggml_types());
      }
      if (hyperparameters_.architecture != "llama") continue;
      const bool q = name.find(".self_attn.q_proj.") != std::string::npos;
      const bool k = name.find(".self_attn.k_proj.") != std::string::npos;
      if (!q && !k) continue;
      const std::int64_t expected =
          (q ? hyperparameters_.heads : hyperparameters_.kv_heads) * hyperparameters_.head_dim;
      const std::int64_t rows = tensor.rank == 1 ? tensor.row_elements() : tensor.rows();
      if (rows != expected) {
        return error(StatusCode::kCorruptData, path_, ": tensor ", codegemm::quoted(tensor.name), " has ",
                     rows, " rows, must have ", expected, ", heads times head size");
      }
      entry.reordered = true;
    }
    return {};
  }

  GgufFile file_;
  std::map<std::string, Entry, std::less<>> tensors_;  // by Hugging Face name
};

}  // namespace prefillshare::examples
