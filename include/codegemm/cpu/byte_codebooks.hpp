// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/byte_codebooks.hpp - codebooks as pairs of signed bytes, arranged for the look-ups that
// rebuild weights in front of AMX's tiles.
// Layer: cpu (host only).
//
// With a radix R = 2^r a rounded centroid element is q = R high + low, -R/2 <= low < R/2. R is 256 over the
// number of codebooks (rounded up to a power of two), so that the bytes of m centroids add up to those of
// their sum: rebuilding a weight is m look-ups and additions of bytes, nothing else.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include <codegemm/format.hpp>

namespace codegemm::detail {

/// The most codebooks: with more the radix leaves too few bits.
inline constexpr int kByteCodebooksMax = 8;

/// r of R = 2^r.
[[nodiscard]] constexpr int byte_radix_bits(int m) noexcept {
  return m <= 1 ? 8 : m <= 2 ? 7 : m <= 4 ? 6 : 5;
}

/// The largest sum of m rounded elements: their high bytes, each rounded, then add up to at most 127.
[[nodiscard]] constexpr std::int64_t byte_weight_max(int m) noexcept {
  return (std::int64_t{1} << byte_radix_bits(m)) * (254 - m) / 2;
}

/// Columns that lie side by side in a tile of AMX: the elements of a vector, or of two of 2.
inline constexpr int kByteColumns = 4;

/// Bytes of one centroid's entry where they are gathered, see fill_byte_codebooks().
[[nodiscard]] constexpr std::int64_t byte_entry_bytes(int v) noexcept { return v == 2 ? 16 : 2 * v; }

/// Bytes of one codebook of 16 centroids where they are permuted, elements of four columns at once.
[[nodiscard]] constexpr std::int64_t byte_permute_bytes(int v) noexcept {
  return std::int64_t{128} * std::max(1, v / 4);
}

/// Bytes of one element of a codebook of 32 or 64 centroids where they are permuted.
inline constexpr std::int64_t kBytePlanes = 128;

/// Whether codes of so many bits are permuted; else entries are gathered.
[[nodiscard]] constexpr bool bytes_are_permuted(int code_bits) noexcept { return code_bits <= 6; }

/// Bytes of all codebooks, and some behind them: registers are loaded whole.
[[nodiscard]] constexpr std::int64_t byte_codebook_bytes(Format f) noexcept {
  const std::int64_t one = f.b == 4                  ? byte_permute_bytes(f.v)
                           : bytes_are_permuted(f.b) ? f.v * kBytePlanes
                                                     : f.centroids() * byte_entry_bytes(f.v);
  return f.m * one + 16;
}

/// Rounds codebooks[m][2^b][v] by `step`, at most byte_weight_max() in sum. With 4 bits a code: [m][groups of
/// 4 elements][high, low][64], byte 16 d + i of element d of centroid i. With 5 or 6: [m][v][high, low][64
/// centroids]. Else [m][2^b][groups][high x 4, low x 4]; v = 2: twice, followed by two zeros as the first of
/// two vectors has it, and after them as the second.
inline void fill_byte_codebooks(const float* codebooks, Format f, float step, std::int8_t* out) {
  const int bits = byte_radix_bits(f.m);
  const int half = 1 << (bits - 1);
  std::fill_n(out, byte_codebook_bytes(f), std::int8_t{0});
  for (std::int64_t c = 0; c < f.m; ++c) {
    for (std::int64_t i = 0; i < f.centroids(); ++i) {
      for (std::int64_t d = 0; d < f.v; ++d) {
        const auto q = static_cast<int>(std::lround(codebooks[(c * f.centroids() + i) * f.v + d] / step));
        const int high = (q + half) >> bits;
        const auto high_byte = static_cast<std::int8_t>(high);
        const auto low_byte = static_cast<std::int8_t>(q - high * 2 * half);
        if (f.b == 4) {
          std::int8_t* const to = out + c * byte_permute_bytes(f.v) + d / 4 * 128 + d % 4 * 16 + i;
          to[0] = high_byte;
          to[64] = low_byte;
          continue;
        }
        if (bytes_are_permuted(f.b)) {
          std::int8_t* const to = out + (c * f.v + d) * kBytePlanes + i;
          to[0] = high_byte;
          to[64] = low_byte;
          continue;
        }
        std::int8_t* const entry = out + (c * f.centroids() + i) * byte_entry_bytes(f.v);
        std::int8_t* const to = entry + d / 4 * 8 + d % 4;
        to[0] = high_byte;
        to[4] = low_byte;
        if (f.v == 2) {
          entry[8 + 2 + d] = high_byte;
          entry[12 + 2 + d] = low_byte;
        }
      }
    }
  }
}

}  // namespace codegemm::detail
