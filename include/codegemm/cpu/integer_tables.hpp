// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/integer_tables.hpp - codebooks as pairs of 16-bit integers, of which Psumbook tables are made
// in the 16 bits that are looked up, without a table in fp32 before.
// Layer: cpu (host only).
//
// The activations X of a flush are rounded so that their norm is kTableNorm, centroids C so that the sum of a
// flush's entries C X / 2^16 fits into 16 bits whatever the activations: by Cauchy's inequality it is at most
// N sqrt(vectors) |X| / 2^16, N being the sum over codebooks of the largest norm of a centroid. So the step
// is known before the table, and the error, relative to a typical row's sum, from the codebooks alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include <codegemm/cpu/configs.hpp>
#include <codegemm/cpu/isa.hpp>
#include <codegemm/format.hpp>

namespace codegemm::detail {

/// The norm of a flush's rounded activations, but for what rounding adds.
inline constexpr float kTableNorm = 32700.0F;

/// Whether `isa` has kernels for them. A table of 16 centroids is one register and cheap in fp32.
[[nodiscard]] constexpr bool makes_integer_tables(Isa isa, int code_bits) noexcept {
  return isa == Isa::kAvx512Vbmi && code_bits >= 5;
}

/// The most vectors of x that the entries of a flush belong to.
[[nodiscard]] constexpr std::int64_t flush_vectors(Format f) noexcept {
  const std::int64_t entries = flush_entries(f.b);
  return entries % f.m == 0 ? entries / f.m : (entries + f.m - 1 + f.m - 1) / f.m;
}

/// By what codebooks[m][2^b][v] are to be rounded, or 0 where 16 bits are not enough: centroids that are far
/// out, beyond what the others are like, stretch the step.
[[nodiscard]] inline float pair_step(const float* codebooks, Format f) noexcept {
  // Of a typical row's sum, as in flush_step(); rounding activations and centroids adds some hundredths.
  constexpr double kAccepted = 8e-4;
  double norms = 0.0;
  double power = 0.0;  // of an entry of each codebook, if x lies along the axis where it is least
  for (std::int64_t c = 0; c < f.m; ++c) {
    double largest = 0.0;
    double squares[kMaxVecLen] = {};
    for (std::int64_t i = 0; i < f.centroids(); ++i) {
      double norm2 = 0.0;
      for (std::int64_t d = 0; d < f.v; ++d) {
        const double value = codebooks[(c * f.centroids() + i) * f.v + d];
        squares[d] += value * value;
        norm2 += value * value;
      }
      largest = std::max(largest, norm2);
    }
    norms += std::sqrt(largest);
    power += *std::min_element(squares, squares + f.v) / static_cast<double>(f.centroids());
  }
  // A little below 2^16: each element is off by half a unit.
  const double step = norms * std::sqrt(static_cast<double>(flush_vectors(f))) / 65300.0;
  const double entry_step = step * 65536.0 / kTableNorm;
  const double error2 = entry_step * entry_step * static_cast<double>(flush_entries(f.b)) / 12.0;
  const bool good = step > 1e-30 && step < 1e30 && error2 <= kAccepted * kAccepted * power;
  return good ? static_cast<float>(step) : 0.0F;
}

/// Rounds codebooks[m][2^b][v] by `step` into [m][v / 2][2^b] of two neighbouring elements, the first below.
inline void fill_pairs(const float* codebooks, Format f, float step, std::int32_t* out) noexcept {
  for (std::int64_t c = 0; c < f.m; ++c) {
    for (std::int64_t i = 0; i < f.centroids(); ++i) {
      const float* const centroid = codebooks + (c * f.centroids() + i) * f.v;
      for (std::int64_t p = 0; p < f.v / 2; ++p) {
        const auto low = static_cast<std::uint32_t>(std::lround(centroid[2 * p] / step));
        const auto high = static_cast<std::uint32_t>(std::lround(centroid[2 * p + 1] / step));
        out[(c * f.v / 2 + p) * f.centroids() + i] = static_cast<std::int32_t>((low & 0xFFFFU) | high << 16U);
      }
    }
  }
}

}  // namespace codegemm::detail
