// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/format_test.cpp - names, limits and bits per weight of the codebook formats.

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

#include <codegemm/base/config_list.hpp>
#include <codegemm/format.hpp>

#include <support/catch.hpp>

using codegemm::Format;
using codegemm::StatusCode;

TEST_CASE("a format's name is read back as the same format", "[codegemm]") {
  for (const int v : {2, 4, 8, 16}) {
    for (int m = 1; m <= codegemm::kMaxCodebooks; ++m) {
      for (int b = codegemm::kMinCodeBits; b <= codegemm::kMaxCodeBits; ++b) {
        for (const int g : {-1, v, 3 * v, 128, 1 << 20}) {
          const Format f{v, m, b, g};
          const auto read = codegemm::parse_format(codegemm::format_name(f));
          CAPTURE(codegemm::format_name(f));
          REQUIRE(read.ok());
          REQUIRE(*read == f);
        }
      }
    }
  }
  CHECK(codegemm::format_name(Format{4, 1, 8, 128}) == "m1v4g128");
  CHECK(codegemm::format_name(Format{8, 2, 8, -1}) == "m2v8g-1");
  CHECK(codegemm::format_name(Format{4, 1, 6, 32}) == "m1v4b6g32");
  CHECK(*codegemm::parse_format("m1v4b8g128") == Format{4, 1, 8, 128});
  CHECK(codegemm::StaticFormat<8, 2, 8, 128>::format() == Format{8, 2, 8, 128});
}

TEST_CASE("a name that is no format is refused and quoted, but never at length", "[codegemm]") {
  for (const std::string_view bad :
       {"", "m", "m1", "m1v4", "v4m1g128", "m1v4g", "m1v4g128 ", " m1v4g128", "m1v4g128x", "M1V4G128",
        "m+1v4g128", "m1v4b6", "m1v4bg32", "m1v4g--1", "m1v4g1.5", "m99999999999v4g128", "m1v4g0x10"}) {
    const auto read = codegemm::parse_format(bad);
    CAPTURE(bad);
    REQUIRE_FALSE(read.ok());
    CHECK(read.status().code() == StatusCode::kInvalidArgument);
    CHECK(read.status().message() ==
          codegemm::concat("format '", bad,
                           "' is not of the form mMvVgG or mMvVbBgG, such as m1v4g128 "
                           "or m1v4b6g32"));
  }
  const auto zero = codegemm::parse_format(std::string_view("m1v4g128\0", 9));
  CHECK_FALSE(zero.ok());
  const auto longest = codegemm::parse_format(std::string(100000, 'm'));
  CHECK(longest.status().message().size() < 200);
  const auto hostile = codegemm::parse_format("m1\x1b[2J").status().message();
  CHECK(hostile.find("'m1\\x1b[2J'") != std::string::npos);
}

TEST_CASE("numbers outside the limits are named", "[codegemm]") {
  const auto text = [](std::string_view name) { return codegemm::parse_format(name).status().message(); };
  CHECK(text("m1v3g128") == "'m1v3g128': format: v = 3 is not 2, 4, 8 or 16");
  CHECK(text("m0v4g128") == "'m0v4g128': format: m = 0 is not in 1..4");
  CHECK(text("m5v4g128") == "'m5v4g128': format: m = 5 is not in 1..4");
  CHECK(text("m1v4b3g128") == "'m1v4b3g128': format: b = 3 is not in 4..16");
  CHECK(text("m1v4b17g128") == "'m1v4b17g128': format: b = 17 is not in 4..16");
  CHECK(text("m1v4g0") == "'m1v4g0': format: g = 0 is neither -1 nor a positive multiple of v = 4");
  CHECK(text("m1v4g-2") == "'m1v4g-2': format: g = -2 is neither -1 nor a positive multiple of v = 4");
  CHECK(text("m1v8g12") == "'m1v8g12': format: g = 12 is neither -1 nor a positive multiple of v = 8");
  CHECK(codegemm::validate(Format{-4, 1, 8, 128}).code() == StatusCode::kInvalidArgument);
  CHECK(codegemm::validate(Format{0, 1, 8, 128}).code() == StatusCode::kInvalidArgument);
}

namespace {
bool near(double a, double b) { return std::fabs(a - b) <= 1e-12 * std::fabs(b); }
}  // namespace

TEST_CASE("bits per weight follow the paper's formula", "[codegemm]") {
  // 2 + 16 / 128 + 16 * 256 * 4 / 4096^2
  CHECK(near(codegemm::bits_per_weight(Format{4, 1, 8, 128}, 4096, 4096), 2.1259765625));
  CHECK(near(codegemm::bits_per_weight(Format{8, 2, 8, 128}, 4096, 4096),
             2.125 + 16.0 * 2 * 256 * 8 / (4096.0 * 4096.0)));
  CHECK(near(codegemm::bits_per_weight(Format{4, 1, 8, -1}, 1000, 400),
             2.0 + 16.0 / 400 + 16.0 * 256 * 4 / 400000.0));
  CHECK(codegemm::bits_per_weight(Format{4, 1, 8, 128}, 0, 4096) == 2.0);
  // The last scale of a row that is no multiple of g is a whole one.
  CHECK(near(codegemm::bits_per_weight(Format{4, 1, 8, 128}, 1, 132),
             2.0 + 32.0 / 132 + 16.0 * 256 * 4 / 132.0));
}

namespace {
struct A {
  static constexpr int kValue = 1;
};
struct B {
  static constexpr int kValue = 2;
};
struct C {
  static constexpr int kValue = 2;
};
}  // namespace

TEST_CASE("first_match takes the first configuration that fits and only that", "[codegemm]") {
  using List = codegemm::config_list<A, B, C>;
  int calls = 0;
  bool was_b = false;
  const auto run = [&](auto config) {
    ++calls;
    was_b = std::is_same_v<decltype(config), B>;
  };
  CHECK(codegemm::first_match(
      List{}, [](auto config) { return config.kValue == 2; }, run));
  CHECK(calls == 1);
  CHECK(was_b);
  CHECK_FALSE(codegemm::first_match(
      List{}, [](auto config) { return config.kValue == 3; }, run));
  CHECK_FALSE(codegemm::first_match(
      codegemm::config_list<>{}, [](auto) { return true; }, run));
  CHECK(calls == 1);
  int sum = 0;
  codegemm::for_each_config(List{}, [&](auto config) { sum = sum * 10 + config.kValue; });
  CHECK(sum == 122);
  static_assert(List::kSize == 3);
}
