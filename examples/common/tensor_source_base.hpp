// SPDX-License-Identifier: Apache-2.0
//
// common/tensor_source_base.hpp - what the readers of model files have in common.
// Layer: examples (host only).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <common/gguf.hpp>
#include <common/hyperparameters.hpp>

namespace prefillshare::examples {

/// A tensor as a matrix; a vector is one row.
struct TensorInfo {
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::string type;  // as its file names it: "Q4_1", "BF16"
};

/// A model's tensors by the names that Hugging Face gives them (model.layers.0.self_attn.q_proj.weight), with
/// rows in the order that rotate-half RoPE wants. Reading is const and may go on from several threads.
class TensorSource {
 public:
  TensorSource(const TensorSource&) = delete;
  TensorSource& operator=(const TensorSource&) = delete;
  virtual ~TensorSource() = default;

  /// The file or folder, as given to open_model().
  [[nodiscard]] const std::string& path() const noexcept { return path_; }
  [[nodiscard]] const ModelHyperparameters& hyperparameters() const noexcept { return hyperparameters_; }

  /// Sorted.
  [[nodiscard]] virtual std::vector<std::string> names() const = 0;
  [[nodiscard]] virtual bool contains(std::string_view name) const = 0;
  /// kNotFound names the file and the tensor.
  [[nodiscard]] virtual Result<TensorInfo> info(std::string_view name) const = 0;
  /// Rows [first_row, first_row + row_count) as fp32 into out[row_count][cols]. kNotFound, kInvalidArgument
  /// for rows that are not there, kUnsupported for a type that has no conversion.
  [[nodiscard]] virtual Status read_rows(std::string_view name, std::int64_t first_row,
                                         std::int64_t row_count, float* out) const = 0;
  /// The GGUF file behind this, whose metadata hold the tokenizer; null for a folder.
  [[nodiscard]] virtual const GgufFile* gguf() const noexcept { return nullptr; }

 protected:
  explicit TensorSource(std::string path) : path_(std::move(path)) {}

  [[nodiscard]] Status no_tensor(std::string_view name) const {
    return error(StatusCode::kNotFound, path_, ": tensor ", codegemm::quoted(name), " is missing");
  }
  [[nodiscard]] Status check_rows(std::string_view name, const TensorInfo& info, std::int64_t first,
                                  std::int64_t count) const {
    if (first >= 0 && count >= 0 && first <= info.rows && count <= info.rows - first) return {};
    return error(StatusCode::kInvalidArgument, path_, ": tensor ", codegemm::quoted(name), " has ", info.rows,
                 " rows, asked for ", count, " from row ", first);
  }

  std::string path_;
  ModelHyperparameters hyperparameters_;
};

}  // namespace prefillshare::examples
