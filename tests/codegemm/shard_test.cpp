// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/shard_test.cpp - every weight of a shard is the one it was cut from.
#include <codegemm/shard.hpp>

#include <codegemm/reference.hpp>
#include <support/catch.hpp>
#include <support/quantized.hpp>
#include <support/random.hpp>

namespace codegemm::test {
namespace {

TEST_CASE("shard: rows and columns hold the weights they were cut from") {
  const std::uint64_t seed = seed_or(51);
  CAPTURE(seed);
  Rng rng(seed);
  for (const Format format :
       {Format{4, 1, 8, 32}, Format{8, 2, 8, 64}, Format{4, 2, 5, -1}, Format{8, 1, 12, 64}}) {
    const QuantizedMatrix whole = random_matrix(format, 30, 200, rng);
    for (const auto& [first, rows] : {std::pair<int, int>{0, 30}, {7, 11}, {29, 1}, {30, 0}}) {
      const auto part = shard_rows(whole.view(), first, rows);
      REQUIRE(part.ok());
      REQUIRE(validate(part->view()).ok());
      REQUIRE(part->rows() == rows);
      for (std::int64_t n = 0; n < rows; ++n) {
        for (std::int64_t k = 0; k < 200; ++k)
          REQUIRE(reference_weight(part->view(), n, k) == reference_weight(whole.view(), first + n, k));
      }
    }
    for (const auto& [first, cols] : {std::pair<int, int>{0, 128}, {64, 64}, {128, 72}, {0, 200}}) {
      const auto part = shard_cols(whole.view(), first, cols);
      REQUIRE(part.ok());
      REQUIRE(validate(part->view()).ok());
      for (std::int64_t n = 0; n < 30; ++n) {
        for (std::int64_t k = 0; k < cols; ++k)
          REQUIRE(reference_weight(part->view(), n, k) == reference_weight(whole.view(), n, first + k));
      }
    }
  }
}

TEST_CASE("shard: what it refuses") {
  Rng rng(52);
  const QuantizedMatrix w = random_matrix({4, 1, 8, 32}, 30, 200, rng);
  const auto refused = [](const Result<QuantizedMatrix>& made, const char* text) {
    return made.status().code() == StatusCode::kInvalidArgument &&
           made.status().message().find(text) != std::string::npos;
  };
  CHECK(refused(shard_rows(w.view(), 20, 11), "11 rows from row 20 on, of 30"));
  CHECK(refused(shard_rows(w.view(), -1, 2), "row -1"));
  CHECK(refused(shard_cols(w.view(), 16, 64), "multiples of 32"));
  CHECK(refused(shard_cols(w.view(), 32, 60), "multiples of 32"));
  CHECK(refused(shard_cols(w.view(), 192, 16), "16 columns from column 192 on, of 200"));
}

}  // namespace
}  // namespace codegemm::test
