// SPDX-License-Identifier: Apache-2.0
//
// bench/support/explore_table.hpp - formats by size, time and perplexity: which are worth having, and which
// to take for a budget.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include <codegemm/base/text.hpp>

namespace codegemm::bench {

/// One way to store a model's linear layers. NaN: not measured.
struct Candidate {
  std::string name;    // "m1v4g64", "Q3_K_M"
  std::string family;  // "codegemm", or whose it is
  std::string method;  // how its weights were made
  double bits_per_weight = std::nan("");
  std::int64_t bytes = 0;
  double cpu_us = std::nan("");  // all linear layers of the blocks, one token
  double gpu_us = std::nan("");
  double perplexity = std::nan("");
  double perplexity_error = std::nan("");  // standard error
};

/// The places in `all`, fastest first, of those that no other beats: none is both as fast and as good, and
/// better in one. What lacks either number is left out; of equals all stay, in their order.
[[nodiscard]] inline std::vector<std::size_t> pareto_front(std::span<const Candidate> all,
                                                           double Candidate::*time) {
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (std::isfinite(all[i].*time) && std::isfinite(all[i].perplexity)) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    if (all[a].*time != all[b].*time) return all[a].*time < all[b].*time;
    return all[a].perplexity < all[b].perplexity;
  });
  std::vector<std::size_t> front;
  for (const std::size_t i : order) {
    const Candidate* const last = front.empty() ? nullptr : &all[front.back()];
    const bool better = last == nullptr || all[i].perplexity < last->perplexity;
    const bool equal =
        last != nullptr && all[i].perplexity == last->perplexity && all[i].*time == last->*time;
    if (better || equal) front.push_back(i);
  }
  return front;
}

/// The places in `all`, smallest first, of those that are better than all that are no larger; of equals the
/// first. What was not judged is left out.
[[nodiscard]] inline std::vector<std::size_t> size_front(std::span<const Candidate> all) {
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (std::isfinite(all[i].perplexity)) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    if (all[a].bytes != all[b].bytes) return all[a].bytes < all[b].bytes;
    return all[a].perplexity < all[b].perplexity;
  });
  std::vector<std::size_t> front;
  for (const std::size_t i : order) {
    if (front.empty() || all[i].perplexity < all[front.back()].perplexity) front.push_back(i);
  }
  return front;
}

/// What may be spent. Infinite: no limit.
struct Budget {
  double bytes = HUGE_VAL;
  double us = HUGE_VAL;
};

/// The place of the least perplexity within the budget; of equals the smaller, then the faster. Nothing where
/// none fits. A limit on time leaves out what has no time.
[[nodiscard]] inline std::optional<std::size_t> choose(std::span<const Candidate> all, const Budget& budget,
                                                       double Candidate::*time) {
  std::optional<std::size_t> best;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const Candidate& one = all[i];
    if (!std::isfinite(one.perplexity) || !(static_cast<double>(one.bytes) <= budget.bytes)) continue;
    if (std::isfinite(budget.us) && !(one.*time <= budget.us)) continue;
    if (!best) {
      best = i;
      continue;
    }
    const Candidate& other = all[*best];
    if (one.perplexity != other.perplexity) {
      if (one.perplexity < other.perplexity) best = i;
    } else if (one.bytes != other.bytes) {
      if (one.bytes < other.bytes) best = i;
    } else if (one.*time < other.*time) {
      best = i;
    }
  }
  return best;
}

/// The answer in words, with the numbers.
[[nodiscard]] inline std::string advice(std::span<const Candidate> all, const Budget& budget,
                                        double Candidate::*time) {
  constexpr double kMiB = 1024.0 * 1024.0;
  const auto text = [](const char* form, double value) {
    char out[64];
    std::snprintf(out, sizeof(out), form, value);
    return std::string(out);
  };
  std::string limits;
  if (std::isfinite(budget.bytes)) limits += text("%.1f MiB", budget.bytes / kMiB);
  if (std::isfinite(budget.us)) limits += (limits.empty() ? "" : " and ") + text("%.0f us", budget.us);
  if (limits.empty()) limits = "no limit";
  const std::optional<std::size_t> at = choose(all, budget, time);
  if (at) {
    const Candidate& one = all[*at];
    std::string out = concat("within ", limits, ": ", one.name, ", perplexity ", text("%.2f", one.perplexity),
                             ", ", text("%.1f MiB", static_cast<double>(one.bytes) / kMiB));
    if (std::isfinite(one.*time)) out += text(", %.0f us", one.*time);
    return out;
  }
  double least_bytes = HUGE_VAL;
  double least_us = HUGE_VAL;
  for (const Candidate& one : all) {
    if (!std::isfinite(one.perplexity)) continue;
    least_bytes = std::min(least_bytes, static_cast<double>(one.bytes));
    if (one.*time < least_us) least_us = one.*time;
  }
  if (!std::isfinite(least_bytes)) return concat("within ", limits, ": nothing was measured");
  std::string out =
      concat("within ", limits, ": none; the smallest has ", text("%.1f MiB", least_bytes / kMiB));
  if (std::isfinite(least_us)) out += text(", the fastest takes %.0f us", least_us);
  return out;
}

/// A field of a CSV line as RFC 4180 has it: quoted where it must be.
[[nodiscard]] inline std::string csv_field(std::string_view text) {
  if (text.find_first_of("\",\r\n") == std::string_view::npos) return std::string(text);
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"') out += '"';
    out += c;
  }
  return out + '"';
}

/// A header and a line for each; fields that were not measured are empty.
[[nodiscard]] inline std::string to_csv(std::span<const Candidate> all) {
  const auto number = [](double value) {
    char out[32] = "";
    if (std::isfinite(value)) std::snprintf(out, sizeof(out), "%.6g", value);
    return std::string(out);
  };
  std::string out = "name,family,method,bits_per_weight,bytes,cpu_us,gpu_us,perplexity,perplexity_error\n";
  for (const Candidate& one : all) {
    out += csv_field(one.name) + ',' + csv_field(one.family) + ',' + csv_field(one.method) + ',' +
           number(one.bits_per_weight) + ',' + concat(one.bytes) + ',' + number(one.cpu_us) + ',' +
           number(one.gpu_us) + ',' + number(one.perplexity) + ',' + number(one.perplexity_error) + '\n';
  }
  return out;
}

/// A row of the results; what was not measured is null.
[[nodiscard]] inline nlohmann::json to_json(const Candidate& one) {
  const auto number = [](double value) {
    return std::isfinite(value) ? nlohmann::json(value) : nlohmann::json();
  };
  return {{"name", one.name},
          {"family", one.family},
          {"method", one.method},
          {"bits_per_weight", number(one.bits_per_weight)},
          {"bytes", one.bytes},
          {"cpu_us", number(one.cpu_us)},
          {"gpu_us", number(one.gpu_us)},
          {"perplexity", number(one.perplexity)},
          {"perplexity_error", number(one.perplexity_error)}};
}

/// One token through layers of these shapes ("NxK") in `config`, out of the results of the suite
/// codegemm-gpu. NaN where a shape is not in it. Throws nlohmann::json::exception for results of another
/// form.
[[nodiscard]] inline double gpu_us(const nlohmann::json& suite, const std::string& config,
                                   std::span<const std::string> shapes) {
  double sum = 0.0;
  for (const std::string& shape : shapes) {
    double found = std::nan("");
    for (const nlohmann::json& row : suite.at("rows")) {
      if (row.at("config") == config && row.at("shape") == shape && row.at("tokens") == 1)
        found = row.at("median_us").get<double>();
    }
    sum += found;
  }
  return sum;
}

}  // namespace codegemm::bench
