// SPDX-License-Identifier: Apache-2.0

#include <cmath>

#include <nlohmann/json.hpp>

#include <bench/support/product_plot.hpp>
#include <support/catch.hpp>

using namespace codegemm;
using namespace codegemm::bench;

namespace {

nlohmann::json row(const char* shape, int tokens, double us, double peer_us) {
  return {{"config", "m1v4g128"},
          {"shape", shape},
          {"tokens", tokens},
          {"median_us", us},
          {"peers", {{{"name", "eigen"}, {"median_us", peer_us}, {"ratio", peer_us / us}}}}};
}

}  // namespace

TEST_CASE("speed is the geometric mean over shapes by tokens, time the one token's by size", "[plot]") {
  nlohmann::json results;
  for (const char* shape : {"1000x1000", "2000x1000", "1000x3000", "4000x1000"}) {
    results["rows"].push_back(row(shape, 1, 2.0, shape[0] == '1' ? 4.0 : 16.0));
    results["rows"].push_back(row(shape, 16, 5.0, 5.0));
  }
  const auto diagrams = product_diagrams(results, "eigen");
  REQUIRE(diagrams.ok());
  REQUIRE(diagrams->size() == 2);
  const Diagram& speed = diagrams->front();
  REQUIRE(speed.lines.size() == 2);  // the format, and the peer at 1
  CHECK(speed.lines[0].points[0].first == 1.0);
  CHECK(std::abs(speed.lines[0].points[0].second - 4.0) < 1e-9);  // of 2, 8, 2 and 8
  CHECK(std::abs(speed.lines[0].points[1].second - 1.0) < 1e-9);
  const Diagram& time = diagrams->back();
  REQUIRE(time.lines.size() == 2);
  CHECK(time.lines[0].name == "m1v4g128");
  CHECK(time.lines[1].points[1] == std::pair(2.0, 16.0));
  CHECK(plot_lines(*diagrams).find("millions of weights") != std::string::npos);
}

TEST_CASE("what cannot be drawn is named", "[plot]") {
  nlohmann::json results;
  results["rows"] = nlohmann::json::array({row("1000x1000", 1, 2.0, 4.0)});
  CHECK(product_diagrams(results, "eigen").status().message().find("nothing to draw") != std::string::npos);
  CHECK(product_diagrams(results, "cublas").status().message().find("'cublas'") != std::string::npos);
  results["rows"][0]["shape"] = "square";
  CHECK(product_diagrams(results, "eigen").status().message().find("'square'") != std::string::npos);
  results["rows"][0].erase("config");
  CHECK_FALSE(product_diagrams(results, "eigen").ok());
  CHECK_FALSE(product_diagrams(nlohmann::json{}, "eigen").ok());
}
