// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/codegemm_linear.hpp - a linear layer whose weights stay codes: the layer of a decode
// module.
// Layer: model (host only).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <codegemm/gemm.hpp>
#include <codegemm/pack.hpp>
#include <prefillshare/model/linear.hpp>

namespace prefillshare {

/// A linear layer on codebook-quantized weights, multiplied by codegemm::gemm. Owns its packed weights.
class CodeGemmLinear {
 public:
  CodeGemmLinear() = default;

  /// bias: empty or [weights.rows()].
  explicit CodeGemmLinear(codegemm::PackedMatrix weights, std::vector<float> bias = {})
      : weights_(std::move(weights)), bias_(std::move(bias)) {
    CODEGEMM_ASSERT(bias_.empty() || static_cast<std::int64_t>(bias_.size()) == weights_.rows());
  }

  [[nodiscard]] std::int64_t rows() const noexcept { return weights_.rows(); }  ///< N
  [[nodiscard]] std::int64_t cols() const noexcept { return weights_.cols(); }  ///< K
  /// Of the packed weights and the bias.
  [[nodiscard]] std::int64_t parameter_bytes() const noexcept {
    return static_cast<std::int64_t>(weights_.bytes() + bias_.size() * sizeof(float));
  }
  [[nodiscard]] const codegemm::PackedMatrix& weights() const noexcept { return weights_; }  ///< packed
  [[nodiscard]] std::span<const float> bias() const noexcept { return bias_; }               ///< [N] or empty

  /// As LinearLayer says.
  [[nodiscard]] std::size_t workspace_bytes(std::int64_t tokens, int workers) const {
    return codegemm::workspace_bytes(weights_, tokens, workers);
  }

  /// Y = x W^T + bias.
  Status forward(MatrixView<const float> x, MatrixView<float> y, std::span<std::byte> workspace,
                 Executor& executor) const {
    if (Status status = codegemm::gemm(weights_, x, y, workspace, executor); !status.ok()) return status;
    detail::add_bias(bias_, y);
    return {};
  }

 private:
  codegemm::PackedMatrix weights_;
  std::vector<float> bias_;  // [rows] or empty
};
static_assert(LinearLayer<CodeGemmLinear>);

}  // namespace prefillshare
