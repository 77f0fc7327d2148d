// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/kernels/decode_append.cuh - the newest token of few sequences in one kernel:
// RoPE, its K and V into pages, attention, and the parts of a row put together within a cluster of blocks.
// Layer: attention/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/ahead.cuh>
#include <codegemm/cuda/block/intrinsics.cuh>
#include <prefillshare/attention/cuda/block/attend.cuh>
#include <prefillshare/attention/cuda/kernels/append.cuh>
#include <prefillshare/attention/cuda/kernels/decode_store.cuh>

namespace prefillshare::cuda {

inline constexpr int kDecodeRanks = 8;  ///< blocks of a cluster, among which a sequence's keys are split

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
  codegemm::cuda::Ahead ahead;
  bool overlap = false;  // the table and all keys but the newest are older than the kernel before
};

/// A block's shared memory behind the tiles of keys, in bytes from its beginning: angles, a barrier, and what
/// the blocks of the cluster push here of the rows that this one ends.
template <class Shape>
struct DecodeAppendPlaces {
  static constexpr int kAngles = (Shape::kSharedBytes + 15) / 16 * 16;  ///< float2[head_dim / 2]
  static constexpr int kBarrier = kAngles + Shape::kHeadDim * 4;        ///< 8 bytes
  static constexpr int kTops = kBarrier + 16;                           ///< float2[ranks][16]
  static constexpr int kSums = kTops + kDecodeRanks * 16 * 8;           ///< float[ranks][share of the rows]
  /// Of a block.
  static constexpr int bytes(int group) { return kSums + group * Shape::kHeadDim * 4; }
};

namespace detail {

/// What AwaitNewest is, where the block that has the newest key writes it, and all turn their queries.
struct AppendNewest {
  static constexpr bool kMayWait = true;
  static constexpr bool kAppends = true;
  static constexpr bool waits = true;
  int newest = 0;  // key, -1: it is not among these
  const DecodeAppendArgs& a;
  float2* angles = nullptr;  // shared memory
  int position = 0;          // of the newest key
  int sequence = 0;
  int kv_head = 0;
  int head_dim = 0;

  __device__ __forceinline__ void find_angles() const {
    if (a.rope.turns()) {
      for (int i = static_cast<int>(threadIdx.x); i < head_dim / 2; i += static_cast<int>(blockDim.x)) {
        angles[i] = a.rope.of(position, i, head_dim / 2);
      }
    }
    if (a.ahead.bytes > 0) {
      const int block = (sequence * static_cast<int>(gridDim.y) + kv_head) * kDecodeRanks;
      codegemm::cuda::detail::ask_ahead(a.ahead, block + static_cast<int>(blockIdx.x),
                                        static_cast<int>(gridDim.y * gridDim.z) * kDecodeRanks);
    }
    __syncthreads();
  }

  // K and V to element `at` of the pages and, if `is_here`, to row `row` of the tile in `stage`. By the warp
  // that loads this row's tile.
  template <class Shape>
  __device__ __forceinline__ void append(std::int64_t at, int row, unsigned stage, bool is_here) const {
    constexpr int kParts = Shape::kHeadDim / 16;
    constexpr int kChunks = Shape::kHeadDim / 8;
    static_assert(kParts + kChunks <= 32, "prefillshare: a warp appends a head");
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (static_cast<int>(threadIdx.x) / 32 != row / Shape::kSlice || lane >= kParts + kChunks) return;
    const auto put = [&](std::uint16_t* pages, unsigned tile, int column, const uint4& words) {
      *reinterpret_cast<uint4*>(pages + at + column) = words;
      if (is_here) store_shared16(tile + Shape::place(row, column / 8), words);
    };
    if (lane >= kParts) {
      const int column = (lane - kParts) * 8;
      const std::uint16_t* const from = a.v + sequence * a.v_stride + kv_head * Shape::kHeadDim + column;
      put(a.v_pages, stage + static_cast<unsigned>(Shape::kTileBytes), column,
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
    put(a.k_pages, stage, columns.x, low);
    put(a.k_pages, stage, columns.y, high);
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
/// even share of its tiles of keys, the last one the newest key. Each pushes what it has of a row to the
/// block that ends it, in whose shared memory the parts are added in the order of their keys.
template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    decode_append_kernel(const __grid_constant__ DecodeAppendArgs a) {
#if __CUDA_ARCH__ >= 900
  static_assert(Shape::kWarpsN == Shape::kWarps && Shape::kRows == 16 && !Shape::kFp8,
                "prefillshare: decode_append_kernel's shape has a tile of rows, and keys of 16 bits");
  using Places = DecodeAppendPlaces<Shape>;
  extern __shared__ __align__(1024) char append_memory[];
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(append_memory));
  const unsigned barrier = shared + static_cast<unsigned>(Places::kBarrier);
  const auto rank = static_cast<int>(blockIdx.x);
  const auto kv_head = static_cast<int>(blockIdx.y);
  const auto sequence = static_cast<int>(blockIdx.z);
  constexpr int kQuads = Shape::kHeadDim / 4;
  const int share = a.group * kQuads / kDecodeRanks;  // quads that a block ends
  if (!a.overlap) codegemm::cuda::detail::wait_for_previous_kernel();
  codegemm::cuda::detail::allow_next_kernel();
  const int first_page = a.indptr[sequence];
  const int pages = a.indptr[sequence + 1] - first_page;
  const int keys_end = pages > 0 ? (pages - 1) * a.kv.page_size + a.last_page_len[sequence] : 0;
  if (threadIdx.x == 0) {
    codegemm::cuda::detail::expect_pushes(
        barrier,
        static_cast<unsigned>(kDecodeRanks * (share * 16 + a.group * static_cast<int>(sizeof(float2)))));
  }
  codegemm::cuda::detail::cluster_arrive();

  const int tiles = (keys_end + kTileKeys - 1) / kTileKeys;
  KeyRange keys;
  keys.begin = tiles * rank / kDecodeRanks * kTileKeys;
  keys.end = min(keys_end, tiles * (rank + 1) / kDecodeRanks * kTileKeys);
  keys.whole = keys.end;
  QueryRows rows;
  rows.q = a.q;
  rows.stride = a.q_stride;
  rows.first_token = sequence;
  rows.first_head = kv_head * a.group;
  rows.group = a.group;
  rows.rows = a.group;
  const detail::AppendNewest newest{
      keys_end - 1,   a,        reinterpret_cast<float2*>(append_memory + Places::kAngles),
      keys_end - 1,   sequence, kv_head,
      Shape::kHeadDim};
  AttendState<Shape> state;
  const auto limit = [&](int, int) { return keys.end; };
  attend(state, shared, a.kv, a.indices + first_page, kv_head, rows, keys, limit, a.scale_log2, newest);
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
            to(shared + static_cast<unsigned>(Places::kSums + (rank * share + quad - owner * share) * 16)),
            sums, to(barrier));
        // A row's columns have all ranks for owners: one of its threads tells each.
        if (column / 4 >= kDecodeRanks) return;
        const auto other = static_cast<unsigned>(column / 4);
        const unsigned at = codegemm::cuda::detail::address_in(
            shared + static_cast<unsigned>(Places::kTops + (rank * 16 + row) * 8), other);
        const unsigned its_barrier = codegemm::cuda::detail::address_in(barrier, other);
        codegemm::cuda::detail::push(at, top, its_barrier);
        codegemm::cuda::detail::push(at + 4U, sum, its_barrier);
      });
  codegemm::cuda::detail::wait_for_pushes(barrier);

  const auto* const sums = reinterpret_cast<const float4*>(append_memory + Places::kSums);
  const auto* const tops = reinterpret_cast<const float2*>(append_memory + Places::kTops);
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
