// SPDX-License-Identifier: Apache-2.0
//
// tests/support/calibration.hpp - layers to quantize with inputs like those of a transformer, and states in
// the middle of it.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <codegemm/quantize/calibrated.hpp>
#include <support/catch.hpp>
#include <support/random.hpp>

namespace codegemm::test {

using detail::AdditiveState;
using detail::DenseMatrix;

[[nodiscard]] inline DenseMatrix random_dense(Rng& rng, std::int64_t rows, std::int64_t cols) {
  const std::vector<float> values = rng.normals(rows * cols);
  return Eigen::Map<const DenseMatrix>(values.data(), rows, cols);
}

/// Inputs whose covariance has a few large directions, as those of a transformer's layers do.
[[nodiscard]] inline DenseMatrix correlated_inputs(Rng& rng, std::int64_t tokens, std::int64_t cols) {
  DenseMatrix mix = random_dense(rng, cols, cols);
  for (std::int64_t i = 0; i < cols; ++i) mix.row(i) *= std::pow(static_cast<float>(i + 1), -0.6F);
  return random_dense(rng, tokens, cols) * mix;
}

[[nodiscard]] inline MatrixView<const float> view(const DenseMatrix& m) {
  return {m.data(), m.rows(), m.cols()};
}

[[nodiscard]] inline std::vector<float> gram_of(const DenseMatrix& x) {
  SerialExecutor serial;
  GramMatrix gram = GramMatrix::create(x.cols()).value();
  REQUIRE(gram.add(view(x), serial).ok());
  return gram.matrix();
}

/// A state with random codes, and codebooks and scales of the weights' size.
[[nodiscard]] inline AdditiveState random_state(Rng& rng, Format f, const DenseMatrix& w,
                                                const DenseMatrix& x) {
  AdditiveState s;
  s.format = f;
  s.rows = w.rows();
  s.cols = w.cols();
  s.weights = view(w);
  const std::vector<float> gram = gram_of(x);
  SerialExecutor serial;
  s.gram = detail::damped_gram({gram.data(), s.cols, s.cols}, 0.01, serial);
  s.books.assign(static_cast<std::size_t>(f.m), detail::SearchBook(f.v, f.centroids()));
  for (detail::SearchBook& book : s.books) {
    for (float& value : book.values) value = detail::round_to_half(rng.normal());
    book.refresh();
  }
  for (std::int64_t i = 0; i < s.rows * f.m * s.vectors(); ++i)
    s.codes.push_back(static_cast<std::uint16_t>(rng.below(f.centroids())));
  for (std::int64_t i = 0; i < s.rows * s.groups(); ++i)
    s.scales.push_back(detail::round_to_half(rng.uniform(0.5F, 1.5F)));
  return s;
}

}  // namespace codegemm::test
