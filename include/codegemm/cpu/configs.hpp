// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/configs.hpp - every number of the CPU kernels: formats, tiles, measured costs. The file to
// edit.
// Layer: cpu (host only).
#pragma once

#include <cstdint>

#include <codegemm/base/config_list.hpp>
#include <codegemm/cpu/isa.hpp>

namespace codegemm {

/// A kernel is a template over the vector length v and the code bits b. The number of codebooks m and the
/// scale group g are loop bounds: as constants they gave no speed, only four times the code to compile.
struct CpuV2B4 {
  /// v
  static constexpr int kVecLen = 2, kCodeBits = 4;  ///< b
};
/// v = 2, b = 5.
struct CpuV2B5 {
  /// v
  static constexpr int kVecLen = 2, kCodeBits = 5;  ///< b
};
/// v = 2, b = 6.
struct CpuV2B6 {
  /// v
  static constexpr int kVecLen = 2, kCodeBits = 6;  ///< b
};
/// v = 2, b = 7.
struct CpuV2B7 {
  /// v
  static constexpr int kVecLen = 2, kCodeBits = 7;  ///< b
};
/// v = 2, b = 8.
struct CpuV2B8 {
  /// v
  static constexpr int kVecLen = 2, kCodeBits = 8;  ///< b
};
/// v = 4, b = 4.
struct CpuV4B4 {
  /// v
  static constexpr int kVecLen = 4, kCodeBits = 4;  ///< b
};
/// v = 4, b = 5.
struct CpuV4B5 {
  /// v
  static constexpr int kVecLen = 4, kCodeBits = 5;  ///< b
};
/// v = 4, b = 6.
struct CpuV4B6 {
  /// v
  static constexpr int kVecLen = 4, kCodeBits = 6;  ///< b
};
/// v = 4, b = 7.
struct CpuV4B7 {
  /// v
  static constexpr int kVecLen = 4, kCodeBits = 7;  ///< b
};
/// v = 4, b = 8.
struct CpuV4B8 {
  /// v
  static constexpr int kVecLen = 4, kCodeBits = 8;  ///< b
};
/// v = 8, b = 4.
struct CpuV8B4 {
  /// v
  static constexpr int kVecLen = 8, kCodeBits = 4;  ///< b
};
/// v = 8, b = 5.
struct CpuV8B5 {
  /// v
  static constexpr int kVecLen = 8, kCodeBits = 5;  ///< b
};
/// v = 8, b = 6.
struct CpuV8B6 {
  /// v
  static constexpr int kVecLen = 8, kCodeBits = 6;  ///< b
};
/// v = 8, b = 7.
struct CpuV8B7 {
  /// v
  static constexpr int kVecLen = 8, kCodeBits = 7;  ///< b
};
/// v = 8, b = 8.
struct CpuV8B8 {
  /// v
  static constexpr int kVecLen = 8, kCodeBits = 8;  ///< b
};
/// v = 16, b = 4.
struct CpuV16B4 {
  /// v
  static constexpr int kVecLen = 16, kCodeBits = 4;  ///< b
};
/// v = 16, b = 5.
struct CpuV16B5 {
  /// v
  static constexpr int kVecLen = 16, kCodeBits = 5;  ///< b
};
/// v = 16, b = 6.
struct CpuV16B6 {
  /// v
  static constexpr int kVecLen = 16, kCodeBits = 6;  ///< b
};
/// v = 16, b = 7.
struct CpuV16B7 {
  /// v
  static constexpr int kVecLen = 16, kCodeBits = 7;  ///< b
};
/// v = 16, b = 8.
struct CpuV16B8 {
  /// v
  static constexpr int kVecLen = 16, kCodeBits = 8;  ///< b
};

/// What gemm() dispatches over unless the caller names a shorter list of his own.
using CpuConfigs =
    config_list<CpuV4B8, CpuV8B8, CpuV2B8, CpuV16B8, CpuV4B4, CpuV8B4, CpuV2B4, CpuV16B4, CpuV4B6, CpuV8B6,
                CpuV2B6, CpuV16B6, CpuV4B5, CpuV8B5, CpuV2B5, CpuV16B5, CpuV4B7, CpuV8B7, CpuV2B7, CpuV16B7>;

/// Tiles. What all rows stream past has to stay in a 32 KiB first-level cache.
struct CpuTiles {
  /// One token: 16 tables of 256 fp32 sums are 16 KiB; codes, scales and partial sums stream through the
  /// rest.
  static constexpr std::int64_t kTableFloats = 4096;
  /// The same where they are only the stage before tables of 16 bits.
  static constexpr std::int64_t kLookupTableFloats = 8192;
  static constexpr std::int64_t kMaxEntries = 128;  ///< entries of a tile at most
  /// Entries whose 16-bit sums are added before they go to fp32: the entries are scaled so that they always
  /// fit, that is to 12 bits for 16 entries. A table of 16 centroids has smaller extremes and bears 32.
  static constexpr std::int64_t kFlushEntries = 16;
  static constexpr std::int64_t kFlushEntries4 = 32;  ///< with 4 bits a code
  /// How far ahead codes are asked for; a page, which is where the processor's own prefetching ends.
  static constexpr std::int64_t kPrefetchBytes = 4096;
  static constexpr std::int64_t kGatherPrefetchBytes = 1024;  ///< the same where codes are gathered
  /// How far ahead codes are asked for where they are looked up with VBMI, which is faster than memory. Twice
  /// as far is no better, and many bytes asked for at once hold up what comes after them.
  static constexpr std::int64_t kLookupAheadBytes = 8192;
  /// How many bytes of codes are asked for before the first table is made, which has to wait for what is
  /// asked.
  static constexpr std::int64_t kLookupFirstBytes = 1024;
  /// Tokens in the lanes: 32 KiB of tables, that is 4 entries of 256 centroids x 8 tokens. Fewer entries cost
  /// more passes over the partial sums; with 8 entries the tables fall out of the cache.
  static constexpr std::int64_t kLaneTableFloats = 8192;
  /// Rows that one Psumbook serves before another task builds it again; their sums for 8 tokens are 128 KiB.
  static constexpr std::int64_t kRowChunk = 4096;
  /// The same for one token, where building costs more against the lookups.
  static constexpr std::int64_t kRowChunk1 = 16384;
  /// Tasks to aim at by cutting K, from the shape alone so that results do not depend on the number of
  /// workers: so many of kTaskWeights weights, but fewer where the adding of their sums would tell.
  static constexpr std::int64_t kTargetTasks = 16;
  static constexpr std::int64_t kFewTasks = 4;  ///< the fewer
  /// Weights up to which one token is two tasks: a third would cost more than it spares. Rows are cut from
  /// kCutRows on, where making the tables twice costs less than adding up, with 4 bits earlier; else K.
  static constexpr std::int64_t kTwoTaskWeights = std::int64_t{1} << 20;
  static constexpr std::int64_t kCutRows = 2048;                       ///< see kTwoTaskWeights
  static constexpr std::int64_t kCutRows4 = 1024;                      ///< the same with 4 bits a code
  static constexpr std::int64_t kTaskWeights = std::int64_t{1} << 18;  ///< weights of such a task

  /// Dequantize and multiply: a 6 x 16 register tile, 16 KiB of weights in the first-level cache, 240 tokens
  /// in the second.
  static constexpr std::int64_t kDenseTokens = 6;
  static constexpr std::int64_t kDenseRows = 16;         ///< rows of the register tile
  static constexpr std::int64_t kDenseDepth = 256;       ///< weights of a row in one step
  static constexpr std::int64_t kDenseTaskRows = 48;     ///< rows of a task
  static constexpr std::int64_t kDenseTaskTokens = 240;  ///< tokens of a task

  /// The same in 16-bit integers: twice the depth in as many bytes. Sums of a chunk fit into 32 bits; scale
  /// groups that are no multiple of the unit would make chunks too short to pay.
  static constexpr std::int64_t kIntegerDepth = 512;
  static constexpr std::int64_t kIntegerChunk = 128;  ///< weights whose products are added in 32 bits
  static constexpr bool kUseAmx = true;               ///< whether gemm() takes tiles of bytes (AMX) of itself
  static constexpr std::int64_t kAmxTokens = 16;      ///< tokens of a tile of bytes
  static constexpr std::int64_t kAmxColumns = 64;     ///< columns of a step of it
  /// Rows and tokens of a task: 64 KiB of weights and 256 KiB of activations in the second-level cache, half
  /// of the weights in the first. Up to kAmxDepthMost columns are one step, which saves a short second one.
  static constexpr std::int64_t kAmxTaskRows = 64;
  static constexpr std::int64_t kAmxTaskTokens = 256;  ///< see kAmxTaskRows
  static constexpr std::int64_t kAmxDepth = 512;       ///< weights of a row in one step
  static constexpr std::int64_t kAmxDepthMost = 640;   ///< see kAmxTaskRows
  static constexpr std::int64_t kIntegerUnit = 32;     ///< weights of a step; scale groups must be multiples
};

/// Measured on a Zen 3 core in its cycles; only their ratios matter. From them follows which way is taken at
/// how many tokens: there is no fixed crossover, since m, v, b and N all move it.
struct CpuCosts {
  static constexpr double kLanes1 = 50;                       ///< one entry, 64 rows x 1 token in fp32
  static constexpr double kLanes4 = 80;                       ///< x 4 tokens
  static constexpr double kLanes8 = 110;                      ///< x 8 tokens, memory included
  static constexpr double kLanesBuild = 0.53;                 ///< one element of a centroid x 8 tokens
  static constexpr double kDenseMultiply = 1 / 13.4;          ///< one weight x one token
  static constexpr double kDequantize = 0.45;                 ///< one weight of one codebook
  static constexpr double kIntegerMultiply = 1 / 22.0;        ///< in 16-bit integers, AVX2
  static constexpr double kIntegerMultiplyAvx512 = 1 / 27.0;  ///< AVX-512 without VNNI
  static constexpr double kIntegerMultiplyVnni = 1 / 35.0;    ///< with VNNI
  static constexpr double kByteMultiply = 1 / 130.0;          ///< as bytes with AMX, on a Xeon
  static constexpr double kByteLoad = 0.2;       ///< and a weight's way through the caches, for all tokens
  static constexpr double kByteRebuild = 0.7;    ///< and rebuilding one code of one row of more than 6 bits
  static constexpr double kBytePermute = 0.025;  ///< of up to 6 bits: one weight of one codebook
  static constexpr double kIntegerDequantize = 1.5;  ///< one code of one row

  /// One entry, 64 rows x 1 token looked up in registers, for 4 to 8 bits a code; 0 where gathering is as
  /// fast. VBMI's row was measured on a Zen 4 core; those without VBMI and of NEON are estimates from
  /// instruction tables.
  static constexpr double kLookupAvx2[] = {6, 12, 18, 32, 0};
  static constexpr double kLookupAvx512[] = {6, 6, 9, 16, 30};              ///< AVX-512 without VBMI
  static constexpr double kLookupAvx512Vbmi[] = {5.5, 5.5, 5.5, 6.5, 7.5};  ///< AVX-512 with VBMI
  static constexpr double kLookupOneRegister = 13;  ///< 8 bits by permutes of one register, on a Xeon
  static constexpr double kLookupNeon[] = {12, 14, 18, 34, 66};  ///< NEON
  static constexpr double kEncode = 0.6;                         ///< encoding one centroid
  static constexpr double kEncodeVbmi = 0.21;    ///< the same with AVX-512 and VBMI, on a Xeon
  static constexpr double kBuildAvx512 = 0.036;  ///< one element of a centroid x 1 token with AVX-512
  static constexpr double kMakeEntry = 0.09;     ///< making one centroid's entry of integers, on a Xeon
  static constexpr double kMakeElement = 0.017;  ///< and one element of it
};

namespace detail {

/// Cycles for one entry, 64 rows and one token looked up in registers; 0 where that is not done.
[[nodiscard]] constexpr double lookup_cost(Isa isa, int code_bits) noexcept {
  if (code_bits < 4 || code_bits > 8) return 0.0;
  switch (isa) {
    case Isa::kAvx2: return CpuCosts::kLookupAvx2[code_bits - 4];
    case Isa::kAvx512: return CpuCosts::kLookupAvx512[code_bits - 4];
    case Isa::kAvx512Vbmi: return CpuCosts::kLookupAvx512Vbmi[code_bits - 4];
    case Isa::kNeon: return CpuCosts::kLookupNeon[code_bits - 4];
    case Isa::kPortable: break;
  }
  return 0.0;
}

/// Entries of a flush (cpu/lookup_args.hpp) of codes of so many bits.
[[nodiscard]] constexpr std::int64_t flush_entries(int code_bits) noexcept {
  return code_bits == 4 ? CpuTiles::kFlushEntries4 : CpuTiles::kFlushEntries;
}

/// Bytes of a table in 16 bits, of whatever arrangement.
[[nodiscard]] constexpr std::int64_t encoded_bytes(int code_bits) noexcept {
  return std::int64_t{2} << code_bits;
}

/// Whether one token is two tasks that each have half of K.
[[nodiscard]] constexpr bool shares_k_by_two(int code_bits, std::int64_t rows, std::int64_t cols) noexcept {
  const std::int64_t cut_rows = code_bits == 4 ? CpuTiles::kCutRows4 : CpuTiles::kCutRows;
  return rows < cut_rows && rows * cols <= CpuTiles::kTwoTaskWeights;
}

/// Bytes of codes that are asked for while a table is made of integers; those of 16 entries are made too soon
/// for a byte a centroid.
[[nodiscard]] constexpr std::int64_t bytes_asked(int code_bits) noexcept {
  return code_bits == 4 ? 32 : std::int64_t{1} << code_bits;
}

/// Cycles for one weight and one token in 16-bit integers.
[[nodiscard]] constexpr double integer_cost(Isa isa) noexcept {
  return isa == Isa::kAvx512Vbmi ? CpuCosts::kIntegerMultiplyVnni
         : isa == Isa::kAvx512   ? CpuCosts::kIntegerMultiplyAvx512
                                 : CpuCosts::kIntegerMultiply;
}

}  // namespace detail

}  // namespace codegemm
