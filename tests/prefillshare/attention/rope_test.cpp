// SPDX-License-Identifier: Apache-2.0
#include <prefillshare/attention/rope.hpp>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <support/catch.hpp>
#include <support/random.hpp>

using codegemm::MatrixView;
using codegemm::StatusCode;
using prefillshare::RopeConfig;
using prefillshare::RopeLayout;
using prefillshare::RopeScaling;
using prefillshare::RopeTable;

namespace {

/// The definition, in double, with none of the fp32 roundings.
double exact_frequency(const RopeConfig& config, int pair) {
  const double plain = std::pow(config.theta, -2.0 * pair / config.head_dim);
  if (config.scaling == RopeScaling::kLinear) return plain / config.factor;
  if (config.scaling == RopeScaling::kNone) return plain;
  const double turns = static_cast<double>(config.original_max_position_embeddings) * plain / (2.0 * M_PI);
  if (turns < config.low_freq_factor) return plain / config.factor;
  if (turns > config.high_freq_factor) return plain;
  const double smooth = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor);
  return (1.0 - smooth) * plain / config.factor + smooth * plain;
}

RopeConfig llama3() {
  RopeConfig config;
  config.head_dim = 128;
  config.theta = 500000.0;
  config.scaling = RopeScaling::kLlama3;
  config.factor = 8.0;
  config.low_freq_factor = 1.0;
  config.high_freq_factor = 4.0;
  config.original_max_position_embeddings = 8192;
  return config;
}

}  // namespace

TEST_CASE("RoPE frequencies are those of the definition") {
  RopeConfig plain;
  plain.head_dim = 64;
  RopeConfig linear = plain;
  linear.scaling = RopeScaling::kLinear;
  linear.factor = 4.0;
  for (const RopeConfig& config : {plain, linear, llama3()}) {
    CAPTURE(static_cast<int>(config.scaling));
    for (int pair = 0; pair < config.head_dim / 2; ++pair) {
      CAPTURE(pair);
      const double exact = exact_frequency(config, pair);
      const double got = static_cast<double>(prefillshare::rope_frequency(config, pair));
      CHECK(std::abs(got - exact) <= 1e-6 * exact);
    }
  }
  CHECK(prefillshare::rope_frequency(plain, 0) == 1.0F);
  CHECK(prefillshare::rope_frequency(linear, 0) == 0.25F);
}

TEST_CASE("llama3 scaling keeps high frequencies, divides low ones, and blends between") {
  const RopeConfig scaled = llama3();
  RopeConfig plain = scaled;
  plain.scaling = RopeScaling::kNone;
  int kept = 0, divided = 0, blended = 0;
  for (int pair = 0; pair < 64; ++pair) {
    const float before = prefillshare::rope_frequency(plain, pair);
    const float after = prefillshare::rope_frequency(scaled, pair);
    if (after == before)
      ++kept;
    else if (after == before / 8.0F)
      ++divided;
    else
      ++blended;
    CHECK(after <= before);
    CHECK(after >= before / 8.0F);
  }
  // Wavelengths 2 pi 500000^(pair / 64) against 8192 / 4 and 8192: pairs up to 28, and from 35.
  CHECK(kept == 29);
  CHECK(blended == 6);
  CHECK(divided == 29);
}

TEST_CASE("RoPE turns each pair by its angle") {
  codegemm::test::Rng rng(31);
  for (const RopeLayout layout : {RopeLayout::kHalf, RopeLayout::kInterleaved}) {
    RopeConfig config;
    config.head_dim = 16;
    config.layout = layout;
    const auto table = RopeTable::create(config, 3000);
    REQUIRE(table.ok());
    CHECK(table->positions() == 3000);
    constexpr std::int64_t kHeads = 3, kTokens = 4, kStride = kHeads * 16 + 5;
    const std::int64_t first = 2990;
    const std::vector<float> before = rng.normals(kTokens * kStride);
    std::vector<float> x = before;
    REQUIRE(table->apply(MatrixView<float>(x.data(), kTokens, kHeads * 16, kStride), first).ok());
    for (std::int64_t t = 0; t < kTokens; ++t) {
      for (std::int64_t head = 0; head < kHeads; ++head) {
        for (int pair = 0; pair < 8; ++pair) {
          const int low = layout == RopeLayout::kHalf ? pair : 2 * pair;
          const int high = layout == RopeLayout::kHalf ? pair + 8 : 2 * pair + 1;
          const auto at = static_cast<std::size_t>(t * kStride + head * 16);
          const double angle = static_cast<double>(first + t) * exact_frequency(config, pair);
          const double a = static_cast<double>(before[at + static_cast<std::size_t>(low)]);
          const double b = static_cast<double>(before[at + static_cast<std::size_t>(high)]);
          // The angle is a product of fp32 numbers: off by up to 2^-22 of itself.
          const double bound = (angle * 0x1p-22 + 1e-6) * (std::abs(a) + std::abs(b));
          CHECK(std::abs(static_cast<double>(x[at + static_cast<std::size_t>(low)]) -
                         (a * std::cos(angle) - b * std::sin(angle))) <= bound);
          CHECK(std::abs(static_cast<double>(x[at + static_cast<std::size_t>(high)]) -
                         (b * std::cos(angle) + a * std::sin(angle))) <= bound);
        }
      }
      for (std::int64_t i = t * kStride + kHeads * 16; i < (t + 1) * kStride; ++i) {  // between the rows
        CHECK(x[static_cast<std::size_t>(i)] == before[static_cast<std::size_t>(i)]);
      }
    }
  }
}

TEST_CASE("RoPE at position 0 is the identity, and scores depend on the distance only") {
  codegemm::test::Rng rng(32);
  RopeConfig config;
  config.head_dim = 64;
  const auto table = RopeTable::create(config, 600);
  REQUIRE(table.ok());
  const std::vector<float> q = rng.normals(64);
  const std::vector<float> k = rng.normals(64);
  std::vector<float> same = q;
  REQUIRE(table->apply(MatrixView<float>(same.data(), 1, 64), 0).ok());
  CHECK(same == q);
  const auto score = [&](std::int64_t q_position, std::int64_t k_position) {
    std::vector<float> a = q, b = k;
    REQUIRE(table->apply(MatrixView<float>(a.data(), 1, 64), q_position).ok());
    REQUIRE(table->apply(MatrixView<float>(b.data(), 1, 64), k_position).ok());
    double sum = 0.0;
    for (std::size_t i = 0; i < 64; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    return sum;
  };
  CHECK(std::abs(score(17, 5) - score(512, 500)) < 2e-3);
  CHECK(std::abs(score(17, 5) - score(512, 501)) > 1e-2);
}

TEST_CASE("RoPE refuses what it cannot turn") {
  RopeConfig config;
  config.head_dim = 16;
  const auto table = RopeTable::create(config, 10);
  REQUIRE(table.ok());
  std::vector<float> x(64, 1.0F);
  CHECK(table->apply(MatrixView<float>(nullptr, 0, 16), 10).ok());
  CHECK(table->apply(MatrixView<float>(nullptr, 1, 16), 0).code() == StatusCode::kNullPointer);
  CHECK(table->apply(MatrixView<float>(x.data(), 1, 24), 0).code() == StatusCode::kShapeMismatch);
  CHECK(table->apply(MatrixView<float>(x.data(), 2, 16, 8), 0).code() == StatusCode::kShapeMismatch);
  CHECK(table->apply(MatrixView<float>(x.data(), 2, 16), 9).message() ==
        "RopeTable::apply: 2 tokens at position 9, the table has 10 positions");
  CHECK(table->apply(MatrixView<float>(x.data(), 2, 16), -1).code() == StatusCode::kInvalidArgument);
  CHECK(table->apply(MatrixView<float>(x.data(), 2, 16), std::numeric_limits<std::int64_t>::max()).code() ==
        StatusCode::kInvalidArgument);
  CHECK(RopeTable().apply(MatrixView<float>(x.data(), 1, 16), 0).code() == StatusCode::kShapeMismatch);
  CHECK(x == std::vector<float>(64, 1.0F));

  const auto refused = [](const RopeConfig& wrong) {
    return RopeTable::create(wrong, 4).status().code() == StatusCode::kInvalidArgument;
  };
  RopeConfig wrong = config;
  wrong.head_dim = 15;
  CHECK(refused(wrong));
  wrong = config;
  wrong.theta = 0.0;
  CHECK(refused(wrong));
  wrong.theta = std::numeric_limits<double>::quiet_NaN();
  CHECK(refused(wrong));
  wrong = llama3();
  wrong.high_freq_factor = 1.0;
  CHECK(refused(wrong));
  wrong = llama3();
  wrong.factor = -1.0;
  CHECK(refused(wrong));
  wrong = llama3();
  wrong.original_max_position_embeddings = 0;
  CHECK(refused(wrong));
  CHECK(RopeTable::create(config, -1).status().code() == StatusCode::kInvalidArgument);
}
