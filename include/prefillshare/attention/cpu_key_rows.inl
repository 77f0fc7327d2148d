// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cpu_key_rows.inl - where the keys and values of a tile lie, or their copies in fp32.
// A part of cpu_kernels.inl.

/// `count` numbers of another type, a multiple of 8, times `scale`.
inline void convert_row(KvElement element, const unsigned char* from, std::int64_t count, float scale,
                        float* to) {
  using Bits8 [[gnu::vector_size(8 * sizeof(std::uint32_t))]] = std::uint32_t;
  using Half8 [[gnu::vector_size(8 * sizeof(std::uint16_t))]] = std::uint16_t;
  using Byte8 [[gnu::vector_size(8)]] = std::uint8_t;
  for (std::int64_t i = 0; i < count; i += 8) {
    Vec8 value;
    if (element == KvElement::kFp8E4M3) {
      Byte8 stored;
      __builtin_memcpy(&stored, from + i, sizeof stored);
      const Bits8 bits = __builtin_convertvector(stored, Bits8);
      const Bits8 magnitude = bits & 0x7FU;
      const Vec8 scaled = __builtin_bit_cast(Vec8, magnitude << 20) * 0x1p120F;  // from bias 7 to 127
      const Bits8 nan = __builtin_bit_cast(Bits8, magnitude == 0x7FU) & 0x7FC00000U;
      value = __builtin_bit_cast(Vec8, __builtin_bit_cast(Bits8, scaled) | nan | (bits & 0x80U) << 24);
    } else {
      Half8 stored;
      __builtin_memcpy(&stored, from + 2 * i, sizeof stored);
      const Bits8 bits = __builtin_convertvector(stored, Bits8);
      if (element == KvElement::kBf16) {
        value = __builtin_bit_cast(Vec8, bits << 16);
      } else {
        const Bits8 magnitude = bits & 0x7FFFU;
        const Vec8 scaled = __builtin_bit_cast(Vec8, magnitude << 13) * 0x1p112F;  // from bias 15 to 127
        const Bits8 special = __builtin_bit_cast(Bits8, magnitude >= 0x7C00U) & 0x7F800000U;
        value =
            __builtin_bit_cast(Vec8, __builtin_bit_cast(Bits8, scaled) | special | (bits & 0x8000U) << 16);
      }
    }
    value *= scale;
    store(to + i, value);
  }
}

/// find_rows() for pages of another type, which are read into `converted` here, or another order.
inline void find_page_rows(const AttentionProblem& problem, int kv_head, std::int64_t first_key,
                           std::int64_t end, float* converted, const float** k_rows, const float** v_rows) {
  const KvPages& pages = *problem.pages;
  const KvElement element = pages.format.element;
  const auto width = static_cast<std::int64_t>(pages.head_dim);
  const auto* const base = static_cast<const unsigned char*>(pages.base);
  const std::int64_t bytes = element == KvElement::kFp8E4M3 ? 1 : element == KvElement::kFp32 ? 4 : 2;
  std::int64_t index = first_key / pages.block_tokens;
  std::int64_t slot = first_key % pages.block_tokens;
  for (int i = 0; i < kKeyTile; ++i) {
    if (first_key + i >= end) {
      k_rows[i] = v_rows[i] = kZeros;
      continue;
    }
    const std::int64_t at = problem.blocks[index] * pages.strides.block + slot * pages.strides.slot +
                            kv_head * pages.strides.head;
    if (element == KvElement::kFp32) {
      k_rows[i] = static_cast<const float*>(pages.base) + at;
      v_rows[i] = k_rows[i] + pages.strides.part;
    } else {
      float* const k = converted + i * width;
      float* const v = k + kKeyTile * width;
      convert_row(element, base + at * bytes, width, pages.k_scale, k);
      convert_row(element, base + (at + pages.strides.part) * bytes, width, pages.v_scale, v);
      k_rows[i] = k;
      v_rows[i] = v;
    }
    if (++slot == pages.block_tokens) {
      slot = 0;
      ++index;
    }
  }
}

/// Where the K (or V) of each key of a tile lies; keys from `end` on are taken as zeros and never read.
inline void find_rows(const AttentionProblem& problem, int kv_head, std::int64_t first_key, std::int64_t end,
                      float* converted, const float** k_rows, const float** v_rows) {
  if (problem.pages != nullptr) {
    find_page_rows(problem, kv_head, first_key, end, converted, k_rows, v_rows);
    return;
  }
  const std::int64_t block_tokens = problem.kv.block_tokens;
  const std::int64_t stride = problem.kv.slot_stride();
  std::int64_t index = first_key / block_tokens;
  std::int64_t slot = first_key % block_tokens;
  for (int i = 0; i < kKeyTile; ++i) {
    if (first_key + i >= end) {
      k_rows[i] = v_rows[i] = kZeros;
      continue;
    }
    const std::int64_t head = static_cast<std::int64_t>(kv_head) * problem.kv.head_dim;
    k_rows[i] = problem.kv.k(problem.blocks[index], 0) + slot * stride + head;
    v_rows[i] = problem.kv.v(problem.blocks[index], 0) + slot * stride + head;
    if (++slot == block_tokens) {
      slot = 0;
      ++index;
    }
  }
}
