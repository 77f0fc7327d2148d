// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/crossovers_test.cpp - which measurement a format and a card get.
#include <codegemm/cuda/crossovers.hpp>

#include "support/catch.hpp"

namespace codegemm::test {
namespace {

using cuda::Crossover;
using cuda::last_tokens;

constexpr Crossover kMeasured[] = {
    {90, 132, {4, 1, 8, 128}, {1, 11}, {1, 12}}, {90, 132, {4, 1, 8, -1}, {2, 21}, {2, 22}},
    {90, 78, {4, 1, 8, 128}, {3, 31}, {3, 32}},  {80, 108, {8, 2, 8, 128}, {4, 41}, {4, 42}},
    {90, 132, {8, 1, 16, -1}, {0, 51}, {0, 52}},
};

int mma_of(Format f, std::int64_t weights, int arch, int multiprocessors) {
  return last_tokens(f, weights, arch, multiprocessors, kMeasured).mma;
}

TEST_CASE("cuda crossovers: the nearest measurement is taken") {
  constexpr std::int64_t kLarge = cuda::kSmallWeights + 1;
  CHECK(mma_of({4, 1, 8, 128}, kLarge, 90, 132) == 12);
  CHECK(mma_of({4, 1, 8, 128}, cuda::kSmallWeights, 90, 132) == 11);
  CHECK(mma_of({4, 1, 6, 64}, kLarge, 90, 132) == 12);    // another b and g of the same kind
  CHECK(mma_of({4, 1, 8, -1}, kLarge, 90, 132) == 22);    // one scale a row
  CHECK(mma_of({4, 1, 8, 128}, kLarge, 90, 78) == 32);    // another card
  CHECK(mma_of({4, 1, 8, -1}, kLarge, 90, 78) == 32);     // the card before the kind of scales
  CHECK(mma_of({8, 2, 8, 128}, kLarge, 90, 132) == 42);   // the format before the card
  CHECK(mma_of({8, 1, 12, 128}, kLarge, 90, 132) == 52);  // codes of two bytes
  CHECK(mma_of({8, 1, 8, -1}, kLarge, 90, 132) == 22);    // no such vectors: the card, then the scales
  CHECK(mma_of({2, 4, 8, 32}, kLarge, 120, 188) == 12);   // near to none: the first
}

TEST_CASE("cuda crossovers: every line is sensible") {
  for (const Crossover& c : cuda::kCrossovers) {
    CAPTURE(c.arch, c.multiprocessors, format_name(c.format));
    CHECK(validate(c.format).ok());
    for (const cuda::LastTokens last : {c.small, c.large}) {
      CHECK(last.gather >= 0);
      CHECK(last.mma >= last.gather);
    }
    CHECK(last_tokens(c.format, 1, c.arch, c.multiprocessors).mma == c.small.mma);
  }
}

}  // namespace
}  // namespace codegemm::test
