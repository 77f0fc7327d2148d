// SPDX-License-Identifier: Apache-2.0
#include <codegemm/base/text.hpp>

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

#include <support/catch.hpp>

using codegemm::concat;

TEST_CASE("concat: words, characters and numbers of every width") {
  CHECK(concat().empty());
  CHECK(concat("K = ", 4096, ", v = ", 8) == "K = 4096, v = 8");
  CHECK(concat('"', std::string("a"), std::string_view("b"), '"') == "\"ab\"");
  CHECK(concat(true, ' ', false) == "true false");
  CHECK(concat(std::int8_t{-5}, ' ', std::uint8_t{200}) == "-5 200");
  CHECK(concat(std::numeric_limits<std::int64_t>::min()) == "-9223372036854775808");
  CHECK(concat(std::numeric_limits<std::uint64_t>::max()) == "18446744073709551615");
}

TEST_CASE("concat: a C string is text and not a truth value") {
  const char* const pointer = "text";
  char array[] = "array";
  CHECK(concat(pointer, array) == "textarray");
}

TEST_CASE("concat: floating-point numbers have six digits, and fit at both ends") {
  CHECK(concat(0.5) == "0.5");
  CHECK(concat(2.125F) == "2.125");
  CHECK(concat(1.0 / 3.0) == "0.333333");
  CHECK(concat(-std::numeric_limits<double>::max()) == "-1.79769e+308");
  CHECK(concat(std::numeric_limits<double>::denorm_min()) == "4.94066e-324");
  CHECK(concat(std::numeric_limits<double>::infinity()) == "inf");
}

TEST_CASE("concat: a byte 0 inside a text is kept") {
  CHECK(concat(std::string_view("a\0b", 3)).size() == 3);
}
