// SPDX-License-Identifier: Apache-2.0
//
// bench/support/svg.hpp - what every plot is drawn with.
#pragma once

#include <cstddef>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

namespace codegemm::bench {

/// Points to be joined by lines, in the units of its plot.
struct Curve {
  std::string name;
  std::vector<std::pair<double, double>> points;
};

/// A white picture in pixels, drawn from left to right and from the top down.
class Svg {
 public:
  Svg(int width, int height) {
    char line[256];
    std::snprintf(line, sizeof(line),
                  "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" "
                  "font-family=\"sans-serif\" font-size=\"12\">\n"
                  "<rect width=\"%d\" height=\"%d\" fill=\"white\"/>\n",
                  width, height, width, height);
    out_ = line;
  }

  /// anchor: "start", "middle" or "end" of the words is at x.
  void text(double x, double y, const char* anchor, const std::string& words) {
    char line[128];
    std::snprintf(line, sizeof(line), "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">", x, y, anchor);
    out_ += line + words + "</text>\n";
  }
  void stroke(double x1, double y1, double x2, double y2, const char* color, double width) {
    char line[256];
    std::snprintf(
        line, sizeof(line),
        "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\" stroke-width=\"%.1f\"/>\n", x1,
        y1, x2, y2, color, width);
    out_ += line;
  }
  void grid(double x1, double y1, double x2, double y2) { stroke(x1, y1, x2, y2, "#dddddd", 1.0); }

  /// A disc that lets others shine through.
  void dot(double x, double y, double radius, const char* color) {
    char line[160];
    std::snprintf(line, sizeof(line),
                  "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"%.1f\" fill=\"%s\" fill-opacity=\"0.6\"/>\n", x, y,
                  radius, color);
    out_ += line;
  }
  /// Points at (at_x(x), at_y(y)), joined.
  template <class AtX, class AtY>
  void curve(const Curve& curve, const char* color, AtX&& at_x, AtY&& at_y) {
    for (std::size_t i = 0; i < curve.points.size(); ++i) {
      const double x = at_x(curve.points[i].first);
      const double y = at_y(curve.points[i].second);
      char line[128];
      std::snprintf(line, sizeof(line), "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n", x, y,
                    color);
      out_ += line;
      if (i == 0) continue;
      stroke(at_x(curve.points[i - 1].first), at_y(curve.points[i - 1].second), x, y, color, 2.0);
    }
  }
  /// A line of its color and a name behind it.
  void legend(double x, double y, double length, const std::string& name, const char* color) {
    stroke(x, y - 4, x + length, y - 4, color, 2.0);
    text(x + length + 6, y, "start", name);
  }

  [[nodiscard]] std::string done() const { return out_ + "</svg>\n"; }

 private:
  std::string out_;
};

}  // namespace codegemm::bench
