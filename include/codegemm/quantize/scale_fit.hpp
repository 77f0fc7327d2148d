// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/scale_fit.hpp - the scales that fit given codes and codebooks best.
// Layer: quantize (host only).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <Eigen/Core>

#include <codegemm/base/executor.hpp>
#include <codegemm/quantize/additive_state.hpp>
#include <codegemm/quantize/guarded_loop.hpp>

namespace codegemm::detail {

/// One pass over the groups of every row: each scale becomes the least-squares one given all others, rounded
/// to fp16, and the next ones see what the rounding left. For one scale a row this is the exact solution.
inline void fit_scales(AdditiveState& s, Executor& executor) {
  const std::vector<float> values = book_values(s);
  const std::int64_t length = s.group_length();
  guarded_for(executor, row_tiles(s), [&](std::int64_t task, int) {
    const std::int64_t first = task * kRowTile;
    const std::int64_t count = std::min(kRowTile, s.rows - first);
    DenseMatrix unscaled(count, s.cols);
    DenseMatrix left(count, s.cols);
    for (std::int64_t i = 0; i < count; ++i) decode_row(s, first + i, values.data(), unscaled.row(i).data());
    residual_rows(s, values, first, count, left.data());
    for (std::int64_t g = 0; g < s.groups(); ++g) {
      const std::int64_t at = g * length;
      const std::int64_t width = std::min(length, s.cols - at);
      const DenseMatrix gradient = left * s.gram.middleCols(at, width);
      const DenseMatrix curvature = unscaled.middleCols(at, width) * s.gram.block(at, at, width, width);
      for (std::int64_t i = 0; i < count; ++i) {
        const float* const u = unscaled.row(i).data() + at;
        const double up = dot(gradient.row(i).data(), u, width);
        const double down = dot(curvature.row(i).data(), u, width);
        if (!(down > 0.0)) continue;
        float& scale = s.scales_of(first + i)[g];
        const float fitted = round_to_half(scale + static_cast<float>(up / down));
        if (!std::isfinite(fitted)) continue;
        const float change = fitted - scale;
        scale = fitted;
        float* const e = left.row(i).data() + at;
        for (std::int64_t k = 0; k < width; ++k) e[k] -= change * u[k];
      }
    }
  });
}

}  // namespace codegemm::detail
