// SPDX-License-Identifier: Apache-2.0
//
// common/ggml_types.hpp - the tensor types of GGUF files: names, block sizes, and conversion to fp32.
// Layer: examples (host only).
//
// Numbers, names and sizes of the types, and the meaning of each block's bits: ggml (MIT), ggml.h and
// ggml-quants.c, https://github.com/ggml-org/ggml, and its Python counterpart gguf 0.19 (PyPI), against which
// the tests check.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <string>
#include <string_view>

#include <codegemm/base/numerics.hpp>

namespace prefillshare::examples {

static_assert(std::endian::native == std::endian::little,
              "GGUF blocks are read as they lie in a little-endian file");

// Types keep the names that ggml gave them, underscores and all. NOLINTBEGIN(readability-identifier-naming)

/// Of the numbers that GGUF gives to tensor types, those that can be converted to fp32 here.
enum class GgmlType : std::uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kF64 = 28,
  kBF16 = 30,
};

namespace detail {

inline constexpr int kQ = 32;     // weights in a block of the simple types
inline constexpr int kQ_K = 256;  // weights in a super-block of the K types

// Blocks as they lie in the file. d and m are fp16: weight = d * q, or d * q + m. All members are bytes or
// pairs of bytes, so no member needs padding.
using codegemm::Half;
struct BlockQ4_0 {
  Half d;
  std::uint8_t qs[kQ / 2];  // weight i in the low half of byte i, weight i + 16 in its high half
};
struct BlockQ4_1 {
  Half d, m;
  std::uint8_t qs[kQ / 2];
};
struct BlockQ5_0 {
  Half d;
  std::uint8_t qh[4];  // bit i: the fifth bit of weight i
  std::uint8_t qs[kQ / 2];
};
struct BlockQ5_1 {
  Half d, m;
  std::uint8_t qh[4];
  std::uint8_t qs[kQ / 2];
};
struct BlockQ8_0 {
  Half d;
  std::int8_t qs[kQ];
};
struct BlockQ2_K {
  std::uint8_t scales[kQ_K / 16];  // of 16 weights each: scale in the low half, minimum in the high half
  std::uint8_t qs[kQ_K / 4];
  Half d, dmin;
};
struct BlockQ3_K {
  std::uint8_t hmask[kQ_K / 8];  // the third bit; 0 means "subtract 4"
  std::uint8_t qs[kQ_K / 4];
  std::uint8_t scales[12];  // 16 of 6 bits, less 32
  Half d;
};
struct BlockQ4_K {
  Half d, dmin;
  std::uint8_t scales[12];  // 8 scales and 8 minima of 6 bits
  std::uint8_t qs[kQ_K / 2];
};
struct BlockQ5_K {
  Half d, dmin;
  std::uint8_t scales[12];
  std::uint8_t qh[kQ_K / 8];
  std::uint8_t qs[kQ_K / 2];
};
struct BlockQ6_K {
  std::uint8_t ql[kQ_K / 2];
  std::uint8_t qh[kQ_K / 4];
  std::int8_t scales[kQ_K / 16];
  Half d;
};
static_assert(sizeof(BlockQ4_0) == 18);
static_assert(sizeof(BlockQ4_1) == 20);
static_assert(sizeof(BlockQ5_0) == 22);
static_assert(sizeof(BlockQ5_1) == 24);
static_assert(sizeof(BlockQ8_0) == 34);
static_assert(sizeof(BlockQ2_K) == 84);
static_assert(sizeof(BlockQ3_K) == 110);
static_assert(sizeof(BlockQ4_K) == 144);
static_assert(sizeof(BlockQ5_K) == 176);
static_assert(sizeof(BlockQ6_K) == 210);

// NOLINTEND(readability-identifier-naming)

inline void dequantize(const BlockQ4_0& b, float* out) {
  const float d = b.d.to_float();
  for (int i = 0; i < kQ / 2; ++i) {
    out[i] = d * static_cast<float>((b.qs[i] & 15) - 8);
    out[i + kQ / 2] = d * static_cast<float>((b.qs[i] >> 4) - 8);
  }
}

inline void dequantize(const BlockQ4_1& b, float* out) {
  const float d = b.d.to_float();
  const float m = b.m.to_float();
  for (int i = 0; i < kQ / 2; ++i) {
    out[i] = d * static_cast<float>(b.qs[i] & 15) + m;
    out[i + kQ / 2] = d * static_cast<float>(b.qs[i] >> 4) + m;
  }
}

/// The 32 five-bit numbers of a Q5 block.
inline void unpack_q5(const std::uint8_t* qs, const std::uint8_t* qh, int* q) {
  for (int i = 0; i < kQ / 2; ++i) {
    q[i] = (qs[i] & 15) | (((qh[i / 8] >> (i % 8)) & 1) << 4);
    q[i + kQ / 2] = (qs[i] >> 4) | (((qh[2 + i / 8] >> (i % 8)) & 1) << 4);
  }
}

inline void dequantize(const BlockQ5_0& b, float* out) {
  const float d = b.d.to_float();
  int q[kQ];
  unpack_q5(b.qs, b.qh, q);
  for (int i = 0; i < kQ; ++i) out[i] = d * static_cast<float>(q[i] - 16);
}

inline void dequantize(const BlockQ5_1& b, float* out) {
  const float d = b.d.to_float();
  const float m = b.m.to_float();
  int q[kQ];
  unpack_q5(b.qs, b.qh, q);
  for (int i = 0; i < kQ; ++i) out[i] = d * static_cast<float>(q[i]) + m;
}

inline void dequantize(const BlockQ8_0& b, float* out) {
  const float d = b.d.to_float();
  for (int i = 0; i < kQ; ++i) out[i] = d * static_cast<float>(b.qs[i]);
}

// The K types with 2 and 3 bits: two halves of 128 weights; byte i of a half's 32 holds weights i, i + 32, i
// + 64 and i + 96, lowest bits first.
inline void dequantize(const BlockQ2_K& b, float* out) {
  const float d = b.d.to_float();
  const float dmin = b.dmin.to_float();
  for (int i = 0; i < kQ_K; ++i) {
    const int half = i / 128;
    const int q = (b.qs[32 * half + i % 32] >> (2 * (i % 128 / 32))) & 3;
    const int scale = b.scales[i / 16];
    out[i] =
        d * static_cast<float>(scale & 15) * static_cast<float>(q) - dmin * static_cast<float>(scale >> 4);
  }
}

inline void dequantize(const BlockQ3_K& b, float* out) {
  const float d = b.d.to_float();
  float scales[16];  // low four bits in bytes 0..7, two halves; high two bits in bytes 8..11, four quarters
  for (int j = 0; j < 16; ++j) {
    const int low = (b.scales[j % 8] >> (4 * (j / 8))) & 15;
    const int high = (b.scales[8 + j % 4] >> (2 * (j / 4))) & 3;
    scales[j] = d * static_cast<float>((low | (high << 4)) - 32);
  }
  for (int i = 0; i < kQ_K; ++i) {
    const int half = i / 128;
    const int low = (b.qs[32 * half + i % 32] >> (2 * (i % 128 / 32))) & 3;
    const int high = (b.hmask[i % 32] >> (i / 32)) & 1;
    out[i] = scales[i / 16] * static_cast<float>(high != 0 ? low : low - 4);
  }
}

/// Scale and minimum number j of the eight that Q4_K and Q5_K pack in 12 bytes: six bits of bytes 0..3
/// and 4..7 for j < 4; for the others four bits of bytes 8..11 and the top two of the bytes before.
inline void unpack_scale_min(const std::uint8_t* scales, int j, int& scale, int& minimum) {
  if (j < 4) {
    scale = scales[j] & 63;
    minimum = scales[j + 4] & 63;
  } else {
    scale = (scales[j + 4] & 15) | ((scales[j - 4] >> 6) << 4);
    minimum = (scales[j + 4] >> 4) | ((scales[j] >> 6) << 4);
  }
}

// Q4_K and Q5_K: eight groups of 32 weights; two groups share 32 bytes, the even one in the low halves.
inline void dequantize(const BlockQ4_K& b, float* out) {
  const float d = b.d.to_float();
  const float dmin = b.dmin.to_float();
  for (int j = 0; j < 8; ++j) {
    int scale = 0;
    int minimum = 0;
    unpack_scale_min(b.scales, j, scale, minimum);
    const float s = d * static_cast<float>(scale);
    const float m = dmin * static_cast<float>(minimum);
    for (int i = 0; i < 32; ++i)
      out[32 * j + i] = s * static_cast<float>((b.qs[32 * (j / 2) + i] >> (4 * (j % 2))) & 15) - m;
  }
}

inline void dequantize(const BlockQ5_K& b, float* out) {
  const float d = b.d.to_float();
  const float dmin = b.dmin.to_float();
  for (int j = 0; j < 8; ++j) {
    int scale = 0;
    int minimum = 0;
    unpack_scale_min(b.scales, j, scale, minimum);
    const float s = d * static_cast<float>(scale);
    const float m = dmin * static_cast<float>(minimum);
    for (int i = 0; i < 32; ++i) {
      const int q = ((b.qs[32 * (j / 2) + i] >> (4 * (j % 2))) & 15) | (((b.qh[i] >> j) & 1) << 4);
      out[32 * j + i] = s * static_cast<float>(q) - m;
    }
  }
}

// Q6_K: two halves of 128 weights in four groups of 32. Low four bits: groups 0 and 1 in the low halves of 64
// bytes, 2 and 3 in their high halves; top two bits: one byte for weights i, i + 32, i + 64 and i + 96.
inline void dequantize(const BlockQ6_K& b, float* out) {
  const float d = b.d.to_float();
  float scales[kQ_K / 16];
  for (int j = 0; j < kQ_K / 16; ++j) scales[j] = d * static_cast<float>(b.scales[j]);
  for (int half = 0; half < 2; ++half) {
    for (int group = 0; group < 4; ++group) {
      for (int i = 0; i < 32; ++i) {
        const int low = (b.ql[64 * half + 32 * (group % 2) + i] >> (4 * (group / 2))) & 15;
        const int high = (b.qh[32 * half + i] >> (2 * group)) & 3;
        const int at = 128 * half + 32 * group + i;
        out[at] = scales[at / 16] * static_cast<float>((low | (high << 4)) - 32);
      }
    }
  }
}

/// Rows of whole blocks, wherever they lie: a file need not align them for the compiler.
template <class Block, int kWeights>
void dequantize_blocks(const std::byte* bytes, std::int64_t blocks, float* out) {
  for (std::int64_t i = 0; i < blocks; ++i) {
    Block block;
    std::memcpy(&block, bytes + static_cast<std::size_t>(i) * sizeof(Block), sizeof(Block));
    dequantize(block, out + i * kWeights);
  }
}

inline float to_float(float value) { return value; }
inline float to_float(double value) { return static_cast<float>(value); }
inline float to_float(codegemm::Half value) { return value.to_float(); }
inline float to_float(codegemm::BFloat16 value) { return value.to_float(); }

template <class T>
void convert(const std::byte* bytes, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    T value{};
    std::memcpy(&value, bytes + static_cast<std::size_t>(i) * sizeof(T), sizeof(T));
    out[i] = to_float(value);
  }
}

}  // namespace detail

/// One tensor type. block_bytes is 0 for a type that ggml has removed, whose size is therefore unknown.
struct GgmlTypeInfo {
  std::uint32_t number = 0;
  std::string_view name;
  std::int64_t block_elements = 0;  // weights of one block; a row is a whole number of blocks
  std::int64_t block_bytes = 0;
  void (*dequantize)(const std::byte* bytes, std::int64_t blocks,
                     float* out) = nullptr;  // null: not convertible here
};

inline constexpr GgmlTypeInfo kGgmlTypes[] = {
    {0, "F32", 1, 4, detail::convert<float>},
    {1, "F16", 1, 2, detail::convert<codegemm::Half>},
    {2, "Q4_0", 32, 18, detail::dequantize_blocks<detail::BlockQ4_0, detail::kQ>},
    {3, "Q4_1", 32, 20, detail::dequantize_blocks<detail::BlockQ4_1, detail::kQ>},
    {4, "Q4_2", 32, 0, nullptr},
    {5, "Q4_3", 32, 0, nullptr},
    {6, "Q5_0", 32, 22, detail::dequantize_blocks<detail::BlockQ5_0, detail::kQ>},
    {7, "Q5_1", 32, 24, detail::dequantize_blocks<detail::BlockQ5_1, detail::kQ>},
    {8, "Q8_0", 32, 34, detail::dequantize_blocks<detail::BlockQ8_0, detail::kQ>},
    {9, "Q8_1", 32, 40, nullptr},
    {10, "Q2_K", 256, 84, detail::dequantize_blocks<detail::BlockQ2_K, detail::kQ_K>},
    {11, "Q3_K", 256, 110, detail::dequantize_blocks<detail::BlockQ3_K, detail::kQ_K>},
    {12, "Q4_K", 256, 144, detail::dequantize_blocks<detail::BlockQ4_K, detail::kQ_K>},
    {13, "Q5_K", 256, 176, detail::dequantize_blocks<detail::BlockQ5_K, detail::kQ_K>},
    {14, "Q6_K", 256, 210, detail::dequantize_blocks<detail::BlockQ6_K, detail::kQ_K>},
    {15, "Q8_K", 256, 292, nullptr},
    {16, "IQ2_XXS", 256, 66, nullptr},
    {17, "IQ2_XS", 256, 74, nullptr},
    {18, "IQ3_XXS", 256, 98, nullptr},
    {19, "IQ1_S", 256, 50, nullptr},
    {20, "IQ4_NL", 32, 18, nullptr},
    {21, "IQ3_S", 256, 110, nullptr},
    {22, "IQ2_S", 256, 82, nullptr},
    {23, "IQ4_XS", 256, 136, nullptr},
    {24, "I8", 1, 1, nullptr},
    {25, "I16", 1, 2, nullptr},
    {26, "I32", 1, 4, nullptr},
    {27, "I64", 1, 8, nullptr},
    {28, "F64", 1, 8, detail::convert<double>},
    {29, "IQ1_M", 256, 56, nullptr},
    {30, "BF16", 1, 2, detail::convert<codegemm::BFloat16>},
    {31, "Q4_0_4_4", 32, 0, nullptr},
    {32, "Q4_0_4_8", 32, 0, nullptr},
    {33, "Q4_0_8_8", 32, 0, nullptr},
    {34, "TQ1_0", 256, 54, nullptr},
    {35, "TQ2_0", 256, 66, nullptr},
    {36, "IQ4_NL_4_4", 32, 0, nullptr},
    {37, "IQ4_NL_4_8", 32, 0, nullptr},
    {38, "IQ4_NL_8_8", 32, 0, nullptr},
    {39, "MXFP4", 32, 17, nullptr},
    {40, "NVFP4", 64, 36, nullptr},
    {41, "Q1_0", 128, 18, nullptr},
};

namespace detail {
consteval bool ggml_types_are_indexed_by_number() {
  for (std::size_t i = 0; i < std::size(kGgmlTypes); ++i) {
    if (kGgmlTypes[i].number != i) return false;
  }
  return true;
}
static_assert(ggml_types_are_indexed_by_number(), "kGgmlTypes: the type's number is its place");
}  // namespace detail

/// Null for a number that no type has.
[[nodiscard]] inline const GgmlTypeInfo* find_ggml_type(std::uint32_t number) {
  return number < std::size(kGgmlTypes) ? &kGgmlTypes[number] : nullptr;
}

/// "F32, F16, Q4_0, ...": what can be converted to fp32, for messages.
[[nodiscard]] inline std::string convertible_ggml_types() {
  std::string text;
  for (const GgmlTypeInfo& type : kGgmlTypes) {
    if (type.dequantize == nullptr) continue;
    if (!text.empty()) text += ", ";
    text += type.name;
  }
  return text;
}

}  // namespace prefillshare::examples
