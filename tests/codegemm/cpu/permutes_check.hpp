// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cpu/permutes_check.hpp - 8-bit codes looked up with VBMI, either way, against a plain loop.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <codegemm/base/aligned_buffer.hpp>
#include <codegemm/cpu/lookup.hpp>

#include <support/catch.hpp>
#include <support/random.hpp>

#if CODEGEMM_HAS_AVX512

namespace codegemm::test {

/// Entries whose sums fit into 16 bits, steps and scales of 1: y holds the very sums.
template <detail::Permutes kPermutes>
void check_permutes() {
  const std::uint64_t seed = seed_or(41);
  CAPTURE(seed, static_cast<int>(kPermutes));
  Rng rng(seed);
  constexpr std::int64_t kBlocks = 13;  // eight together, four, and one alone
  constexpr std::int64_t kEntries = 16;
  constexpr std::int64_t kTable = 256;
  constexpr std::int64_t kRows = kBlocks * kBlockRows;
  AlignedBuffer<std::uint8_t> codes;
  AlignedBuffer<std::uint8_t> tables;
  AlignedBuffer<float> y;
  REQUIRE(codes.reserve(static_cast<std::size_t>(kRows * kEntries)));  // [blocks][entries][64]
  REQUIRE(tables.reserve(static_cast<std::size_t>(kEntries * detail::encoded_bytes(8))));
  REQUIRE(y.reserve(static_cast<std::size_t>(kRows)));
  for (std::uint8_t& code : codes.span()) code = static_cast<std::uint8_t>(rng.below(kTable));
  std::vector<int> entries;
  for (std::int64_t e = 0; e < kEntries; ++e) {
    std::uint8_t* const table = tables.data() + e * detail::encoded_bytes(8);
    for (std::int64_t i = 0; i < kTable; ++i) {
      const int entry = static_cast<int>(rng.below(4001)) - 2000;
      entries.push_back(entry);
      table[i] = static_cast<std::uint8_t>(entry & 255);
      table[kTable + i] = static_cast<std::uint8_t>((entry >> 8) & 255);
    }
  }
  for (float& value : y.span()) value = 0.5F;
  const std::vector<Half> scales(static_cast<std::size_t>(kRows), Half::from_float(1.0F));
  const detail::Flush flush{0, kEntries, 1.0F, scales.data()};
  detail::lookup_planes_by_vbmi<8, kPermutes>(
      {codes.data(), kEntries * kBlockRows, tables.data(), &flush, 1, y.data(), 0, kBlocks, codes.data()});
  for (std::int64_t n = 0; n < kRows; ++n) {
    int want = 0;
    for (std::int64_t e = 0; e < kEntries; ++e) {
      const std::int64_t at = (n / kBlockRows * kEntries + e) * kBlockRows + n % kBlockRows;
      want += entries[static_cast<std::size_t>(e * kTable + codes.data()[at])];
    }
    CAPTURE(n);
    REQUIRE(y.data()[n] == static_cast<float>(want) + 0.5F);
  }
}

}  // namespace codegemm::test

#endif
