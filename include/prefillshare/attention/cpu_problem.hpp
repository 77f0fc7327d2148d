// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cpu_problem.hpp - what the CPU attention kernels are given, and how work is cut.
// Layer: attention (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <prefillshare/kv/block_pool.hpp>
#include <prefillshare/kv/pages.hpp>
#include <prefillshare/kv/storage.hpp>

namespace prefillshare::detail {

/// One attention call, checked. The queries that read the same K and V head are taken together as rows:
/// row r of K/V head h is token r / group, query head h * group + r % group.
struct AttentionProblem {
  KvLayerView<const float> kv;     // with `pages`: their sizes alone
  const KvPages* pages = nullptr;  // of another type or order
  const BlockId* blocks = nullptr;
  std::int64_t first_position = 0;
  std::int64_t tokens = 0;
  const float* q = nullptr;  // [tokens][q_stride]
  std::int64_t q_stride = 0;
  float* out = nullptr;  // [tokens][out_stride]
  std::int64_t out_stride = 0;
  int group = 1;       // query heads for each K/V head
  float scale = 1.0F;  // of the scores, times log2(e): the kernels raise 2 to them, not e

  [[nodiscard]] std::int64_t rows() const { return tokens * group; }  // for each K/V head
  [[nodiscard]] std::int64_t position(std::int64_t row) const { return first_position + row / group; }
  [[nodiscard]] const float* q_row(int kv_head, std::int64_t row) const {
    return q + row / group * q_stride + (std::int64_t{kv_head} * group + row % group) * kv.head_dim;
  }
  [[nodiscard]] float* out_row(int kv_head, std::int64_t row) const {
    return out + row / group * out_stride + (std::int64_t{kv_head} * group + row % group) * kv.head_dim;
  }
};

inline constexpr std::int64_t kKeyTile = 64;       // keys taken together; tiles start at multiples of it
inline constexpr std::int64_t kRowPad = 6;         // rows of a register tile
inline constexpr std::int64_t kMaxTileRows = 192;  // a multiple of kRowPad, as is kMinTileRows
inline constexpr std::int64_t kMinTileRows = 48;
inline constexpr int kMaxHeadDim = 512;
inline constexpr std::int64_t kFewRows = 16;  // up to here the keys are split between tasks, not the rows
inline constexpr std::int64_t kMinSplitKeys = 256;  // a multiple of kKeyTile
inline constexpr std::int64_t kMaxSplits = 32;

/// Floats of scratch memory that a worker needs: tile of Q and of the output, the running maximum and sum
/// of each row, K tile transposed, V tile, scores of one register tile of rows. All parts are multiples of
/// 16 floats, so that each begins at a 64-byte boundary.
struct TileScratch {
  float* q;
  float* out;
  float* maximum;
  float* sum;
  float* k_transposed;  // [head_dim][kKeyTile]
  float* v;             // [kKeyTile][head_dim]
  float* scores;        // [kRowPad][kKeyTile]
  float* converted;     // converted_floats(), behind floats()

  [[nodiscard]] static std::int64_t floats(std::int64_t head_dim) {
    return 2 * kMaxTileRows * head_dim + 2 * kMaxTileRows + 2 * kKeyTile * head_dim + kRowPad * kKeyTile;
  }
  TileScratch(float* memory, std::int64_t head_dim)
      : q(memory),
        out(q + kMaxTileRows * head_dim),
        maximum(out + kMaxTileRows * head_dim),
        sum(maximum + kMaxTileRows),
        k_transposed(sum + kMaxTileRows),
        v(k_transposed + kKeyTile * head_dim),
        scores(v + kKeyTile * head_dim),
        converted(scores + kRowPad * kKeyTile) {}
};

/// Floats of a tile of K and of V that are read from pages of another type; 0 where they are read in place.
[[nodiscard]] inline std::int64_t converted_floats(const KvPages* pages, std::int64_t head_dim) {
  return pages == nullptr || pages->format.element == KvElement::kFp32 ? 0 : 2 * kKeyTile * head_dim;
}
/// Floats of scratch memory of a worker where keys are split: rows of Q, their scores, two tiles.
[[nodiscard]] inline std::int64_t key_scratch_floats(const KvPages* pages, std::int64_t head_dim) {
  return kFewRows * (head_dim + kKeyTile) + 2 * converted_floats(pages, head_dim);
}
/// The sizes of pages, as those of fp32 pages in NHD.
[[nodiscard]] inline KvLayerView<const float> sizes_of(const KvPages& pages) {
  return {static_cast<const float*>(pages.base), pages.blocks, pages.block_tokens, pages.kv_heads,
          pages.head_dim};
}

/// Rows of one task when rows are split: as many as keep the packed K and V tile busy, but no fewer tasks
/// than some workers can share. Depends on the problem alone, and the result does not depend on it.
[[nodiscard]] inline std::int64_t tile_rows(std::int64_t rows, int kv_heads) {
  constexpr std::int64_t kTasks = 32;
  const std::int64_t wanted = rows * kv_heads / kTasks / kRowPad * kRowPad;
  return std::clamp<std::int64_t>(wanted, kMinTileRows, kMaxTileRows);
}

/// Keys of one task when keys are split, for few rows. The result depends on it, so it depends on nothing
/// but the number of keys.
[[nodiscard]] inline std::int64_t split_keys(std::int64_t keys) {
  const std::int64_t even = (keys + kMaxSplits - 1) / kMaxSplits;
  return std::max(kMinSplitKeys, (even + kKeyTile - 1) / kKeyTile * kKeyTile);
}

/// Floats that a split leaves for each row: its maximum, its sum, 6 unused, its weighted sum of V.
[[nodiscard]] constexpr std::int64_t partial_floats(std::int64_t head_dim) { return 8 + head_dim; }

}  // namespace prefillshare::detail
