// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/samples.hpp - random quantized matrices and the error that fp32 may make on them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include <codegemm/cpu/configs.hpp>
#include <codegemm/cpu/integer_tables.hpp>
#include <codegemm/pack.hpp>
#include <codegemm/quantized_matrix.hpp>
#include <codegemm/reference.hpp>
#include <support/random.hpp>

namespace codegemm::test {

/// Random codes, with the first and last centroid among them; codebooks of mean 0; scales of both signs, with
/// a zero and a subnormal one.
[[nodiscard]] inline QuantizedMatrix random_quantized(Rng& rng, Format f, std::int64_t rows,
                                                      std::int64_t cols) {
  Result<QuantizedMatrix> made = QuantizedMatrix::create(f, rows, cols);
  if (!made.ok()) throw std::runtime_error(made.status().message());
  QuantizedMatrix& w = *made;
  for (Half& value : w.codebooks()) value = Half::from_float(rng.normal());
  for (Half& value : w.scales())
    value = Half::from_float(rng.uniform(0.01F, 0.1F) * (rng.below(4) == 0 ? -1.0F : 1.0F));
  if (w.scales().size() > 3) {
    w.scales()[1] = Half{};
    w.scales()[2] = Half{0x0123};
  }
  for (std::int64_t c = 0; c < f.m; ++c) {
    for (std::int64_t n = 0; n < rows; ++n) {
      for (std::int64_t j = 0; j < cols / f.v; ++j) {
        const std::int64_t pick = rng.below(8);
        const std::int64_t code = pick == 0 ? 0 : pick == 1 ? f.centroids() - 1 : rng.below(f.centroids());
        w.set_code(c, n, j, static_cast<std::uint32_t>(code));
      }
    }
  }
  return std::move(*made);
}

/// What a multiplication should give and how far off each element may be.
struct Expected {
  std::vector<double> y;      // [T][N]
  std::vector<double> bound;  // [T][N]
};

/// The bound is that of fp32 sums in any order: every term |s * C_c[k] * x[k]| goes through at most v + m * K
/// / v additions and a few products, each off by 2^-24 of its result.
[[nodiscard]] inline Expected expect(const QuantizedMatrixView& w, const std::vector<float>& x,
                                     std::int64_t tokens) {
  const std::int64_t n_count = w.rows;
  const std::int64_t v = w.format.v;
  Expected out;
  out.y.assign(static_cast<std::size_t>(tokens * n_count), 0.0);
  out.bound.assign(static_cast<std::size_t>(tokens * n_count), 0.0);
  for (std::int64_t n = 0; n < n_count; ++n) {
    for (std::int64_t k = 0; k < w.cols; ++k) {
      double weight = 0.0;
      double size = 0.0;
      for (std::int64_t c = 0; c < w.format.m; ++c) {
        const std::int64_t centroid = c * w.format.centroids() + w.code(c, n, k / v);
        const auto value = static_cast<double>(w.codebooks[centroid * v + k % v].to_float());
        weight += value;
        size += std::fabs(value);
      }
      weight *= static_cast<double>(w.scale(n, k));
      size *= std::fabs(static_cast<double>(w.scale(n, k)));
      for (std::int64_t t = 0; t < tokens; ++t) {
        const auto xk = static_cast<double>(x[static_cast<std::size_t>(t * w.cols + k)]);
        out.y[static_cast<std::size_t>(t * n_count + n)] += weight * xk;
        out.bound[static_cast<std::size_t>(t * n_count + n)] += size * std::fabs(xk);
      }
    }
  }
  const std::int64_t vectors = w.cols / v;
  const auto additions = static_cast<double>(v + w.format.m * vectors + 4);
  for (double& bound : out.bound) {
    bound = additions * 0x1p-24 * bound + static_cast<double>(std::numeric_limits<float>::denorm_min());
  }
  return out;
}

/// The norms of the activations that are rounded together with each vector's where tables are made of
/// integers: those of a flush of 16 entries within a scale group and a tile.
inline std::vector<double> flush_norms(Format f, std::int64_t rows, const float* x, std::int64_t vectors) {
  const std::int64_t tile = detail::choose_tile_vectors(f, rows, vectors, true);
  const std::int64_t segment = f.g < 0 ? vectors : f.g / f.v;
  std::vector<double> out(static_cast<std::size_t>(vectors), 0.0);
  for (std::int64_t j = 0, next = 0; j < vectors; j = next) {
    next = std::min({vectors, (j / tile + 1) * tile, (j / segment + 1) * segment});
    for (std::int64_t first = j * f.m; first < next * f.m; first += detail::flush_entries(f.b)) {
      const std::int64_t end = std::min(first + detail::flush_entries(f.b), next * f.m);
      double squares = 0.0;
      for (std::int64_t k = first / f.m * f.v; k < (end + f.m - 1) / f.m * f.v; ++k) {
        squares += static_cast<double>(x[k]) * static_cast<double>(x[k]);
      }
      for (std::int64_t i = first / f.m; i < (end + f.m - 1) / f.m; ++i) {
        double& norm = out[static_cast<std::size_t>(i)];
        norm = std::max(norm, std::sqrt(squares));
      }
    }
  }
  return out;
}

/// Widens the bound to what 16-bit tables may do. Where they are encoded from fp32, an entry is off by half a
/// step, which is the sum over a flush (16 entries, 32 with 16 centroids) of the largest of each, over 32700.
/// Where they are made of integers, by half of a step that the norm of the flush's activations gives, and by
/// what rounding activations and centroids changes.
inline void add_lookup_rounding(const QuantizedMatrixView& w, const std::vector<float>& x,
                                std::int64_t tokens, Expected& to) {
  const Format f = w.format;
  const double share = (f.b == 4 ? 32.0 : 16.0) / 2.0 / 32700.0;
  std::vector<float> codebooks;
  for (std::int64_t i = 0; i < f.m * f.centroids() * f.v; ++i) codebooks.push_back(w.codebooks[i].to_float());
  const double pair_step =
      detail::makes_integer_tables(Isa::kAvx512Vbmi, f.b)
          ? static_cast<double>(detail::pair_step(
                codebooks.data(), f,
                detail::longest_flush(w, codebooks.data(),
                                      detail::choose_tile_vectors(f, w.rows, w.vectors(), true))))
          : 0.0;
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::vector<double> norms = flush_norms(f, w.rows, x.data() + t * w.cols, w.cols / f.v);
    for (std::int64_t j = 0; j < w.cols / f.v; ++j) {
      const float* const vector = x.data() + t * w.cols + j * f.v;
      double encoded = 0.0;
      double made = 0.0;
      for (std::int64_t c = 0; c < f.m; ++c) {
        double largest = 0.0;
        double longest = 0.0;
        for (std::int64_t i = 0; i < f.centroids(); ++i) {
          const float* const centroid = codebooks.data() + (c * f.centroids() + i) * f.v;
          double product = 0.0;
          double length = 0.0;
          for (int d = 0; d < f.v; ++d) {
            product += static_cast<double>(centroid[d]) * static_cast<double>(vector[d]);
            length += std::fabs(static_cast<double>(centroid[d]));
          }
          largest = std::max(largest, std::fabs(product));
          longest = std::max(longest, length);
        }
        encoded += largest * share;
        if (pair_step == 0.0) continue;
        const double x_step = norms[static_cast<std::size_t>(j)] / 32700.0;
        made += pair_step * 65536.0 * x_step / 2.0 + longest * x_step / 2.0;
        for (int d = 0; d < f.v; ++d) {
          made += (std::fabs(static_cast<double>(vector[d])) + x_step / 2.0) * pair_step / 2.0;
        }
      }
      for (std::int64_t n = 0; n < w.rows; ++n) {
        to.bound[static_cast<std::size_t>(t * w.rows + n)] +=
            std::fabs(static_cast<double>(w.scale(n, j * f.v))) * std::max(encoded, made);
      }
    }
  }
}

/// Widens the bound to what 16-bit integers may do: centroids are off by half of `codebook_step`, activations
/// by half a step of their chunk, up to 128 columns of one scale group; steps are such that their magnitudes
/// add up to 2^18 - 128 and none is above 32767.
inline void add_integer_rounding(const QuantizedMatrixView& w, const std::vector<float>& x,
                                 std::int64_t tokens, double codebook_step, Expected& to) {
  const Format f = w.format;
  const double weight_off = codebook_step * f.m / 2.0;
  const auto magnitude = [&](std::int64_t n, std::int64_t k) {  // of a weight before its scale
    double sum = 0.0;
    for (std::int64_t c = 0; c < f.m; ++c) {
      const std::int64_t centroid = c * f.centroids() + w.code(c, n, k / f.v);
      sum += std::fabs(static_cast<double>(w.codebooks[centroid * f.v + k % f.v].to_float()));
    }
    return sum;
  };
  for (std::int64_t first = 0, end = 0; first < w.cols; first = end) {
    end = std::min(w.cols, (first / 128 + 1) * 128);
    if (f.g > 0) end = std::min(end, (first / f.g + 1) * f.g);
    for (std::int64_t t = 0; t < tokens; ++t) {
      double sum = 0.0;
      double largest = 0.0;
      for (std::int64_t k = first; k < end; ++k) {
        const double size = std::fabs(static_cast<double>(x[static_cast<std::size_t>(t * w.cols + k)]));
        sum += size;
        largest = std::max(largest, size);
      }
      const double token_off = 1.001 * std::max(sum / 262016.0, largest / 32767.0) / 2.0;
      for (std::int64_t n = 0; n < w.rows; ++n) {
        double off = weight_off * sum;
        for (std::int64_t k = first; k < end; ++k) off += token_off * (magnitude(n, k) + weight_off);
        to.bound[static_cast<std::size_t>(t * w.rows + n)] +=
            std::fabs(static_cast<double>(w.scale(n, first))) * off;
      }
    }
  }
}

}  // namespace codegemm::test
