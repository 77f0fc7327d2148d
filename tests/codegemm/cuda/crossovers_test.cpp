// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/crossovers_test.cpp - which measurement a format and a card get, and which cluster
// which piece of a product.
#include <codegemm/cuda/block/piece_schedule.hpp>
#include <codegemm/cuda/crossovers.hpp>

#include <algorithm>
#include <vector>

#include <support/catch.hpp>

namespace codegemm::test {
namespace {

using cuda::Crossover;
using cuda::last_tokens;

constexpr Crossover kMeasured[] = {
    {{90, 132, 5120}, {4, 1, 8, 128}, {1, 11}, {1, 12}}, {{90, 132, 5120}, {4, 1, 8, -1}, {2, 21}, {2, 22}},
    {{90, 78, 4096}, {4, 1, 8, 128}, {3, 31}, {3, 32}},  {{80, 108, 5120}, {8, 2, 8, 128}, {4, 41}, {4, 42}},
    {{90, 132, 5120}, {8, 1, 16, -1}, {0, 51}, {0, 52}}, {{90, 132, 6016}, {4, 1, 8, 128}, {1, 61}, {1, 62}},
};

int mma_of(Format f, std::int64_t weights, cuda::Card card) {
  return last_tokens(f, weights, 1, card, kMeasured).mma;
}

TEST_CASE("cuda crossovers: the nearest measurement is taken") {
  constexpr std::int64_t kLarge = cuda::kSmallWeights + 1;
  constexpr cuda::Card kH100{90, 132, 5120};
  CHECK(mma_of({4, 1, 8, 128}, kLarge, kH100) == 12);
  CHECK(mma_of({4, 1, 8, 128}, cuda::kSmallWeights, kH100) == 11);
  CHECK(mma_of({4, 1, 8, 128}, kLarge, {90, 132, 6016}) == 62);  // an H200
  CHECK(mma_of({4, 1, 8, -1}, kLarge, {90, 132, 6016}) == 62);
  CHECK(mma_of({4, 1, 8, 128}, kLarge, {90, 132, 6144}) == 62);  // as many stacks of memory
  CHECK(mma_of({8, 1, 16, -1}, kLarge, {90, 132, 6016}) == 52);  // was not measured on it
  CHECK(mma_of({4, 1, 6, 64}, kLarge, kH100) == 12);             // another b and g of the same kind
  CHECK(mma_of({4, 1, 8, -1}, kLarge, kH100) == 22);             // one scale a row
  CHECK(mma_of({4, 1, 8, 128}, kLarge, {90, 78, 4096}) == 32);   // another card
  CHECK(mma_of({4, 1, 8, -1}, kLarge, {90, 78, 4096}) == 32);    // the card before the kind of scales
  CHECK(mma_of({8, 2, 8, 128}, kLarge, kH100) == 42);            // the format before the card
  CHECK(mma_of({8, 1, 12, 128}, kLarge, kH100) == 52);           // codes of two bytes
  CHECK(mma_of({8, 1, 8, -1}, kLarge, kH100) == 22);             // no such vectors: the card, then the scales
  CHECK(mma_of({2, 4, 8, 32}, kLarge, {120, 188, 512}) == 12);   // near to none: the first
}

TEST_CASE("cuda crossovers: two tokens of low matrices are not gathered") {
  constexpr cuda::Card kH200{90, 132, 6016};
  constexpr Crossover kTall[] = {{kH200, {4, 1, 8, 128}, {2, 16}, {2, 24}, 9000},
                                 {kH200, {8, 1, 16, -1}, {0, 16}, {0, 16}, 9000}};
  const auto last = [&](std::int64_t rows, std::int64_t cols) {
    return last_tokens({4, 1, 8, 128}, rows, cols, kH200, kTall);
  };
  CHECK(last(8999, 8192).gather == 1);
  CHECK(last(9000, 8192).gather == 2);
  CHECK(last(8999, 8192).mma == 24);
  CHECK(last(9000, 512).gather == 2);  // small ones alike
  CHECK(last(512, 512).gather == 1);
  CHECK(last_tokens({8, 1, 16, -1}, 512, 512, kH200, kTall).gather == 0);
}

TEST_CASE("cuda crossovers: every line is sensible") {
  for (const Crossover& c : cuda::kCrossovers) {
    CAPTURE(c.card.arch, c.card.multiprocessors, c.card.memory_bits, format_name(c.format));
    CHECK(validate(c.format).ok());
    for (const cuda::LastTokens last : {c.small, c.large}) {
      CHECK(last.gather >= 0);
      CHECK(last.mma >= last.gather);
    }
    CHECK(last_tokens(c.format, 1, 1, c.card).mma == c.small.mma);
    CHECK(c.gather_rows >= 0);
  }
}

// Every slab of every product is made once, and whoever ends a product finds all the pieces before its own
// with the clusters of lower number just before it.
void check_schedule(std::int64_t products, int slabs, int most, int splits, int most_even) {
  CAPTURE(products, slabs, most, splits, most_even);
  const cuda::PieceSchedule s = cuda::schedule_pieces(products, slabs, most, splits, most_even);
  REQUIRE(s.clusters >= 1);
  REQUIRE(s.clusters <= most);
  std::vector<int> made(static_cast<std::size_t>(products * slabs), 0);
  std::vector<cuda::PieceSchedule::Piece> heads(
      static_cast<std::size_t>(s.clusters));  // of a cluster; 0 slabs: none
  std::vector<int> taken(heads.size(), 0);
  int longest = 0;
  for (int c = 0; c < s.clusters; ++c) {
    const cuda::PieceSchedule::Pieces pieces(s, c);
    REQUIRE(pieces.size() >= 1);
    int all = 0;
    for (int i = 0; i < pieces.size(); ++i) {
      const cuda::PieceSchedule::Piece p = pieces.piece(s, i);
      REQUIRE(p.slabs >= 1);
      REQUIRE(p.slab >= 0);
      REQUIRE(p.slab + p.slabs <= slabs);
      all += p.slabs;
      for (int k = p.slab; k < p.slab + p.slabs; ++k) ++made[static_cast<std::size_t>(p.product * slabs + k)];
      if (s.even_pieces > 1 && p.slabs < slabs) {  // the last that its cluster makes
        REQUIRE(i == pieces.size() - 1);
        CHECK(p.ends);
        CHECK(p.product == s.whole * s.clusters + c / s.even_pieces);
        CHECK(p.slab == c % s.even_pieces * slabs / s.even_pieces);
        continue;
      }
      REQUIRE((p.slab + p.slabs == slabs) == p.ends);
      if (!p.ends) {
        REQUIRE(i == 0);
        heads[static_cast<std::size_t>(c)] = p;
      } else if (p.slab > 0) {
        REQUIRE(i == pieces.size() - 1);
        int end = p.slab;
        for (int before = c; end > 0;) {  // as the kernel does
          REQUIRE(--before >= 0);
          const auto& head = heads[static_cast<std::size_t>(before)];
          REQUIRE(head.product == p.product);
          REQUIRE(head.slab + head.slabs == end);
          ++taken[static_cast<std::size_t>(before)];
          end = head.slab;
          CHECK((end > 0) == (s.first_slab(before) > s.first_slab(c) - p.slab));
        }
      }
    }
    longest = std::max(longest, all);
  }
  for (const int times : made) REQUIRE(times == 1);
  for (std::size_t c = 0; c < heads.size(); ++c) CHECK(taken[c] == (heads[c].slabs > 0 ? 1 : 0));
  const std::int64_t rest = products % most;
  if (rest > 0 && s.cutters == most) {  // all clusters end at the same time
    CHECK(longest <= s.whole * slabs + (rest * slabs + most - 1) / most);
  }
}

TEST_CASE("cuda pieces: every slab is made once, and all pieces of a product are found") {
  for (const int most : {1, 2, 7, 66}) {
    for (const int slabs : {1, 2, 3, 16, 33}) {
      for (const std::int64_t products : {1, 2, 5, 32, 65, 66, 67, 80, 200}) {
        for (const int splits : {1, 2, 3, 8}) {
          for (const int most_even : {1, 4, 8}) check_schedule(products, slabs, most, splits, most_even);
        }
      }
    }
  }
  CHECK(cuda::schedule_pieces(0, 4, 66, 2, 8).clusters == 0);
  CHECK(cuda::schedule_pieces(4, 0, 66, 2, 8).clusters == 0);
  CHECK(cuda::schedule_pieces(4, std::int64_t{1} << 24, 66, 2, 8).clusters == 0);
  // Even pieces only where each product gets as many: 14 beside a whole wave of 66, four clusters each.
  CHECK(cuda::schedule_pieces(80, 32, 66, 4, 8).even_pieces == 4);
  CHECK(cuda::schedule_pieces(80, 32, 66, 8, 8).even_pieces == 0);
  CHECK(cuda::schedule_pieces(80, 3, 66, 4, 8).even_pieces == 0);
  CHECK(cuda::schedule_pieces(80, 32, 66, 4, 2).even_pieces == 0);
  CHECK(cuda::schedule_pieces(80, 32, 66, 3, 8).even_pieces == 0);
}

}  // namespace
}  // namespace codegemm::test
