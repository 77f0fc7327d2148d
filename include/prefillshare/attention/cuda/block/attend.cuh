// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/block/attend.cuh - a block's query rows over a range of keys: online softmax on
// tensor cores.
// Layer: attention/cuda/block (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/intrinsics.cuh>
#include <prefillshare/attention/cuda/block/attend_products.cuh>
#include <prefillshare/attention/cuda/block/attend_wgmma.cuh>
#include <prefillshare/attention/cuda/block/page_loader.cuh>

namespace prefillshare::cuda {

/// What a warp knows of its rows after some keys, in mma's fragments: of row tile i, this lane has the rows
/// lane / 4 and lane / 4 + 8 (from detail::tile_row() on). `sum` is of this lane's keys alone until finish().
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
  /// After the last ones: `sum` is of all lanes' keys, and stored values become V.
  __device__ __forceinline__ void finish(float v_scale) {
    if constexpr (Shape::kFp8) {
#pragma unroll
      for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
        for (int n = 0; n < Shape::kHeadDim / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) out[r][n][e] *= v_scale;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[r][h] += __shfl_xor_sync(0xFFFFFFFFU, sum[r][h], 1);
        sum[r][h] += __shfl_xor_sync(0xFFFFFFFFU, sum[r][h], 2);
      }
    }
  }
  /// Two neighbouring columns, the first being lane_column() + column_step(n), of row lane / 4 + 8 h of tile
  /// r; n from 0 to kHeadDim / 8 - 1 are all that this lane has.
  [[nodiscard]] __device__ __forceinline__ float2 pair(int r, int n, int h) const {
    if constexpr (Shape::kFp8) {
      return make_float2(out[r][n / 2 * 2][2 * h + n % 2], out[r][n / 2 * 2 + 1][2 * h + n % 2]);
    } else {
      return make_float2(out[r][n][2 * h], out[r][n][2 * h + 1]);
    }
  }
  /// See pair(). Of fp8 values, tiles 2 i and 2 i + 1 have the even and the odd ones of 16 columns. Added to
  /// a pointer one after the other, so that steps become parts of instructions and no address needs a
  /// register.
  [[nodiscard]] static __device__ __forceinline__ int lane_column() {
    return static_cast<int>(threadIdx.x) % 4 * (Shape::kFp8 ? 4 : 2);
  }
  /// The same.
  [[nodiscard]] static __device__ __forceinline__ constexpr int column_step(int n) {
    return Shape::kFp8 ? n / 2 * 16 + n % 2 * 2 : n * 8;
  }
};

/// Which keys rows see: from `begin`, a row sees those below its own limit. Below `whole` all rows see all.
struct KeyRange {
  int begin = 0;  ///< the first key
  int end = 0;    ///< keys from here on are not read
  int whole = 0;  ///< keys that all rows see
};

/// Before a block's first queries and last key there may be a kernel to wait for. This is for those that have
/// waited already.
struct NothingToAwait {
  static constexpr bool kMayWait = false;  ///< nothing is compiled for it
};
/// Keys are copied while the kernel before still runs, but for the newest, which it may be writing; then the
/// block waits for it, and lets the next kernel start.
struct AwaitNewest {
  static constexpr bool kMayWait = true;  ///< if `waits`
  bool waits = false;                     ///< else the block has waited
  int newest = 0;                         ///< key, -1: it is not among these
};

namespace detail {

// The warp's keys of the tile in `stage`, which start at first_key. Swizzled: see multiply_keys().
template <bool Swizzled = false, class Shape, class Limit>
__device__ __forceinline__ void attend_tile(AttendState<Shape>& state, const Queries<Shape>& queries,
                                            unsigned stage, int first_key, int whole, const Limit& limit,
                                            float scale_log2) {
  constexpr int kTiles = Shape::kWarpKeys / 8;  // column tiles of the scores
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int key_at = static_cast<int>(threadIdx.x) / 32 % Shape::kWarpsN * Shape::kWarpKeys;
  constexpr int kPitch = Swizzled ? 128 : Shape::kRowBytes;
  const int chunk = Swizzled ? lane / 16 ^ lane % 8 : lane / 16;
  const unsigned v_at =
      stage + static_cast<unsigned>(Shape::kTileBytes + (key_at + lane % 16) * kPitch + chunk * 16);

  float score[Shape::kRowTiles][kTiles][4] = {};
  multiply_keys<Swizzled>(score, queries, stage, key_at);
  if (first_key + kTileKeys > whole) {
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
      const int limits[2] = {limit(r, 0), limit(r, 1)};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int key = first_key + key_at + n * 8 + lane % 4 * 2 + e % 2;
          if (key >= limits[e / 2]) score[r][n][e] = -INFINITY;
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
    multiply_values<Shape, Swizzled>(state.out, a, rest, v_at + static_cast<unsigned>(n * 8 * kPitch));
  }
}

}  // namespace detail

/// All threads of a block call it; shared memory (Shape::kSharedBytes) is free again after the block's next
/// barrier. limit(r, h): of row lane / 4 + 8 h of this lane's row tile r, see KeyRange; called seldom. Rows
/// that see no key keep sum 0.
template <class Shape, class Limit, class Await = NothingToAwait>
__device__ __forceinline__ void attend(AttendState<Shape>& state, unsigned shared, const KvSource& kv,
                                       const std::int32_t* pages, int kv_head, const QueryRows& rows,
                                       const KeyRange& keys, const Limit& limit, float scale_log2,
                                       const Await& await = {}) {
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
  bool waits = false;
  if constexpr (Await::kMayWait) waits = await.waits;
  if (Shape::kQueriesInShared && !waits) queries.load(rows, shared);
  loader.look_up(kv, pages, keys.begin, keys.end);
  int missing = -1;
  if constexpr (Await::kMayWait) missing = waits ? await.newest : -1;
#pragma unroll
  for (int s = 0; s < Shape::kAhead; ++s) {
    if (s < tiles) {
      loader.template copy<Await::kMayWait>(kv, kv_head, shared + static_cast<unsigned>(s) * kStageBytes,
                                            missing);
    }
    detail::end_copy_group();
    loader.look_up(kv, pages, keys.begin + (s + 1) * kTileKeys, keys.end);
  }
  if constexpr (Await::kMayWait) {
    if (waits) {
      const int tile = (await.newest - keys.begin) / kTileKeys;
      const bool is_here = await.newest >= keys.begin && await.newest < keys.end && tile < Shape::kAhead;
      const int slot = detail::page_of(kv, await.newest);
      const int page = is_here ? __ldg(pages + slot) : 0;
      codegemm::cuda::detail::wait_for_previous_kernel();
      codegemm::cuda::detail::allow_next_kernel();
      if (is_here) {
        const std::int64_t from = page * kv.page_stride +
                                  (await.newest - slot * kv.page_size) * kv.token_stride +
                                  kv_head * kv.head_stride;
        detail::PageLoader<Shape>::copy_row(kv, from, (await.newest - keys.begin) % kTileKeys,
                                            shared + static_cast<unsigned>(tile) * kStageBytes);
      }
      queries.load(rows, shared);
      if (Shape::kQueriesInShared || is_here) {
        detail::end_copy_group();
        detail::wait_for_copies<0>();
      }
    }
  }
  if (!Shape::kQueriesInShared && !waits) queries.load(rows, shared);
  unsigned stage = 0;
  unsigned next_stage = Shape::kStages - 1;
  constexpr bool kAllAhead = Shape::kAhead == Shape::kStages;
  for (int t = 0; t < tiles; ++t) {
    if (kAllAhead && t == 0) {
      detail::wait_for_copies<Shape::kStages - 1>();
    } else {
      detail::wait_for_copies<Shape::kStages - 2>();
    }
#if CODEGEMM_HAS_WGMMA
    if constexpr (Shape::kWgmma) detail::publish_to_products();
#endif
    meet();
    if (!kAllAhead || t > 0) {
      if (t + Shape::kStages <= tiles) {
        loader.copy(kv, kv_head, shared + next_stage * kStageBytes);
        loader.look_up(kv, pages, keys.begin + (t + Shape::kStages) * kTileKeys, keys.end);
      }
      detail::end_copy_group();
    }
    const unsigned tile_at = shared + stage * kStageBytes;
    const int first_key = keys.begin + t * kTileKeys;
#if CODEGEMM_HAS_WGMMA
    if constexpr (Shape::kWgmma) {
      detail::attend_tile_wgmma<Shape>(state, queries, tile_at, first_key, keys.whole, limit, scale_log2);
    }
#endif
    if constexpr (!Shape::kWgmma) {
      detail::attend_tile(state, queries, tile_at, first_key, keys.whole, limit, scale_log2);
    }
    next_stage = stage;
    stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
  }
  detail::wait_for_copies<0>();
  state.finish(kv.v_scale);
}

}  // namespace prefillshare::cuda
