// SPDX-License-Identifier: Apache-2.0
//
// bench/support/kv_plot.hpp - hit rates over cache sizes, drawn.
#pragma once

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

namespace codegemm::bench {

struct Curve {
  std::string name;
  std::vector<std::pair<double, double>> points;  // per cent of the working set, per cent of blocks found
};

/// An SVG of its own, both axes in per cent.
[[nodiscard]] inline std::string plot_svg(const std::vector<Curve>& curves) {
  constexpr const char* kColors[] = {"#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#d62728", "#333333"};
  constexpr double kWidth = 460;
  constexpr double kHeight = 300;
  constexpr double kLeft = 50;
  constexpr double kTop = 20;
  double low = 100.0;
  double high = 0.0;
  for (const Curve& curve : curves) {
    for (const auto& [x, y] : curve.points) {
      low = std::min(low, y);
      high = std::max(high, y);
    }
  }
  low = 5.0 * static_cast<double>(static_cast<int>(low / 5.0));
  high = std::max(low + 5.0, 5.0 * static_cast<double>(static_cast<int>(high / 5.0) + 1));
  const auto at_x = [](double x) { return kLeft + kWidth * x / 100.0; };
  const auto at_y = [&](double y) { return kTop + kHeight * (high - y) / (high - low); };
  std::string out =
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"720\" height=\"380\" font-family=\"sans-serif\" "
      "font-size=\"12\">\n<rect width=\"720\" height=\"380\" fill=\"white\"/>\n";
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
  for (int x = 0; x <= 100; x += 25) {
    stroke(at_x(x), kTop, at_x(x), kTop + kHeight, "#dddddd", 1.0);
    text(at_x(x), kTop + kHeight + 18, "middle", std::to_string(x) + "%");
  }
  for (int y = static_cast<int>(low); y <= static_cast<int>(high); y += 5) {
    stroke(kLeft, at_y(y), kLeft + kWidth, at_y(y), "#dddddd", 1.0);
    text(kLeft - 6, at_y(y) + 4, "end", std::to_string(y) + "%");
  }
  text(kLeft + kWidth / 2, kTop + kHeight + 40, "middle", "blocks in the cache, of the trace's working set");
  text(kLeft, kTop - 6, "start", "blocks found");
  for (std::size_t c = 0; c < curves.size(); ++c) {
    const char* const color = kColors[c % std::size(kColors)];
    const auto& points = curves[c].points;
    for (std::size_t i = 0; i < points.size(); ++i) {
      std::snprintf(line, sizeof(line), "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n",
                    at_x(points[i].first), at_y(points[i].second), color);
      out += line;
      if (i == 0) continue;
      stroke(at_x(points[i - 1].first), at_y(points[i - 1].second), at_x(points[i].first),
             at_y(points[i].second), color, 2.0);
    }
    const double y = kTop + 16 + 20 * static_cast<double>(c);
    stroke(kLeft + kWidth + 16, y - 4, kLeft + kWidth + 40, y - 4, color, 2.0);
    text(kLeft + kWidth + 46, y, "start", curves[c].name);
  }
  return out + "</svg>\n";
}

}  // namespace codegemm::bench
