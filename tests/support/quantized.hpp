// SPDX-License-Identifier: Apache-2.0
//
// tests/support/quantized.hpp - random quantized matrices.
#pragma once

#include <cstdint>
#include <utility>

#include <codegemm/quantized_matrix.hpp>
#include <support/catch.hpp>
#include <support/random.hpp>

namespace codegemm::test {

/// Random codes, codebooks of about the size of normalized weights, scales around 0.02.
[[nodiscard]] inline QuantizedMatrix random_matrix(Format format, std::int64_t rows, std::int64_t cols,
                                                   Rng& rng) {
  auto made = QuantizedMatrix::create(format, rows, cols);
  REQUIRE(made.ok());
  QuantizedMatrix out = std::move(made).value();
  for (std::int64_t c = 0; c < format.m; ++c) {
    for (std::int64_t n = 0; n < rows; ++n) {
      for (std::int64_t j = 0; j < cols / format.v; ++j) {
        out.set_code(c, n, j, static_cast<std::uint32_t>(rng.below(format.centroids())));
      }
    }
  }
  for (Half& value : out.codebooks()) value = Half::from_float(rng.normal());
  for (Half& value : out.scales()) value = Half::from_float(rng.uniform(0.01F, 0.03F));
  return out;
}

}  // namespace codegemm::test
