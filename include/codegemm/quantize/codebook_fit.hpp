// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/codebook_fit.hpp - the codebooks that fit given codes best: least squares weighted by H.
// Layer: quantize (host only).
// See: AQLM (arXiv 2401.06118), algorithm 1, which takes steps of Adam in place of least squares
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <Eigen/Cholesky>
#include <Eigen/Core>

#include <codegemm/base/executor.hpp>
#include <codegemm/quantize/additive_state.hpp>
#include <codegemm/quantize/guarded_loop.hpp>

namespace codegemm::detail {

/// The sums over all rows that a fit of codebooks needs, on the host. Sums over rows go through fixed parts,
/// so that they do not depend on the workers.
class HostCodebookSums {
 public:
  HostCodebookSums(AdditiveState& state, Executor& executor)
      : s_(state),
        executor_(executor),
        size_(state.format.m * state.format.centroids() * state.format.v),
        parts_(std::clamp<std::int64_t>(
            kMostSums / (size_ * state.format.v), 1,
            std::min<std::int64_t>(kParts, std::max<std::int64_t>(1, row_tiles(state))))) {}

  /// D^T (W - D x) H if `residual`, else D^T (D x) H: [m][2^b][v].
  [[nodiscard]] std::vector<float> normal_map(const std::vector<float>& x, bool residual) const {
    return sum_tiles(size_, [&](std::int64_t first, std::int64_t count, double* sums) {
      DenseMatrix e(count, s_.cols);
      if (residual) {
        residual_rows(s_, x, first, count, e.data());
      } else {
        for (std::int64_t i = 0; i < count; ++i) {
          decode_row(s_, first + i, x.data(), e.data() + i * s_.cols);
          apply_scales(s_, first + i, e.data() + i * s_.cols);
        }
      }
      DenseMatrix product(count, s_.cols);
      product.noalias() = e * s_.gram;
      for (std::int64_t i = 0; i < count; ++i) {
        float* const row = product.data() + i * s_.cols;
        apply_scales(s_, first + i, row);
        scatter(first + i, row, sums);
      }
    });
  }

  /// The v x v block of each centroid, sum of s^2 H_jj over its uses: [m][2^b][v][v].
  [[nodiscard]] std::vector<float> blocks() const {
    const std::int64_t v = s_.format.v;
    const std::int64_t block = v * v;
    return sum_tiles(size_ * v, [&](std::int64_t first, std::int64_t count, double* sums) {
      for (std::int64_t n = first; n < first + count; ++n) {
        const std::uint16_t* codes = s_.codes_of(n);
        for (std::int64_t c = 0; c < s_.format.m; ++c, codes += s_.vectors()) {
          double* const book = sums + c * s_.format.centroids() * block;
          for (std::int64_t j = 0; j < s_.vectors(); ++j) {
            const float scale = s_.scales_of(n)[j * v / s_.group_length()];
            double* const to = book + std::int64_t{codes[j]} * block;
            for (std::int64_t a = 0; a < v; ++a) {
              const float* const h = s_.gram.data() + (j * v + a) * s_.cols + j * v;
              for (std::int64_t b = 0; b < v; ++b) to[a * v + b] += static_cast<double>(scale * scale * h[b]);
            }
          }
        }
      }
    });
  }

 private:
  static constexpr std::int64_t kParts = 8;
  static constexpr std::int64_t kMostSums = std::int64_t{1} << 25;  // 256 MiB: fewer parts for huge codebooks

  [[nodiscard]] std::int64_t first_tile(std::int64_t part) const { return row_tiles(s_) * part / parts_; }

  /// Calls body(first row, rows, sums) for each tile; returns the parts' sums ([width]) added up.
  template <class Body>
  std::vector<float> sum_tiles(std::int64_t width, Body&& body) const {
    std::vector<double> sums(static_cast<std::size_t>(parts_ * width), 0.0);
    guarded_for(executor_, parts_, [&](std::int64_t part, int) {
      for (std::int64_t tile = first_tile(part); tile < first_tile(part + 1); ++tile) {
        const std::int64_t first = tile * kRowTile;
        body(first, std::min(kRowTile, s_.rows - first), sums.data() + part * width);
      }
    });
    std::vector<float> out(static_cast<std::size_t>(width));
    for (std::int64_t i = 0; i < width; ++i) {
      double sum = 0.0;
      for (std::int64_t part = 0; part < parts_; ++part)
        sum += sums[static_cast<std::size_t>(part * width + i)];
      out[static_cast<std::size_t>(i)] = static_cast<float>(sum);
    }
    return out;
  }

  void scatter(std::int64_t n, const float* row, double* sums) const {
    const std::int64_t v = s_.format.v;
    const std::uint16_t* codes = s_.codes_of(n);
    for (std::int64_t c = 0; c < s_.format.m; ++c, codes += s_.vectors()) {
      double* const book = sums + c * s_.format.centroids() * v;
      for (std::int64_t j = 0; j < s_.vectors(); ++j) {
        double* const to = book + std::int64_t{codes[j]} * v;
        for (std::int64_t d = 0; d < v; ++d) to[d] += static_cast<double>(row[j * v + d]);
      }
    }
  }

  AdditiveState& s_;
  Executor& executor_;
  std::int64_t size_;  // m * 2^b * v
  std::int64_t parts_;
};

/// The loss is quadratic in all m * 2^b * v centroid values P: with D the linear map that decodes P into rows
/// (codes and scales fixed), it is tr((W - D P) H (W - D P)^T). Conjugate gradients solve its normal
/// equations without forming them (they would be (m 2^b v)^2 numbers), each step one product with H. The
/// preconditioner is the v x v block of each centroid. Sums: HostCodebookSums, or the same on a device.
template <class Sums>
class CodebookSolver {
 public:
  CodebookSolver(AdditiveState& state, Sums& sums)
      : s_(state), sums_(sums), size_(state.format.m * state.format.centroids() * state.format.v) {}

  /// At most `steps` steps, fewer where the gradient has become small. Writes codebooks rounded to fp16.
  void run(int steps) {
    if (s_.rows == 0 || s_.cols == 0) return;
    factor_blocks();
    std::vector<float> x = book_values(s_);
    std::vector<float> r = sums_.normal_map(x, true);
    std::vector<float> z = precondition(r);
    std::vector<float> p = z;
    double rz = dot(r.data(), z.data(), size_);
    const double enough = rz * kEnough;
    for (int step = 0; step < steps && rz > enough && rz > 0.0; ++step) {
      const std::vector<float> q = sums_.normal_map(p, false);
      const double curvature = dot(p.data(), q.data(), size_);
      if (!(curvature > 0.0)) break;
      const auto alpha = static_cast<float>(rz / curvature);
      for (std::size_t i = 0; i < x.size(); ++i) {
        x[i] += alpha * p[i];
        r[i] -= alpha * q[i];
      }
      z = precondition(r);
      const double next = dot(r.data(), z.data(), size_);
      const auto beta = static_cast<float>(next / rz);
      rz = next;
      for (std::size_t i = 0; i < p.size(); ++i) p[i] = z[i] + beta * p[i];
    }
    store(x);
  }

 private:
  static constexpr double kEnough = 1e-6;  // of the first squared gradient, in the preconditioner's norm
  static constexpr double kLargestHalf = 65504;  // a centroid beyond it keeps its old value

  void factor_blocks() {
    const std::int64_t v = s_.format.v;
    const std::int64_t block = v * v;
    blocks_ = sums_.blocks();
    used_.assign(static_cast<std::size_t>(size_ / v), false);
    for (std::int64_t i = 0; i < size_ / v; ++i) {
      Eigen::Map<DenseMatrix> m(blocks_.data() + i * block, v, v);
      const float mean = m.trace() / static_cast<float>(v);
      if (!(mean > 0.0F)) continue;
      m.diagonal().array() += 1e-5F * mean;  // two inputs may be the same
      const Eigen::LLT<DenseMatrix> factor(m);
      if (factor.info() != Eigen::Success) continue;
      m = factor.matrixL();
      used_[static_cast<std::size_t>(i)] = true;
    }
  }

  [[nodiscard]] std::vector<float> precondition(const std::vector<float>& r) const {
    const std::int64_t v = s_.format.v;
    std::vector<float> z(r.size(), 0.0F);
    for (std::int64_t i = 0; i < size_ / v; ++i) {
      if (!used_[static_cast<std::size_t>(i)]) continue;  // a centroid without uses stays as it is
      const float* const factor = blocks_.data() + i * v * v;
      float* const x = z.data() + i * v;
      std::copy_n(r.data() + i * v, v, x);
      for (std::int64_t a = 0; a < v; ++a) {  // L y = r
        for (std::int64_t b = 0; b < a; ++b) x[a] -= factor[a * v + b] * x[b];
        x[a] /= factor[a * v + a];
      }
      for (std::int64_t a = v - 1; a >= 0; --a) {  // L^T z = y
        for (std::int64_t b = a + 1; b < v; ++b) x[a] -= factor[b * v + a] * x[b];
        x[a] /= factor[a * v + a];
      }
    }
    return z;
  }

  void store(const std::vector<float>& x) {
    std::size_t at = 0;
    for (SearchBook& book : s_.books) {
      for (float& value : book.values) {
        const float fitted = x[at++];
        if (std::abs(static_cast<double>(fitted)) <= kLargestHalf) value = round_to_half(fitted);
      }
      book.refresh();
    }
  }

  AdditiveState& s_;
  Sums& sums_;
  std::int64_t size_;          // m * 2^b * v
  std::vector<float> blocks_;  // [m * 2^b][v][v], lower factors
  std::vector<bool> used_;     // [m * 2^b]
};

/// On the host.
class CodebookFit {
 public:
  CodebookFit(AdditiveState& state, Executor& executor) : s_(state), sums_(state, executor) {}

  void run(int steps) { CodebookSolver<HostCodebookSums>(s_, sums_).run(steps); }

 private:
  AdditiveState& s_;
  HostCodebookSums sums_;
};

}  // namespace codegemm::detail
