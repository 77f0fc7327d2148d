// SPDX-License-Identifier: Apache-2.0
//
// bench/support/problems.hpp - shapes of real models, and random weights for them.
#pragma once

#include <cstdint>
#include <vector>

#include <codegemm/format.hpp>
#include <codegemm/quantized_matrix.hpp>
#include <support/random.hpp>

namespace codegemm::bench {

struct Shape {
  std::int64_t rows;  // N, outputs
  std::int64_t cols;  // K, inputs
};

/// The layers of Llama-3.1-8B (attention, feed-forward up and down) and of SmolLM2-135M with its head.
[[nodiscard]] inline std::vector<Shape> model_shapes() {
  return {{4096, 4096}, {14336, 4096}, {4096, 14336}, {576, 576}, {1536, 576}, {576, 1536}, {49152, 576}};
}

/// Random codes, codebooks and scales: how long a multiplication takes does not depend on what they are.
[[nodiscard]] inline QuantizedMatrix random_weights(Format f, Shape shape, test::Rng& random) {
  QuantizedMatrix w = QuantizedMatrix::create(f, shape.rows, shape.cols).value();
  const std::uint32_t used = (f.b < 8 ? (1U << f.b) - 1U : 255U) * 0x01010101U;
  for (std::uint32_t& word : w.codes()) word = static_cast<std::uint32_t>(random.next()) & used;
  for (Half& value : w.codebooks()) value = Half::from_float(random.uniform(-1.0F, 1.0F));
  for (Half& scale : w.scales()) scale = Half::from_float(random.uniform(0.02F, 0.04F));
  return w;
}

}  // namespace codegemm::bench
