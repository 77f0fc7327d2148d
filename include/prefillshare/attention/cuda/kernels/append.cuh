// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/kernels/append.cuh - turns Q and K by their positions, and writes K and V to
// their pages.
// Layer: attention/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/base/macros.hpp>
#include <codegemm/cuda/block/intrinsics.cuh>
#include <prefillshare/attention/cuda/block/page_loader.cuh>

namespace prefillshare::cuda {

/// Where angles come from: a table, frequencies, or neither (nothing is turned). Pointers are to device
/// memory.
struct RopeArgs {
  const float* cos = nullptr;  // [positions][head_dim / 2], or null: from frequencies
  const float* sin = nullptr;
  const float* frequencies = nullptr;  // [head_dim / 2], or null: nothing is turned
  int positions = 0;                   // of the table
  bool interleaved = false;

  [[nodiscard]] __device__ __forceinline__ bool turns() const {
    return cos != nullptr || frequencies != nullptr;
  }
  // Cosine and sine of a pair's angle. Past the table's end its last angles (an assertion in debug).
  [[nodiscard]] __device__ __forceinline__ float2 of(int position, int pair, int half) const {
    return of(position, pair, half, cos != nullptr ? 0.0F : frequencies[pair]);
  }
  // The same with the pair's frequency, for where there is no table.
  [[nodiscard]] __device__ __forceinline__ float2 of(int position, int pair, int half,
                                                     float frequency) const {
    CODEGEMM_ASSERT(cos == nullptr || position < positions);
    float2 out;
    if (cos != nullptr) {
      const std::int64_t at = static_cast<std::int64_t>(min(position, positions - 1)) * half + pair;
      out = make_float2(cos[at], sin[at]);
    } else {
      // Rounded as RopeTable rounds it: an fp32 product.
      sincosf(static_cast<float>(position) * frequency, &out.y, &out.x);
    }
    return out;
  }
};

/// Everything that the kernel reads, by value. Pointers are to device memory.
struct AppendArgs {
  std::uint16_t* q = nullptr;        // [tokens][q_stride], turned in place; null: no Q
  const std::uint16_t* k = nullptr;  // [tokens][k_stride]
  const std::uint16_t* v = nullptr;  // [tokens][v_stride]
  std::int64_t q_stride = 0;
  std::int64_t k_stride = 0;
  std::int64_t v_stride = 0;
  void* k_pages = nullptr;
  void* v_pages = nullptr;
  float k_scale = 1.0F;  // of fp8
  float v_scale = 1.0F;
  std::int64_t page_stride = 0;  // elements
  std::int64_t token_stride = 0;
  std::int64_t head_stride = 0;
  const std::int32_t* query_indptr = nullptr;  // [sequences + 1], or null: one token a sequence
  const std::int32_t* indptr = nullptr;        // [sequences + 1]
  const std::int32_t* indices = nullptr;
  const std::int32_t* last_page_len = nullptr;  // [sequences]
  RopeArgs rope;
  int tokens = 0;
  int sequences = 0;
  int heads = 0;  // of Q
  int kv_heads = 0;
  int head_dim = 0;
  int page_size = 0;
  int pages = 0;
  bool overlap = false;  // places and angles are found while the kernel in front still runs
};

inline constexpr int kAppendThreads = 256;

namespace detail {

// A pair of numbers turned by an angle's (cosine, sine).
__device__ __forceinline__ void turn_pair(float& a, float& b, const float2& angle) {
  const float turned = a * angle.x - b * angle.y;
  b = b * angle.x + a * angle.y;
  a = turned;
}

// Sixteen elements of a head: for rotate-half the first and the second of eight pairs, which lie in its two
// halves; interleaved, eight neighbours and the next eight.
struct Sixteen {
  float a[8];
  float b[8];

  template <ScalarType Type>
  __device__ __forceinline__ void load(const uint4& low, const uint4& high, bool interleaved) {
    const unsigned words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack<Type>(words[i]);
      const float2 y = unpack<Type>(words[i + 4]);
      if (interleaved) {
        a[i] = x.x;
        b[i] = x.y;
        a[i + 4] = y.x;
        b[i + 4] = y.y;
      } else {
        a[2 * i] = x.x;
        a[2 * i + 1] = x.y;
        b[2 * i] = y.x;
        b[2 * i + 1] = y.y;
      }
    }
  }
  __device__ __forceinline__ void turn(const float2 (&angles)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) turn_pair(a[i], b[i], angles[i]);
  }
  // Elements 2 i and 2 i + 1 of the first eight in memory, or of the second.
  [[nodiscard]] __device__ __forceinline__ float2 low(int i, bool interleaved) const {
    return interleaved ? make_float2(a[i], b[i]) : make_float2(a[2 * i], a[2 * i + 1]);
  }
  [[nodiscard]] __device__ __forceinline__ float2 high(int i, bool interleaved) const {
    return interleaved ? make_float2(a[i + 4], b[i + 4]) : make_float2(b[2 * i], b[2 * i + 1]);
  }
  template <ScalarType Type>
  __device__ __forceinline__ void store(uint4& first, uint4& second, bool interleaved) const {
    unsigned words[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = low(i, interleaved);
      const float2 y = high(i, interleaved);
      words[i] = pack<Type>(x.x, x.y);
      words[i + 4] = pack<Type>(y.x, y.y);
    }
    first = make_uint4(words[0], words[1], words[2], words[3]);
    second = make_uint4(words[4], words[5], words[6], words[7]);
  }
};

// Where part `part` of a head has its sixteen elements: two times eight.
[[nodiscard]] __device__ __forceinline__ int2 sixteen_at(int part, int head_dim, bool interleaved) {
  return interleaved ? make_int2(part * 16, part * 16 + 8) : make_int2(part * 8, head_dim / 2 + part * 8);
}

// Two numbers divided by the scale, as e4m3: to nearest even, beyond 448 to 448.
__device__ __forceinline__ unsigned narrow_fp8(const float2& pair, float scale) {
  return __nv_cvt_float2_to_fp8x2(make_float2(__fdiv_rn(pair.x, scale), __fdiv_rn(pair.y, scale)),
                                  __NV_SATFINITE, __NV_E4M3);
}

}  // namespace detail

/// A thread takes sixteen elements of one head of one token, of Q, K or V. Fp8: pages of e4m3.
template <ScalarType Type, bool Fp8>
__global__ void __launch_bounds__(kAppendThreads) append_kernel(const __grid_constant__ AppendArgs a) {
  if (!a.overlap) codegemm::cuda::detail::wait_for_previous_kernel();
  codegemm::cuda::detail::allow_next_kernel();
  const int parts = a.head_dim / 16;
  const int q_heads = a.q == nullptr ? 0 : a.heads;
  const std::int64_t a_token = static_cast<std::int64_t>(q_heads + 2 * a.kv_heads) * parts;
  const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * kAppendThreads + threadIdx.x;
  // No block of the next kernel may find this grid ended while the one before still runs.
  const auto wait = [&] {
    if (a.overlap) codegemm::cuda::detail::wait_for_previous_kernel();
  };
  if (number >= a_token * a.tokens) return wait();
  const int token = static_cast<int>(number / a_token);
  const int in_token = static_cast<int>(number - token * a_token);
  const int head = in_token / parts;
  const int part = in_token - head * parts;

  int sequence = token;
  int behind = 0;  // tokens of the sequence after this one
  if (a.query_indptr != nullptr) {
    int low = 0;
    int high = a.sequences;  // query_indptr[low] <= token < query_indptr[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (a.query_indptr[middle] <= token ? low : high) = middle;
    }
    sequence = low;
    behind = a.query_indptr[sequence + 1] - 1 - token;
    if (behind < 0) return wait();  // more tokens than query_indptr tells of
  }
  const int page_begin = a.indptr[sequence];
  const int sequence_pages = a.indptr[sequence + 1] - page_begin;
  const int position = (sequence_pages - 1) * a.page_size + a.last_page_len[sequence] - 1 - behind;
  CODEGEMM_ASSERT(sequence_pages > 0 && position >= 0);
  if (sequence_pages <= 0 || position < 0) return wait();

  const bool is_q = head < q_heads;
  const bool is_k = !is_q && head < q_heads + a.kv_heads;
  const int kv_head = head - q_heads - (is_k ? 0 : a.kv_heads);
  const int2 at = detail::sixteen_at(part, a.head_dim, a.rope.interleaved);
  const std::uint16_t* const from =
      is_q   ? a.q + token * a.q_stride + static_cast<std::int64_t>(head) * a.head_dim
      : is_k ? a.k + token * a.k_stride + static_cast<std::int64_t>(kv_head) * a.head_dim
             : a.v + token * a.v_stride + static_cast<std::int64_t>(kv_head) * a.head_dim;
  const bool turns = (is_q || is_k) && a.rope.turns();
  float2 angles[8];
  if (turns) {
#pragma unroll
    for (int i = 0; i < 8; ++i) angles[i] = a.rope.of(position, part * 8 + i, a.head_dim / 2);
  }
  std::int64_t to_page = 0;
  if (!is_q) {
    const int page = a.indices[page_begin + position / a.page_size];
    CODEGEMM_ASSERT(page >= 0 && page < a.pages);
    to_page = page * a.page_stride + position % a.page_size * a.token_stride + kv_head * a.head_stride;
  }
  wait();
  uint4 low = *reinterpret_cast<const uint4*>(from + at.x);
  uint4 high = *reinterpret_cast<const uint4*>(from + at.y);
  detail::Sixteen numbers;
  if (turns || (Fp8 && !is_q)) numbers.load<Type>(low, high, a.rope.interleaved);
  if (turns) {
    numbers.turn(angles);
    numbers.store<Type>(low, high, a.rope.interleaved);
  }
  std::uint16_t* to = nullptr;
  if (is_q) {
    to = a.q + token * a.q_stride + static_cast<std::int64_t>(head) * a.head_dim;
  } else {
    void* const pages = is_k ? a.k_pages : a.v_pages;
    if constexpr (Fp8) {
      auto* const row = static_cast<std::uint8_t*>(pages) + to_page;
      const float scale = is_k ? a.k_scale : a.v_scale;
      const auto four = [&](int i, bool second) {
        const float2 x = second ? numbers.high(i, a.rope.interleaved) : numbers.low(i, a.rope.interleaved);
        const float2 y =
            second ? numbers.high(i + 1, a.rope.interleaved) : numbers.low(i + 1, a.rope.interleaved);
        return detail::narrow_fp8(x, scale) | detail::narrow_fp8(y, scale) << 16;
      };
      *reinterpret_cast<uint2*>(row + at.x) = make_uint2(four(0, false), four(2, false));
      *reinterpret_cast<uint2*>(row + at.y) = make_uint2(four(0, true), four(2, true));
      return;
    }
    to = static_cast<std::uint16_t*>(pages) + to_page;
  }
  *reinterpret_cast<uint4*>(to + at.x) = low;
  *reinterpret_cast<uint4*>(to + at.y) = high;
}

}  // namespace prefillshare::cuda
