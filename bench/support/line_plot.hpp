// SPDX-License-Identifier: Apache-2.0
//
// bench/support/line_plot.hpp - curves over numbers, drawn.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <iterator>
#include <string>
#include <vector>

#include "svg.hpp"

namespace codegemm::bench {

/// One diagram; x and y begin at 0, or are logarithmic.
struct Diagram {
  std::string title;
  std::string x_name;
  std::vector<Curve> lines;
  bool logarithmic = false;
  double scale = 1.0;          // of y
  bool logarithmic_x = false;  // x is then marked where the first line has points
};

/// An SVG of its own, the diagrams below one another. A name has the same color in all of them.
[[nodiscard]] inline std::string plot_lines(const std::vector<Diagram>& diagrams) {
  constexpr const char* kColors[] = {"#d62728", "#ff7f0e", "#8c564b", "#1f77b4", "#2ca02c",
                                     "#9467bd", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f"};
  constexpr double kWidth = 460;
  constexpr double kHeight = 220;
  constexpr double kLeft = 60;
  constexpr double kStep = 300;
  Svg svg(760, static_cast<int>(kStep) * static_cast<int>(diagrams.size()));
  char line[32];
  std::vector<std::string> names;
  const auto color_of = [&](const std::string& name) {
    const auto place = std::find(names.begin(), names.end(), name) - names.begin();
    if (place == std::ssize(names)) names.push_back(name);
    return kColors[static_cast<std::size_t>(place) % std::size(kColors)];
  };
  double top = 30;
  for (const Diagram& diagram : diagrams) {
    double left = 1e300;
    double right = 0.0;
    double low = 1e300;
    double high = 1e-300;
    for (const Curve& one : diagram.lines) {
      for (const auto& [x, y] : one.points) {
        left = std::min(left, x);
        right = std::max(right, x);
        low = std::min(low, y * diagram.scale);
        high = std::max(high, y * diagram.scale);
      }
    }
    const double first = diagram.logarithmic ? std::floor(std::log10(low)) : 0.0;
    const double decade = std::pow(10.0, std::floor(std::log10(high)));
    const double rise = high / decade > 5 ? 2 * decade : high / decade > 2 ? decade : decade / 2;
    const double last =
        diagram.logarithmic ? std::ceil(std::log10(high)) : rise * std::ceil(high / rise - 1e-9);
    const auto value = [&](double y) { return diagram.logarithmic ? std::log10(std::max(y, 1e-300)) : y; };
    const auto at_x = [&](double x) {
      return kLeft +
             kWidth * (diagram.logarithmic_x ? std::log(x / left) / std::log(right / left) : x / right);
    };
    const auto at_y = [&](double y) { return top + kHeight * (last - value(y)) / (last - first); };
    const double step = diagram.logarithmic ? 1.0 : rise;
    for (int mark = 0; first + mark * step <= last + 1e-9; ++mark) {
      const double y = first + mark * step;
      const double shown = diagram.logarithmic ? std::pow(10.0, y) : y;
      svg.grid(kLeft, at_y(shown), kLeft + kWidth, at_y(shown));
      std::snprintf(line, sizeof(line), "%.4g", shown);
      svg.text(kLeft - 6, at_y(shown) + 4, "end", std::string(line));
    }
    std::vector<double> marks = {0, right / 4, right / 2, right * 3 / 4, right};
    if (diagram.logarithmic_x) {
      marks.clear();
      for (const auto& [x, y] : diagram.lines.front().points) {
        // Room for the digits of both; numbers of tokens have few.
        const double room = x < 1000 && x == std::floor(x) ? 34 : 38;
        if (marks.empty() || at_x(x) - at_x(marks.back()) > room) marks.push_back(x);
      }
    }
    for (const double x : marks) {
      svg.grid(at_x(x), top, at_x(x), top + kHeight);
      std::snprintf(line, sizeof(line), x < 1000 ? "%.3g" : "%.0f", x);
      svg.text(at_x(x), top + kHeight + 16, "middle", std::string(line));
    }
    svg.text(kLeft, top - 8, "start", diagram.title);
    svg.text(kLeft + kWidth / 2, top + kHeight + 34, "middle", diagram.x_name);
    for (std::size_t c = 0; c < diagram.lines.size(); ++c) {
      const char* const color = color_of(diagram.lines[c].name);
      svg.curve(diagram.lines[c], color, at_x, [&](double y) { return at_y(y * diagram.scale); });
      svg.legend(kLeft + kWidth + 16, top + 16 + 20 * static_cast<double>(c), 24, diagram.lines[c].name,
                 color);
    }
    top += kStep;
  }
  return svg.done();
}

}  // namespace codegemm::bench
