// SPDX-License-Identifier: Apache-2.0
//
// bench/support/kv_plot.hpp - hit rates over cache sizes, drawn.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <string>
#include <vector>

#include "svg.hpp"

namespace codegemm::bench {

/// Per cent of blocks found over per cent of the working set.
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
  Svg svg(720, 380);
  for (int x = 0; x <= 100; x += 25) {
    svg.grid(at_x(x), kTop, at_x(x), kTop + kHeight);
    svg.text(at_x(x), kTop + kHeight + 18, "middle", std::to_string(x) + "%");
  }
  for (int y = static_cast<int>(low); y <= static_cast<int>(high); y += 5) {
    svg.grid(kLeft, at_y(y), kLeft + kWidth, at_y(y));
    svg.text(kLeft - 6, at_y(y) + 4, "end", std::to_string(y) + "%");
  }
  svg.text(kLeft + kWidth / 2, kTop + kHeight + 40, "middle",
           "blocks in the cache, of the trace's working set");
  svg.text(kLeft, kTop - 6, "start", "blocks found");
  for (std::size_t c = 0; c < curves.size(); ++c) {
    const char* const color = kColors[c % std::size(kColors)];
    svg.curve(curves[c], color, at_x, at_y);
    svg.legend(kLeft + kWidth + 16, kTop + 16 + 20 * static_cast<double>(c), 24, curves[c].name, color);
  }
  return svg.done();
}

}  // namespace codegemm::bench
