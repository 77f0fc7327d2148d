// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/lookup_args.hpp - what the register lookups share: arguments, scaling, the error they accept.
// Layer: cpu (host only).
//
// A Psumbook entry T (fp32) becomes q = round(T / step) with one step for a *flush* of 16 entries (32 with 16
// centroids), such that the sum over a flush of any codes fits into 16 bits. Sums of q are exact; each flush
// adds step * scale[n] * sum[n] to y[n] in fp32.
#pragma once

#include <algorithm>
#include <cstdint>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/numerics.hpp>
#include <codegemm/cpu/configs.hpp>
#include <codegemm/pack.hpp>

namespace codegemm::detail {

/// Bytes of an entry's codes for a block of 64 rows.
[[nodiscard]] constexpr std::int64_t code_bytes(int code_bits) noexcept {
  return code_bits == 4 ? kBlockRows / 2 : kBlockRows;
}

/// Entries whose sums are added in 16 bits; they share a scale group.
struct Flush {
  std::int64_t first;  // counted from the first entry of the tile
  std::int64_t count;
  float step;
  const Half* scales;  // [blocks * 64]
};

/// Tables of a flush to encode.
struct EncodeArgs {
  const float* sums;  // [entries][2^b], 32-byte aligned
  std::int64_t entries;
  std::uint8_t* tables;                 // out: [entries][table bytes], aligned to a table or 64 bytes
  const std::uint8_t* ahead = nullptr;  // codes to ask for meanwhile, a byte a centroid
};

/// Tables of a flush to make of integers.
struct IntegerTableArgs {
  const std::int32_t* pairs;  // [m][v / 2][2^b]
  float pair_step;            // of them
  const float* x;             // from the vector of the first entry on
  std::int64_t vectors;       // that the entries belong to
  std::int64_t m;             // codebooks
  std::int64_t codebook;      // of the first entry
  std::int64_t entries;       // at most flush_entries()
  std::uint8_t* tables;       // out: [entries][table bytes], as the look-ups take them
  const std::uint8_t* ahead;  // codes to ask for meanwhile, bytes_asked() an entry; null: none
};

/// y[n] += sum over flushes f of step_f * scales_f[n] * sum over the entries e of f of tables[e][code(n, e)].
struct LookupArgs {
  const std::uint8_t* codes;  // the first block's codes of the tile's first entry; entries follow one another
  std::int64_t stride;        // bytes from one row block to the next
  const std::uint8_t* tables;
  const Flush* flushes;
  std::int64_t flush_count;
  float* y;                  // [end_block * 64], 64-byte aligned
  std::int64_t first_block;  // the first row block that is looked up ...
  std::int64_t end_block;    // ... and the one behind the last
  const std::uint8_t* next;  // what will be read after these codes, in the same order; `codes` if nothing
};

/// How many bytes behind the codes of `block` those lie that are to be asked for while these are looked up,
/// with `count` blocks at a time: so many that the memory has work also while the next tile's tables are
/// built.
[[nodiscard]] inline std::int64_t bytes_ahead(const LookupArgs& a, std::int64_t block,
                                              std::int64_t count) noexcept {
  const std::int64_t bytes = count * a.stride;
  const std::int64_t target = block + (CpuTiles::kLookupAheadBytes + bytes - 1) / bytes * count;
  if (target < a.end_block) return (target - block) * a.stride;
  return a.next - a.codes + (target - a.end_block - block) * a.stride;
}

/// What the entries of a flush are like.
struct FlushStats {
  float bound = 0.0F;  // the sum over entries of the largest |T| of each: no row's sum is larger
  float power = 0.0F;  // the sum over entries of the mean of T^2
};

/// The step of a flush, or a negative number where 16 bits are not enough: rounding makes an error of
/// sqrt(entries / 12) * step, and it has to stay below kAcceptedError of a typical row's sum. That is so
/// unless a few huge activations stand among small ones; those entries are then gathered in fp32. The same
/// goes for what is not finite or hardly a number at all.
[[nodiscard]] inline float flush_step(const FlushStats& s, std::int64_t entries) noexcept {
  constexpr float kAcceptedError = 8e-4F;
  if (s.bound == 0.0F) return 0.0F;
  const float step = s.bound / 32700.0F;  // 32 times half a unit fit as well
  const float error = step * step * static_cast<float>(entries) / 12.0F;
  const bool good = s.power > 1e-30F && s.power < 1e30F && error <= kAcceptedError * kAcceptedError * s.power;
  return good ? step : -1.0F;
}

}  // namespace codegemm::detail
