// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/kernels/stream_product.cuh - dense weights times one token: every weight is read
// once, through rings in shared memory that fill while the kernels in front still run.
// Layer: model/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/base/macros.hpp>
#include <codegemm/cuda/block/intrinsics.cuh>
#include <codegemm/cuda/kernels/normed_row.cuh>
#include <prefillshare/model/cuda/kernels/rms_norm.cuh>
#include <prefillshare/model/cuda/kernels/scalars.cuh>

namespace prefillshare::cuda {

/// What becomes of the sums.
enum class StreamOutput : int {
  kStore,     ///< y = x W^T + bias, of the weights' type
  kStoreF32,  ///< y = x W^T, fp32
  kAddF32,    ///< y += x W^T, fp32
  kGated,     ///< y = silu(gate) * up, the gate being the first half of the rows of W
};

/// Everything that stream_product_kernel reads, by value. Pointers are to device memory, 16-byte aligned.
struct StreamProductArgs {
  const void* weights = nullptr;  // [rows][cols]
  const void* x = nullptr;        // [cols]; null: of norm
  codegemm::cuda::NormedRow norm;
  const void* bias = nullptr;  // [rows] or null; for kStore
  void* y = nullptr;           // [rows], with a gate half as many
  StreamOutput output = StreamOutput::kStore;
  int rows = 0;    // even
  int cols = 0;    // a multiple of 8
  int stages = 0;  // of a warp's ring
};

inline constexpr int kStreamWarps = 8;
inline constexpr int kStreamThreads = kStreamWarps * 32;
inline constexpr int kStreamColumns = 1024;                       // of a row that a warp takes at a time
inline constexpr int kStreamStageBytes = kStreamColumns * 2 * 2;  // of two rows
inline constexpr int kStreamBarrierBytes = 1024;                  // of all rings
inline constexpr int kStreamMostStages = kStreamBarrierBytes / (kStreamWarps * 8);
/// Columns of x that a block keeps: zeros behind the last.
[[nodiscard]] CODEGEMM_HOST_DEVICE constexpr int stream_x_bytes(int cols) {
  return (cols + kStreamColumns - 1) / kStreamColumns * kStreamColumns * 2;
}

namespace detail {

#if __CUDA_ARCH__ >= 900
// `bytes` (a multiple of 16) into shared memory, counted at the barrier. One thread. Nothing else will read
// them: the second-level cache need not keep them.
__device__ __forceinline__ void copy_bulk(unsigned shared, const void* from, unsigned bytes, unsigned barrier,
                                          std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], "
      "%4;" ::"r"(shared),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}
__device__ __forceinline__ std::uint64_t first_to_go() {
  std::uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
#endif

__device__ __forceinline__ uint4 load_shared16(unsigned address) {
  uint4 out;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
               : "r"(address));
  return out;
}
template <class T>
__device__ __forceinline__ float2 pair_of(unsigned word) {
  return unpack2(*reinterpret_cast<const typename PairOf<T>::Type*>(&word));
}

// x, or the normalized row, into shared memory. All threads of the block; the caller's barrier follows.
template <class T>
struct StreamInput {
  static constexpr int kHeld = 4;  // eights of norm weights that a thread asks for in time
  float weight[kHeld][8];

  __device__ __forceinline__ void prefetch(const StreamProductArgs& a) {
    if (a.x != nullptr) return;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int at = (static_cast<int>(threadIdx.x) + i * kStreamThreads) * 8;
      if (at < a.cols) load8(a.norm.weight + at, weight[i]);
    }
  }
  __device__ __forceinline__ void store(const StreamProductArgs& a, char* to) const {
    const int padded = stream_x_bytes(a.cols) / 2;
    const int first = static_cast<int>(threadIdx.x) * 8;
    constexpr int kStep = kStreamThreads * 8;
    for (int at = first; at < padded; at += kStep) {
      if (at >= a.cols) *reinterpret_cast<uint4*>(to + at * 2) = make_uint4(0, 0, 0, 0);
    }
    if (a.x != nullptr) {
      for (int at = first; at < a.cols; at += kStep) {
        *reinterpret_cast<uint4*>(to + at * 2) =
            *reinterpret_cast<const uint4*>(static_cast<const T*>(a.x) + at);
      }
      return;
    }
    float held[kHeld][8];
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int at = first + i * kStep;
      if (at < a.cols) load8(a.norm.x + at, held[i]);
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first + i * kStep >= a.cols) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += held[i][j] * held[i][j];
    }
    for (int at = first + kHeld * kStep; at < a.cols; at += kStep) {
      float more[8];
      load8(a.norm.x + at, more);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += more[j] * more[j];
    }
    const float scale = rsqrtf(block_sum<kStreamWarps>(sum) / static_cast<float>(a.cols) + a.norm.epsilon);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int at = first + i * kStep;
      if (at >= a.cols) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) held[i][j] = held[i][j] * scale * weight[i][j];
      store8(reinterpret_cast<T*>(to) + at, held[i]);
    }
    for (int at = first + kHeld * kStep; at < a.cols; at += kStep) {
      float more[8];
      float by[8];
      load8(a.norm.x + at, more);
      load8(a.norm.weight + at, by);
#pragma unroll
      for (int j = 0; j < 8; ++j) more[j] = more[j] * scale * by[j];
      store8(reinterpret_cast<T*>(to) + at, more);
    }
  }
};

}  // namespace detail

/// A block has an even share of the pairs of rows (neighbours; with a gate, a row and the one that it gates),
/// its warps every eighth of them. Each warp has a ring of its own, which its first lane fills by bulk
/// copies: the first of them before the kernel in front has ended. Shared memory: x, barriers, rings. As much
/// of it as there is: then one block is on each multiprocessor, those of the next product come as these end,
/// and the memory is never idle in between.
template <class T>
__global__ void __launch_bounds__(kStreamThreads, 1)
    stream_product_kernel(const __grid_constant__ StreamProductArgs a) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) char stream_memory[];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool gated = a.output == StreamOutput::kGated;
  const int pairs = a.rows / 2;
  const int begin = static_cast<int>(static_cast<std::int64_t>(blockIdx.x) * pairs / gridDim.x) + warp;
  const int end = static_cast<int>(static_cast<std::int64_t>(blockIdx.x + 1) * pairs / gridDim.x);
  const int pieces = (a.cols + kStreamColumns - 1) / kStreamColumns;

  const auto start = static_cast<unsigned>(__cvta_generic_to_shared(stream_memory));
  const unsigned barriers = start + static_cast<unsigned>(stream_x_bytes(a.cols) + warp * a.stages * 8);
  const unsigned ring = start + static_cast<unsigned>(stream_x_bytes(a.cols) + kStreamBarrierBytes +
                                                      warp * a.stages * kStreamStageBytes);
  // What the first lane asks for next, and where it goes.
  int asked = begin;
  int asked_piece = 0;
  const std::uint64_t policy = detail::first_to_go();
  const auto ask = [&](int stage) {
    if (asked >= end) return;
    const int at = asked_piece * kStreamColumns;
    const auto bytes = static_cast<unsigned>(min(kStreamColumns, a.cols - at) * 2);
    const unsigned barrier = barriers + static_cast<unsigned>(stage) * 8U;
    const unsigned to = ring + static_cast<unsigned>(stage * kStreamStageBytes);
    const std::int64_t row = gated ? asked : std::int64_t{2} * asked;
    const T* const from = static_cast<const T*>(a.weights) + row * a.cols + at;
    codegemm::cuda::detail::arrive_and_expect(barrier, 2 * bytes);
    detail::copy_bulk(to, from, bytes, barrier, policy);
    detail::copy_bulk(to + kStreamStageBytes / 2, from + (gated ? std::int64_t{pairs} : 1) * a.cols, bytes,
                      barrier, policy);
    if (++asked_piece == pieces) {
      asked_piece = 0;
      asked += kStreamWarps;
    }
  };
  if (lane == 0) {
    for (int s = 0; s < a.stages; ++s) codegemm::cuda::detail::init_barrier(barriers + s * 8U, 1);
    codegemm::cuda::detail::publish_barriers();
    for (int s = 0; s < a.stages; ++s) ask(s);
  }
  __syncwarp();
  codegemm::cuda::detail::allow_next_kernel();
  detail::StreamInput<T> input;
  input.prefetch(a);
  codegemm::cuda::detail::wait_for_previous_kernel();
  input.store(a, stream_memory);
  __syncthreads();

  int stage = 0;
  unsigned parity = 0;
  for (int pair = begin; pair < end; pair += kStreamWarps) {
    const int row = gated ? pair : 2 * pair;  // of y
    float2 before = make_float2(0.0F, 0.0F);
    if (a.output == StreamOutput::kAddF32 && lane == 0) {
      before = *reinterpret_cast<const float2*>(static_cast<const float*>(a.y) + row);
    }
    float first[2] = {};
    float second[2] = {};
    for (int piece = 0; piece < pieces; ++piece) {
      const int columns = min(kStreamColumns, a.cols - piece * kStreamColumns);
      const unsigned from = ring + static_cast<unsigned>(stage * kStreamStageBytes + lane * 16);
      const unsigned x_from = start + static_cast<unsigned>(piece * kStreamColumns * 2 + lane * 16);
      codegemm::cuda::detail::wait_for_phase(barriers + static_cast<unsigned>(stage) * 8U, parity);
#pragma unroll
      for (int i = 0; i < kStreamColumns / 256; ++i) {
        if (i * 256 + lane * 8 >= columns) break;
        const uint4 x = detail::load_shared16(x_from + i * 512U);
        const uint4 w = detail::load_shared16(from + i * 512U);
        const uint4 v = detail::load_shared16(from + kStreamStageBytes / 2 + i * 512U);
        const unsigned xs[4] = {x.x, x.y, x.z, x.w};
        const unsigned ws[4] = {w.x, w.y, w.z, w.w};
        const unsigned vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 by = detail::pair_of<T>(xs[j]);
          const float2 one = detail::pair_of<T>(ws[j]);
          const float2 two = detail::pair_of<T>(vs[j]);
          first[0] += one.x * by.x;
          first[1] += one.y * by.y;
          second[0] += two.x * by.x;
          second[1] += two.y * by.y;
        }
      }
      __syncwarp();  // all have read
      if (lane == 0) ask(stage);
      if (++stage == a.stages) {
        stage = 0;
        parity ^= 1U;
      }
    }
    float2 sum = make_float2(first[0] + first[1], second[0] + second[1]);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      sum.x += __shfl_xor_sync(0xFFFFFFFFU, sum.x, step);
      sum.y += __shfl_xor_sync(0xFFFFFFFFU, sum.y, step);
    }
    if (lane != 0) continue;
    switch (a.output) {
      case StreamOutput::kGated:
        static_cast<T*>(a.y)[row] = static_cast<T>(sum.x / (1.0F + __expf(-sum.x)) * sum.y);
        break;
      case StreamOutput::kStore: {
        if (a.bias != nullptr) {
          const auto* const bias = static_cast<const T*>(a.bias) + row;
          sum.x += static_cast<float>(bias[0]);
          sum.y += static_cast<float>(bias[1]);
        }
        typename detail::PairOf<T>::Type out;
        detail::pack2(sum, out);
        *reinterpret_cast<typename detail::PairOf<T>::Type*>(static_cast<T*>(a.y) + row) = out;
        break;
      }
      case StreamOutput::kStoreF32:
      case StreamOutput::kAddF32:
        *reinterpret_cast<float2*>(static_cast<float*>(a.y) + row) =
            make_float2(before.x + sum.x, before.y + sum.y);
        break;
    }
  }
#endif
}

}  // namespace prefillshare::cuda
