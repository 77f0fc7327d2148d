// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantized_matrix.hpp - a codebook-quantized matrix in the canonical (checkpoint) layout.
// Layer: data (host only).
// See: examples/01_codegemm_cpu.cpp
#pragma once

#include <cstdint>
#include <exception>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include <codegemm/base/numerics.hpp>
#include <codegemm/base/status.hpp>
#include <codegemm/format.hpp>

namespace codegemm {

/// Number of elements of the three arrays of a quantized matrix.
struct CanonicalSizes {
  std::int64_t code_words = 0;       ///< [m][ceil((K / v) / codes_per_word)][N], 32-bit words
  std::int64_t codebook_values = 0;  ///< [m][2^b][v]
  std::int64_t scale_values = 0;     ///< [ceil(K / g)][N], or [1][N] for g = -1
};

/// A quantized matrix in somebody else's memory. Rows are outputs (N), columns are inputs (K).
struct QuantizedMatrixView {
  Format format;          ///< how the weights are quantized
  std::int64_t rows = 0;  ///< N
  std::int64_t cols = 0;  ///< K, a multiple of v
  /// [m][ceil((K / v) / codes_per_word)][N]; inside a word lowest bits first along K, padding codes 0
  const std::uint32_t* codes = nullptr;
  const Half* codebooks = nullptr;  ///< [m][2^b][v]
  const Half* scales = nullptr;     ///< [ceil(K / g)][N]

  /// Vectors of a row, K / v.
  [[nodiscard]] std::int64_t vectors() const noexcept { return cols / format.v; }

  /// The code of codebook c for weights [j * v, j * v + v) of row n.
  [[nodiscard]] std::uint32_t code(std::int64_t c, std::int64_t n, std::int64_t j) const noexcept {
    const int per_word = format.codes_per_word();
    const int bits = format.stored_code_bits();
    const std::int64_t words = (vectors() + per_word - 1) / per_word;
    const std::uint32_t word = codes[(c * words + j / per_word) * rows + n];
    return (word >> (static_cast<int>(j % per_word) * bits)) & ((1U << bits) - 1U);
  }
  /// The scale of weight W[n, k].
  [[nodiscard]] float scale(std::int64_t n, std::int64_t k) const noexcept {
    return scales[(format.g < 0 ? 0 : k / format.g) * rows + n].to_float();
  }
};
static_assert(std::is_trivially_copyable_v<QuantizedMatrixView>, "QuantizedMatrixView is passed by value");

namespace detail {

// a * b for a, b >= 0; false where it does not fit.
[[nodiscard]] inline bool checked_multiply(std::int64_t a, std::int64_t b, std::int64_t& product) noexcept {
  if (b != 0 && a > std::numeric_limits<std::int64_t>::max() / b) return false;
  product = a * b;
  return true;
}

}  // namespace detail

/// The sizes for an N x K matrix. kInvalidArgument: the format is not valid, N or K is negative, K is not a
/// multiple of v, or a size does not fit into 2^62 bytes. Allocates nothing.
[[nodiscard]] inline Result<CanonicalSizes> canonical_sizes(Format f, std::int64_t rows, std::int64_t cols) {
  if (Status status = validate(f); !status.ok()) return status;
  if (rows < 0 || cols < 0) {
    return error(StatusCode::kInvalidArgument, "quantized matrix: shape ", rows, " x ", cols, " is negative");
  }
  if (cols % f.v != 0) {
    return error(StatusCode::kInvalidArgument, "quantized matrix: K = ", cols,
                 " is not a multiple of v = ", f.v);
  }
  constexpr std::int64_t kMaxElements = std::int64_t{1} << 60;
  CanonicalSizes sizes;
  std::int64_t weights = 0;
  if (!detail::checked_multiply(rows, cols, weights) || weights > kMaxElements / kMaxCodebooks) {
    return error(StatusCode::kInvalidArgument, "quantized matrix: shape ", rows, " x ", cols,
                 " is too large");
  }
  const std::int64_t vectors = cols / f.v;
  sizes.code_words = f.m * ((vectors + f.codes_per_word() - 1) / f.codes_per_word()) * rows;
  sizes.codebook_values = f.m * f.centroids() * f.v;
  sizes.scale_values = f.scale_groups(cols) * rows;
  return sizes;
}

/// Checks a view: format and shape, null pointers, and that every code is below 2^b. kNullPointer,
/// kInvalidArgument, or kCorruptData with the place of the first code that points beyond its codebook.
[[nodiscard]] inline Status validate(const QuantizedMatrixView& w) {
  const Result<CanonicalSizes> sizes = canonical_sizes(w.format, w.rows, w.cols);
  if (!sizes.ok()) return sizes.status();
  if (w.codebooks == nullptr) return error(StatusCode::kNullPointer, "quantized matrix: codebooks is null");
  if (sizes->code_words > 0 && w.codes == nullptr) {
    return error(StatusCode::kNullPointer, "quantized matrix: codes is null");
  }
  if (sizes->scale_values > 0 && w.scales == nullptr) {
    return error(StatusCode::kNullPointer, "quantized matrix: scales is null");
  }
  if (w.format.b == w.format.stored_code_bits()) return {};
  // Looks at a word's codes one by one only if some bit at or above b is set. Padding codes do not matter.
  const std::uint32_t one = (~0U << w.format.b) & ((1U << w.format.stored_code_bits()) - 1U);
  const std::uint32_t beyond = w.format.b < 8 ? one * 0x01010101U : one * 0x00010001U;
  const int per_word = w.format.codes_per_word();
  const std::int64_t words = (w.vectors() + per_word - 1) / per_word;
  for (std::int64_t i = 0; i < sizes->code_words; ++i) {
    if ((w.codes[i] & beyond) == 0) continue;
    const std::int64_t n = i % w.rows;
    const std::int64_t first = i / w.rows % words * per_word;
    const std::int64_t c = i / w.rows / words;
    for (std::int64_t j = first; j < first + per_word && j < w.vectors(); ++j) {
      if (w.code(c, n, j) < static_cast<std::uint32_t>(w.format.centroids())) continue;
      return error(StatusCode::kCorruptData, "quantized matrix: code ", w.code(c, n, j), " of codebook ", c,
                   ", row ", n, ", vector ", j, " is not below 2^", w.format.b);
    }
  }
  return {};
}

/// Owns the three arrays. Movable and copyable; everything is zero after create().
class QuantizedMatrix {
 public:
  /// An N x K matrix of zeros. Errors as canonical_sizes(), and kOutOfMemory.
  [[nodiscard]] static Result<QuantizedMatrix> create(Format format, std::int64_t rows, std::int64_t cols) {
    const Result<CanonicalSizes> sizes = canonical_sizes(format, rows, cols);
    if (!sizes.ok()) return sizes.status();
    QuantizedMatrix out;
    out.format_ = format;
    out.rows_ = rows;
    out.cols_ = cols;
    try {
      out.codes_.resize(static_cast<std::size_t>(sizes->code_words));
      out.codebooks_.resize(static_cast<std::size_t>(sizes->codebook_values));
      out.scales_.resize(static_cast<std::size_t>(sizes->scale_values));
    } catch (const std::exception&) {  // bad_alloc or length_error
      return error(StatusCode::kOutOfMemory, "quantized matrix: ", rows, " x ", cols, " as ",
                   format_name(format), " needs ",
                   sizes->code_words * 4 + sizes->codebook_values * 2 + sizes->scale_values * 2, " bytes");
    }
    return out;
  }

  [[nodiscard]] Format format() const noexcept { return format_; }    ///< how the weights are quantized
  [[nodiscard]] std::int64_t rows() const noexcept { return rows_; }  ///< N
  [[nodiscard]] std::int64_t cols() const noexcept { return cols_; }  ///< K

  /// The canonical codes, as QuantizedMatrixView::codes; to write to: validate() tells whether they fit.
  [[nodiscard]] std::span<std::uint32_t> codes() noexcept { return codes_; }
  /// The same, to read from.
  [[nodiscard]] std::span<const std::uint32_t> codes() const noexcept { return codes_; }
  /// [m][2^b][v]
  [[nodiscard]] std::span<Half> codebooks() noexcept { return codebooks_; }
  /// [m][2^b][v], to read from.
  [[nodiscard]] std::span<const Half> codebooks() const noexcept { return codebooks_; }
  /// [ceil(K / g)][N]
  [[nodiscard]] std::span<Half> scales() noexcept { return scales_; }
  /// [ceil(K / g)][N], to read from.
  [[nodiscard]] std::span<const Half> scales() const noexcept { return scales_; }

  /// Writes the code of codebook c for weights [j * v, j * v + v) of row n. value < 2^b.
  void set_code(std::int64_t c, std::int64_t n, std::int64_t j, std::uint32_t value) noexcept {
    CODEGEMM_ASSERT(value < static_cast<std::uint32_t>(format_.centroids()));
    const int per_word = format_.codes_per_word();
    const int bits = format_.stored_code_bits();
    const std::int64_t words = (cols_ / format_.v + per_word - 1) / per_word;
    std::uint32_t& word = codes_[static_cast<std::size_t>((c * words + j / per_word) * rows_ + n)];
    const int shift = static_cast<int>(j % per_word) * bits;
    word = (word & ~(((1U << bits) - 1U) << shift)) | (value << shift);
  }

  /// Valid as long as this object is neither moved from nor destroyed.
  [[nodiscard]] QuantizedMatrixView view() const noexcept {
    return QuantizedMatrixView{format_, rows_, cols_, codes_.data(), codebooks_.data(), scales_.data()};
  }

  /// Whether every code is below 2^b: what was read from a file is to be checked before it is used.
  [[nodiscard]] Status validate() const { return codegemm::validate(view()); }

 private:
  QuantizedMatrix() = default;

  Format format_;
  std::int64_t rows_ = 0;
  std::int64_t cols_ = 0;
  std::vector<std::uint32_t> codes_;
  std::vector<Half> codebooks_;
  std::vector<Half> scales_;
};

}  // namespace codegemm
