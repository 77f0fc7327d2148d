// SPDX-License-Identifier: Apache-2.0
//
// bench/support/explore_plot.hpp - perplexity over time, each dot's area the size.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <iterator>
#include <span>
#include <string>
#include <vector>

#include "explore_table.hpp"
#include "svg.hpp"

namespace codegemm::bench {

/// An SVG of its own: time to the right, perplexity (logarithmic) upwards, dots whose area is the size, and a
/// line through the front. What lacks either number is not in it; nothing measured gives an empty picture.
[[nodiscard]] inline std::string explore_svg(std::span<const Candidate> all, double Candidate::*time,
                                             const std::string& title, const std::string& x_name) {
  constexpr const char* kColors[] = {"#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd"};
  constexpr double kLeft = 70;
  constexpr double kTop = 40;
  constexpr double kWidth = 640;
  constexpr double kHeight = 360;
  Svg svg(880, 460);
  svg.text(kLeft, kTop - 16, "start", title);
  std::vector<const Candidate*> dots;
  double left = HUGE_VAL;
  double right = 0.0;
  double low = HUGE_VAL;
  double high = 0.0;
  double most_bytes = 1.0;
  for (const Candidate& one : all) {
    if (!std::isfinite(one.*time) || !(one.perplexity > 0.0) || !std::isfinite(one.perplexity)) continue;
    dots.push_back(&one);
    left = std::min(left, one.*time);
    right = std::max(right, one.*time);
    low = std::min(low, one.perplexity);
    high = std::max(high, one.perplexity);
    most_bytes = std::max(most_bytes, static_cast<double>(one.bytes));
  }
  if (dots.empty()) return svg.done();
  const double margin = std::max(1e-9, 0.1 * (right - left) + 0.02 * right);
  left = std::max(0.0, left - margin);
  right += margin;
  low /= 1.06;
  high *= 1.06;
  const auto at_x = [&](double x) { return kLeft + kWidth * (x - left) / (right - left); };
  const auto at_y = [&](double y) {
    return kTop + kHeight * (std::log(high) - std::log(y)) / (std::log(high) - std::log(low));
  };
  char line[64];
  for (int i = 0; i <= 4; ++i) {
    const double x = left + (right - left) * i / 4;
    svg.grid(at_x(x), kTop, at_x(x), kTop + kHeight);
    std::snprintf(line, sizeof(line), "%.4g", x);
    svg.text(at_x(x), kTop + kHeight + 18, "middle", line);
    const double y = low * std::pow(high / low, i / 4.0);
    svg.grid(kLeft, at_y(y), kLeft + kWidth, at_y(y));
    std::snprintf(line, sizeof(line), "%.3g", y);
    svg.text(kLeft - 8, at_y(y) + 4, "end", line);
  }
  svg.text(kLeft + kWidth / 2, kTop + kHeight + 40, "middle", x_name);
  svg.text(8, kTop - 16, "start", "perplexity");
  const std::vector<std::size_t> front = pareto_front(all, time);
  for (std::size_t i = 1; i < front.size(); ++i) {
    const Candidate& a = all[front[i - 1]];
    const Candidate& b = all[front[i]];
    svg.stroke(at_x(a.*time), at_y(a.perplexity), at_x(b.*time), at_y(b.perplexity), "#999999", 1.5);
  }
  std::vector<std::string> families;
  for (const Candidate* one : dots) {
    auto at = std::find(families.begin(), families.end(), one->family);
    if (at == families.end()) {
      families.push_back(one->family);
      at = families.end() - 1;
    }
    const char* const color = kColors[static_cast<std::size_t>(at - families.begin()) % std::size(kColors)];
    const double radius = 14.0 * std::sqrt(static_cast<double>(one->bytes) / most_bytes);
    svg.dot(at_x(one->*time), at_y(one->perplexity), radius, color);
    svg.text(at_x(one->*time) + radius + 3, at_y(one->perplexity) - 4, "start", one->name);
  }
  for (std::size_t i = 0; i < families.size(); ++i) {
    svg.legend(kLeft + kWidth + 20, kTop + 16 + 20 * static_cast<double>(i), 20, families[i],
               kColors[i % std::size(kColors)]);
  }
  std::snprintf(line, sizeof(line), "largest dot: %.1f MiB", most_bytes / (1024.0 * 1024.0));
  svg.text(kLeft + kWidth + 20, kTop + 26 + 20 * static_cast<double>(families.size()), "start", line);
  return svg.done();
}

}  // namespace codegemm::bench
