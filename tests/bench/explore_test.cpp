// SPDX-License-Identifier: Apache-2.0

#include <cmath>
#include <cstddef>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include <bench/support/explore_plot.hpp>
#include <bench/support/explore_table.hpp>
#include <support/catch.hpp>
#include <support/random.hpp>

using namespace codegemm::bench;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

Candidate candidate(const std::string& name, double us, double perplexity, std::int64_t bytes = 1 << 20) {
  Candidate out;
  out.name = name;
  out.family = "codegemm";
  out.cpu_us = us;
  out.perplexity = perplexity;
  out.bytes = bytes;
  return out;
}

std::size_t count(const std::string& text, const std::string& word) {
  std::size_t found = 0;
  for (std::size_t at = text.find(word); at != std::string::npos; at = text.find(word, at + 1)) ++found;
  return found;
}

}  // namespace

TEST_CASE("the front holds what nothing else beats, fastest first", "[explore]") {
  const std::vector<Candidate> all = {candidate("slow and best", 30, 10),
                                      candidate("beaten", 20, 21),
                                      candidate("fast", 10, 20),
                                      candidate("no time", kNan, 5),
                                      candidate("no perplexity", 1, kNan),
                                      candidate("as slow, worse", 30, 11),
                                      candidate("as fast, as good", 10, 20)};
  CHECK(pareto_front(all, &Candidate::cpu_us) == std::vector<std::size_t>{2, 6, 0});
  CHECK(pareto_front({}, &Candidate::cpu_us).empty());
  CHECK(pareto_front(all, &Candidate::gpu_us).empty());
}

TEST_CASE("sizes worth having, smallest first", "[explore]") {
  const std::vector<Candidate> all = {
      candidate("large and best", kNan, 10, 300), candidate("small", 5, 30, 100),
      candidate("larger, worse", 5, 31, 200),     candidate("as small, worse", 1, 40, 100),
      candidate("not judged", 5, kNan, 50),       candidate("medium", kNan, 20, 250),
      candidate("as good, larger", 5, 20, 260)};
  CHECK(size_front(all) == std::vector<std::size_t>{1, 5, 0});
  CHECK(size_front({}).empty());
}

TEST_CASE("the front is what the definition says, on random candidates", "[explore]") {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    CAPTURE(seed);
    codegemm::test::Rng random(seed);
    std::vector<Candidate> all;
    for (int i = 0; i < 40; ++i) {  // few values: many ties
      const double us = random.next() % 8 == 0 ? kNan : static_cast<double>(random.next() % 12);
      const double perplexity = random.next() % 8 == 0 ? HUGE_VAL : static_cast<double>(random.next() % 12);
      all.push_back(candidate("c", us, perplexity));
    }
    const std::vector<std::size_t> front = pareto_front(all, &Candidate::cpu_us);
    for (std::size_t i = 0; i < all.size(); ++i) {
      CAPTURE(i);
      bool wanted = std::isfinite(all[i].cpu_us) && std::isfinite(all[i].perplexity);
      for (const Candidate& other : all) {
        if (!std::isfinite(other.cpu_us) || !std::isfinite(other.perplexity)) continue;
        const bool no_worse = other.cpu_us <= all[i].cpu_us && other.perplexity <= all[i].perplexity;
        const bool better = other.cpu_us < all[i].cpu_us || other.perplexity < all[i].perplexity;
        if (no_worse && better) wanted = false;
      }
      std::size_t times = 0;
      for (const std::size_t at : front) times += at == i ? 1U : 0U;
      CHECK(times == (wanted ? 1U : 0U));
    }
    for (std::size_t i = 1; i < front.size(); ++i) CHECK(all[front[i - 1]].cpu_us <= all[front[i]].cpu_us);
  }
}

TEST_CASE("a budget gets the best that fits it", "[explore]") {
  const std::vector<Candidate> all = {
      candidate("large", 30, 10, 40 << 20), candidate("middle", 20, 15, 20 << 20),
      candidate("small", 25, 20, 10 << 20), candidate("untimed", kNan, 12, 30 << 20),
      candidate("unmeasured", 1, kNan, 1)};
  const auto pick = [&](double mib, double us) {
    const auto at = choose(all, {mib * 1024 * 1024, us}, &Candidate::cpu_us);
    return at ? all[*at].name : std::string("none");
  };
  CHECK(pick(HUGE_VAL, HUGE_VAL) == "large");
  CHECK(pick(40, HUGE_VAL) == "large");  // the limit itself fits
  CHECK(pick(39.9, HUGE_VAL) == "untimed");
  CHECK(pick(39.9, 100) == "middle");  // what has no time meets no limit on it
  CHECK(pick(15, HUGE_VAL) == "small");
  CHECK(pick(HUGE_VAL, 24) == "middle");
  CHECK(pick(9.9, HUGE_VAL) == "none");
  CHECK(pick(HUGE_VAL, 19) == "none");
  CHECK(pick(kNan, HUGE_VAL) == "none");
  CHECK_FALSE(choose({}, {}, &Candidate::cpu_us).has_value());

  const std::vector<Candidate> ties = {candidate("a", 3, 1, 9), candidate("b", 5, 1, 8),
                                       candidate("c", 4, 1, 8)};
  CHECK(*choose(ties, {}, &Candidate::cpu_us) == 2);

  CHECK(advice(all, {15.0 * 1024 * 1024, 100}, &Candidate::cpu_us) ==
        "within 15.0 MiB and 100 us: small, perplexity 20.00, 10.0 MiB, 25 us");
  CHECK(advice(all, {}, &Candidate::cpu_us) == "within no limit: large, perplexity 10.00, 40.0 MiB, 30 us");
  CHECK(advice(all, {1024.0, HUGE_VAL}, &Candidate::cpu_us) ==
        "within 0.0 MiB: none; the smallest has 10.0 MiB, the fastest takes 20 us");
  CHECK(advice({}, {}, &Candidate::cpu_us) == "within no limit: nothing was measured");
}

TEST_CASE("CSV fields are quoted where they must be, and empty where nothing was measured", "[explore]") {
  CHECK(csv_field("m1v4g64") == "m1v4g64");
  CHECK(csv_field("a, b") == "\"a, b\"");
  CHECK(csv_field("say \"x\"") == "\"say \"\"x\"\"\"");
  CHECK(csv_field("two\nlines") == "\"two\nlines\"");
  Candidate one = candidate("m1v4g64", 12.5, HUGE_VAL, 7);
  one.method = "calibrated, 3 rounds";
  one.bits_per_weight = 2.375;
  CHECK(to_csv(std::vector<Candidate>{one}) ==
        "name,family,method,bits_per_weight,bytes,cpu_us,gpu_us,perplexity,perplexity_error\n"
        "m1v4g64,codegemm,\"calibrated, 3 rounds\",2.375,7,12.5,,,\n");
  CHECK(to_json(one).at("gpu_us").is_null());
  CHECK(to_json(one).at("cpu_us") == 12.5);
}

TEST_CASE("times of the GPU suite are summed over a block's shapes", "[explore]") {
  const auto row = [](const char* config, const char* shape, int tokens, double us) {
    return nlohmann::json{{"config", config}, {"shape", shape}, {"tokens", tokens}, {"median_us", us}};
  };
  const nlohmann::json suite = {{"rows",
                                 {row("m1v4g64", "576x576", 1, 2.0), row("m1v4g64", "576x576", 16, 50.0),
                                  row("m1v4g64", "1536x576", 1, 3.0), row("m2v8g64", "576x576", 1, 70.0)}}};
  const std::vector<std::string> shapes = {"576x576", "1536x576", "1536x576"};
  CHECK(gpu_us(suite, "m1v4g64", shapes) == 8.0);
  CHECK(std::isnan(gpu_us(suite, "m2v8g64", shapes)));
  CHECK_THROWS_AS(gpu_us(nlohmann::json::object(), "m1v4g64", shapes), nlohmann::json::exception);
}

TEST_CASE("the plot has a dot for each measured format and stays within its picture", "[explore]") {
  const std::vector<Candidate> all = {candidate("a", 10, 30), candidate("b", 20, 20), candidate("c", 30, 10),
                                      candidate("beaten", 25, 25), candidate("untimed", kNan, 5)};
  const std::string svg = explore_svg(all, &Candidate::cpu_us, "title", "us");
  CHECK(count(svg, "<circle") == 4);
  CHECK(count(svg, "#999999") == 2);  // the front's three dots, joined
  CHECK(count(svg, "untimed") == 0);
  CHECK(count(svg, "nan") + count(svg, "inf") == 0);
  CHECK(svg.substr(svg.size() - 7) == "</svg>\n");
  CHECK(count(explore_svg({}, &Candidate::cpu_us, "title", "us"), "<circle") == 0);
  const std::vector<Candidate> one = {candidate("alone", 10, 30)};  // no range in either direction
  const std::string alone = explore_svg(one, &Candidate::cpu_us, "title", "us");
  CHECK(count(alone, "<circle") == 1);
  CHECK(count(alone, "nan") + count(alone, "inf") == 0);
}
