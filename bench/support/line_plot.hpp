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
#include <utility>
#include <vector>

namespace codegemm::bench {

struct Line {
  std::string name;
  std::vector<std::pair<double, double>> points;
};

/// One diagram; y begins at 0, or is logarithmic.
struct Diagram {
  std::string title;
  std::string x_name;
  std::vector<Line> lines;
  bool logarithmic = false;
  double scale = 1.0;  // of y
};

/// An SVG of its own, the diagrams below one another.
[[nodiscard]] inline std::string plot_lines(const std::vector<Diagram>& diagrams) {
  constexpr const char* kColors[] = {"#d62728", "#ff7f0e", "#8c564b", "#1f77b4", "#2ca02c", "#9467bd"};
  constexpr double kWidth = 460;
  constexpr double kHeight = 220;
  constexpr double kLeft = 60;
  constexpr double kStep = 300;
  char line[320];
  const double height = kStep * static_cast<double>(diagrams.size());
  std::snprintf(
      line, sizeof(line),
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"760\" height=\"%.0f\" font-family=\"sans-serif\" "
      "font-size=\"12\">\n<rect width=\"760\" height=\"%.0f\" fill=\"white\"/>\n",
      height, height);
  std::string out = line;
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
  double top = 30;
  for (const Diagram& diagram : diagrams) {
    double right = 0.0;
    double low = 1e300;
    double high = 1e-300;
    for (const Line& one : diagram.lines) {
      for (const auto& [x, y] : one.points) {
        right = std::max(right, x);
        low = std::min(low, y * diagram.scale);
        high = std::max(high, y * diagram.scale);
      }
    }
    const double first = diagram.logarithmic ? std::floor(std::log10(low)) : 0.0;
    const double last = diagram.logarithmic ? std::ceil(std::log10(high)) : high * 1.05;
    const auto value = [&](double y) { return diagram.logarithmic ? std::log10(std::max(y, 1e-300)) : y; };
    const auto at_x = [&](double x) { return kLeft + kWidth * x / right; };
    const auto at_y = [&](double y) { return top + kHeight * (last - value(y)) / (last - first); };
    const double step = diagram.logarithmic ? 1.0 : (last - first) / 5.0;
    for (int mark = 0; first + mark * step <= last + 1e-9; ++mark) {
      const double y = first + mark * step;
      const double shown = diagram.logarithmic ? std::pow(10.0, y) : y;
      stroke(kLeft, at_y(shown), kLeft + kWidth, at_y(shown), "#dddddd", 1.0);
      std::snprintf(line, sizeof(line), "%.4g", shown);
      text(kLeft - 6, at_y(shown) + 4, "end", std::string(line));
    }
    for (int i = 0; i <= 4; ++i) {
      const double x = right * i / 4;
      stroke(at_x(x), top, at_x(x), top + kHeight, "#dddddd", 1.0);
      std::snprintf(line, sizeof(line), "%.4g", x);
      text(at_x(x), top + kHeight + 16, "middle", std::string(line));
    }
    text(kLeft, top - 8, "start", diagram.title);
    text(kLeft + kWidth / 2, top + kHeight + 34, "middle", diagram.x_name);
    for (std::size_t c = 0; c < diagram.lines.size(); ++c) {
      const char* const color = kColors[c % std::size(kColors)];
      const auto& points = diagram.lines[c].points;
      for (std::size_t i = 0; i < points.size(); ++i) {
        const double x = at_x(points[i].first);
        const double y = at_y(points[i].second * diagram.scale);
        std::snprintf(line, sizeof(line), "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n", x, y,
                      color);
        out += line;
        if (i == 0) continue;
        stroke(at_x(points[i - 1].first), at_y(points[i - 1].second * diagram.scale), x, y, color, 2.0);
      }
      const double y = top + 16 + 20 * static_cast<double>(c);
      stroke(kLeft + kWidth + 16, y - 4, kLeft + kWidth + 40, y - 4, color, 2.0);
      text(kLeft + kWidth + 46, y, "start", diagram.lines[c].name);
    }
    top += kStep;
  }
  return out + "</svg>\n";
}

}  // namespace codegemm::bench
