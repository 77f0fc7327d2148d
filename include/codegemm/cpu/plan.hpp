// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/plan.hpp - cuts one multiplication into tasks. Looks at shapes only, never at the workers.
// Layer: cpu (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include <codegemm/cpu/amx.hpp>
#include <codegemm/cpu/configs.hpp>
#include <codegemm/cpu/isa.hpp>
#include <codegemm/cpu/lookup_args.hpp>
#include <codegemm/cpu/slab_plan.hpp>
#include <codegemm/pack.hpp>

namespace codegemm::detail {

/// Which of the ways is taken. kAutomatic is the cheapest by CpuCosts; the others are for tests.
/// kPsumbook gathers from fp32 tables, kLookup looks 16-bit tables up in registers (where the instruction set
/// has no such kernel: kPsumbook). kDense multiplies dequantized weights in fp32, kInteger in 16-bit integers
/// (where that cannot be: kDense).
/// kBytes multiplies pairs of bytes with AMX (where that cannot be: kInteger).
enum class Regime : int { kAutomatic = 0, kPsumbook = 1, kDense = 2, kLookup = 3, kInteger = 4, kBytes = 5 };

/// Whether `isa` has kernels for 16-bit integers and the matrix suits them.
[[nodiscard]] constexpr bool can_multiply_integers(const PackedView& w, Isa isa) noexcept {
  return has_avx2(isa) && w.codebooks_rounded != nullptr &&
         (w.format.g < 0 || w.format.g % CpuTiles::kIntegerUnit == 0);
}

/// Whether the matrix suits tiles of bytes, packed for `isa`.
[[nodiscard]] constexpr bool suits_bytes(const PackedView& w, Isa isa) noexcept {
  return isa == Isa::kAvx512Vbmi && w.codebooks_bytes != nullptr && w.cols % CpuTiles::kAmxColumns == 0 &&
         (w.format.g < 0 || w.format.g % CpuTiles::kAmxColumns == 0);
}

/// And whether they can be multiplied here, with AMX; taken of itself only if CpuTiles::kUseAmx.
[[nodiscard]] inline bool can_multiply_bytes(const PackedView& w, Isa isa) noexcept {
  return suits_bytes(w, isa) && amx_available();
}

/// Whether the kernels of `isa` can look the codes up as they lie.
[[nodiscard]] inline bool can_look_up(const PackedView& w, Isa isa) noexcept {
  return w.block_rows == kBlockRows && lookup_cost(isa, w.format.b) > 0.0;
}

/// Cycles of an entry by each way, all rows.
struct EntryCosts {
  double lookup1 = 0.0;  // a token; 0: not done
  double lanes1 = 0.0;
  double lanes4 = 0.0;
  double lanes8 = 0.0;

  [[nodiscard]] double lanes(std::int64_t tokens) const noexcept {
    const std::int64_t eights = tokens / 8;
    const std::int64_t left = tokens % 8;
    const double rest = left == 0 ? 0.0 : left == 1 ? lanes1 : left <= 4 ? lanes4 : lanes8;
    return static_cast<double>(eights) * lanes8 + rest;
  }
};

[[nodiscard]] inline EntryCosts entry_costs(const PackedView& w, Isa isa) noexcept {
  const double blocks = static_cast<double>(w.padded_rows()) / kBlockRows;
  const auto chunks = static_cast<double>(ceil_div(w.padded_rows(), CpuTiles::kRowChunk));
  const double elements = static_cast<double>(w.format.v) * static_cast<double>(w.format.centroids());
  const double build = chunks * CpuCosts::kLanesBuild * elements;
  EntryCosts out;
  out.lanes1 = blocks * CpuCosts::kLanes1 + build / 8;
  out.lanes4 = blocks * CpuCosts::kLanes4 + build / 2;
  out.lanes8 = blocks * CpuCosts::kLanes8 + build;
  if (can_look_up(w, isa)) {
    const bool slow = isa == Isa::kAvx512Vbmi && w.format.b == 8 && two_register_lookups_are_slow();
    const double cost = slow ? CpuCosts::kLookupOneRegister : lookup_cost(isa, w.format.b);
    const double encode = isa == Isa::kAvx512Vbmi ? CpuCosts::kEncodeVbmi : CpuCosts::kEncode;
    const double build1 = has_avx512(isa) ? CpuCosts::kBuildAvx512 * elements : build / chunks / 8;
    const auto centroids = static_cast<double>(w.format.centroids());
    const double tables = w.codebooks_pairs != nullptr
                              ? CpuCosts::kMakeElement * elements + CpuCosts::kMakeEntry * centroids
                              : build1 + encode * centroids;
    out.lookup1 = blocks * cost + chunks * tables;
  }
  return out;
}

/// The fewest tokens from which on dequantize-and-multiply is the cheapest way, by CpuCosts.
[[nodiscard]] inline std::int64_t dense_from_tokens(const PackedView& w, Isa isa) noexcept {
  const bool integers = can_multiply_integers(w, isa);
  const auto weights = static_cast<double>(w.padded_rows()) * static_cast<double>(w.cols);
  const auto entries = static_cast<double>(w.vectors() * w.format.m);
  const EntryCosts costs = entry_costs(w, isa);
  double entry = costs.lanes8 / 8;  // a token
  if (costs.lookup1 > 0.0) entry = std::min(entry, costs.lookup1);
  const auto codes = entries * static_cast<double>(w.padded_rows());
  double dense = weights * (integers ? integer_cost(isa) : CpuCosts::kDenseMultiply);  // a token
  double dequantize =
      integers ? CpuCosts::kIntegerDequantize * codes : CpuCosts::kDequantize * weights * w.format.m;
  if (CpuTiles::kUseAmx && can_multiply_bytes(w, isa)) {
    dense = weights * CpuCosts::kByteMultiply;
    const double rebuild = bytes_are_permuted(w.format.b) ? CpuCosts::kBytePermute * weights * w.format.m
                                                          : CpuCosts::kByteRebuild * codes;
    dequantize = weights * CpuCosts::kByteLoad + rebuild;
  }
  if (entries * entry <= dense) return std::numeric_limits<std::int64_t>::max();
  const double tokens = dequantize / (entries * entry - dense);
  return tokens > 1e9 ? std::numeric_limits<std::int64_t>::max() : static_cast<std::int64_t>(tokens) + 1;
}

[[nodiscard]] inline Regime choose_regime(const PackedView& w, std::int64_t tokens, Isa isa,
                                          Regime asked) noexcept {
  const bool lookup = can_look_up(w, isa);
  const Regime integer = can_multiply_integers(w, isa) ? Regime::kInteger : Regime::kDense;
  const bool bytes = (CpuTiles::kUseAmx || asked == Regime::kBytes) && can_multiply_bytes(w, isa);
  const Regime dense = bytes ? Regime::kBytes : integer;
  if (asked == Regime::kLookup && !lookup) return Regime::kPsumbook;
  if (asked == Regime::kInteger) return integer;
  if (asked == Regime::kBytes) return dense;
  if (asked != Regime::kAutomatic) return asked;
  if (tokens >= dense_from_tokens(w, isa)) return dense;
  if (!lookup) return Regime::kPsumbook;
  const EntryCosts costs = entry_costs(w, isa);
  return static_cast<double>(tokens) * costs.lookup1 <= costs.lanes(tokens) ? Regime::kLookup
                                                                            : Regime::kPsumbook;
}

/// Psumbook: tokens go in blocks of 8. Gathering has them in the lanes, 8, 4 or 1 in what is left; looking up
/// takes one after the other while their codes are in the cache. Rows go in chunks that share one Psumbook; K
/// in splits, where there would be too few tasks else, whose sums are added in a fixed order.
struct PsumbookPlan {
  bool lookup = false;
  std::int64_t tokens = 0;
  std::int64_t token_blocks = 0;
  std::int64_t chunk_blocks = 0;  // row blocks in a chunk
  std::int64_t chunks = 0;
  std::int64_t split_tiles = 0;  // tiles in a split
  std::int64_t splits = 0;
  std::int64_t last_parts = 1;     // parts of the rows that the last split is done in
  bool meet = false;               // the two splits add their sums up themselves
  std::int64_t sweep_vectors = 0;  // vectors whose tables are held at once, more than one lane
  // Floats of a worker's scratch and of the partial sums of all splits: [splits][token blocks][rows][lanes],
  // of lookups [splits][tokens][rows].
  std::int64_t table_floats = 0;
  std::int64_t encoded_floats = 0;
  std::int64_t flush_floats = 0;
  std::int64_t x_floats = 0;
  std::int64_t sum_floats = 0;
  std::int64_t split_floats = 0;

  [[nodiscard]] std::int64_t tokens_in(std::int64_t token_block) const noexcept {
    return std::min<std::int64_t>(8, tokens - token_block * 8);
  }
  [[nodiscard]] int lanes(std::int64_t token_block) const noexcept {
    const std::int64_t left = tokens_in(token_block);
    return lookup || left == 1 ? 1 : left > 4 ? 8 : 4;
  }
  /// Sums that are kept for each row of a token block.
  [[nodiscard]] std::int64_t row_sums(std::int64_t token_block) const noexcept {
    return lookup ? tokens_in(token_block) : lanes(token_block);
  }
  [[nodiscard]] std::int64_t worker_floats() const noexcept {
    const std::int64_t part = lookup ? 0 : sum_floats;
    return table_floats + encoded_floats + flush_floats + x_floats + part + (splits > 1 ? 0 : sum_floats);
  }
  [[nodiscard]] std::int64_t partial_floats() const noexcept {
    return splits > 1 ? splits * split_floats : 0;
  }
  [[nodiscard]] std::int64_t floats(int workers) const noexcept {
    return partial_floats() + workers * worker_floats();
  }
};

[[nodiscard]] inline PsumbookPlan make_psumbook_plan(const PackedView& w, std::int64_t tokens,
                                                     bool lookup) noexcept {
  PsumbookPlan plan;
  plan.lookup = lookup;
  plan.tokens = tokens;
  plan.token_blocks = ceil_div(tokens, 8);
  const std::int64_t chunk_rows = tokens == 1 ? CpuTiles::kRowChunk1 : CpuTiles::kRowChunk;
  plan.chunks = std::max<std::int64_t>(1, ceil_div(w.padded_rows(), chunk_rows));
  const std::int64_t whole = std::max<std::int64_t>(1, plan.chunks * plan.token_blocks);
  const std::int64_t tasks =
      std::clamp<std::int64_t>(tokens * w.padded_rows() * w.cols / CpuTiles::kTaskWeights,
                               CpuTiles::kFewTasks, CpuTiles::kTargetTasks);
  const std::int64_t wanted =
      std::clamp<std::int64_t>(ceil_div(tasks, whole), 1, std::max<std::int64_t>(1, w.tiles));
  plan.split_tiles = std::max<std::int64_t>(1, ceil_div(w.tiles, wanted));
  if (lookup && tokens == 1 && w.rows * w.cols <= CpuTiles::kTwoTaskWeights) {
    const bool cut_rows = !shares_k_by_two(w.format.b, w.rows, w.cols);
    if (cut_rows) plan.chunks = std::min<std::int64_t>(2, w.row_blocks);
    plan.split_tiles = cut_rows ? w.tiles : std::max<std::int64_t>(1, w.tiles / 2);
  }
  plan.chunk_blocks = ceil_div(w.row_blocks, plan.chunks);
  plan.splits = std::max<std::int64_t>(1, ceil_div(w.tiles, plan.split_tiles));
  // So that two workers or four share an odd number evenly.
  if (plan.splits % 2 == 1 && plan.splits > 1 && plan.chunk_blocks > 1) plan.last_parts = 2;
  plan.meet = lookup && tokens == 1 && plan.chunks == 1 && plan.splits == 2;

  const std::int64_t held = w.tile_vectors * w.format.m;  // tables of a tile
  const std::int64_t table1 = w.format.centroids();
  const std::int64_t last = plan.token_blocks - 1;
  const std::int64_t lanes = plan.lanes(0);
  const std::int64_t table = table1 * w.format.m * lanes;  // of one vector
  plan.sweep_vectors = std::clamp<std::int64_t>(CpuTiles::kLaneTableFloats / table, 1, w.tile_vectors);
  plan.table_floats = line_floats(std::max(lookup ? 0 : plan.sweep_vectors * table, held * table1));
  if (lookup) {
    plan.encoded_floats = line_floats(held * encoded_bytes(w.format.b) / 4);
    // A scale group of any length may end in the tile, and its last flush be short.
    plan.flush_floats = line_floats(held * static_cast<std::int64_t>(sizeof(Flush) / sizeof(float)));
  } else {
    plan.x_floats = line_floats(w.tile_vectors * w.format.v * lanes);
  }
  plan.sum_floats = line_floats(plan.chunk_blocks * w.block_rows * plan.row_sums(0));
  plan.split_floats = line_floats(w.padded_rows() * (8 * last + plan.row_sums(last)));
  return plan;
}

/// Floats of workspace for exactly `tokens` tokens.
[[nodiscard]] inline std::int64_t exact_workspace_floats(const PackedView& w, std::int64_t tokens,
                                                         int workers, Isa isa, Regime asked) noexcept {
  if (tokens <= 0 || w.rows == 0 || w.cols == 0) return 0;
  const Regime regime = choose_regime(w, tokens, isa, asked);
  if (regime == Regime::kDense) return make_dense_plan(w.rows, w.cols, tokens).floats(workers);
  if (regime == Regime::kBytes) return make_byte_plan(w.rows, w.cols, tokens).floats(workers);
  if (regime == Regime::kInteger) return make_integer_plan(w.rows, w.cols, tokens).floats(workers);
  return make_psumbook_plan(w, tokens, regime == Regime::kLookup).floats(workers);
}

/// Floats for any number of tokens up to `tokens`. Fewer tokens may need more, since K is split for them;
/// that ends at kTargetTasks token blocks. From there on until it gets dense the need stays, then it grows.
[[nodiscard]] inline std::int64_t workspace_floats(const PackedView& w, std::int64_t tokens, int workers,
                                                   Isa isa) noexcept {
  std::int64_t most = exact_workspace_floats(w, tokens, workers, isa, Regime::kAutomatic);
  for (std::int64_t t = 1; t < tokens && t <= 8 * (CpuTiles::kTargetTasks + 1); ++t) {
    most = std::max(most, exact_workspace_floats(w, t, workers, isa, Regime::kAutomatic));
  }
  return most;
}

}  // namespace codegemm::detail
