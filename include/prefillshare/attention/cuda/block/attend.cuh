// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/block/attend.cuh - a block's query rows over a range of keys: online softmax on
// tensor cores.
// Layer: attention/cuda/block (device).
#pragma once

#include <cstdint>

#include <prefillshare/attention/cuda/block/page_loader.cuh>

namespace prefillshare::cuda {

/// Query rows of one K/V head: row r is head first_head + r % group of token first_token + r / group.
struct QueryRows {
  const std::uint16_t* q = nullptr;  ///< [tokens][stride]
  std::int64_t stride = 0;           ///< elements from a token to the next
  std::int64_t first_token = 0;      ///< of these rows
  int first_head = 0;                ///< of these rows
  int group = 1;                     ///< query heads of a K/V head
  int first_row = 0;                 ///< of this block
  int rows = 0;                      ///< rows from here on do not exist
};

/// What a warp knows of its rows after some keys, in mma's fragments: of row tile i, this lane has the rows
/// lane / 4 and lane / 4 + 8. `sum` is of this lane's keys alone until finish().
template <class Shape>
struct AttendState {
  float out[Shape::kRowTiles][Shape::kHeadDim / 8][4];  ///< sum of weight * V
  float top[Shape::kRowTiles][2];                       ///< largest score, not yet scaled
  float sum[Shape::kRowTiles][2];                       ///< of weights

  /// Before the first keys.
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int n = 0; n < Shape::kHeadDim / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[r][n][e] = 0.0F;
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[r][h] = -INFINITY;
        sum[r][h] = 0.0F;
      }
    }
  }
  /// After the last ones: `sum` is of all lanes' keys.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[r][h] += __shfl_xor_sync(0xFFFFFFFFU, sum[r][h], 1);
        sum[r][h] += __shfl_xor_sync(0xFFFFFFFFU, sum[r][h], 2);
      }
    }
  }
};

/// Which keys rows see: from `begin`, a row sees those below its own limit. Below `whole` all rows see all.
struct KeyRange {
  int begin = 0;  ///< the first key
  int end = 0;    ///< keys from here on are not read
  int whole = 0;  ///< keys that all rows see
};

namespace detail {

// The first row of this warp, in the block.
template <class Shape>
[[nodiscard]] __device__ __forceinline__ int warp_row() {
  return static_cast<int>(threadIdx.x) / 32 / Shape::kWarpsN * Shape::kWarpRows;
}

[[nodiscard]] __device__ __forceinline__ const std::uint16_t* query_row(const QueryRows& rows, int row,
                                                                        int head_dim) {
  const int token = row / rows.group;
  return rows.q + (rows.first_token + token) * rows.stride +
         static_cast<std::int64_t>(rows.first_head + row - token * rows.group) * head_dim;
}

// The warp's rows of Q as fragments of A, or all rows of the block into shared memory.
template <class Shape>
struct Queries {
  static constexpr int kSteps = Shape::kHeadDim / 16;
  unsigned fragment[Shape::kQueriesInShared ? 1 : kSteps][4];
  unsigned shared;

  // In shared memory they are complete at the block's next barrier.
  __device__ __forceinline__ void load(const QueryRows& rows, unsigned shared_memory) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (Shape::kQueriesInShared) {
      constexpr int kChunks = Shape::kHeadDim / 8;
      const unsigned base = shared_memory + Shape::kQueriesAt;
      for (int i = static_cast<int>(threadIdx.x); i < Shape::kRows * kChunks; i += Shape::kThreads) {
        const int row = rows.first_row + i / kChunks;
        const bool there = row < rows.rows;
        copy_or_zero(base + static_cast<unsigned>(i / kChunks * Shape::kRowBytes + i % kChunks * 16),
                     query_row(rows, there ? row : 0, Shape::kHeadDim) + i % kChunks * 8, there);
      }
      shared =
          base + static_cast<unsigned>((warp_row<Shape>() + lane % 16) * Shape::kRowBytes + lane / 16 * 16);
    } else {
      const int row = rows.first_row + warp_row<Shape>() + lane / 4;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const bool there = row + 8 * h < rows.rows;
        const std::uint16_t* const from =
            query_row(rows, there ? row + 8 * h : 0, Shape::kHeadDim) + lane % 4 * 2;
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          fragment[k][h] = there ? *reinterpret_cast<const unsigned*>(from + k * 16) : 0U;
          fragment[k][h + 2] = there ? *reinterpret_cast<const unsigned*>(from + k * 16 + 8) : 0U;
        }
      }
    }
  }
  __device__ __forceinline__ void get(int k, unsigned (&out)[Shape::kRowTiles][4]) const {
    if constexpr (Shape::kQueriesInShared) {
#pragma unroll
      for (int r = 0; r < Shape::kRowTiles; ++r) {
        load_matrices(out[r], shared + static_cast<unsigned>(r * 16 * Shape::kRowBytes + k * 32));
      }
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[0][e] = fragment[k][e];
    }
  }
};

// The warp's keys of the tile in `stage`, which start at first_key.
template <class Shape>
__device__ __forceinline__ void attend_tile(AttendState<Shape>& state, const Queries<Shape>& queries,
                                            unsigned stage, int first_key, int whole,
                                            const int (&limit)[Shape::kRowTiles][2], float scale_log2) {
  constexpr int kTiles = Shape::kWarpKeys / 8;  // column tiles of the scores
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int key_at = static_cast<int>(threadIdx.x) / 32 % Shape::kWarpsN * Shape::kWarpKeys;
  const unsigned k_at = stage + static_cast<unsigned>((key_at + lane % 8 + lane / 16 * 8) * Shape::kRowBytes +
                                                      lane / 8 % 2 * 16);
  const unsigned v_at =
      stage +
      static_cast<unsigned>(Shape::kTileBytes + (key_at + lane % 16) * Shape::kRowBytes + lane / 16 * 16);

  float score[Shape::kRowTiles][kTiles][4] = {};
#pragma unroll
  for (int k = 0; k < Shape::kHeadDim / 16; ++k) {
    unsigned a[Shape::kRowTiles][4];
    queries.get(k, a);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      unsigned b[4];
      load_matrices(b, k_at + static_cast<unsigned>(n * 8 * Shape::kRowBytes + k * 32));
#pragma unroll
      for (int r = 0; r < Shape::kRowTiles; ++r) {
        mma<Shape::kType>(score[r][n], a[r], b[0], b[1]);
        mma<Shape::kType>(score[r][n + 1], a[r], b[2], b[3]);
      }
    }
  }
  if (first_key + kTileKeys > whole) {
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int key = first_key + key_at + n * 8 + lane % 4 * 2 + e % 2;
          if (key >= limit[r][e / 2]) score[r][n][e] = -INFINITY;
        }
      }
    }
  }

  float base[Shape::kRowTiles][2];  // what is subtracted in the exponent
  bool moved = false;
  float factor[Shape::kRowTiles][2];
#pragma unroll
  for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = fmaxf(score[r][0][2 * h], score[r][0][2 * h + 1]);
#pragma unroll
      for (int n = 1; n < kTiles; ++n) top = fmaxf(top, fmaxf(score[r][n][2 * h], score[r][n][2 * h + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFU, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFU, top, 2));
      top = fmaxf(top, state.top[r][h]);
      base[r][h] = top == -INFINITY ? 0.0F : top * scale_log2;
      factor[r][h] = exp2_fast(state.top[r][h] * scale_log2 - base[r][h]);
      moved = moved || top != state.top[r][h];
      state.top[r][h] = top;
    }
  }
  if (__any_sync(0xFFFFFFFFU, moved)) {  // seldom, after the first tiles
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) state.sum[r][h] *= factor[r][h];
#pragma unroll
      for (int n = 0; n < Shape::kHeadDim / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) state.out[r][n][e] *= factor[r][e / 2];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        score[r][n][e] = exp2_fast(fmaf(score[r][n][e], scale_log2, -base[r][e / 2]));
        state.sum[r][e / 2] += score[r][n][e];
      }
    }
  }

#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    unsigned a[Shape::kRowTiles][4];
    unsigned rest[Shape::kRowTiles][4];  // what rounding took from the weights
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float low = score[r][n + e / 2][e % 2 * 2];
        const float high = score[r][n + e / 2][e % 2 * 2 + 1];
        a[r][e] = pack<Shape::kType>(low, high);
        if constexpr (Shape::kExactWeights) {
          const float2 rounded = unpack<Shape::kType>(a[r][e]);
          rest[r][e] = pack<Shape::kType>(low - rounded.x, high - rounded.y);
        }
      }
    }
#pragma unroll
    for (int d = 0; d < Shape::kHeadDim / 8; d += 2) {
      unsigned b[4];
      load_matrices_transposed(b, v_at + static_cast<unsigned>(n * 8 * Shape::kRowBytes + d * 16));
#pragma unroll
      for (int r = 0; r < Shape::kRowTiles; ++r) {
        mma<Shape::kType>(state.out[r][d], a[r], b[0], b[1]);
        mma<Shape::kType>(state.out[r][d + 1], a[r], b[2], b[3]);
        if constexpr (Shape::kExactWeights) {
          mma<Shape::kType>(state.out[r][d], rest[r], b[0], b[1]);
          mma<Shape::kType>(state.out[r][d + 1], rest[r], b[2], b[3]);
        }
      }
    }
  }
}

}  // namespace detail

/// All threads of a block call it; shared memory (Shape::kSharedBytes) is free again after the block's next
/// barrier. limit: of this lane's rows, see AttendState. Rows that see no key keep sum 0.
template <class Shape>
__device__ __forceinline__ void attend(AttendState<Shape>& state, unsigned shared, const KvSource& kv,
                                       const std::int32_t* pages, int kv_head, const QueryRows& rows,
                                       const KeyRange& keys, const int (&limit)[Shape::kRowTiles][2],
                                       float scale_log2) {
  // A warp that multiplies the keys that it loaded itself waits for nobody.
  const auto meet = [] {
    if constexpr (Shape::kWarpsN == Shape::kWarps && !Shape::kQueriesInShared) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  };
  constexpr unsigned kStageBytes = 2 * Shape::kTileBytes;
  const int tiles = (keys.end - keys.begin + kTileKeys - 1) / kTileKeys;
  detail::Queries<Shape> queries;
  state.clear();
  detail::PageLoader<Shape> loader;
  if constexpr (Shape::kQueriesInShared) queries.load(rows, shared);
  loader.look_up(kv, pages, keys.begin, keys.end);
#pragma unroll
  for (int s = 0; s < Shape::kStages - 1; ++s) {
    loader.copy(kv, kv_head, shared + static_cast<unsigned>(s) * kStageBytes);
    detail::end_copy_group();
    loader.look_up(kv, pages, keys.begin + (s + 1) * kTileKeys, keys.end);
  }
  if constexpr (!Shape::kQueriesInShared) queries.load(rows, shared);
  unsigned stage = 0;
  unsigned next_stage = Shape::kStages - 1;
  for (int t = 0; t < tiles; ++t) {
    detail::wait_for_copies<Shape::kStages - 2>();
    meet();
    loader.copy(kv, kv_head, shared + next_stage * kStageBytes);
    detail::end_copy_group();
    loader.look_up(kv, pages, keys.begin + (t + Shape::kStages) * kTileKeys, keys.end);
    detail::attend_tile(state, queries, shared + stage * kStageBytes, keys.begin + t * kTileKeys, keys.whole,
                        limit, scale_log2);
    next_stage = stage;
    stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
  }
  detail::wait_for_copies<0>();
  state.finish();
}

}  // namespace prefillshare::cuda
