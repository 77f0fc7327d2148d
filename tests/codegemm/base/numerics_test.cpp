// SPDX-License-Identifier: Apache-2.0
#include <codegemm/base/numerics.hpp>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>

#include <support/catch.hpp>
#include <support/random.hpp>

namespace {

using codegemm::BFloat16;
using codegemm::Half;

// The value of binary16 bits by the standard's formula, in double, where every one of them is exact.
double half_value(std::uint32_t bits) {
  const double sign = (bits & 0x8000U) != 0U ? -1.0 : 1.0;
  const int exponent = static_cast<int>((bits >> 10) & 31U);
  const int fraction = static_cast<int>(bits & 1023U);
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

bool is_finite_half(std::uint32_t bits) { return (bits & 0x7C00U) != 0x7C00U; }
Half half_of(std::uint32_t bits) { return Half{static_cast<std::uint16_t>(bits)}; }
BFloat16 bfloat_of(std::uint32_t bits) { return BFloat16{static_cast<std::uint16_t>(bits)}; }

// Round to nearest even by its definition: of the two neighbours the nearer, of two equally near the even
// one.
std::uint32_t nearest_half(double magnitude) {
  std::uint32_t low = 0;
  std::uint32_t high = 0x7C00U;  // stands for 65536, where infinity begins to be nearer
  while (high - low > 1U) {
    const std::uint32_t middle = (low + high) / 2U;
    (half_value(middle) <= magnitude ? low : high) = middle;
  }
  const double below = magnitude - half_value(low);
  const double above = half_value(high) - magnitude;  // half_value(0x7C00) is 65536 by the formula
  if (below != above) return below < above ? low : high;
  return (low & 1U) == 0U ? low : high;
}

}  // namespace

TEST_CASE("half: all 65536 values become the float they stand for, and come back") {
  for (std::uint32_t bits = 0; bits < 65536U; ++bits) {
    const float value = half_of(bits).to_float();
    const Half back = Half::from_float(value);
    if (is_finite_half(bits)) {
      if (static_cast<double>(value) != half_value(bits) || back.bits != bits ||
          std::signbit(value) != ((bits & 0x8000U) != 0U)) {
        CAPTURE(bits, value, back.bits);
        FAIL("finite half is not exact");
      }
    } else if ((bits & 0x3FFU) == 0U) {
      if (!std::isinf(value) || back.bits != bits) {
        CAPTURE(bits, value, back.bits);
        FAIL("infinity is not kept");
      }
    } else if (!std::isnan(value) || !std::isnan(back.to_float()) || ((back.bits ^ bits) & 0x8000U) != 0U) {
      CAPTURE(bits, value, back.bits);
      FAIL("NaN or its sign is not kept");
    }
  }
  SUCCEED();
}

TEST_CASE("half: halfway cases go to even, their neighbours to the nearer side") {
  // Between each two neighbouring finite halves, and between the largest and infinity.
  for (std::uint32_t low = 0; low < 0x7C00U; ++low) {
    const double middle = (half_value(low) + half_value(low + 1U)) / 2.0;
    const auto tie = static_cast<float>(middle);
    REQUIRE(static_cast<double>(tie) == middle);  // a tie has 11 significant bits: a float holds it
    const std::uint32_t even = (low & 1U) == 0U ? low : low + 1U;
    const float below = std::nextafter(tie, 0.0F);
    const float above = std::nextafter(tie, std::numeric_limits<float>::infinity());
    for (const std::uint32_t sign : {0U, 0x8000U}) {
      const float s = sign == 0U ? 1.0F : -1.0F;
      if (Half::from_float(s * tie).bits != (sign | even) ||
          Half::from_float(s * below).bits != (sign | low) ||
          Half::from_float(s * above).bits != (sign | (low + 1U))) {
        CAPTURE(low, sign, tie);
        FAIL("rounds the wrong way");
      }
    }
  }
  SUCCEED();
}

TEST_CASE("half: any float rounds to its nearest half") {
  const std::uint64_t seed = codegemm::test::seed_or(7);
  CAPTURE(seed);
  codegemm::test::Rng rng(seed);
  for (int i = 0; i < 300000; ++i) {
    // Every exponent from where all is zero to where all is infinite, and random bits below.
    const auto exponent = static_cast<std::uint32_t>(127 - 30 + rng.below(48));
    const auto fraction = static_cast<std::uint32_t>(rng.next() & 0x7FFFFFU);
    const float value = std::bit_cast<float>((exponent << 23) | fraction);
    if (Half::from_float(value).bits != nearest_half(value) ||
        Half::from_float(-value).bits != (nearest_half(value) | 0x8000U)) {
      CAPTURE(value);
      FAIL("not the nearest half");
    }
  }
  SUCCEED();
}

TEST_CASE("half: the ends of the range") {
  CHECK(Half::from_float(65504.0F).bits == 0x7BFF);
  CHECK(Half::from_float(65519.996F).bits == 0x7BFF);
  CHECK(Half::from_float(65520.0F).bits == 0x7C00);  // the tie between 65504 and 65536
  CHECK(Half::from_float(std::numeric_limits<float>::max()).bits == 0x7C00);
  CHECK(Half::from_float(-std::numeric_limits<float>::infinity()).bits == 0xFC00);
  CHECK(Half::from_float(0x1p-24F).bits == 1);
  CHECK(Half::from_float(0x1p-25F).bits == 0);  // the tie between 0 and the smallest
  CHECK(Half::from_float(std::nextafter(0x1p-25F, 1.0F)).bits == 1);
  CHECK(Half::from_float(std::numeric_limits<float>::denorm_min()).bits == 0);
  CHECK(Half::from_float(-0.0F).bits == 0x8000);
  CHECK(std::isnan(Half::from_float(std::numeric_limits<float>::quiet_NaN()).to_float()));
  // A NaN whose payload lies only in the bits that are dropped must not become infinity.
  CHECK(std::isnan(Half::from_float(std::bit_cast<float>(0x7F800001U)).to_float()));
  static_assert(Half::from_float(1.0F).bits == 0x3C00 && Half{0x3C00}.to_float() == 1.0F,
                "usable at compile time");
}

TEST_CASE("bfloat16: all 65536 values come back") {
  for (std::uint32_t bits = 0; bits < 65536U; ++bits) {
    const float value = bfloat_of(bits).to_float();
    const std::uint32_t back = BFloat16::from_float(value).bits;
    const bool same = std::isnan(value) ? std::isnan(bfloat_of(back).to_float()) : back == bits;
    if (!same || std::bit_cast<std::uint32_t>(value) != bits << 16) {
      CAPTURE(bits, back);
      FAIL("bfloat16 is not kept");
    }
  }
  SUCCEED();
}

TEST_CASE("bfloat16: halfway cases go to even, their neighbours to the nearer side") {
  for (std::uint32_t low = 0; low < 0x7F80U; ++low) {
    const std::uint32_t even = (low & 1U) == 0U ? low : low + 1U;
    for (const std::uint32_t sign : {0U, 0x8000U}) {
      const std::uint32_t tie = ((sign | low) << 16) | 0x8000U;
      const auto round = [](std::uint32_t x) {
        return static_cast<std::uint32_t>(BFloat16::from_float(std::bit_cast<float>(x)).bits);
      };
      if (round(tie) != (sign | even) || round(tie - 1U) != (sign | low) ||
          round(tie + 1U) != (sign | (low + 1U))) {
        CAPTURE(low, sign);
        FAIL("rounds the wrong way");
      }
    }
  }
  CHECK(BFloat16::from_float(std::numeric_limits<float>::max()).bits == 0x7F80);
  CHECK(std::isnan(BFloat16::from_float(std::bit_cast<float>(0x7F800001U)).to_float()));
  CHECK(std::isnan(BFloat16::from_float(std::bit_cast<float>(0xFFFFFFFFU)).to_float()));
}
