// SPDX-License-Identifier: Apache-2.0
//
// codegemm/base/numerics.hpp - fp16 and bf16 as bits in memory, converted exactly.
// Layer: base (host + device, no CUDA headers).
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include <codegemm/base/macros.hpp>

namespace codegemm {

/// IEEE 754 binary16, stored as its bits. Rounds to nearest even; overflow gives infinity, NaN stays NaN.
struct Half {
  std::uint16_t bits = 0;  ///< sign, 5 bits of exponent, 10 of mantissa

  /// Rounds to nearest, ties to even; what is too large becomes infinity.
  [[nodiscard]] static constexpr Half from_float(float value) noexcept {
    const std::uint32_t x = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = (x >> 16) & 0x8000U;
    const std::uint32_t magnitude = x & 0x7FFFFFFFU;
    std::uint32_t half = 0;
    if (magnitude > 0x7F800000U) {  // NaN: keep the top payload bits, stay quiet
      half = 0x7E00U | ((magnitude >> 13) & 0x3FFU);
    } else if (magnitude >= 0x477FF000U) {  // rounds to 65536 or more, or is infinite
      half = 0x7C00U;
    } else if (magnitude >= 0x38800000U) {  // normal
      half = ((magnitude - 0x38000000U) + 0xFFFU + ((magnitude >> 13) & 1U)) >> 13;
    } else if (magnitude >= 0x33000000U) {  // subnormal: shift the explicit significand into place
      const std::uint32_t shift = 126U - (magnitude >> 23);
      const std::uint32_t significand = (magnitude & 0x7FFFFFU) | 0x800000U;
      const std::uint32_t dropped = significand & ((1U << shift) - 1U);
      const std::uint32_t middle = 1U << (shift - 1U);
      half = significand >> shift;
      if (dropped > middle || (dropped == middle && (half & 1U) != 0U)) ++half;
    }
    return Half{static_cast<std::uint16_t>(sign | half)};
  }

  /// Exact.
  [[nodiscard]] constexpr float to_float() const noexcept {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16;
    const std::uint32_t exponent = (bits >> 10) & 0x1FU;
    const std::uint32_t fraction = bits & 0x3FFU;
    if (exponent == 0x1FU) return std::bit_cast<float>(sign | 0x7F800000U | (fraction << 13));
    if (exponent != 0U) return std::bit_cast<float>(sign | ((exponent + 112U) << 23) | (fraction << 13));
    const float magnitude = static_cast<float>(fraction) * 0x1p-24F;  // exact: fraction < 2^10
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(magnitude));
  }

  /// Compares the bits: +0 and -0 differ, a NaN equals itself.
  friend constexpr bool operator==(Half, Half) = default;
};
static_assert(sizeof(Half) == 2 && std::is_trivially_copyable_v<Half>, "Half is two bytes in a file");

/// bfloat16, stored as its bits. Rounds to nearest even; NaN stays NaN.
struct BFloat16 {
  std::uint16_t bits = 0;  ///< sign, 8 bits of exponent, 7 of mantissa

  /// Rounds to nearest, ties to even.
  [[nodiscard]] static constexpr BFloat16 from_float(float value) noexcept {
    const std::uint32_t x = std::bit_cast<std::uint32_t>(value);
    if ((x & 0x7FFFFFFFU) > 0x7F800000U) return BFloat16{static_cast<std::uint16_t>((x >> 16) | 0x40U)};
    return BFloat16{static_cast<std::uint16_t>((x + 0x7FFFU + ((x >> 16) & 1U)) >> 16)};
  }

  /// Exact.
  [[nodiscard]] constexpr float to_float() const noexcept {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  }

  /// Compares the bits, as Half does.
  friend constexpr bool operator==(BFloat16, BFloat16) = default;
};
static_assert(sizeof(BFloat16) == 2 && std::is_trivially_copyable_v<BFloat16>,
              "BFloat16 is two bytes in a file");

}  // namespace codegemm
