// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/sim/cost_model.hpp - how long a step takes: tables, filled by measurement or from a formula.
// Layer: sim (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <prefillshare/vocabulary.hpp>

namespace prefillshare {

/// Seconds over two axes, linear between the points and beyond the last of them.
struct StepTable {
  std::vector<double> x;        ///< ascending
  std::vector<double> y;        ///< ascending
  std::vector<double> seconds;  ///< [x][y]

  /// Seconds at that point: linear between the table's points, and beyond its ends by the two points there.
  [[nodiscard]] double operator()(double at_x, double at_y) const noexcept {
    const std::size_t i = cell(x, at_x);
    const std::size_t j = cell(y, at_y);
    const double u = share(x, i, at_x);
    const double v = share(y, j, at_y);
    const std::size_t next_i = std::min(i + 1, x.size() - 1);
    const std::size_t next_j = std::min(j + 1, y.size() - 1);
    const double low = at(i, j) + v * (at(i, next_j) - at(i, j));
    const double high = at(next_i, j) + v * (at(next_i, next_j) - at(next_i, j));
    return low + u * (high - low);
  }

 private:
  [[nodiscard]] static std::size_t cell(const std::vector<double>& axis, double value) noexcept {
    const auto above = std::upper_bound(axis.begin(), axis.end(), value) - axis.begin();
    const auto last = static_cast<std::ptrdiff_t>(axis.size()) - 2;
    return static_cast<std::size_t>(
        std::clamp<std::ptrdiff_t>(above - 1, 0, std::max<std::ptrdiff_t>(last, 0)));
  }
  [[nodiscard]] static double share(const std::vector<double>& axis, std::size_t i, double value) noexcept {
    return i + 1 < axis.size() ? (value - axis[i]) / (axis[i + 1] - axis[i]) : 0.0;
  }
  [[nodiscard]] double at(std::size_t i, std::size_t j) const noexcept { return seconds[i * y.size() + j]; }
};

/// kInvalidArgument unless both axes ascend and every cell has a time of 0 or more.
[[nodiscard]] inline Status validate(const StepTable& table, const char* name) {
  const auto ascends = [](const std::vector<double>& axis) {
    for (std::size_t i = 1; i < axis.size(); ++i) {
      if (!(axis[i - 1] < axis[i])) return false;
    }
    return !axis.empty() && axis.front() >= 0.0;
  };
  const bool times =
      std::all_of(table.seconds.begin(), table.seconds.end(), [](double s) { return s >= 0.0; });
  if (ascends(table.x) && ascends(table.y) && table.seconds.size() == table.x.size() * table.y.size() &&
      times) {
    return {};
  }
  return error(StatusCode::kInvalidArgument, "step table ", name, ": ", table.seconds.size(), " times for ",
               table.x.size(), " x ", table.y.size(), " points, which must ascend from 0 or more");
}

/// What a prefill step does for one sequence.
struct PrefillPart {
  std::int64_t tokens = 0;   ///< of its chunk
  std::int64_t context = 0;  ///< before them
};

/// One worker of each kind, and the wire between them.
struct CostModel {
  StepTable prefill;  ///< x: tokens of the chunk, from 0 (what a step costs by itself); y: tokens before it
  StepTable decode;   ///< x: sequences in the batch; y: tokens of all their contexts together
  double link_seconds = 0.0;            ///< each transfer, besides its bytes
  double link_bytes_per_second = 1e12;  ///< out of a prefill worker, and into a decode worker
  int overlapped_layers =
      0;  ///< a transfer runs along with the prefill but for one layer of so many; 0: after it

  /// Of a step over one chunk.
  [[nodiscard]] double prefill_seconds(std::int64_t tokens, std::int64_t context) const noexcept {
    return prefill(static_cast<double>(tokens), static_cast<double>(context));
  }
  /// Of a step over the chunks of several sequences, where the table is one of chunks of one sequence. The
  /// linear layers see them all as one chunk. Attention of several runs beside each other: as long as the
  /// longest of them, or as all pairs of tokens that look at one another at the rate of the table's largest
  /// point.
  [[nodiscard]] double prefill_step_seconds(std::span<const PrefillPart> parts) const noexcept {
    const double most_pairs = prefill.x.back() * prefill.y.back();
    const double most = prefill(prefill.x.back(), prefill.y.back()) - prefill(prefill.x.back(), 0.0);
    const double pair = most_pairs > 0.0 ? std::max(most, 0.0) / most_pairs : 0.0;
    const auto linear = [&](std::int64_t tokens) {
      const auto t = static_cast<double>(tokens);
      return prefill_seconds(tokens, 0) - pair * 0.5 * t * t;
    };
    std::int64_t tokens = 0;
    double longest = 0.0;
    double pairs = 0.0;
    for (const PrefillPart& part : parts) {
      const auto t = static_cast<double>(part.tokens);
      tokens += part.tokens;
      pairs += t * static_cast<double>(part.context) + 0.5 * t * t;
      longest = std::max(longest, prefill_seconds(part.tokens, part.context) - linear(part.tokens));
    }
    return linear(tokens) + std::max(longest, pair * pairs);
  }
  /// What one chunk adds to a step that has others.
  [[nodiscard]] double prefill_share(std::int64_t tokens, std::int64_t context) const noexcept {
    return prefill_seconds(tokens, context) - prefill_seconds(0, context);
  }
  /// Each of `steps` steps, which add one token to each context: the mean, exact while the table is linear.
  [[nodiscard]] double decode_seconds(std::int64_t batch, std::int64_t context,
                                      std::int64_t steps) const noexcept {
    const double middle =
        static_cast<double>(context) +
        0.5 * static_cast<double>(batch) * static_cast<double>(std::max<std::int64_t>(steps, 1) - 1);
    return decode(static_cast<double>(batch), middle);
  }
  /// Seconds that a transfer takes when its prefill took `prefill_seconds`.
  [[nodiscard]] double transfer_seconds(double bytes, double prefill_seconds) const noexcept {
    const double wire = bytes / link_bytes_per_second;
    if (overlapped_layers < 1) return link_seconds + wire;
    return link_seconds + std::max(wire / overlapped_layers, wire - prefill_seconds);
  }
};

/// A row of a table that was measured at two points. Decode steps, whose time grows with the tokens that they
/// read, are measured so: batches of different sizes have no contexts in common.
struct MeasuredLine {
  double x = 0.0;             ///< of the row
  double low = 0.0;           ///< the smaller y
  double high = 0.0;          ///< the larger y
  double low_seconds = 0.0;   ///< measured there
  double high_seconds = 0.0;  ///< measured there
};
/// The table of such lines, y from 0 to `most_y`. A line that falls (noise) is taken as flat at its mean.
/// kInvalidArgument unless x ascends and low < high.
[[nodiscard]] inline Result<StepTable> table_of_lines(std::span<const MeasuredLine> lines, double most_y) {
  StepTable out;
  out.y = {0.0, most_y};
  for (const MeasuredLine& line : lines) {
    if (!(line.low < line.high) || !(out.x.empty() || out.x.back() < line.x) || !(most_y > 0.0)) {
      return error(StatusCode::kInvalidArgument, "step table: a line at ", line.x, " from ", line.low, " to ",
                   line.high, ", up to ", most_y);
    }
    double slope = (line.high_seconds - line.low_seconds) / (line.high - line.low);
    double start = line.low_seconds - slope * line.low;
    if (slope < 0.0 || start < 0.0) {
      slope = slope < 0.0 ? 0.0 : line.high_seconds / line.high;
      start = slope == 0.0 ? 0.5 * (line.low_seconds + line.high_seconds) : 0.0;
    }
    out.x.push_back(line.x);
    out.seconds.push_back(start);
    out.seconds.push_back(start + slope * most_y);
  }
  return out;
}

/// kInvalidArgument for a table that cannot be, named in the text.
[[nodiscard]] inline Status validate(const CostModel& cost) {
  if (Status s = validate(cost.prefill, "prefill"); !s.ok()) return s;
  if (Status s = validate(cost.decode, "decode"); !s.ok()) return s;
  if (cost.link_seconds >= 0.0 && cost.link_bytes_per_second > 0.0 && cost.overlapped_layers >= 0) return {};
  return error(StatusCode::kInvalidArgument, "cost model: a link of ", cost.link_bytes_per_second,
               " bytes/s after ", cost.link_seconds, " s");
}

/// For a Router: what a prompt costs, by the table.
struct TablePrefillCost {
  const CostModel* model = nullptr;  ///< the table; outlives this

  /// Seconds for `tokens` behind a context of `context` tokens.
  [[nodiscard]] double operator()(std::int64_t tokens, std::int64_t context) const noexcept {
    return model->prefill_seconds(tokens, context);
  }
};

/// A card and a model in a few numbers, for a roofline: a model of a machine, not a measurement of one.
struct RooflineSpec {
  double flop_per_second = 0.0;       ///< dense, of the type computed in
  double bytes_per_second = 0.0;      ///< of its memory
  double compute_share = 0.5;         ///< of these, what a prefill reaches
  double memory_share = 0.8;          ///< and what a decode step reaches
  double prefill_step_seconds = 0.0;  ///< of a step besides
  double decode_step_seconds = 0.0;   ///< of a step besides
  double parameters = 0.0;            ///< of the model
  double weight_bytes = 0.0;          ///< all that a step reads of them
  double kv_bytes_per_token = 0.0;    ///< of all layers
  int layers = 0;                     ///< of the model
  int heads = 0;                      ///< of Q
  int head_dim = 0;                   ///< elements of a head
};

/// Llama-3.1-8B in 16 bits on an A100-SXM4-80GB: 312 TFLOP/s and 2,039 GB/s (NVIDIA's data sheet), 8.03e9
/// parameters, 32 layers, 32 heads of 128, 8 of K and V. The shares and the milliseconds a step are assumed.
[[nodiscard]] inline RooflineSpec a100_llama_8b() {
  RooflineSpec spec;
  spec.flop_per_second = 312e12;
  spec.bytes_per_second = 2039e9;
  spec.prefill_step_seconds = 2e-3;
  spec.decode_step_seconds = 1.5e-3;
  spec.parameters = 8.03e9;
  spec.weight_bytes = 16.06e9;
  spec.kv_bytes_per_token = 131072;
  spec.layers = 32;
  spec.heads = 32;
  spec.head_dim = 128;
  return spec;
}

/// prefill(t, c) = step + max(weights / memory, (2 P t + 4 layers heads head_dim t (c + t/2)) / compute)
/// decode(b, s)  = step + max(2 P b / compute, (weights + s kv) / memory); the attention's arithmetic is
/// free.
[[nodiscard]] inline CostModel roofline_cost(const RooflineSpec& spec) {
  CostModel cost;
  const double compute = spec.flop_per_second * spec.compute_share;
  const double memory = spec.bytes_per_second * spec.memory_share;
  cost.prefill.x = {0, 1, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192};
  cost.prefill.y = {0, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072};
  for (const double t : cost.prefill.x) {
    for (const double c : cost.prefill.y) {
      const double pairs = t * (c + 0.5 * t);
      const double flop = 2.0 * spec.parameters * t + 4.0 * spec.layers * spec.heads * spec.head_dim * pairs;
      const double floor = t > 0.0 ? spec.weight_bytes / memory : 0.0;
      cost.prefill.seconds.push_back(spec.prefill_step_seconds + std::max(floor, flop / compute));
    }
  }
  cost.decode.x = {1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512};
  cost.decode.y = {0, 1e4, 1e5, 1e6, 1e7};
  for (const double b : cost.decode.x) {
    for (const double s : cost.decode.y) {
      const double bytes = spec.weight_bytes + s * spec.kv_bytes_per_token;
      cost.decode.seconds.push_back(spec.decode_step_seconds +
                                    std::max(2.0 * spec.parameters * b / compute, bytes / memory));
    }
  }
  return cost;
}

}  // namespace prefillshare
