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

/// Everything that the kernel reads, by value. Pointers are to device memory.
struct AppendArgs {
  std::uint16_t* q = nullptr;        // [tokens][q_stride], turned in place; null: no Q
  const std::uint16_t* k = nullptr;  // [tokens][k_stride]
  const std::uint16_t* v = nullptr;  // [tokens][v_stride]
  std::int64_t q_stride = 0;
  std::int64_t k_stride = 0;
  std::int64_t v_stride = 0;
  std::uint16_t* k_pages = nullptr;
  std::uint16_t* v_pages = nullptr;
  std::int64_t page_stride = 0;
  std::int64_t token_stride = 0;
  std::int64_t head_stride = 0;
  const std::int32_t* query_indptr = nullptr;  // [sequences + 1], or null: one token a sequence
  const std::int32_t* indptr = nullptr;        // [sequences + 1]
  const std::int32_t* indices = nullptr;
  const std::int32_t* last_page_len = nullptr;  // [sequences]
  const float* cos = nullptr;                   // [positions][head_dim / 2], or null: from frequencies
  const float* sin = nullptr;
  const float* frequencies = nullptr;  // [head_dim / 2], or null: nothing is turned
  int tokens = 0;
  int sequences = 0;
  int heads = 0;  // of Q
  int kv_heads = 0;
  int head_dim = 0;
  int page_size = 0;
  int pages = 0;
  int positions = 0;  // of the table
  bool interleaved = false;
};

inline constexpr int kAppendThreads = 256;

namespace detail {

// Sixteen elements of a head: for rotate-half eight pairs from its two halves, else neighbours.
template <ScalarType Type>
__device__ __forceinline__ void turn(unsigned (&low)[4], unsigned (&high)[4], const float (&cos)[8],
                                     const float (&sin)[8], bool interleaved) {
  float a[8];
  float b[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = unpack<Type>(low[i]);
    const float2 y = unpack<Type>(high[i]);
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
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float turned = a[i] * cos[i] - b[i] * sin[i];
    b[i] = b[i] * cos[i] + a[i] * sin[i];
    a[i] = turned;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    low[i] = interleaved ? pack<Type>(a[i], b[i]) : pack<Type>(a[2 * i], a[2 * i + 1]);
    high[i] = interleaved ? pack<Type>(a[i + 4], b[i + 4]) : pack<Type>(b[2 * i], b[2 * i + 1]);
  }
}

}  // namespace detail

/// A thread takes sixteen elements of one head of one token, of Q, K or V.
template <ScalarType Type>
__global__ void __launch_bounds__(kAppendThreads) append_kernel(const __grid_constant__ AppendArgs a) {
  codegemm::cuda::detail::wait_for_previous_kernel();
  codegemm::cuda::detail::allow_next_kernel();
  const int parts = a.head_dim / 16;
  const int q_heads = a.q == nullptr ? 0 : a.heads;
  const std::int64_t a_token = static_cast<std::int64_t>(q_heads + 2 * a.kv_heads) * parts;
  const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * kAppendThreads + threadIdx.x;
  if (number >= a_token * a.tokens) return;
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
    if (behind < 0) return;  // more tokens than query_indptr tells of
  }
  const int page_begin = a.indptr[sequence];
  const int sequence_pages = a.indptr[sequence + 1] - page_begin;
  const int position = (sequence_pages - 1) * a.page_size + a.last_page_len[sequence] - 1 - behind;
  CODEGEMM_ASSERT(sequence_pages > 0 && position >= 0);
  if (sequence_pages <= 0 || position < 0) return;

  const bool is_q = head < q_heads;
  const bool is_k = !is_q && head < q_heads + a.kv_heads;
  const int kv_head = head - q_heads - (is_k ? 0 : a.kv_heads);
  const int half = a.head_dim / 2;
  const int low_at = a.interleaved ? part * 16 : part * 8;
  const int high_at = a.interleaved ? part * 16 + 8 : half + part * 8;
  const std::uint16_t* const from =
      is_q   ? a.q + token * a.q_stride + static_cast<std::int64_t>(head) * a.head_dim
      : is_k ? a.k + token * a.k_stride + static_cast<std::int64_t>(kv_head) * a.head_dim
             : a.v + token * a.v_stride + static_cast<std::int64_t>(kv_head) * a.head_dim;
  const uint4 low4 = *reinterpret_cast<const uint4*>(from + low_at);
  const uint4 high4 = *reinterpret_cast<const uint4*>(from + high_at);
  unsigned low[4] = {low4.x, low4.y, low4.z, low4.w};
  unsigned high[4] = {high4.x, high4.y, high4.z, high4.w};
  if ((is_q || is_k) && (a.cos != nullptr || a.frequencies != nullptr)) {
    CODEGEMM_ASSERT(a.cos == nullptr || position < a.positions);
    float cos[8];
    float sin[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int pair = part * 8 + i;
      if (a.cos != nullptr) {
        const std::int64_t at = static_cast<std::int64_t>(min(position, a.positions - 1)) * half + pair;
        cos[i] = a.cos[at];
        sin[i] = a.sin[at];
      } else {
        // Rounded as RopeTable rounds it: an fp32 product.
        sincosf(static_cast<float>(position) * a.frequencies[pair], &sin[i], &cos[i]);
      }
    }
    detail::turn<Type>(low, high, cos, sin, a.interleaved);
  }
  std::uint16_t* to = nullptr;
  if (is_q) {
    to = a.q + token * a.q_stride + static_cast<std::int64_t>(head) * a.head_dim;
  } else {
    const int page = a.indices[page_begin + position / a.page_size];
    CODEGEMM_ASSERT(page >= 0 && page < a.pages);
    to = (is_k ? a.k_pages : a.v_pages) + page * a.page_stride + position % a.page_size * a.token_stride +
         kv_head * a.head_stride;
  }
  *reinterpret_cast<uint4*>(to + low_at) = make_uint4(low[0], low[1], low[2], low[3]);
  *reinterpret_cast<uint4*>(to + high_at) = make_uint4(high[0], high[1], high[2], high[3]);
}

}  // namespace prefillshare::cuda
