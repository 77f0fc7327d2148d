// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/kernels/decode_append.cuh - the newest token of few sequences in one kernel:
// RoPE, its K and V into pages, attention, and the parts of a row put together within a cluster of blocks.
// Layer: attention/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/intrinsics.cuh>
#include <prefillshare/attention/cuda/block/attend.cuh>
#include <prefillshare/attention/cuda/kernels/append.cuh>
#include <prefillshare/attention/cuda/kernels/decode_store.cuh>

namespace prefillshare::cuda {

inline constexpr int kDecodeRanks = 8;  ///< blocks of a cluster, among which a sequence's keys are split
inline constexpr int kGroupKeys = 16;   ///< keys that a warp takes at a time

/// Eight warps with keys of their own, each with a ring of two groups of them. A "tile" is a warp's group.
template <ScalarType Type, int HeadDim>
struct DecodeAppendShape : AttendShape<Type, HeadDim, 1, 8, 1, 2> {
  using Base = AttendShape<Type, HeadDim, 1, 8, 1, 2>;               ///< what the products are made for
  static constexpr int kWarpKeys = kGroupKeys;                       ///< of a group
  static constexpr int kTileBytes = kGroupKeys * Base::kRowBytes;    ///< of K or of V
  static constexpr int kRingBytes = Base::kStages * 2 * kTileBytes;  ///< of a warp
  static constexpr int kSharedBytes = Base::kWarps * kRingBytes;     ///< of all rings
  // What else a block's shared memory holds, in bytes from its beginning: angles, barriers of the rings and
  // of the cluster, and what its blocks push here of the rows that this one ends.
  static constexpr int kAnglesAt = kSharedBytes;               ///< float2[head_dim / 2]
  static constexpr int kBarriersAt = kAnglesAt + HeadDim * 4;  ///< of rings
  static constexpr int kClusterBarrierAt = kBarriersAt + Base::kWarps * Base::kStages * 8;  ///< 8 bytes
  static constexpr int kTopsAt = kClusterBarrierAt + 16;           ///< float2[ranks][16]
  static constexpr int kSumsAt = kTopsAt + kDecodeRanks * 16 * 8;  ///< float[ranks][share of the rows]
  /// All of it, for `group` query heads a K/V head.
  static constexpr int bytes(int group) { return kSumsAt + group * HeadDim * 4; }
};

/// Everything that the kernel reads, by value. Pointers are to device memory.
struct DecodeAppendArgs {
  KvSource kv;
  std::uint16_t* k_pages = nullptr;  // those of kv
  std::uint16_t* v_pages = nullptr;
  const std::uint16_t* q = nullptr;  // [sequences][q_stride], before RoPE
  const std::uint16_t* k = nullptr;  // [sequences][k_stride], the same
  const std::uint16_t* v = nullptr;  // [sequences][v_stride]
  std::int64_t q_stride = 0;
  std::int64_t k_stride = 0;
  std::int64_t v_stride = 0;
  const std::int32_t* indptr = nullptr;  // [sequences + 1]
  const std::int32_t* indices = nullptr;
  const std::int32_t* last_page_len = nullptr;  // [sequences]
  RopeArgs rope;
  void* out = nullptr;  // [sequences][out_stride]
  std::int64_t out_stride = 0;
  ScalarType out_type = ScalarType::kHalf;
  int group = 0;  // query heads of a K/V head, at most 16
  float scale_log2 = 0.0F;
  bool overlap = false;  // the table and all keys but the newest are older than the kernel before
};

namespace detail {

/// The newest token of a sequence, of one K/V head and its query heads.
struct NewestToken {
  const DecodeAppendArgs& a;
  float2* angles = nullptr;  // shared memory, [head_dim / 2]
  float frequency = 0.0F;    // of this thread's pair, if it has one and there is no table of angles
  int position = 0;
  int sequence = 0;
  int kv_head = 0;

  // All threads; the block's barrier follows.
  template <class Shape>
  __device__ __forceinline__ void find_angles() const {
    constexpr int kPairs = Shape::kHeadDim / 2;
    static_assert(kPairs <= Shape::kThreads, "prefillshare: a thread for each pair of a head");
    const int pair = static_cast<int>(threadIdx.x);
    if (pair < kPairs && a.rope.turns()) angles[pair] = a.rope.of(position, pair, kPairs, frequency);
  }

  // K and V to element `at` of the pages and to row `row` of a group in shared memory. One warp.
  template <class Shape>
  __device__ __forceinline__ void append(std::int64_t at, int row, unsigned group) const {
    constexpr int kParts = Shape::kHeadDim / 16;
    constexpr int kChunks = Shape::kHeadDim / 8;
    static_assert(kParts + kChunks <= 32, "prefillshare: a warp appends a head");
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane >= kParts + kChunks) return;
    const auto put = [&](std::uint16_t* pages, unsigned tile, int column, const uint4& words) {
      *reinterpret_cast<uint4*>(pages + at + column) = words;
      store_shared16(tile + Shape::place(row, column / 8), words);
    };
    if (lane >= kParts) {
      const int column = (lane - kParts) * 8;
      const std::uint16_t* const from = a.v + sequence * a.v_stride + kv_head * Shape::kHeadDim + column;
      put(a.v_pages, group + static_cast<unsigned>(Shape::kTileBytes), column,
          *reinterpret_cast<const uint4*>(from));
      return;
    }
    const std::uint16_t* const from = a.k + sequence * a.k_stride + kv_head * Shape::kHeadDim;
    const int2 columns = sixteen_at(lane, Shape::kHeadDim, a.rope.interleaved);
    uint4 low = *reinterpret_cast<const uint4*>(from + columns.x);
    uint4 high = *reinterpret_cast<const uint4*>(from + columns.y);
    if (a.rope.turns()) {
      Sixteen numbers;
      numbers.load<Shape::kType>(low, high, a.rope.interleaved);
      float2 turns[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) turns[i] = angles[lane * 8 + i];
      numbers.turn(turns);
      numbers.store<Shape::kType>(low, high, a.rope.interleaved);
    }
    put(a.k_pages, group, columns.x, low);
    put(a.k_pages, group, columns.y, high);
  }

  // Fragments as the products take them: of step k, columns 16 k + 2 (lane % 4) and the next, and those eight
  // further on.
  template <class Shape>
  __device__ __forceinline__ void turn(Queries<Shape>& queries) const {
    if (!a.rope.turns()) return;
    constexpr int kSteps = Shape::kHeadDim / 16;
    const int lane = static_cast<int>(threadIdx.x) % 4;
    const auto turned = [](unsigned& low, unsigned& high, const float2& first, const float2& second) {
      float2 x = unpack<Shape::kType>(low);
      float2 y = unpack<Shape::kType>(high);
      turn_pair(x.x, y.x, first);
      turn_pair(x.y, y.y, second);
      low = pack<Shape::kType>(x.x, x.y);
      high = pack<Shape::kType>(y.x, y.y);
    };
    if (a.rope.interleaved) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float2 x = unpack<Shape::kType>(queries.fragment[k][e]);
          turn_pair(x.x, x.y, angles[k * 8 + lane + e / 2 * 4]);
          queries.fragment[k][e] = pack<Shape::kType>(x.x, x.y);
        }
      }
      return;
    }
#pragma unroll
    for (int k = 0; k < kSteps / 2; ++k) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int pair = k * 16 + lane * 2 + e / 2 * 8;
        turned(queries.fragment[k][e], queries.fragment[k + kSteps / 2][e], angles[pair], angles[pair + 1]);
      }
    }
  }
};

}  // namespace detail

/// Block (rank, K/V head, sequence): the clusters have a K/V head of a sequence each, and their blocks an
/// even share of its groups of keys, the last one the newest key. Each pushes what it has of a row to the
/// block that ends it, in whose shared memory the parts are added in the order of their ranks.
///
/// There is little to compute and much to wait for: a lane copies a row of K or of V by one instruction, and
/// the first groups of all warps are on their way before the kernel in front has ended.
template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    decode_append_kernel(const __grid_constant__ DecodeAppendArgs a) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) char append_memory[];
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(append_memory));
  const unsigned barrier = shared + static_cast<unsigned>(Shape::kClusterBarrierAt);
  const auto rank = static_cast<int>(blockIdx.x);
  const auto kv_head = static_cast<int>(blockIdx.y);
  const auto sequence = static_cast<int>(blockIdx.z);
  const int warp = __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) / 32, 0);  // known to be uniform
  const int lane = static_cast<int>(threadIdx.x) % 32;
  constexpr int kQuads = Shape::kHeadDim / 4;
  const int share = a.group * kQuads / kDecodeRanks;  // quads that a block ends
  if (!a.overlap) codegemm::cuda::detail::wait_for_previous_kernel();
  codegemm::cuda::detail::allow_next_kernel();
  const int first_page = a.indptr[sequence];
  const int end_page = a.indptr[sequence + 1];
  const int last_page_len = a.last_page_len[sequence];
  float frequency = 0.0F;
  if (a.rope.cos == nullptr && a.rope.frequencies != nullptr && threadIdx.x < Shape::kHeadDim / 2)
    frequency = a.rope.frequencies[threadIdx.x];
  const int pages = end_page - first_page;
  const int keys_end = pages > 0 ? (pages - 1) * a.kv.page_size + last_page_len : 0;
  const unsigned ring = shared + static_cast<unsigned>(warp * Shape::kRingBytes);
  const unsigned ring_barriers =
      shared + static_cast<unsigned>(Shape::kBarriersAt + warp * Shape::kStages * 8);
  if (lane == 0) {
    for (int s = 0; s < Shape::kStages; ++s)
      codegemm::cuda::detail::init_barrier(ring_barriers + static_cast<unsigned>(s) * 8U, 1);
    if (warp == 0) {
      codegemm::cuda::detail::expect_pushes(
          barrier,
          static_cast<unsigned>(kDecodeRanks * (share * 16 + a.group * static_cast<int>(sizeof(float2)))));
    }
    codegemm::cuda::detail::publish_barriers();
  }
  __syncwarp();
  codegemm::cuda::detail::cluster_arrive();

  // Groups first_group + warp, + warp + kWarps, ... are this warp's.
  const int groups = (keys_end + kGroupKeys - 1) / kGroupKeys;
  const int first_group = groups * rank / kDecodeRanks;
  const int end_group = groups * (rank + 1) / kDecodeRanks;
  const int mine = max(end_group - first_group - warp + Shape::kWarps - 1, 0) / Shape::kWarps;
  const auto group_at = [&](int i) {
    return ring + static_cast<unsigned>(i % Shape::kStages * 2 * Shape::kTileBytes);
  };
  const auto element_of = [&](int key) {
    const int slot = detail::page_of(a.kv, key);
    return __ldg(a.indices + first_page + slot) * a.kv.page_stride +
           (key - slot * a.kv.page_size) * a.kv.token_stride + kv_head * a.kv.head_stride;
  };
  // This lane's key of the warp's i-th group, and where an older one than the newest lies.
  const int own_row = lane % kGroupKeys;
  const auto first_of = [&](int i) { return (first_group + warp + i * Shape::kWarps) * kGroupKeys; };
  const auto place_of = [&](int i) {
    const int key = first_of(i) + own_row;
    return key < keys_end - 1 ? element_of(key) : 0;
  };
  // Asks for that group, but for the newest key; zeros behind it.
  const auto ask = [&](int i, std::int64_t element) {
    const int first = first_of(i);
    const bool of_v = lane >= kGroupKeys;
    const int key = first + own_row;
    const unsigned ready = ring_barriers + static_cast<unsigned>(i % Shape::kStages) * 8U;
    const unsigned to =
        group_at(i) + static_cast<unsigned>((of_v ? Shape::kTileBytes : 0) + Shape::place(own_row, 0));
    constexpr unsigned kBytes = Shape::kHeadDim * 2;
    if (lane == 0) {
      const int older = min(max(keys_end - 1 - first, 0), kGroupKeys);
      codegemm::cuda::detail::arrive_and_expect(ready, static_cast<unsigned>(older) * 2U * kBytes);
    }
    __syncwarp();
    if (key < keys_end - 1) {
      codegemm::cuda::detail::copy_bulk(to, (of_v ? a.kv.v : a.kv.k) + element, kBytes, ready);
    } else if (key >= keys_end) {
      for (unsigned at = 0; at < kBytes; at += 16) detail::store_shared16(to + at, make_uint4(0, 0, 0, 0));
    }
  };
  std::int64_t places[Shape::kStages];  // looked up together
#pragma unroll
  for (int i = 0; i < Shape::kStages; ++i) places[i] = i < mine ? place_of(i) : 0;
#pragma unroll
  for (int i = 0; i < Shape::kStages; ++i) {
    if (i < mine) ask(i, places[i]);
  }

  QueryRows rows;
  rows.q = a.q;
  rows.stride = a.q_stride;
  rows.first_token = sequence;
  rows.first_head = kv_head * a.group;
  rows.group = a.group;
  rows.rows = a.group;
  const detail::NewestToken newest{a,         reinterpret_cast<float2*>(append_memory + Shape::kAnglesAt),
                                   frequency, keys_end - 1,
                                   sequence,  kv_head};
  // The warp whose group ends the sequence.
  const bool appends = mine > 0 && first_group + warp + (mine - 1) * Shape::kWarps == groups - 1;
  const std::int64_t newest_at = appends ? element_of(keys_end - 1) : 0;
  const auto append = [&] {
    newest.append<Shape>(newest_at, (keys_end - 1) % kGroupKeys, group_at(mine - 1));
  };
  codegemm::cuda::detail::wait_for_previous_kernel();  // mostly over: blocks start as those in front end
  detail::Queries<Shape> queries;
  queries.load(rows, shared);
  newest.find_angles<Shape>();  // while they come
  __syncthreads();
  if (appends && mine <= Shape::kStages) append();
  newest.turn(queries);
  AttendState<Shape> state;
  state.clear();
  const auto limit = [&](int, int) { return keys_end; };
  for (int i = 0; i < mine; ++i) {
    const int first = first_of(i);
    codegemm::cuda::detail::wait_for_phase(ring_barriers + static_cast<unsigned>(i % Shape::kStages) * 8U,
                                           static_cast<unsigned>(i / Shape::kStages) & 1U);
    __syncwarp();
    // The warp's keys lie together, and are not the warp-th of a tile that all warps share.
    const int offset = warp * kGroupKeys;
    detail::attend_tile(state, queries, group_at(i) - static_cast<unsigned>(offset * Shape::kRowBytes),
                        first - offset, first + kGroupKeys > keys_end ? 0 : first + kTileKeys, limit,
                        a.scale_log2);
    __syncwarp();
    if (i + Shape::kStages >= mine) continue;
    ask(i + Shape::kStages, place_of(i + Shape::kStages));
    if (appends && i + Shape::kStages == mine - 1) append();
  }
  state.finish(1.0F);
  codegemm::cuda::detail::cluster_wait();  // every barrier of the cluster is ready
  __syncthreads();
  detail::for_warp_sums(
      state, append_memory, a.scale_log2, a.group,
      [&](int row, int column, const float4& sums, float top, float sum) {
        const int quad = row * kQuads + column / 4;
        const int owner = quad / share;
        const auto to = [&](unsigned at) {
          return codegemm::cuda::detail::address_in(at, static_cast<unsigned>(owner));
        };
        codegemm::cuda::detail::push4(
            to(shared + static_cast<unsigned>(Shape::kSumsAt + (rank * share + quad - owner * share) * 16)),
            sums, to(barrier));
        // A row's columns have all ranks for owners: one of its threads tells each.
        if (column / 4 >= kDecodeRanks) return;
        const auto other = static_cast<unsigned>(column / 4);
        const unsigned at = codegemm::cuda::detail::address_in(
            shared + static_cast<unsigned>(Shape::kTopsAt + (rank * 16 + row) * 8), other);
        const unsigned its_barrier = codegemm::cuda::detail::address_in(barrier, other);
        codegemm::cuda::detail::push(at, top, its_barrier);
        codegemm::cuda::detail::push(at + 4U, sum, its_barrier);
      });
  codegemm::cuda::detail::wait_for_pushes(barrier);

  const auto* const sums = reinterpret_cast<const float4*>(append_memory + Shape::kSumsAt);
  const auto* const tops = reinterpret_cast<const float2*>(append_memory + Shape::kTopsAt);
  for (int i = static_cast<int>(threadIdx.x); i < share; i += Shape::kThreads) {
    const int quad = rank * share + i;
    const int row = quad / kQuads;
    float2 parts[kDecodeRanks];
    float top = -INFINITY;
#pragma unroll
    for (int r = 0; r < kDecodeRanks; ++r) {
      parts[r] = tops[r * 16 + row];
      top = fmaxf(top, parts[r].x);
    }
    const float base = top == -INFINITY ? 0.0F : top;
    float4 out = {};
    float sum = 0.0F;
#pragma unroll
    for (int r = 0; r < kDecodeRanks; ++r) {
      const float factor = detail::exp2_fast(parts[r].x - base);
      const float4 of = sums[r * share + i];
      sum += factor * parts[r].y;
      out.x += factor * of.x;
      out.y += factor * of.y;
      out.z += factor * of.z;
      out.w += factor * of.w;
    }
    const float factor = sum > 0.0F ? 1.0F / sum : 0.0F;
    const std::int64_t at = sequence * a.out_stride +
                            static_cast<std::int64_t>(kv_head * a.group + row) * Shape::kHeadDim +
                            (quad - row * kQuads) * 4;
    detail::store_pair(a.out, at, a.out_type, out.x * factor, out.y * factor);
    detail::store_pair(a.out, at + 2, a.out_type, out.z * factor, out.w * factor);
  }
#endif
}

}  // namespace prefillshare::cuda
