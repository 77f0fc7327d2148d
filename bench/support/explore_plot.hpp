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
#include <utility>
#include <vector>

#include "explore_table.hpp"
#include "svg.hpp"

namespace codegemm::bench {

/// Multiples of 1, 2 or 5 times a power of ten between two numbers, some four to ten of them.
[[nodiscard]] inline std::vector<double> round_marks(double from, double to) {
  std::vector<double> out;
  if (!(to > from)) return out;
  const double power = std::pow(10.0, std::floor(std::log10((to - from) / 4)));
  const double steps = (to - from) / 4 / power;  // 1 to 10
  const double step = power * (steps >= 5 ? 5 : steps >= 2 ? 2 : 1);
  for (double at = std::ceil(from / step); at * step <= to; ++at) out.push_back(at * step);
  return out;
}

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
  svg.text(kLeft + kWidth, kTop - 16, "end", title);
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
  for (const double x : round_marks(left, right)) {
    svg.grid(at_x(x), kTop, at_x(x), kTop + kHeight);
    std::snprintf(line, sizeof(line), "%.6g", x);
    svg.text(at_x(x), kTop + kHeight + 18, "middle", line);
  }
  for (const double y : round_marks(low, high)) {
    svg.grid(kLeft, at_y(y), kLeft + kWidth, at_y(y));
    std::snprintf(line, sizeof(line), "%.6g", y);
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
  std::vector<std::pair<double, double>> labels;  // where each begins
  for (const Candidate* one : dots) {
    auto at = std::find(families.begin(), families.end(), one->family);
    if (at == families.end()) {
      families.push_back(one->family);
      at = families.end() - 1;
    }
    const char* const color = kColors[static_cast<std::size_t>(at - families.begin()) % std::size(kColors)];
    const double radius = 14.0 * std::sqrt(static_cast<double>(one->bytes) / most_bytes);
    svg.dot(at_x(one->*time), at_y(one->perplexity), radius, color);
    // Names of dots that are close by stand below each other.
    const double x = at_x(one->*time) + radius + 3;
    double y = at_y(one->perplexity) - 4;
    for (const auto& [other_x, other_y] : labels) {
      if (std::abs(other_x - x) < 130 && std::abs(other_y - y) < 13) y = other_y + 14;
    }
    labels.emplace_back(x, y);
    svg.text(x, y, "start", one->name);
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
