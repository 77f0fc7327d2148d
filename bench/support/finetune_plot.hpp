// SPDX-License-Identifier: Apache-2.0
//
// bench/support/finetune_plot.hpp - accuracies of the suite finetune, drawn: bars for each task and method,
// and curves over the sharing ratio.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "finetune_runs.hpp"
#include "svg.hpp"

namespace codegemm::bench {

namespace detail {

/// A name's place among the names seen so far.
[[nodiscard]] inline std::size_t place_of(std::vector<std::string>& names, const std::string& name) {
  const auto at = std::find(names.begin(), names.end(), name);
  const auto place = static_cast<std::size_t>(at - names.begin());
  if (at == names.end()) names.push_back(name);
  return place;
}

}  // namespace detail

/// An SVG of its own. `bars` are the methods as they serve, `curves` the accuracy at each sharing ratio.
[[nodiscard]] inline std::string finetune_svg(const std::vector<FinetuneRow>& bars,
                                              const std::vector<FinetuneRow>& curves) {
  constexpr const char* kColors[] = {"#7f7f7f", "#1f77b4", "#2ca02c", "#d62728", "#9467bd", "#8c564b",
                                     "#e377c2", "#bcbd22", "#17becf", "#ff7f0e", "#aec7e8", "#98df8a"};
  constexpr double kLeft = 60;
  constexpr double kTop = 40;
  constexpr double kHeight = 240;
  constexpr double kWidth = 620;
  std::vector<std::string> tasks;
  std::vector<std::string> methods;
  for (const FinetuneRow& row : bars) {
    (void)detail::place_of(tasks, row.task);
    (void)detail::place_of(methods, row.method);
  }
  std::vector<std::string> curve_tasks;
  for (const FinetuneRow& row : curves) (void)detail::place_of(curve_tasks, row.task);
  const double second = kTop + kHeight + 80;
  Svg svg(1000, static_cast<int>(curves.empty() ? second : second + kHeight + 60));
  char line[48];
  const auto axis = [&](double top, double left, double right, const std::string& title) {
    svg.text(left, top - 14, "start", title);
    for (int points = 0; points <= 100; points += 20) {
      const double y = top + kHeight * (100 - points) / 100.0;
      svg.grid(left, y, right, y);
      std::snprintf(line, sizeof(line), "%d", points);
      svg.text(left - 6, y + 4, "end", line);
    }
  };

  axis(kTop, kLeft, kLeft + kWidth, "right answers on held-out items, %");
  const double group = kWidth / static_cast<double>(std::max<std::size_t>(1, tasks.size()));
  const double bar = 0.85 * group / static_cast<double>(std::max<std::size_t>(1, methods.size()));
  const auto at_y = [](double top, double points) { return top + kHeight * (100.0 - points) / 100.0; };
  for (const FinetuneRow& row : bars) {
    const double x = kLeft + group * (static_cast<double>(detail::place_of(tasks, row.task)) + 0.08) +
                     bar * (static_cast<double>(detail::place_of(methods, row.method)) + 0.5);
    const char* const color = kColors[detail::place_of(methods, row.method) % std::size(kColors)];
    svg.stroke(x, at_y(kTop, 0.0), x, at_y(kTop, std::max(0.4, row.mean())), color, 0.8 * bar);
    if (row.deviation() > 0.0) {
      svg.stroke(x, at_y(kTop, row.mean() - row.deviation()), x, at_y(kTop, row.mean() + row.deviation()),
                 "#000000", 1.0);
    }
  }
  for (std::size_t t = 0; t < tasks.size(); ++t)
    svg.text(kLeft + group * (static_cast<double>(t) + 0.5), kTop + kHeight + 18, "middle", tasks[t]);
  for (std::size_t m = 0; m < methods.size(); ++m) {
    svg.legend(kLeft + kWidth + 20, kTop + 10 + 18 * static_cast<double>(m), 18, methods[m],
               kColors[m % std::size(kColors)]);
  }
  if (curves.empty()) return svg.done();

  const double wide = (kWidth + 200.0) / static_cast<double>(curve_tasks.size()) - 40.0;
  for (std::size_t t = 0; t < curve_tasks.size(); ++t) {
    const double left = kLeft + (wide + 40.0) * static_cast<double>(t);
    axis(second, left, left + wide, curve_tasks[t]);
    for (int quarter = 0; quarter <= 4; ++quarter) {
      std::snprintf(line, sizeof(line), "%.2f", 0.25 * quarter);
      svg.text(left + wide * 0.25 * quarter, second + kHeight + 16, "middle", line);
    }
    svg.text(left + wide / 2, second + kHeight + 34, "middle", "share read from the base's cache");
    for (const std::string_view method : {"naive", "prefillshare"}) {
      Curve curve{std::string(method), {}};
      for (const FinetuneRow& row : curves) {
        if (row.task == curve_tasks[t] && row.method == method)
          curve.points.emplace_back(row.sharing, row.mean());
      }
      std::sort(curve.points.begin(), curve.points.end());
      const char* const color = method == "naive" ? "#d62728" : "#2ca02c";
      svg.curve(
          curve, color, [&](double x) { return left + wide * x; }, [&](double y) { return at_y(second, y); });
    }
  }
  return svg.done();
}

}  // namespace codegemm::bench
