// SPDX-License-Identifier: Apache-2.0
//
// bench/support/product_plot.hpp - the kept rows of codegemm-cpu or codegemm-gpu as two diagrams.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <codegemm/base/status.hpp>

#include "line_plot.hpp"

namespace codegemm::bench {

/// Diagrams of a suite's results: by tokens, how many times faster than `peer` each format is (the geometric
/// mean over the shapes), and the time of one token by the size of the matrix, the peers beside it (each its
/// fastest, where several formats have it). What has too few points is left out; an error if nothing is left,
/// or no row has that peer.
[[nodiscard]] inline Result<std::vector<Diagram>> product_diagrams(const nlohmann::json& results,
                                                                   const std::string& peer) {
  std::map<std::string, std::map<double, std::pair<double, int>>>
      ratios;                                             // format, tokens: sum of logs, rows
  std::map<std::string, std::map<double, double>> times;  // whose, millions of weights: us
  try {
    for (const nlohmann::json& row : results.at("rows")) {
      const std::string format = row.at("config");
      const auto tokens = row.at("tokens").get<double>();
      const std::string shape = row.at("shape");  // NxK
      const std::size_t cross = shape.find('x');
      if (cross == std::string::npos)
        return error(StatusCode::kInvalidArgument, "shape '", shape, "' is no NxK");
      const double weights = std::atof(shape.c_str()) * std::atof(shape.c_str() + cross + 1) * 1e-6;
      for (const nlohmann::json& other : row.at("peers")) {
        const std::string name = other.at("name");
        if (name == peer) {
          auto& [sum, count] = ratios[format][tokens];
          sum += std::log(other.at("ratio").get<double>());
          ++count;
        }
        if (tokens != 1) continue;
        const auto [at, first] = times[name].try_emplace(weights, other.at("median_us").get<double>());
        if (!first) at->second = std::min(at->second, other.at("median_us").get<double>());
      }
      if (tokens == 1) times[format][weights] = row.at("median_us");
    }
  } catch (const nlohmann::json::exception& e) {
    return error(StatusCode::kInvalidArgument,
                 "these are no results of codegemm-cpu or codegemm-gpu: ", e.what());
  }
  if (ratios.empty()) return error(StatusCode::kNotFound, "no row was measured beside '", peer, "'");
  Diagram speed{"times as fast as " + peer + ", geometric mean over the shapes", "tokens", {}};
  speed.logarithmic_x = true;
  for (const auto& [format, by_tokens] : ratios) {
    Curve curve{format, {}};
    for (const auto& [tokens, sum] : by_tokens)
      curve.points.emplace_back(tokens, std::exp(sum.first / sum.second));
    speed.lines.push_back(std::move(curve));
  }
  Curve one{peer, {}};
  for (const auto& [tokens, ratio] : speed.lines.front().points) one.points.emplace_back(tokens, 1.0);
  speed.lines.push_back(std::move(one));
  Diagram time{"one token, us", "millions of weights", {}};
  time.logarithmic = true;
  time.logarithmic_x = true;
  for (const bool ours : {true, false}) {
    for (const auto& [name, by_size] : times) {
      if (ratios.contains(name) == ours) time.lines.push_back({name, {by_size.begin(), by_size.end()}});
    }
  }
  constexpr std::size_t kFewest = 4;  // points that make a curve worth looking at; tokens have two at least
  std::vector<Diagram> all;
  if (speed.lines.front().points.size() >= 2) all.push_back(std::move(speed));
  if (!time.lines.empty() && time.lines.front().points.size() >= kFewest) all.push_back(std::move(time));
  if (all.empty()) {
    return error(StatusCode::kInvalidArgument, "neither two numbers of tokens nor ", kFewest,
                 " sizes of a matrix: nothing to draw");
  }
  return all;
}

}  // namespace codegemm::bench
