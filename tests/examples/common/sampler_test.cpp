// SPDX-License-Identifier: Apache-2.0
//
// tests/examples/common/sampler_test.cpp - greedy choice, the distribution, repetition, bad input.

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <common/sampler.hpp>
#include <support/catch.hpp>
#include <support/random.hpp>

using namespace prefillshare::examples;

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

Sampler make(const SamplerOptions& options) {
  Result<Sampler> sampler = Sampler::create(options);
  INFO(sampler.status().message());
  REQUIRE(sampler.ok());
  return *std::move(sampler);
}

std::vector<double> frequencies(const SamplerOptions& options, const std::vector<float>& logits, int draws) {
  Sampler sampler = make(options);
  std::vector<double> out(logits.size());
  for (int i = 0; i < draws; ++i) {
    const Result<std::int32_t> token = sampler.sample(logits);
    REQUIRE(token.ok());
    out[static_cast<std::size_t>(*token)] += 1.0 / draws;
  }
  return out;
}

}  // namespace

TEST_CASE("greedy takes the greatest logit, the lowest id among equals, never a NaN") {
  Sampler sampler = make({});
  CHECK(*sampler.sample(std::vector<float>{1, 3, 2}) == 1);
  CHECK(*sampler.sample(std::vector<float>{1, 3, 3, 3}) == 1);
  CHECK(*sampler.sample(std::vector<float>{kNaN, -5, kNaN, -4}) == 3);
  CHECK(*sampler.sample(std::vector<float>{0, kInf, kInf}) == 1);
  CHECK(*sampler.sample(std::vector<float>{-kInf, -1e30F}) == 1);
  CHECK(*sampler.sample(std::vector<float>{0.0F, -0.0F}) == 0);
  CHECK_FALSE(sampler.sample(std::vector<float>{}).ok());
  CHECK_FALSE(sampler.sample(std::vector<float>{kNaN, -kInf}).ok());
}

TEST_CASE("sampled frequencies follow the softmax at the temperature") {
  codegemm::test::Rng rng(codegemm::test::seed_or(11));
  for (const float temperature : {0.5F, 1.0F, 2.0F}) {
    CAPTURE(temperature);
    std::vector<float> logits = rng.normals(6);
    logits[2] = kNaN;
    double sum = 0;
    for (const float x : logits) sum += std::isnan(x) ? 0.0 : std::exp(static_cast<double>(x / temperature));
    constexpr int kDraws = 20000;
    SamplerOptions options;
    options.temperature = temperature;
    options.seed = rng.next();
    const std::vector<double> seen = frequencies(options, logits, kDraws);
    for (std::size_t i = 0; i < logits.size(); ++i) {
      CAPTURE(i);
      const double p =
          std::isnan(logits[i]) ? 0.0 : std::exp(static_cast<double>(logits[i] / temperature)) / sum;
      // Five standard deviations of a binomial share.
      CHECK(std::fabs(seen[i] - p) <= 5.0 * std::sqrt(p * (1.0 - p) / kDraws));
    }
  }
}

TEST_CASE("top-k and top-p cut the tail") {
  // Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625.
  const std::vector<float> logits{std::log(2.0F), std::log(8.0F), std::log(4.0F), 0.0F, 0.0F};
  SamplerOptions options;
  options.temperature = 1.0F;
  options.top_k = 2;
  std::vector<double> seen = frequencies(options, logits, 4000);
  CHECK(seen[0] + seen[3] + seen[4] == 0.0);
  CHECK(std::fabs(seen[1] - 2.0 / 3.0) < 0.05);
  options.top_k = 0;
  options.top_p = 0.7F;
  seen = frequencies(options, logits, 4000);
  CHECK(seen[0] + seen[3] + seen[4] == 0.0);
  CHECK(seen[2] > 0.25);
  options.top_p = 0.4F;  // the first one reaches it alone
  CHECK(frequencies(options, logits, 100)[1] > 0.999);
  options.top_p = 1.0F;
  options.top_k = 1;
  CHECK(frequencies(options, logits, 100)[1] > 0.999);
  options.top_k = 4;  // of two equals at the edge the lower id stays
  seen = frequencies(options, logits, 4000);
  CHECK(seen[3] > 0.0);
  CHECK(seen[4] == 0.0);
}

TEST_CASE("the repetition penalty lowers what was there, once, with either sign") {
  SamplerOptions options;
  options.repetition_penalty = 2.0F;
  Sampler sampler = make(options);
  const std::vector<std::int32_t> once{0}, twice{0, 0}, both{0, 1}, outside{3}, negative{-1};
  CHECK(*sampler.sample(std::vector<float>{4.0F, 3.0F, 1.0F}, once) == 1);
  CHECK(*sampler.sample(std::vector<float>{4.0F, 1.5F, 1.0F}, twice) == 0);
  CHECK(*sampler.sample(std::vector<float>{-1.0F, -1.5F, -3.0F}, both) == 0);
  CHECK(*sampler.sample(std::vector<float>{-1.0F, -1.5F, -1.9F}, both) == 2);
  CHECK_FALSE(sampler.sample(std::vector<float>{1.0F, 2.0F, 3.0F}, outside).ok());
  CHECK_FALSE(sampler.sample(std::vector<float>{1.0F, 2.0F, 3.0F}, negative).ok());
}

TEST_CASE("the same seed gives the same tokens, another seed others") {
  codegemm::test::Rng rng(codegemm::test::seed_or(5));
  const std::vector<float> logits = rng.normals(100);
  SamplerOptions options;
  options.temperature = 1.0F;
  options.seed = 1;
  Sampler a = make(options), b = make(options);
  options.seed = 2;
  Sampler c = make(options);
  int different = 0;
  for (int i = 0; i < 100; ++i) {
    const std::int32_t token = *a.sample(logits);
    REQUIRE(token == *b.sample(logits));
    different += token != *c.sample(logits) ? 1 : 0;
  }
  CHECK(different > 50);
}

TEST_CASE("options outside their range are refused with the number") {
  const auto refused = [](SamplerOptions options, const char* name) {
    const Result<Sampler> sampler = Sampler::create(options);
    REQUIRE_FALSE(sampler.ok());
    CHECK(sampler.status().code() == StatusCode::kInvalidArgument);
    CHECK(sampler.status().message().find(name) == 0);
  };
  refused({.temperature = -0.1F}, "temperature is -0.1");
  refused({.temperature = kNaN}, "temperature is nan");
  refused({.top_k = -1}, "top_k is -1");
  refused({.top_p = 0.0F}, "top_p is 0");
  refused({.top_p = 1.5F}, "top_p is 1.5");
  refused({.repetition_penalty = 0.0F}, "repetition_penalty is 0");
}
