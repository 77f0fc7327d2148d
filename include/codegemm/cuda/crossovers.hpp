// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/crossovers.hpp - token counts up to which each regime is the fastest, as measured.
// Layer: cuda (host only, no CUDA headers).
#pragma once

#include <cstdint>
#include <span>

#include <codegemm/format.hpp>

namespace codegemm::cuda {

/// The last token counts of two regimes, for matrices of one size. Above both comes wgmma where there is one.
struct LastTokens {
  int gather = 1;  ///< last token count that is gathered
  int mma = 16;    ///< last one that goes through mma.sync
};

/// A kind of card. An H100 (5120) and an H200 (6144; the one that was measured says 6016) differ in the last
/// number alone.
struct Card {
  int arch = 0;             ///< as Device::arch
  int multiprocessors = 0;  ///< how many
  int memory_bits = 0;      ///< width of the memory's bus

  /// The same kind: as many stacks of memory, each 1,024 bits wide.
  [[nodiscard]] constexpr bool operator==(const Card& o) const noexcept {
    return arch == o.arch && multiprocessors == o.multiprocessors &&
           (memory_bits + 1023) / 1024 == (o.memory_bits + 1023) / 1024;
  }
};

/// What was measured on one card for one format.
struct Crossover {
  Card card;         ///< measured on
  Format format;     ///< measured with
  LastTokens small;  ///< matrices of at most kSmallWeights weights
  LastTokens large;  ///< all larger ones
  /// Matrices of fewer rows are gathered for one token at most: a Psumbook of two is as much work as two of
  /// one, and few row tiles share it.
  std::int64_t gather_rows = 0;

  /// For a matrix of this size.
  [[nodiscard]] constexpr LastTokens of(std::int64_t rows, std::int64_t cols) const noexcept;
};

/// Up to here a matrix counts as small.
inline constexpr std::int64_t kSmallWeights = std::int64_t{6144} * 4096;

constexpr LastTokens Crossover::of(std::int64_t rows, std::int64_t cols) const noexcept {
  LastTokens out = rows * cols <= kSmallWeights ? small : large;
  if (rows < gather_rows && out.gather > 1) out.gather = 1;
  return out;
}

/// The lines between the two marks are written by `scripts/bench tune --write` on the card that they name.
/// The first one is what formats near none of the others get.
inline constexpr Crossover kCrossovers[] = {
    // tune: begin
    {{90, 132, 5120}, {4, 1, 8, 128}, {1, 16}, {1, 16}},
    {{90, 132, 5120}, {8, 2, 8, 128}, {1, 16}, {1, 16}},
    {{90, 132, 5120}, {4, 1, 8, 32}, {1, 24}, {1, 16}},
    {{90, 132, 5120}, {4, 1, 8, -1}, {1, 16}, {1, 16}},
    {{90, 132, 5120}, {8, 2, 8, -1}, {1, 24}, {1, 16}},
    {{90, 132, 5120}, {8, 1, 16, -1}, {0, 16}, {0, 16}},
    {{90, 132, 6016}, {4, 1, 8, 128}, {1, 16}, {2, 16}, 28672},
    {{90, 132, 6016}, {8, 2, 8, 128}, {2, 16}, {2, 16}},
    {{90, 132, 6016}, {4, 1, 8, 32}, {1, 16}, {2, 16}, 28672},
    {{90, 132, 6016}, {4, 1, 8, -1}, {1, 16}, {1, 16}},
    {{90, 132, 6016}, {8, 2, 8, -1}, {2, 16}, {2, 16}},
    {{90, 132, 6016}, {8, 1, 16, -1}, {0, 16}, {0, 16}},
    // tune: end
};

/// The nearest measurement: of the same v, m and code bytes before any other, then of the same card, then of
/// the same kind of scales (one a row, or groups), then of the same format; the first of those that are
/// equally near.
[[nodiscard]] constexpr LastTokens last_tokens(Format f, std::int64_t rows, std::int64_t cols, Card card,
                                               std::span<const Crossover> measured = kCrossovers) {
  const auto nearness = [&](const Crossover& c) {
    const Format& o = c.format;
    int out = 0;
    if (o.v == f.v && o.m == f.m && o.stored_code_bits() == f.stored_code_bits()) out += 16;
    if (c.card.arch == card.arch) out += 4;
    if (c.card.arch == card.arch && c.card.multiprocessors == card.multiprocessors) out += 4;
    if (c.card == card) out += 4;
    if ((o.g < 0) == (f.g < 0)) out += 2;
    if (o == f) out += 1;
    return out;
  };
  const Crossover* best = measured.data();
  for (const Crossover& c : measured) {
    if (nearness(c) > nearness(*best)) best = &c;
  }
  return best->of(rows, cols);
}

}  // namespace codegemm::cuda
