// SPDX-License-Identifier: Apache-2.0
//
// bench/support/serve_plot.hpp - panels of curves over the number of sessions at once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "kv_plot.hpp"

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
  std::string out = "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"780\" height=\"" +
                    std::to_string(height) +
                    "\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"780\" height=\"" +
                    std::to_string(height) + "\" fill=\"white\"/>\n";
  char line[256];
  const auto text = [&](double x, double y, const char* anchor, const std::string& words) {
    std::snprintf(line, sizeof(line), "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">", x, y, anchor);
    out += line + words + "</text>\n";
  };
  const auto stroke = [&](double x1, double y1, double x2, double y2, const char* color, double width) {
    std::snprintf(
        line, sizeof(line),
        "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\" stroke-width=\"%.1f\"/>\n", x1,
        y1, x2, y2, color, width);
    out += line;
  };
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
    text(left, top - 12, "start", panel.title);
    for (int mark = 0; mark <= static_cast<int>(std::lround(high / step)); ++mark) {
      const double y = mark * step;
      stroke(left, at_y(y), left + kWidth, at_y(y), "#dddddd", 1.0);
      std::snprintf(line, sizeof(line), "%.3g", y);
      text(left - 6, at_y(y) + 4, "end", line);
    }
    text(left - 6, top - 12, "end", panel.unit);
    for (std::size_t c = 0; c < panel.curves.size(); ++c) {
      const char* const color = kColors[c % std::size(kColors)];
      const auto& points = panel.curves[c].points;
      for (std::size_t i = 0; i < points.size(); ++i) {
        std::snprintf(line, sizeof(line), "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n",
                      at_x(points[i].first), at_y(points[i].second), color);
        out += line;
        if (c == 0)
          text(at_x(points[i].first), top + kHeight + 16, "middle",
               std::to_string(std::lround(points[i].first)));
        if (i == 0) continue;
        stroke(at_x(points[i - 1].first), at_y(points[i - 1].second), at_x(points[i].first),
               at_y(points[i].second), color, 2.0);
      }
      const double x = left + 100 * static_cast<double>(c);
      stroke(x, top + kHeight + 30, x + 18, top + kHeight + 30, color, 2.0);
      text(x + 22, top + kHeight + 34, "start", panel.curves[c].name);
    }
  }
  return out + "</svg>\n";
}

}  // namespace codegemm::bench
