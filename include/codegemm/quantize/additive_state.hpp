// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/additive_state.hpp - a layer while it is quantized: what its steps read and write.
// Layer: quantize (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <Eigen/Core>

#include <codegemm/base/executor.hpp>
#include <codegemm/base/matrix_view.hpp>
#include <codegemm/base/numerics.hpp>
#include <codegemm/quantize/guarded_loop.hpp>
#include <codegemm/quantize/nearest.hpp>
#include <codegemm/quantized_matrix.hpp>

namespace codegemm::detail {

using DenseMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using DenseMap = Eigen::Map<const DenseMatrix>;

/// The weights, their calibration and the quantization so far. Codebooks and scales are always values that
/// fp16 holds, so that codes are chosen for what will be stored.
struct AdditiveState {
  Format format;
  std::int64_t rows = 0;  // N
  std::int64_t cols = 0;  // K
  MatrixView<const float> weights;
  DenseMatrix gram;                  // H, [K][K], damped
  std::vector<SearchBook> books;     // [m]
  std::vector<std::uint16_t> codes;  // [N][m][K / v]
  std::vector<float> scales;         // [N][groups]

  [[nodiscard]] std::int64_t vectors() const noexcept { return cols / format.v; }
  [[nodiscard]] std::int64_t groups() const noexcept { return format.scale_groups(cols); }
  [[nodiscard]] std::int64_t group_length() const noexcept { return format.g < 0 ? cols : format.g; }
  [[nodiscard]] std::uint16_t* codes_of(std::int64_t n) { return codes.data() + n * format.m * vectors(); }
  [[nodiscard]] const std::uint16_t* codes_of(std::int64_t n) const {
    return codes.data() + n * format.m * vectors();
  }
  [[nodiscard]] float* scales_of(std::int64_t n) { return scales.data() + n * groups(); }
  [[nodiscard]] const float* scales_of(std::int64_t n) const { return scales.data() + n * groups(); }
};

/// Rows that are worked on together, so that a product with H is a matrix product.
inline constexpr std::int64_t kRowTile = 64;

[[nodiscard]] inline std::int64_t row_tiles(const AdditiveState& s) {
  return (s.rows + kRowTile - 1) / kRowTile;
}

/// out[K] = sum of row n's centroids taken from `values` ([m][2^b][v]), without the scales.
inline void decode_row(const AdditiveState& s, std::int64_t n, const float* values, float* out) {
  const std::int64_t v = s.format.v;
  const std::int64_t vectors = s.vectors();
  const std::uint16_t* codes = s.codes_of(n);
  for (std::int64_t c = 0; c < s.format.m; ++c, codes += vectors) {
    const float* const book = values + c * s.format.centroids() * v;
    for (std::int64_t j = 0; j < vectors; ++j) {
      const float* const centroid = book + std::int64_t{codes[j]} * v;
      float* const to = out + j * v;
      for (std::int64_t d = 0; d < v; ++d) to[d] = c == 0 ? centroid[d] : to[d] + centroid[d];
    }
  }
}

/// row[K] times the scales of row n.
inline void apply_scales(const AdditiveState& s, std::int64_t n, float* row) {
  const std::int64_t length = s.group_length();
  for (std::int64_t g = 0; g < s.groups(); ++g) {
    const float scale = s.scales_of(n)[g];
    for (std::int64_t k = g * length; k < std::min(s.cols, (g + 1) * length); ++k) row[k] *= scale;
  }
}

/// All codebooks one after the other, [m][2^b][v].
[[nodiscard]] inline std::vector<float> book_values(const AdditiveState& s) {
  std::vector<float> out;
  for (const SearchBook& book : s.books) out.insert(out.end(), book.values.begin(), book.values.end());
  return out;
}

/// out[count][K] = W - W^ for rows [first, first + count).
inline void residual_rows(const AdditiveState& s, const std::vector<float>& values, std::int64_t first,
                          std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i, out += s.cols) {
    decode_row(s, first + i, values.data(), out);
    apply_scales(s, first + i, out);
    const float* const w = s.weights.row(first + i);
    for (std::int64_t k = 0; k < s.cols; ++k) out[k] = w[k] - out[k];
  }
}

/// sum of a[i] * b[i] in double, in an order that does not depend on where the arrays lie.
[[nodiscard]] inline double dot(const float* a, const float* b, std::int64_t count) {
  constexpr std::int64_t kLanes = 8;
  double lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::int64_t l = 0; l < kLanes; ++l)
      lanes[l] += static_cast<double>(a[i + l]) * static_cast<double>(b[i + l]);
  }
  double sum = 0.0;
  for (; i < count; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  for (const double lane : lanes) sum += lane;
  return sum;
}

/// tr(E H E^T) over all rows: of what is left of W if `residual`, else of W itself.
[[nodiscard]] inline double weighted_error(const AdditiveState& s, bool residual, Executor& executor) {
  const std::vector<float> values = book_values(s);
  std::vector<double> parts(static_cast<std::size_t>(row_tiles(s)));
  guarded_for(executor, row_tiles(s), [&](std::int64_t task, int) {
    const std::int64_t first = task * kRowTile;
    const std::int64_t count = std::min(kRowTile, s.rows - first);
    DenseMatrix e(count, s.cols);
    if (residual) {
      residual_rows(s, values, first, count, e.data());
    } else {
      for (std::int64_t i = 0; i < count; ++i)
        std::copy_n(s.weights.row(first + i), s.cols, e.data() + i * s.cols);
    }
    DenseMatrix product(count, s.cols);
    product.noalias() = e * s.gram;
    parts[static_cast<std::size_t>(task)] = dot(e.data(), product.data(), count * s.cols);
  });
  double sum = 0.0;
  for (const double part : parts) sum += part;
  return sum;
}

[[nodiscard]] inline float round_to_half(float value) { return Half::from_float(value).to_float(); }

}  // namespace codegemm::detail
