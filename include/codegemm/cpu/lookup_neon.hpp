// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/lookup_neon.hpp - register lookups on 64-bit Arm: TBL and TBX over 64 bytes at a time.
// Layer: cpu (host only).
#pragma once

#include <cstddef>

#include <codegemm/cpu/lookup_args.hpp>

#if CODEGEMM_HAS_NEON
#include <arm_neon.h>

namespace codegemm::detail {

template <int kCodeBits>
FlushStats flush_stats_neon(const float* sums, std::int64_t entries) {
  constexpr int kCentroids = 1 << kCodeBits;
  FlushStats out;
  float32x4_t power = vdupq_n_f32(0.0F);
  for (std::int64_t e = 0; e < entries; ++e, sums += kCentroids) {
    float32x4_t largest = vdupq_n_f32(0.0F);
    for (int i = 0; i < kCentroids; i += 4) {
      const float32x4_t v = vld1q_f32(sums + i);
      largest = vmaxq_f32(largest, vabsq_f32(v));
      power = vfmaq_f32(power, v, v);
    }
    const float of_entry = vmaxvq_f32(largest);
    out.bound += of_entry;
  }
  out.power = vaddvq_f32(power) / static_cast<float>(kCentroids);
  return out;
}

/// Tables in two planes: the low bytes of all entries, then the high ones. The step of the flush, negative
/// where 16 bits are not enough.
template <int kCodeBits>
float encode_planes_neon(const EncodeArgs& a) {
  constexpr int kCentroids = 1 << kCodeBits;
  const float step = flush_step(flush_stats_neon<kCodeBits>(a.sums, a.entries), a.entries);
  if (step < 0.0F) return step;
  const float inverse = step > 0.0F ? 1.0F / step : 0.0F;
  for (std::int64_t e = 0; e < a.entries; ++e) {
    const float* const sums = a.sums + e * kCentroids;
    std::uint8_t* const table = a.tables + e * encoded_bytes(kCodeBits);
    for (int i = 0; i < kCentroids; i += 8) {
      const int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(sums + i), inverse));
      const int32x4_t high = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(sums + i + 4), inverse));
      const uint16x8_t q = vreinterpretq_u16_s16(vcombine_s16(vqmovn_s32(low), vqmovn_s32(high)));
      vst1_u8(table + i, vmovn_u16(q));
      vst1_u8(table + kCentroids + i, vshrn_n_u16(q, 8));
    }
  }
  return step;
}

// 16 bytes of a plane at `codes` minus 64 * chunk; what lies beyond the chunk leaves `before`.
template <int kCodeBits>
CODEGEMM_ALWAYS_INLINE uint8x16_t look_up_chunk_neon(uint8x16_t before, const std::uint8_t* plane,
                                                     uint8x16_t codes) {
  if constexpr (kCodeBits == 4) {
    return vqtbl1q_u8(vld1q_u8(plane), codes);
  } else if constexpr (kCodeBits == 5) {
    return vqtbl2q_u8(vld1q_u8_x2(plane), codes);
  } else {
    return vqtbx4q_u8(before, vld1q_u8_x4(plane), codes);
  }
}

// The codes of rows 16 * part .. of a block.
template <int kCodeBits>
CODEGEMM_ALWAYS_INLINE uint8x16_t load_codes_neon(const std::uint8_t* codes, int part) {
  if constexpr (kCodeBits == 4) {
    const uint8x16_t both = vld1q_u8(codes + 16 * (part & 1));
    return part < 2 ? vandq_u8(both, vdupq_n_u8(15)) : vshrq_n_u8(both, 4);
  } else {
    return vld1q_u8(codes + 16 * part);
  }
}

// sums[0..64) of one entry are added to.
template <int kCodeBits>
CODEGEMM_ALWAYS_INLINE void add_entry_neon(const std::uint8_t* codes, const std::uint8_t* table,
                                           uint16x8_t* sums) {
  constexpr int kChunk = kCodeBits < 6 ? 1 << kCodeBits : 64;
  constexpr int kChunks = (1 << kCodeBits) / kChunk;
  uint8x16_t index[4];
  uint8x16_t rest[4];
  uint8x16_t top[4];
  for (int part = 0; part < 4; ++part) {
    index[part] = load_codes_neon<kCodeBits>(codes, part);
    rest[part] = vdupq_n_u8(0);
    top[part] = vdupq_n_u8(0);
  }
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    for (int part = 0; part < 4; ++part) {
      rest[part] = look_up_chunk_neon<kCodeBits>(rest[part], table + kChunk * chunk, index[part]);
      top[part] =
          look_up_chunk_neon<kCodeBits>(top[part], table + (1 << kCodeBits) + kChunk * chunk, index[part]);
      index[part] = vsubq_u8(index[part], vdupq_n_u8(kChunk));
    }
  }
  for (int part = 0; part < 4; ++part) {
    const uint8x16_t low = vzip1q_u8(rest[part], top[part]);
    const uint8x16_t high = vzip2q_u8(rest[part], top[part]);
    sums[2 * part] = vaddq_u16(sums[2 * part], vreinterpretq_u16_u8(low));
    sums[2 * part + 1] = vaddq_u16(sums[2 * part + 1], vreinterpretq_u16_u8(high));
  }
}

// y[0..8) += step * scales[n] * sums[n].
CODEGEMM_ALWAYS_INLINE void add_flush_neon(uint16x8_t sums, float step, const Half* scales, float* y) {
  const int16x8_t sum = vreinterpretq_s16_u16(sums);
  float16x8_t halves;
  __builtin_memcpy(&halves, scales, sizeof(halves));
  const float32x4_t scale0 = vmulq_n_f32(vcvt_f32_f16(vget_low_f16(halves)), step);
  const float32x4_t scale1 = vmulq_n_f32(vcvt_f32_f16(vget_high_f16(halves)), step);
  vst1q_f32(y, vfmaq_f32(vld1q_f32(y), scale0, vcvtq_f32_s32(vmovl_s16(vget_low_s16(sum)))));
  vst1q_f32(y + 4, vfmaq_f32(vld1q_f32(y + 4), scale1, vcvtq_f32_s32(vmovl_s16(vget_high_s16(sum)))));
}

template <int kCodeBits>
void lookup_planes_neon(const LookupArgs& a) {
  constexpr std::int64_t kEntryBytes = code_bytes(kCodeBits);
  for (std::int64_t block = a.first_block; block < a.end_block; ++block) {
    for (const Flush* f = a.flushes; f != a.flushes + a.flush_count; ++f) {
      const std::uint8_t* codes = a.codes + block * a.stride + f->first * kEntryBytes;
      const std::uint8_t* table = a.tables + f->first * encoded_bytes(kCodeBits);
      uint16x8_t sums[kBlockRows / 8];
      for (int i = 0; i < kBlockRows / 8; ++i) sums[i] = vdupq_n_u16(0);
      for (std::int64_t e = 0; e < f->count; ++e, codes += kEntryBytes, table += encoded_bytes(kCodeBits)) {
        add_entry_neon<kCodeBits>(codes, table, sums);
      }
      for (int i = 0; i < kBlockRows / 8; ++i) {
        const std::int64_t row = block * kBlockRows + 8 * i;
        add_flush_neon(sums[i], f->step, f->scales + row, a.y + row);
      }
    }
  }
}

}  // namespace codegemm::detail

#endif
