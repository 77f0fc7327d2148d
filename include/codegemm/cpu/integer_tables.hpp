// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/integer_tables.hpp - codebooks as pairs of 16-bit integers, of which Psumbook tables are made
// in the 16 bits that are looked up, without a table in fp32 before.
// Layer: cpu (host only).
//
// The activations X of a flush are rounded so that their norm is kTableNorm, centroids C so that the sum of a
// flush's entries C X / 2^16 fits into 16 bits whatever the activations: by Cauchy's inequality it is at most
// |W| |X| / 2^16, W being what a row's codes of the flush stand for. pack() knows the longest W of all rows,
// so the step is known before the table is, and the error, relative to a typical row's sum, too. Only the sum
// of a row has to fit: entries, like the sums on the way, are what they are modulo 2^16.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <codegemm/cpu/configs.hpp>
#include <codegemm/cpu/isa.hpp>
#include <codegemm/format.hpp>
#include <codegemm/quantized_matrix.hpp>

namespace codegemm::detail {

/// The norm of a flush's rounded activations, but for what rounding adds.
inline constexpr float kTableNorm = 32700.0F;

/// Whether `isa` has kernels for them.
[[nodiscard]] constexpr bool makes_integer_tables(Isa isa, int code_bits) noexcept {
  return isa == Isa::kAvx512Vbmi && code_bits >= 4;
}

// The codes of vector j for each row, codebook by codebook.
struct VectorCodes {
  const std::uint32_t* words;  // [m][rows], codebooks `stride` apart
  std::int64_t stride;
  int shift;
  std::uint32_t mask;

  VectorCodes(const QuantizedMatrixView& w, std::int64_t j) noexcept {
    const int per_word = w.format.codes_per_word();
    words = w.codes + j / per_word * w.rows;
    stride = (w.vectors() + per_word - 1) / per_word * w.rows;
    shift = static_cast<int>(j % per_word) * w.format.stored_code_bits();
    mask = (1U << w.format.stored_code_bits()) - 1U;
  }
  [[nodiscard]] std::int64_t at(std::int64_t codebook, std::int64_t n) const noexcept {
    return words[codebook * stride + n] >> shift & mask;
  }
};

// squares[n] += |the sum over codebooks [first, end) of what the codes of row n and vector j stand for|^2.
template <int kVecLen>
void add_flush_squares(const QuantizedMatrixView& w, const float* codebooks, std::int64_t j,
                       std::int64_t first, std::int64_t end, float* squares) noexcept {
  const VectorCodes codes(w, j);
  for (std::int64_t n = 0; n < w.rows; ++n) {
    float sums[std::size_t{kVecLen}] = {};
    for (std::int64_t c = first; c < end; ++c) {
      const float* const centroid = codebooks + (c * w.format.centroids() + codes.at(c, n)) * kVecLen;
      for (int d = 0; d < kVecLen; ++d) sums[d] += centroid[d];
    }
    float square = 0.0F;
    for (int d = 0; d < kVecLen; ++d) square += sums[d] * sums[d];
    squares[n] += square;
  }
}

// The same for one codebook, whose centroids' |C|^2 are known.
inline void add_known_squares(const QuantizedMatrixView& w, const float* norms, std::int64_t j,
                              std::int64_t codebook, float* squares) noexcept {
  const VectorCodes codes(w, j);
  const float* const of = norms + codebook * w.format.centroids();
  for (std::int64_t n = 0; n < w.rows; ++n) squares[n] += of[codes.at(codebook, n)];
}

/// The largest norm of what the codes of a row and a flush stand for, scales left out. Flushes begin anew
/// with each tile and each scale group.
[[nodiscard]] inline double longest_flush(const QuantizedMatrixView& w, const float* codebooks,
                                          std::int64_t tile_vectors) {
  const Format f = w.format;
  const std::int64_t m = f.m;
  const std::int64_t segment = f.g < 0 ? std::max<std::int64_t>(1, w.vectors()) : f.g / f.v;
  const auto add = f.v == 2   ? &add_flush_squares<2>
                   : f.v == 4 ? &add_flush_squares<4>
                   : f.v == 8 ? &add_flush_squares<8>
                              : &add_flush_squares<16>;
  std::vector<float> squares(static_cast<std::size_t>(w.rows));
  std::vector<float> norms(static_cast<std::size_t>(m * f.centroids()), 0.0F);
  for (std::size_t i = 0; i < norms.size(); ++i) {
    const float* const centroid = codebooks + static_cast<std::int64_t>(i) * f.v;
    for (int d = 0; d < f.v; ++d) norms[i] += centroid[d] * centroid[d];
  }
  float longest = 0.0F;
  for (std::int64_t j = 0, next = 0; j < w.vectors(); j = next) {
    next = std::min({w.vectors(), (j / tile_vectors + 1) * tile_vectors, (j / segment + 1) * segment});
    for (std::int64_t first = j * m, end = 0; first < next * m; first = end) {
      end = std::min(first + flush_entries(f.b), next * m);
      std::fill(squares.begin(), squares.end(), 0.0F);
      for (std::int64_t i = first / m; i * m < end; ++i) {
        const std::int64_t from = std::max<std::int64_t>(0, first - i * m);
        const std::int64_t to = std::min(m, end - i * m);
        if (to - from == 1) {
          add_known_squares(w, norms.data(), i, from, squares.data());
        } else {
          add(w, codebooks, i, from, to, squares.data());
        }
      }
      for (const float sum : squares) longest = std::max(longest, sum);
    }
  }
  return std::sqrt(static_cast<double>(longest));
}

/// By what codebooks[m][2^b][v] are to be rounded, `longest` being longest_flush(), or 0 where 16 bits are
/// not enough: centroids or rows that are far out, beyond what the others are like, stretch the step.
[[nodiscard]] inline float pair_step(const float* codebooks, Format f, double longest) noexcept {
  // Of a typical row's sum, as in flush_step(); rounding activations and centroids adds some hundredths.
  constexpr double kAccepted = 8e-4;
  double largest = 0.0;
  double power = 0.0;  // of an entry of each codebook, if x lies along the axis where it is least
  for (std::int64_t c = 0; c < f.m; ++c) {
    double squares[kMaxVecLen] = {};
    for (std::int64_t i = 0; i < f.centroids(); ++i) {
      for (std::int64_t d = 0; d < f.v; ++d) {
        const double value = codebooks[(c * f.centroids() + i) * f.v + d];
        squares[d] += value * value;
        largest = std::max(largest, std::abs(value));
      }
    }
    power += *std::min_element(squares, squares + f.v) / static_cast<double>(f.centroids());
  }
  // A little below 2^16, since each element is off by half a unit; and each has to fit into 16 bits.
  const double step = std::max(longest / 65200.0, largest / 32760.0);
  const double entry_step = step * 65536.0 / kTableNorm;
  const double error2 = entry_step * entry_step * static_cast<double>(flush_entries(f.b)) / 12.0;
  const bool good = step > 1e-30 && step < 1e30 && error2 <= kAccepted * kAccepted * power;
  return good ? static_cast<float>(step) : 0.0F;
}

/// Centroids that are multiplied together, where there are so many.
inline constexpr std::int64_t kPairBlock = 32;

/// Where the pairs of centroid i lie: such that tables come out in order though their two halves of a block
/// are made side by side, in either half of the registers.
[[nodiscard]] constexpr std::int64_t pair_place(Format f, std::int64_t i) noexcept {
  if (f.centroids() < kPairBlock) return i;
  const std::int64_t in_block = i % kPairBlock;
  return i - in_block + in_block / 4 % 4 * 8 + in_block / 16 * 4 + in_block % 4;
}

/// Rounds codebooks[m][2^b][v] by `step` into [m][v / 2][2^b] of two neighbouring elements, the first below,
/// centroids by pair_place().
inline void fill_pairs(const float* codebooks, Format f, float step, std::int32_t* out) noexcept {
  for (std::int64_t c = 0; c < f.m; ++c) {
    for (std::int64_t i = 0; i < f.centroids(); ++i) {
      const float* const centroid = codebooks + (c * f.centroids() + i) * f.v;
      for (std::int64_t p = 0; p < f.v / 2; ++p) {
        const auto low = static_cast<std::uint32_t>(std::lround(centroid[2 * p] / step));
        const auto high = static_cast<std::uint32_t>(std::lround(centroid[2 * p + 1] / step));
        out[(c * f.v / 2 + p) * f.centroids() + pair_place(f, i)] =
            static_cast<std::int32_t>((low & 0xFFFFU) | high << 16U);
      }
    }
  }
}

}  // namespace codegemm::detail
