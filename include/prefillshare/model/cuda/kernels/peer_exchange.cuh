// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/kernels/peer_exchange.cuh - small sums over the GPUs of a group, and columns from
// each to all, through each other's memory.
// Layer: model/cuda/kernels (device).
// See: NCCL's LL protocol, as "Demystifying NCCL" (arXiv 2507.04786) section IV describes it.
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/intrinsics.cuh>

namespace prefillshare::cuda {

inline constexpr int kMostPeerRanks = 8;
inline constexpr int kPeerThreads = 256;

/// What a rank keeps at the head of its mailbox.
struct PeerState {
  unsigned call = 0;     // the last call that has ended
  unsigned arrived = 0;  // blocks of the call under way that have ended
  unsigned failed = 0;   // 1 + the rank that did not answer
};
inline constexpr std::int64_t kPeerHead = 256;  // bytes in front of the lines

/// Everything that peer_exchange_kernel reads, by value. A line is two values, each in 8 bytes with the
/// number of the call, which arrive together: whoever finds the number has the value, and no fence is needed.
struct PeerExchangeArgs {
  char* mailboxes[kMostPeerRanks] = {};  // as this device reaches them: head, then lines [2][ranks][lines]
  float* data = nullptr;                 // [rows][stride]
  std::int64_t stride = 0;
  std::int64_t first = 0;       // item of this launch
  std::int64_t items = 0;       // pairs of values of this launch
  std::int64_t lines = 0;       // of one rank in a mailbox
  std::int64_t timeout_ns = 0;  // how long a peer may keep this one waiting
  int width = 0;                // gather: columns of each rank
  int rank = 0;
  int ranks = 0;
  bool next_early = true;  // the next kernel may take its place while this one waits for the others
};

namespace detail {

__device__ __forceinline__ void store_line(char* to, float x, float y, unsigned call) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %2};" ::"l"(to), "r"(__float_as_uint(x)),
               "r"(call), "r"(__float_as_uint(y))
               : "memory");
}

// False when nothing came in time.
__device__ __forceinline__ bool load_line(const char* from, unsigned call, std::int64_t timeout_ns,
                                          float2& out) {
  std::uint64_t since = 0;
  for (unsigned tries = 1;; ++tries) {
    unsigned x = 0, a = 0, y = 0, b = 0;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x), "=r"(a), "=r"(y), "=r"(b)
                 : "l"(from)
                 : "memory");
    if (a == call && b == call) {
      out = make_float2(__uint_as_float(x), __uint_as_float(y));
      return true;
    }
    if (tries % 1024 != 0) continue;
    std::uint64_t now = 0;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (since == 0) since = now;
    if (now - since > static_cast<std::uint64_t>(timeout_ns)) return false;
  }
}

}  // namespace detail

/// kSum: data[0][2i], [2i + 1] become the sums over the ranks, added in the order of the ranks, so that all
/// have the same bits. Else: columns rank * width on of each row go to all. Two sets of lines in turn: a rank
/// can only be a call ahead, for it waits for the lines of all.
template <bool kSum>
__global__ void __launch_bounds__(kPeerThreads)
    peer_exchange_kernel(const __grid_constant__ PeerExchangeArgs a) {
  codegemm::cuda::detail::wait_for_previous_kernel();
  if (a.next_early) codegemm::cuda::detail::allow_next_kernel();
  auto* const state = reinterpret_cast<PeerState*>(a.mailboxes[a.rank]);
  unsigned call = *const_cast<volatile unsigned*>(&state->call) + 1;
  if (call == 0) call = 2;  // cleared memory is no call's; even as the one that it stands for
  bool waiting = *const_cast<volatile unsigned*>(&state->failed) == 0;
  const std::int64_t set = kPeerHead + static_cast<std::int64_t>(call % 2) * a.ranks * a.lines * 16;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kPeerThreads;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kPeerThreads + threadIdx.x;
  const std::int64_t pairs = (a.width + 1) / 2;  // of a row, gather
  // The pair's place within the rank's part, and whether it has a second value.
  const auto place = [&](std::int64_t i, int rank, bool& both) {
    const std::int64_t item = a.first + i;
    if (kSum) {
      both = 2 * item + 1 < a.stride;
      return a.data + 2 * item;
    }
    const std::int64_t row = item / pairs;
    const std::int64_t column = (item - row * pairs) * 2;
    both = column + 1 < a.width;
    return a.data + row * a.stride + static_cast<std::int64_t>(rank) * a.width + column;
  };
  for (std::int64_t i = begin; i < a.items; i += step) {
    bool both = false;
    const float* const mine = place(i, a.rank, both);
    const float x = mine[0];
    const float y = both ? mine[1] : 0.0F;
    for (int r = 1; r < a.ranks; ++r) {
      const int peer = (a.rank + r) % a.ranks;  // not all to the same one at once
      detail::store_line(a.mailboxes[peer] + set + (a.rank * a.lines + i) * 16, x, y, call);
    }
  }
  for (std::int64_t i = begin; i < a.items; i += step) {
    bool both = false;
    float2 sum = make_float2(0.0F, 0.0F);
    for (int r = 0; r < a.ranks; ++r) {
      float* const to = place(i, r, both);
      float2 value = make_float2(0.0F, 0.0F);
      if (r == a.rank) {
        if (!kSum) continue;
        value = make_float2(to[0], both ? to[1] : 0.0F);
      } else if (waiting && !detail::load_line(a.mailboxes[a.rank] + set + (r * a.lines + i) * 16, call,
                                               a.timeout_ns, value)) {
        waiting = false;
        atomicCAS(&state->failed, 0U, static_cast<unsigned>(r) + 1U);
      }
      if (kSum) {
        sum = r == 0 ? value : make_float2(sum.x + value.x, sum.y + value.y);
      } else {
        to[0] = value.x;
        if (both) to[1] = value.y;
      }
    }
    if (kSum) {
      float* const to = place(i, a.rank, both);
      to[0] = sum.x;
      if (both) to[1] = sum.y;
    }
  }
  __syncthreads();  // all have read the call's number
  if (threadIdx.x == 0 && atomicInc(&state->arrived, gridDim.x - 1) == gridDim.x - 1) state->call = call;
}

}  // namespace prefillshare::cuda
