// SPDX-License-Identifier: Apache-2.0
//
// examples/common/timeline.hpp - what each agent's modules did when, as a picture.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

#include <codegemm/base/text.hpp>

namespace prefillshare::examples {

/// A stretch of time on one row.
struct TimelineSpan {
  int row = 0;
  double begin = 0.0;  // seconds
  double end = 0.0;
  bool prefill = false;
  std::string label;  // shown when the pointer rests on it
};

/// One panel: rows over a time axis.
struct TimelinePanel {
  std::string title;
  std::vector<std::string> rows;
  std::vector<TimelineSpan> spans;
};

namespace detail {

[[nodiscard]] inline std::string escape_xml(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&': out += "&amp;"; break;
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '"': out += "&quot;"; break;
      default: out += c;
    }
  }
  return out;
}

[[nodiscard]] inline std::string fixed(double value, int digits) {
  char text[48];
  std::snprintf(text, sizeof(text), "%.*f", digits, value);
  return text;
}

/// 1, 2 or 5 times a power of ten, so that about eight ticks fit.
[[nodiscard]] inline double tick_step(double span) {
  const double raw = span / 8.0;
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (factor * power >= raw) return factor * power;
  }
  return 10.0 * power;
}

}  // namespace detail

/// An SVG of the panels below each other on one time scale, so that their lengths compare.
[[nodiscard]] inline std::string timeline_svg(const std::vector<TimelinePanel>& panels) {
  using codegemm::concat;
  using detail::fixed;
  constexpr double kLeft = 150.0;
  constexpr double kWidth = 900.0;
  constexpr double kRow = 30.0;
  constexpr double kHead = 44.0;
  constexpr double kFoot = 40.0;
  const std::string prefill_color = "#d9822b";
  const std::string decode_color = "#2b6cb0";

  double last = 0.001;
  double height = 34.0;
  for (const TimelinePanel& panel : panels) {
    for (const TimelineSpan& span : panel.spans) last = std::max(last, span.end);
    height += kHead + kRow * static_cast<double>(panel.rows.size()) + kFoot;
  }
  const auto x = [&](double seconds) { return kLeft + seconds / last * kWidth; };

  std::string svg = concat("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 ", kLeft + kWidth + 30.0,
                           " ", fixed(height, 0), "\" font-family=\"sans-serif\" font-size=\"13\">\n",
                           "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n");
  const auto legend = [&](double at, const std::string& color, const char* text) {
    svg += concat("<rect x=\"", at, "\" y=\"12\" width=\"14\" height=\"14\" fill=\"", color, "\"/><text x=\"",
                  at + 20.0, "\" y=\"24\">", text, "</text>\n");
  };
  legend(kLeft, prefill_color, "prefill");
  legend(kLeft + 90.0, decode_color, "decode");

  double y = 34.0;
  for (const TimelinePanel& panel : panels) {
    svg += concat("<text x=\"12\" y=\"", fixed(y + 28.0, 1), "\" font-weight=\"bold\">",
                  detail::escape_xml(panel.title), "</text>\n");
    y += kHead;
    for (std::size_t r = 0; r < panel.rows.size(); ++r) {
      const double top = y + kRow * static_cast<double>(r);
      svg += concat("<text x=\"12\" y=\"", fixed(top + 19.0, 1), "\">", detail::escape_xml(panel.rows[r]),
                    "</text>", "<line x1=\"", kLeft, "\" x2=\"", kLeft + kWidth, "\" y1=\"",
                    fixed(top + kRow, 1), "\" y2=\"", fixed(top + kRow, 1), "\" stroke=\"#ddd\"/>\n");
    }
    for (const TimelineSpan& span : panel.spans) {
      const double top = y + kRow * static_cast<double>(span.row) + 6.0;
      svg += concat("<rect x=\"", fixed(x(span.begin), 2), "\" y=\"", fixed(top, 1), "\" width=\"",
                    fixed(std::max(0.8, x(span.end) - x(span.begin)), 2), "\" height=\"", kRow - 11.0,
                    "\" fill=\"", span.prefill ? prefill_color : decode_color, "\"><title>",
                    detail::escape_xml(span.label), "</title></rect>\n");
    }
    y += kRow * static_cast<double>(panel.rows.size());
    const double step = detail::tick_step(last);
    const int ticks = static_cast<int>(last * 1.0001 / step);
    for (int tick = 0; tick <= ticks; ++tick) {
      const double t = step * tick;
      svg += concat("<text x=\"", fixed(x(t), 1), "\" y=\"", fixed(y + 18.0, 1),
                    "\" text-anchor=\"middle\" fill=\"#555\">", detail::fixed(t, step < 1.0 ? 1 : 0),
                    " s</text>\n");
    }
    y += kFoot;
  }
  return svg + "</svg>\n";
}

}  // namespace prefillshare::examples
