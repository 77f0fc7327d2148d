// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/element.hpp - the number types that K and V may be kept in.
// Layer: kv (host only).
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/numerics.hpp>

namespace prefillshare {

/// The type of a stored number.
enum class KvElement : std::uint8_t { kFp32, kFp16, kBf16, kFp8E4M3 };

/// Bytes of an element.
[[nodiscard]] constexpr int bytes_of(KvElement element) noexcept {
  switch (element) {
    case KvElement::kFp32: return 4;
    case KvElement::kFp16:
    case KvElement::kBf16: return 2;
    case KvElement::kFp8E4M3: return 1;
  }
  return 0;
}
/// As it is printed: "fp16".
[[nodiscard]] constexpr std::string_view to_string(KvElement element) noexcept {
  switch (element) {
    case KvElement::kFp32: return "fp32";
    case KvElement::kFp16: return "fp16";
    case KvElement::kBf16: return "bf16";
    case KvElement::kFp8E4M3: return "fp8_e4m3";
  }
  return "unknown";
}

/// fp8 with 4 bits of exponent (bias 7) and 3 of fraction, no infinities, NaN = S.1111.111, as its bits (OCP
/// 8-bit floating point). Rounds to nearest even; beyond 448, infinity too, gives 448 of that sign.
struct Fp8E4M3 {
  std::uint8_t bits = 0;  ///< sign, 4 bits of exponent, 3 of fraction

  static constexpr float kMax = 448.0F;  ///< largest magnitude

  /// Rounds to nearest even, see above.
  [[nodiscard]] static constexpr Fp8E4M3 from_float(float value) noexcept {
    const std::uint32_t x = std::bit_cast<std::uint32_t>(value);
    const auto sign = static_cast<std::uint8_t>((x >> 24) & 0x80U);
    const std::uint32_t magnitude = x & 0x7FFFFFFFU;
    if (magnitude > 0x7F800000U) return {static_cast<std::uint8_t>(sign | 0x7FU)};
    if (magnitude >= 0x43E00000U) return {static_cast<std::uint8_t>(sign | 0x7EU)};  // 448 and more
    std::uint32_t out = 0;
    if (magnitude >= 0x3C800000U) {  // normal: 2^-6 and more
      const std::uint32_t rebased = magnitude - (120U << 23);
      out = (rebased + 0x7FFFFU + ((rebased >> 20) & 1U)) >> 20;
    } else {  // subnormal: in units of 2^-9; adding 2^14 rounds to them in fp32's last bit
      const float rounded = std::bit_cast<float>(magnitude) + 16384.0F;
      out = std::bit_cast<std::uint32_t>(rounded) - std::bit_cast<std::uint32_t>(16384.0F);
    }
    return {static_cast<std::uint8_t>(sign | out)};
  }

  /// Exact.
  [[nodiscard]] constexpr float to_float() const noexcept {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x80U) << 24;
    const std::uint32_t exponent = (bits >> 3) & 0xFU;
    const std::uint32_t fraction = bits & 0x7U;
    if ((bits & 0x7FU) == 0x7FU) return std::bit_cast<float>(sign | 0x7FC00000U);
    if (exponent != 0) return std::bit_cast<float>(sign | ((exponent + 120U) << 23) | (fraction << 20));
    const float magnitude = static_cast<float>(fraction) * 0x1p-9F;
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(magnitude));
  }

  /// Compares the bits.
  friend constexpr bool operator==(Fp8E4M3, Fp8E4M3) = default;
};
static_assert(sizeof(Fp8E4M3) == 1);

/// element i of `data`, and back. `data` needs no alignment.
[[nodiscard]] inline float load_element(KvElement element, const std::byte* data, std::int64_t i) noexcept {
  const std::byte* const at = data + i * bytes_of(element);
  const auto as = [at](auto value) {
    std::memcpy(&value, at, sizeof(value));
    return value;
  };
  switch (element) {
    case KvElement::kFp32: return as(0.0F);
    case KvElement::kFp16: return as(codegemm::Half{}).to_float();
    case KvElement::kBf16: return as(codegemm::BFloat16{}).to_float();
    case KvElement::kFp8E4M3: return as(Fp8E4M3{}).to_float();
  }
  return 0.0F;
}
/// Rounds to nearest even.
inline void store_element(KvElement element, std::byte* data, std::int64_t i, float value) noexcept {
  std::byte* const at = data + i * bytes_of(element);
  const auto put = [at](const auto& bits) { std::memcpy(at, &bits, sizeof(bits)); };
  switch (element) {
    case KvElement::kFp32: put(value); break;
    case KvElement::kFp16: put(codegemm::Half::from_float(value)); break;
    case KvElement::kBf16: put(codegemm::BFloat16::from_float(value)); break;
    case KvElement::kFp8E4M3: put(Fp8E4M3::from_float(value)); break;
  }
}

}  // namespace prefillshare
