// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/warpgroup_output.cuh - sums in the fragments of wgmma on their way out as whole
// lines.
// Layer: cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/wgmma.cuh>
#include <codegemm/cuda/kernels/output.cuh>

#if CODEGEMM_HAS_WGMMA
namespace codegemm::cuda::detail {

// The 128 threads of a warpgroup that multiplies, 0 to 2, meet.
__device__ __forceinline__ void wait_for_warpgroup(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 2) : "memory");
}

// 64 rows of a warpgroup as 16-bit numbers, 16 tokens at a time by way of shared memory: [16 tokens][64 rows]
// twice, 4 KiB, in which chunk c of 16 bytes of a token lies at c ^ (token % 8). Eight lanes then store the
// 128 bytes of a token: a store takes as many cycles as it touches lines.
//
// d[8 i + e] is the sum of row lane / 4 + e / 2 % 2 * 8 of the warp's 16 and token 16 i + e / 4 * 8 + lane %
// 4 * 2 + e % 2.
struct WarpgroupOutput {
  unsigned shared = 0;  // at a multiple of 16 bytes
  int group = 0;        // see wait_for_warpgroup()

  // Whether rows [row, row + 64) may go out by this way, of which those before `end` are there.
  [[nodiscard]] static __device__ __forceinline__ bool fits(const Output& o, int row, int end) {
    return row + 64 <= end && row + 64 <= o.rows && o.type != ScalarType::kFloat && o.y_stride % 8 == 0 &&
           o.residual_stride % 8 == 0 &&
           (reinterpret_cast<std::uintptr_t>(o.y) | reinterpret_cast<std::uintptr_t>(o.residual)) % 16 == 0;
  }

  template <PairType Type, int Sums>
  __device__ __forceinline__ void store(const Output& o, int row, int first_token, int tokens,
                                        const float (&d)[Sums]) const {
    if (o.residual != nullptr)
      store<Type, true>(o, row, first_token, tokens, d);
    else
      store<Type, false>(o, row, first_token, tokens, d);
  }

 private:
  // Every instruction runs once and comes from afar: the fewer the better.
  template <PairType Type, bool Residual, int Sums>
  __device__ __forceinline__ void store(const Output& o, int row, int first_token, int tokens,
                                        const float (&d)[Sums]) const {
    constexpr unsigned kBuffer = 2048;
    constexpr int kSteps = Sums / 8;
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const int lane = thread % 32;
    const int warp = thread / 32;
    float scale[2];
    float bias[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int of = row + warp * 16 + lane / 4 + 8 * i;
      scale[i] = o.unscale;
      if (o.row_scales != nullptr) scale[i] *= __half2float(__ushort_as_half(o.row_scales[of]));
      bias[i] = o.bias != nullptr ? load_scalar(o.bias, of, o.type) : 0.0F;
    }
    // Of four 8 x 8 matrices lane 8 i + j names token j of the i-th: tokens 8 on are the upper two, rows 8 on
    // the odd ones.
    const int to_token = lane / 16 * 8 + lane % 8;
    const int to_chunk = warp * 2 + lane / 8 % 2;
    const unsigned to_shared =
        shared + static_cast<unsigned>(to_token * 128 + (to_chunk ^ (to_token % 8)) * 16);
    const int token_of_thread = thread / 8;
    const unsigned from_shared =
        shared + static_cast<unsigned>(token_of_thread * 128 + (thread % 8 ^ (token_of_thread % 8)) * 16);
    const auto put = [&](int step) {
      const unsigned buffer = static_cast<unsigned>(step % 2) * kBuffer;
      unsigned pairs[4];
      if constexpr (Residual) {  // the other way: from lines to fragments
        const int token = first_token + step * 16 + token_of_thread;
        uint4 more = {};
        if (token < tokens) {
          more = *reinterpret_cast<const uint4*>(static_cast<const std::uint16_t*>(o.residual) +
                                                 token * o.residual_stride + row + thread % 8 * 8);
        }
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(from_shared + buffer), "r"(more.x),
                     "r"(more.y), "r"(more.z), "r"(more.w)
                     : "memory");
        wait_for_warpgroup(group);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                     : "r"(to_shared + buffer)
                     : "memory");
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float2 sum = make_float2(d[step * 8 + i * 2] * scale[i % 2] + bias[i % 2],
                                 d[step * 8 + i * 2 + 1] * scale[i % 2] + bias[i % 2]);
        if constexpr (Residual) {
          const float2 more = unpack_pair_of<Type>(pairs[i]);
          sum.x += more.x, sum.y += more.y;
        }
        pairs[i] = pack_pair<Type>(sum.x, sum.y);
      }
      asm volatile(
          "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to_shared + buffer),
          "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
          : "memory");
    };
    int token = first_token + token_of_thread;
    auto* to = static_cast<std::uint16_t*>(o.y) + token * o.y_stride + row + thread % 8 * 8;
    wait_for_warpgroup(group);  // nobody reads there any more
    put(0);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (first_token + step * 16 >= tokens) break;
      wait_for_warpgroup(group);
      if (step + 1 < kSteps) put(step + 1);
      uint4 out;
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
                   : "r"(from_shared + static_cast<unsigned>(step % 2) * kBuffer)
                   : "memory");
      if (token < tokens) {
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(out.x), "r"(out.y), "r"(out.z),
                     "r"(out.w)
                     : "memory");
      }
      token += 16;
      to += 16 * o.y_stride;
    }
    wait_for_warpgroup(group);  // what comes next may write there
  }
};

}  // namespace codegemm::cuda::detail
#endif
