// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/attention.cuh - which attention kernels serve, and the tiles they take.
// Layer: train/cuda (host, needs nvcc).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include <prefillshare/train/cuda/kernels/attention.cuh>
#include <prefillshare/train/cuda/kernels/attention_mma.cuh>
#include <prefillshare/train/cuda/train_stream.cuh>

namespace prefillshare::cuda::detail {

/// Whether heads of this size go to tensor cores.
template <class S>
[[nodiscard]] constexpr bool attends_on_tensor_cores(std::int64_t head_dim) {
  return std::is_same_v<S, __nv_bfloat16> && (head_dim == 64 || head_dim == 128);
}

/// The tiles of a batch: pairs of a segment and a first row (query r / group, or key).
struct AttentionTiles {
  static constexpr std::int64_t kRows = 64;

  std::vector<std::int32_t> queries;     // [tiles][2]
  std::vector<std::int32_t> keys;        // [tiles][2], of keys with a gradient
  std::vector<std::int32_t> segment_of;  // [rows]

  void assign(const std::vector<DeviceSegment>& segments, std::int64_t group) {
    queries.clear();
    keys.clear();
    segment_of.clear();
    for (std::size_t i = 0; i < segments.size(); ++i) {
      const auto number = static_cast<std::int32_t>(i);
      const auto cut = [number](std::vector<std::int32_t>& tiles, std::int64_t rows) {
        for (std::int64_t at = 0; at < rows; at += kRows) {
          tiles.push_back(number);
          tiles.push_back(static_cast<std::int32_t>(at));
        }
      };
      cut(queries, segments[i].count * group);
      cut(keys, segments[i].count);
      segment_of.insert(segment_of.end(), static_cast<std::size_t>(segments[i].count), number);
    }
    // Tiles with much to do begin first.
    sort(queries, [&](std::int32_t segment, std::int32_t row) {
      return segments[static_cast<std::size_t>(segment)].prefix + row / group;
    });
    sort(keys, [&](std::int32_t segment, std::int32_t row) {
      return static_cast<std::int64_t>(segments[static_cast<std::size_t>(segment)].count - row);
    });
  }
  /// So many tiles at most, of `rows` rows in so many segments.
  [[nodiscard]] static constexpr std::int64_t most(std::int64_t rows, std::int64_t segments) {
    return rows / kRows + segments;
  }
  /// Fills up to most() with tiles of nothing.
  void pad(std::int64_t rows, std::int64_t group, std::int64_t padded_segments) {
    const auto fill = [](std::vector<std::int32_t>& tiles, std::int64_t count) {
      while (std::ssize(tiles) < 2 * count) {
        tiles.push_back(0);
        tiles.push_back(std::int32_t{1} << 29);
      }
    };
    fill(queries, most(rows * group, padded_segments));
    fill(keys, most(rows, padded_segments));
  }

 private:
  template <class Work>
  void sort(std::vector<std::int32_t>& tiles, Work&& work) {
    order_.clear();
    for (std::size_t i = 0; i < tiles.size(); i += 2)
      order_.push_back({work(tiles[i], tiles[i + 1]), tiles[i], tiles[i + 1]});
    std::stable_sort(order_.begin(), order_.end(),
                     [](const Tile& a, const Tile& b) { return a.work > b.work; });
    for (std::size_t i = 0; i < order_.size(); ++i) {
      tiles[2 * i] = order_[i].segment;
      tiles[2 * i + 1] = order_[i].row;
    }
  }

  struct Tile {
    std::int64_t work = 0;
    std::int32_t segment = 0;
    std::int32_t row = 0;
  };
  std::vector<Tile> order_;
};

/// A batch's tiles on the device.
struct DeviceAttentionTiles {
  const DeviceSegment* segments = nullptr;
  const std::int32_t* segment_of = nullptr;  // [rows]
  const std::int32_t* queries = nullptr;     // [query_tiles][2]
  const std::int32_t* keys = nullptr;        // [key_tiles][2]
  std::int64_t query_tiles = 0;
  std::int64_t key_tiles = 0;
};

/// Calls body(tile) with the tensor-core tile of this head size.
template <class Body>
void with_mma_tile(int head_dim, Body&& body) {
  if (head_dim == 64) {
    body(MmaTile<64, 64>{});
  } else {
    body(MmaTile<128, 32>{});
  }
}

/// args: all but segments and tiles.
template <class S>
void attend(TrainStream& ts, AttentionArgs args, const DeviceAttentionTiles& tiles) {
  args.segments = tiles.segments;
  args.segment_of = tiles.segment_of;
  args.scale = 1.0F / std::sqrt(static_cast<float>(args.head_dim));
  if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    if (attends_on_tensor_cores<S>(args.head_dim)) {
      args.tiles = tiles.queries;
      with_mma_tile(args.head_dim, [&](auto tile) {
        using Tile = decltype(tile);
        ts.start(attention_mma_kernel<Tile>, args,
                 dim3(static_cast<unsigned>(tiles.query_tiles), static_cast<unsigned>(args.kv_heads)),
                 Tile::kThreads, Tile::kForwardShared);
      });
      return;
    }
  }
  ts.start(attention_kernel<S>, args, (args.rows * args.heads + kAttentionWarps - 1) / kAttentionWarps,
           kAttentionThreads);
}

/// The same; out and lse as attend() wrote them.
template <class S>
void attend_backward(TrainStream& ts, AttentionArgs args, const DeviceAttentionTiles& tiles) {
  args.segments = tiles.segments;
  args.segment_of = tiles.segment_of;
  args.scale = 1.0F / std::sqrt(static_cast<float>(args.head_dim));
  if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    if (attends_on_tensor_cores<S>(args.head_dim)) {
      with_mma_tile(args.head_dim, [&](auto tile) {
        using Tile = decltype(tile);
        const auto kv = static_cast<unsigned>(args.kv_heads);
        args.tiles = tiles.queries;
        ts.start(attention_mma_dq_kernel<Tile>, args, dim3(static_cast<unsigned>(tiles.query_tiles), kv),
                 Tile::kThreads, Tile::kBackwardShared);
        args.tiles = tiles.keys;
        ts.start(attention_mma_dkv_kernel<Tile>, args, dim3(static_cast<unsigned>(tiles.key_tiles), kv),
                 Tile::kThreads, Tile::kBackwardShared);
      });
      return;
    }
  }
  ts.start(attention_dq_kernel<S>, args, (args.rows * args.heads + kAttentionWarps - 1) / kAttentionWarps,
           kAttentionThreads);
  ts.start(attention_dkv_kernel<S>, args, (args.rows * args.kv_heads + kAttentionWarps - 1) / kAttentionWarps,
           kAttentionThreads);
}

}  // namespace prefillshare::cuda::detail
