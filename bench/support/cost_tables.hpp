// SPDX-License-Identifier: Apache-2.0
//
// bench/support/cost_tables.hpp - step times that were measured on a card, as rows of a suite's JSON, and the
// cost model that they make.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <codegemm/base/status.hpp>
#include <prefillshare/sim/cost_model.hpp>

namespace codegemm::bench {

/// Where a step was timed: on the whole card alone, or on a part of so many multiprocessors while steps of
/// other weights ran on the rest.
struct StepPlace {
  int multiprocessors = 0;  // 0: alone
  std::string beside;       // the weights of those steps
};

namespace detail {

inline void set_place(nlohmann::json& row, const StepPlace& place) {
  if (place.multiprocessors == 0) return;
  row["multiprocessors"] = place.multiprocessors;
  row["beside"] = place.beside;
}

}  // namespace detail

/// A prefill step over `tokens` of one sequence behind `context`.
[[nodiscard]] inline nlohmann::json prefill_row(const std::string& weights, std::int64_t tokens,
                                                std::int64_t context, double seconds,
                                                const StepPlace& place = {}) {
  nlohmann::json row{{"name", "prefill_step"},
                     {"weights", weights},
                     {"tokens", tokens},
                     {"context", context},
                     {"ms", seconds * 1e3}};
  detail::set_place(row, place);
  return row;
}
/// A decode step of `batch` sequences with `context` tokens in all.
[[nodiscard]] inline nlohmann::json decode_row(const std::string& weights, std::int64_t batch,
                                               std::int64_t context, double seconds,
                                               const StepPlace& place = {}) {
  nlohmann::json row{{"name", "decode_step"},
                     {"weights", weights},
                     {"batch", batch},
                     {"context", context},
                     {"ms", seconds * 1e3}};
  detail::set_place(row, place);
  return row;
}

/// The multiprocessors of a split card: 0 for steps that have all of it.
struct CardParts {
  int prefill = 0;
  int decode = 0;
};

/// The model that such rows make, others among them: prefill steps of the weights `prefill`, every tokens at
/// every context; decode steps of `decode`, each batch at two contexts; alone, or of each beside the other on
/// `parts`. kCorruptData for rows that lack something.
[[nodiscard]] inline Result<prefillshare::CostModel> cost_from_rows(const nlohmann::json& rows,
                                                                    const std::string& prefill,
                                                                    const std::string& decode,
                                                                    const CardParts& parts = {}) {
  constexpr double kMostContext = 1e7;                 // the lines' far end, in tokens of all sequences
  std::map<double, std::map<double, double>> chunks;   // tokens, context: seconds
  std::map<double, std::map<double, double>> batches;  // sequences, context: seconds
  try {
    for (const nlohmann::json& row : rows) {
      const std::string name = row.value("name", "");
      const bool step = name == "prefill_step";
      if (!step && name != "decode_step") continue;
      if (row.at("weights").get<std::string>() != (step ? prefill : decode)) continue;
      const int multiprocessors = step ? parts.prefill : parts.decode;
      if (row.value("multiprocessors", 0) != multiprocessors) continue;
      if (multiprocessors > 0 && row.at("beside").get<std::string>() != (step ? decode : prefill)) continue;
      auto& table = step ? chunks : batches;
      table[row.at(step ? "tokens" : "batch").get<double>()][row.at("context").get<double>()] =
          row.at("ms").get<double>() * 1e-3;
    }
  } catch (const nlohmann::json::exception& e) {
    return error(StatusCode::kCorruptData, "step costs: ", e.what());
  }
  prefillshare::CostModel out;
  if (!chunks.empty()) {
    for (const auto& [context, seconds] : chunks.begin()->second) out.prefill.y.push_back(context);
  }
  for (const auto& [tokens, line] : chunks) {
    out.prefill.x.push_back(tokens);
    for (const double context : out.prefill.y) {
      const auto at = line.find(context);
      if (at == line.end() || line.size() != out.prefill.y.size()) {
        return error(StatusCode::kCorruptData, "step costs: a prefill step of ", tokens,
                     " tokens was measured at ", line.size(), " contexts, others at ", out.prefill.y.size(),
                     " or at other ones");
      }
      out.prefill.seconds.push_back(at->second);
    }
  }
  std::vector<prefillshare::MeasuredLine> lines;
  for (const auto& [batch, line] : batches) {
    if (line.size() < 2) {
      return error(StatusCode::kCorruptData, "step costs: a decode step of ", batch,
                   " sequences was measured at one context");
    }
    lines.push_back(
        {batch, line.begin()->first, line.rbegin()->first, line.begin()->second, line.rbegin()->second});
  }
  auto table = prefillshare::table_of_lines(lines, kMostContext);
  if (!table.ok()) return table.status();
  out.decode = *std::move(table);
  if (Status s = prefillshare::validate(out); !s.ok()) return s;
  return out;
}

}  // namespace codegemm::bench
