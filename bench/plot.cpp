// SPDX-License-Identifier: Apache-2.0
//
// bench/plot.cpp - no suite of its own: draws what codegemm-cpu, codegemm-gpu or serve-gpu kept.
//
// usage: plot FILE.json... [--peer NAME] [--pattern react|reflexion] --out FILE.svg
//
// serve-gpu: throughput and latency by rate, of the pattern's runs of 24 sessions (reflexion: 12). Else, by
// tokens, how many times faster than the peer each format is (cublas or eigen, where nothing else is named),
// and the time of one token by the size of the matrix, beside all peers.
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "support/line_plot.hpp"
#include "support/product_plot.hpp"
#include "support/report.hpp"
#include "support/serve_gpu_report.hpp"

int main(int argc, char** argv) {
  using namespace codegemm;
  std::vector<std::string> from;
  std::string peer;
  std::string pattern = "react";
  std::string out;
  CLI::App app{"Draws the kept results of codegemm-cpu, codegemm-gpu or serve-gpu."};
  app.add_option("FILE", from, "the suite's JSON files, of one machine")
      ->required()
      ->check(CLI::ExistingFile);
  app.add_option("--peer", peer, "whom to compare with (default: cublas on a GPU, eigen on a CPU)");
  app.add_option("--pattern", pattern, "of serve-gpu's sessions: react or reflexion");
  app.add_option("--out", out, "the SVG file to write")->required();
  CLI11_PARSE(app, argc, argv);
  nlohmann::json results = {{"rows", nlohmann::json::array()}};
  for (const std::string& path : from) {
    const nlohmann::json one = nlohmann::json::parse(std::ifstream(path), nullptr, false);
    if (!one.is_object() || !one.contains("rows") || !one["rows"].is_array()) {
      std::fprintf(stderr, "plot: %s: these are no results of a suite\n", bench::file_name(path).c_str());
      return 1;
    }
    results["suite"] = one.value("suite", "");
    for (const nlohmann::json& row : one["rows"]) results["rows"].push_back(row);
  }
  if (peer.empty()) {
    peer = results["suite"] == "codegemm-gpu" ? "cublas" : "eigen";
  }
  const auto drawn = [&]() -> Result<std::vector<bench::Diagram>> {
    if (results["suite"] != "serve-gpu") return bench::product_diagrams(results, peer);
    auto lines = bench::serve_diagrams(results["rows"], pattern, pattern == "reflexion" ? 12 : 24);
    if (lines.empty()) return error(StatusCode::kNotFound, "no runs of ", pattern);
    return lines;
  };
  const auto diagrams = drawn();
  const Status status =
      diagrams.ok() ? bench::write_text(bench::plot_lines(*diagrams), out) : diagrams.status();
  if (status.ok()) return 0;
  std::fprintf(stderr, "plot: %s\n", status.message().c_str());
  return 1;
}
