// SPDX-License-Identifier: Apache-2.0
//
// bench/support/serve_plot.hpp - panels of curves over the number of sessions at once.
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

struct Panel {
  std::string title;
  std::string unit;
  std::vector<Curve> curves;
};

/// The panels side by side, two in a row, y from 0.
[[nodiscard]] inline std::string panels_svg(const std::vector<Panel>& panels) {
  constexpr const char* kColors[] = {"#2ca02c", "#ff7f0e", "#d62728", "#1f77b4", "#9467bd", "#333333"};
  constexpr double kWidth = 300;
  constexpr double kHeight = 180;
  constexpr double kLeft = 60;
  constexpr double kTop = 34;
  constexpr double kPanelWidth = 390;
  constexpr double kPanelHeight = 270;
  const auto rows = static_cast<int>((panels.size() + 1) / 2);
  const int height = rows * static_cast<int>(kPanelHeight);
  Svg svg(780, height);
  for (std::size_t p = 0; p < panels.size(); ++p) {
    const Panel& panel = panels[p];
    const double left = kLeft + kPanelWidth * static_cast<double>(p % 2);
    const std::size_t row = p / 2;
    const double top = kTop + kPanelHeight * static_cast<double>(row);
    double most_x = 1.0;
    double most_y = 0.0;
    for (const Curve& curve : panel.curves) {
      for (const auto& [x, y] : curve.points) {
        most_x = std::max(most_x, x);
        most_y = std::max(most_y, y);
      }
    }
    const double decade = std::pow(10.0, std::floor(std::log10(std::max(most_y, 1e-9))));
    const double step = most_y / decade > 5 ? 2 * decade : most_y / decade > 2 ? decade : decade / 2;
    const double high = step * std::ceil(most_y / step + 1e-9);
    const auto at_x = [&](double x) { return left + kWidth * x / most_x; };
    const auto at_y = [&](double y) { return top + kHeight * (high - y) / high; };
    svg.text(left, top - 12, "start", panel.title);
    for (int mark = 0; mark <= static_cast<int>(std::lround(high / step)); ++mark) {
      const double y = mark * step;
      svg.grid(left, at_y(y), left + kWidth, at_y(y));
      char line[32];
      std::snprintf(line, sizeof(line), "%.3g", y);
      svg.text(left - 6, at_y(y) + 4, "end", line);
    }
    svg.text(left - 6, top - 12, "end", panel.unit);
    for (std::size_t c = 0; c < panel.curves.size(); ++c) {
      const char* const color = kColors[c % std::size(kColors)];
      const Curve& curve = panel.curves[c];
      svg.curve(curve, color, at_x, at_y);
      svg.legend(left + 100 * static_cast<double>(c), top + kHeight + 34, 18, curve.name, color);
      if (c > 0) continue;
      for (const auto& [x, y] : curve.points) {
        svg.text(at_x(x), top + kHeight + 16, "middle", std::to_string(std::lround(x)));
      }
    }
  }
  return svg.done();
}

}  // namespace codegemm::bench
