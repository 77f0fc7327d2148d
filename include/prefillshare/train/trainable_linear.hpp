// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/trainable_linear.hpp - a linear layer whose weights are parameters, or are made of
// parameters: low-rank deltas, or the codebooks and scales of fixed codes.
// Layer: train (host only).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <codegemm/base/numerics.hpp>
#include <codegemm/quantized_matrix.hpp>
#include <prefillshare/model/dense_linear.hpp>
#include <prefillshare/train/block.hpp>
#include <prefillshare/train/products.hpp>
#include <prefillshare/train/tensor.hpp>

namespace prefillshare {

/// One tensor that training changes.
template <TrainScalar T>
struct Parameter {
  std::string name;                 ///< of the checkpoint: "model.layers.3.mlp.up_proj.weight"
  std::vector<std::int64_t> shape;  ///< as in the checkpoint
  bool decay = false;  ///< whether weight decay acts on it: matrices, not norms, biases and scales
  Tensor<T> value;     ///< in the order of the checkpoint
  Tensor<T> gradient;  ///< the same shape
};

/// Parameters keep their addresses while more are added.
template <TrainScalar T>
using ParameterList = std::deque<Parameter<T>>;

namespace detail {

template <TrainScalar T>
Parameter<T>& add_parameter(ParameterList<T>& list, std::string_view name,
                            const std::vector<std::int64_t>& shape, bool decay) {
  Parameter<T>& p = list.emplace_back();
  std::int64_t size = 1;
  for (const std::int64_t dim : shape) size *= dim;
  p.name = name;
  p.shape = shape;
  p.decay = decay;
  p.value.resize(size);
  p.gradient.resize(size);
  return p;
}

/// Weights that stay as they are: somebody's fp32 values, or a copy in double.
template <TrainScalar T>
class FrozenValues {
 public:
  FrozenValues() = default;
  explicit FrozenValues(std::shared_ptr<const std::vector<float>> values) : values_(std::move(values)) {
    if constexpr (!std::is_same_v<T, float>) {
      copy_.resize(static_cast<std::int64_t>(values_->size()));
      std::copy(values_->begin(), values_->end(), copy_.data());
    }
  }
  [[nodiscard]] const T* data() const noexcept {
    if constexpr (std::is_same_v<T, float>) return values_ ? values_->data() : nullptr;
    if constexpr (!std::is_same_v<T, float>) return copy_.data();
  }

 private:
  std::shared_ptr<const std::vector<float>> values_;
  Tensor<T> copy_;
};

/// A codebook-quantized matrix with codes given, codebooks and scales trained:
/// W[n,k] = s[n, k/g] * sum_c C_c[code_c[n, k/v]][k % v].
template <TrainScalar T>
class CodebookWeights {
 public:
  CodebookWeights(const codegemm::QuantizedMatrix& matrix, const std::string& name, ParameterList<T>& list)
      : matrix_(matrix), codebooks_(&add_parameter(list, name + ".codebooks", shape_of(matrix), false)) {
    const codegemm::QuantizedMatrixView view = matrix_.view();
    const codegemm::Format f = matrix_.format();
    scales_ = &add_parameter(list, name + ".scales", {matrix_.rows(), f.scale_groups(matrix_.cols())}, false);
    for (std::int64_t i = 0; i < codebooks_->value.size(); ++i)
      codebooks_->value[i] = static_cast<T>(view.codebooks[i].to_float());
    const std::int64_t groups = f.scale_groups(matrix_.cols());
    for (std::int64_t n = 0; n < matrix_.rows(); ++n) {
      for (std::int64_t g = 0; g < groups; ++g)
        scales_->value[n * groups + g] = static_cast<T>(view.scales[g * matrix_.rows() + n].to_float());
    }
    codes_.resize(static_cast<std::size_t>(matrix_.rows() * f.m * view.vectors()));
    std::size_t at = 0;
    for (std::int64_t n = 0; n < matrix_.rows(); ++n) {
      for (std::int64_t c = 0; c < f.m; ++c) {
        for (std::int64_t j = 0; j < view.vectors(); ++j)
          codes_[at++] = static_cast<std::uint16_t>(view.code(c, n, j));
      }
    }
  }

  [[nodiscard]] std::int64_t rows() const noexcept { return matrix_.rows(); }
  [[nodiscard]] std::int64_t cols() const noexcept { return matrix_.cols(); }

  /// Other codes, [N][m][K / v]; false where they are not as many, or not all below 2^b.
  [[nodiscard]] bool set_codes(std::span<const std::uint16_t> codes) {
    const codegemm::Format f = matrix_.format();
    if (codes.size() != codes_.size()) return false;
    if (std::any_of(codes.begin(), codes.end(), [&](std::uint16_t code) { return code >= f.centroids(); }))
      return false;
    std::copy(codes.begin(), codes.end(), codes_.begin());
    std::size_t at = 0;
    for (std::int64_t n = 0; n < rows(); ++n) {
      for (std::int64_t c = 0; c < f.m; ++c) {
        for (std::int64_t j = 0; j < cols() / f.v; ++j) matrix_.set_code(c, n, j, codes_[at++]);
      }
    }
    return true;
  }

  /// out[N][K].
  void materialize(T* out, Executor& executor) const {
    codegemm::detail::with_vec_len(matrix_.format().v, [&](auto v) {
      codegemm::parallel_for(executor, tiles(), [&](std::int64_t tile, int) {
        for (std::int64_t n = tile * kRows; n < std::min(rows(), (tile + 1) * kRows); ++n) {
          T* const row = out + n * cols();
          decode_row<v>(n, row);
          for_groups(n, [&](std::int64_t first, std::int64_t count, std::int64_t scale) {
            TrainArray<T>(row + first, count) *= scales_->value[scale];
          });
        }
      });
    });
  }

  /// Adds the gradients of codebooks (a scatter of s * dW by codes) and scales (a dot product for each group
  /// of a row) out of dw[N][K]. Sums go through fixed parts, so that they do not depend on the workers.
  void pull_back(const T* dw, Executor& executor) {
    const std::int64_t size = codebooks_->value.size();
    const std::int64_t parts =
        std::clamp<std::int64_t>((std::int64_t{1} << 23) / size, 1, std::min(kParts, tiles()));
    if (parts_.size() < parts * size) parts_.resize(parts * size);
    if (row_.size() < executor.workers() * cols()) row_.resize(executor.workers() * cols());
    codegemm::detail::with_vec_len(matrix_.format().v, [&](auto v) {
      codegemm::parallel_for(executor, parts, [&](std::int64_t part, int worker) {
        T* const sums = parts_.data() + part * size;
        T* const unscaled = row_.data() + worker * cols();
        std::fill_n(sums, size, T{0});
        const std::int64_t end = std::min(rows(), tiles() * (part + 1) / parts * kRows);
        for (std::int64_t n = tiles() * part / parts * kRows; n < end; ++n) {
          const T* const d = dw + n * cols();
          decode_row<v>(n, unscaled);
          for_groups(n, [&](std::int64_t first, std::int64_t count, std::int64_t scale) {
            T sum{0};
            for (std::int64_t k = first; k < first + count; ++k) sum += d[k] * unscaled[k];
            scales_->gradient[scale] += sum;
          });
          for_groups(n, [&](std::int64_t first, std::int64_t count, std::int64_t scale) {
            TrainArray<T>(unscaled + first, count) =
                TrainConstArray<T>(d + first, count) * scales_->value[scale];
          });
          scatter_row<v>(n, unscaled, sums);
        }
      });
    });
    add_parts(parts_.data(), parts, size, codebooks_->gradient.data());
  }

  /// The matrix with codebooks and scales as they are now, rounded to fp16. Values beyond fp16 become its
  /// largest.
  [[nodiscard]] codegemm::QuantizedMatrix matrix() const {
    codegemm::QuantizedMatrix out = matrix_;
    for (std::size_t i = 0; i < out.codebooks().size(); ++i)
      out.codebooks()[i] = half(codebooks_->value[static_cast<std::int64_t>(i)]);
    const std::int64_t groups = scales_->shape[1];
    for (std::int64_t n = 0; n < rows(); ++n) {
      for (std::int64_t g = 0; g < groups; ++g)
        out.scales()[static_cast<std::size_t>(g * rows() + n)] = half(scales_->value[n * groups + g]);
    }
    return out;
  }

 private:
  static constexpr std::int64_t kRows = 32;
  static constexpr std::int64_t kParts = 8;

  static std::vector<std::int64_t> shape_of(const codegemm::QuantizedMatrix& matrix) {
    const codegemm::Format f = matrix.format();
    return {f.m, f.centroids(), f.v};
  }
  static codegemm::Half half(T value) {
    constexpr T kLargest{65504};
    return codegemm::Half::from_float(static_cast<float>(std::clamp(value, -kLargest, kLargest)));
  }
  [[nodiscard]] std::int64_t tiles() const noexcept { return (rows() + kRows - 1) / kRows; }
  [[nodiscard]] const std::uint16_t* codes_of(std::int64_t n) const {
    return codes_.data() + n * matrix_.format().m * (cols() / matrix_.format().v);
  }

  /// body(first column, columns, index of the scale) for each scale group of row n.
  template <class Body>
  void for_groups(std::int64_t n, Body&& body) const {
    const std::int64_t length = matrix_.format().g < 0 ? cols() : matrix_.format().g;
    const std::int64_t groups = scales_->shape[1];
    for (std::int64_t g = 0; g < groups; ++g)
      body(g * length, std::min(length, cols() - g * length), n * groups + g);
  }

  template <int kVecLen>
  void decode_row(std::int64_t n, T* out) const {
    const std::uint16_t* codes = codes_of(n);
    const std::int64_t vectors = cols() / kVecLen;
    for (std::int64_t c = 0; c < matrix_.format().m; ++c, codes += vectors) {
      const T* const book = codebooks_->value.data() + c * matrix_.format().centroids() * kVecLen;
      for (std::int64_t j = 0; j < vectors; ++j) {
        const T* const centroid = book + std::int64_t{codes[j]} * kVecLen;
        T* const to = out + j * kVecLen;
        for (int d = 0; d < kVecLen; ++d) to[d] = c == 0 ? centroid[d] : to[d] + centroid[d];
      }
    }
  }

  template <int kVecLen>
  void scatter_row(std::int64_t n, const T* row, T* sums) const {
    const std::uint16_t* codes = codes_of(n);
    const std::int64_t vectors = cols() / kVecLen;
    for (std::int64_t c = 0; c < matrix_.format().m; ++c, codes += vectors) {
      T* const book = sums + c * matrix_.format().centroids() * kVecLen;
      for (std::int64_t j = 0; j < vectors; ++j) {
        T* const to = book + std::int64_t{codes[j]} * kVecLen;
        for (int d = 0; d < kVecLen; ++d) to[d] += row[j * kVecLen + d];
      }
    }
  }

  codegemm::QuantizedMatrix matrix_;
  std::vector<std::uint16_t> codes_;  // [N][m][K / v]
  Parameter<T>* codebooks_;           // [m][2^b][v]
  Parameter<T>* scales_ = nullptr;    // [N][groups]
  Tensor<T> parts_;                   // [parts][m * 2^b * v]
  Tensor<T> row_;                     // [workers][K]
};

}  // namespace detail

/// A linear layer as training sees it. materialize() gives its weights as a dense matrix, gradients() says
/// where their gradient is to be added, and pull_back() makes the parameters' gradients of it. Scratch of N x
/// K values is the caller's and used where the weights are no parameters themselves.
template <TrainScalar T>
class TrainableLinear {
 public:
  /// Weights and bias that stay as they are.
  explicit TrainableLinear(const DenseLinear& dense)
      : rows_(dense.rows()), cols_(dense.cols()), frozen_(copy_of(dense)) {
    set_frozen_bias(dense);
  }

  /// All weights, and the bias, become parameters.
  [[nodiscard]] static TrainableLinear full(const DenseLinear& dense, const std::string& name,
                                            ParameterList<T>& list) {
    TrainableLinear out;
    out.rows_ = dense.rows();
    out.cols_ = dense.cols();
    out.weight_ = &detail::add_parameter(list, name + ".weight", {out.rows_, out.cols_}, true);
    const float* const from = dense.weights().data;
    std::copy_n(from, out.rows_ * out.cols_, out.weight_->value.data());
    if (!dense.bias().empty()) {
      out.bias_ = &detail::add_parameter(list, name + ".bias", {out.rows_}, false);
      std::copy(dense.bias().begin(), dense.bias().end(), out.bias_->value.data());
    }
    return out;
  }

  /// W + scale * B A with A[rank][K] and B[N][rank] (zero at first) as parameters. a: the first A.
  [[nodiscard]] static TrainableLinear low_rank(const DenseLinear& dense, const std::string& name,
                                                std::int64_t rank, T scale, const std::vector<float>& a,
                                                ParameterList<T>& list) {
    TrainableLinear out(dense);
    out.scale_ = scale;
    out.a_ = &detail::add_parameter(list, name + ".lora_A.weight", {rank, out.cols_}, true);
    out.b_ = &detail::add_parameter(list, name + ".lora_B.weight", {out.rows_, rank}, true);
    std::copy(a.begin(), a.end(), out.a_->value.data());
    return out;
  }

  /// Codes stay, codebooks and scales become parameters; the bias stays.
  [[nodiscard]] static TrainableLinear codebooks(const codegemm::QuantizedMatrix& matrix,
                                                 const DenseLinear& bias_of, const std::string& name,
                                                 ParameterList<T>& list) {
    TrainableLinear out;
    out.rows_ = matrix.rows();
    out.cols_ = matrix.cols();
    out.codes_ = std::make_unique<detail::CodebookWeights<T>>(matrix, name, list);
    out.set_frozen_bias(bias_of);
    return out;
  }

  [[nodiscard]] std::int64_t rows() const noexcept { return rows_; }  ///< N
  [[nodiscard]] std::int64_t cols() const noexcept { return cols_; }  ///< K
  /// Whether materialize() writes to its scratch, and gradients() to its.
  [[nodiscard]] bool composed() const noexcept { return a_ != nullptr || codes_ != nullptr; }
  /// Null where the weights are not codes.
  [[nodiscard]] const detail::CodebookWeights<T>* codes() const noexcept { return codes_.get(); }
  /// The same.
  [[nodiscard]] detail::CodebookWeights<T>* codes() noexcept { return codes_.get(); }

  /// The weights to multiply by; in `scratch` if they are not kept as they are.
  [[nodiscard]] LinearWeights<T> materialize(T* scratch, detail::Products<T>& products) const {
    LinearWeights<T> out;
    out.bias = bias_ != nullptr ? bias_->value.data() : frozen_bias_.empty() ? nullptr : frozen_bias_.data();
    const T* weight = weight_ != nullptr ? weight_->value.data() : frozen_.data();
    if (codes_ != nullptr) codes_->materialize(scratch, products.executor());
    if (a_ != nullptr) {
      const std::int64_t rank = a_->shape[0];
      products.nn(b_->value.rows(rows_, rank), a_->value.rows(rank, cols_),
                  MatrixView<T>(scratch, rows_, cols_), false);
      detail::for_elements(rows_ * cols_, products.executor(), [&](std::int64_t first, std::int64_t count) {
        detail::TrainArray<T> out_values(scratch + first, count);
        out_values = out_values * scale_ + detail::TrainConstArray<T>(weight + first, count);
      });
    }
    out.weight = MatrixView<const T>(composed() ? scratch : weight, rows_, cols_);
    return out;
  }

  /// `scratch` is zeroed where it is used.
  [[nodiscard]] LinearGradients<T> gradients(T* scratch) {
    LinearGradients<T> out;
    if (weight_ != nullptr) out.weight = weight_->gradient.data();
    if (bias_ != nullptr) out.bias = bias_->gradient.data();
    if (composed()) {
      std::fill_n(scratch, rows_ * cols_, T{0});
      out.weight = scratch;
    }
    return out;
  }

  /// `dw`: the scratch that gradients() got, filled by the backward pass.
  void pull_back(const T* dw, detail::Products<T>& products) {
    if (codes_ != nullptr) codes_->pull_back(dw, products.executor());
    if (a_ == nullptr) return;
    const std::int64_t rank = a_->shape[0];
    const MatrixView<const T> d(dw, rows_, cols_);
    if (product_.size() < rank * std::max(rows_, cols_)) product_.resize(rank * std::max(rows_, cols_));
    products.nt(d, a_->value.rows(rank, cols_), product_.rows(rows_, rank));
    add_scaled(rows_ * rank, b_->gradient.data());
    products.tn(b_->value.rows(rows_, rank), d, product_.rows(rank, cols_), false);
    add_scaled(rank * cols_, a_->gradient.data());
  }

  /// The layer with its parameters as they are now, deltas merged.
  [[nodiscard]] DenseLinear dense(detail::Products<T>& products) const {
    Tensor<T> scratch;
    if (composed()) scratch.resize(rows_ * cols_);
    const LinearWeights<T> w = materialize(scratch.data(), products);
    auto values = std::make_shared<std::vector<float>>(static_cast<std::size_t>(rows_ * cols_));
    std::transform(w.weight.data, w.weight.data + rows_ * cols_, values->begin(),
                   [](T x) { return static_cast<float>(x); });
    std::vector<float> bias;
    for (std::int64_t n = 0; w.bias != nullptr && n < rows_; ++n)
      bias.push_back(static_cast<float>(w.bias[n]));
    return {std::move(values), rows_, cols_, std::move(bias)};
  }

 private:
  TrainableLinear() = default;

  void set_frozen_bias(const DenseLinear& dense) {
    if (dense.bias().empty()) return;
    frozen_bias_.resize(dense.rows());
    std::copy(dense.bias().begin(), dense.bias().end(), frozen_bias_.data());
  }

  static detail::FrozenValues<T> copy_of(const DenseLinear& dense) {
    return detail::FrozenValues<T>(dense.shared_weights());
  }

  void add_scaled(std::int64_t size, T* to) const {
    detail::TrainArray<T>(to, size) += detail::TrainConstArray<T>(product_.data(), size) * scale_;
  }

  std::int64_t rows_ = 0;
  std::int64_t cols_ = 0;
  detail::FrozenValues<T> frozen_;  // [N][K]
  Tensor<T> frozen_bias_;           // [N]
  Parameter<T>* weight_ = nullptr;  // [N][K]
  Parameter<T>* bias_ = nullptr;    // [N]
  Parameter<T>* a_ = nullptr;       // [rank][K]
  Parameter<T>* b_ = nullptr;       // [N][rank]
  T scale_{1};
  Tensor<T> product_;  // [N][rank] or [rank][K]
  std::unique_ptr<detail::CodebookWeights<T>> codes_;
};

}  // namespace prefillshare
