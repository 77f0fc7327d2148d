// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/block/tile_layout.hpp - where the codes of a 16-row tile lie.
// Layer: cuda/block (host + device, no CUDA headers).
#pragma once

#include <codegemm/base/macros.hpp>

namespace codegemm::cuda {

inline constexpr int kTileRows = 16;  ///< rows of a tile

/// The slot of row `row` (0..15) in lane `lane` (0..31), and, being an involution, the row of a slot. The
/// four low bits of the lane, reversed, flip the row: in each step of the transposing sum over lanes every
/// lane then keeps its lower slots and sends its upper ones, and no value has to be selected by lane.
[[nodiscard]] CODEGEMM_HOST_DEVICE constexpr int row_slot(int lane, int row) {
  return row ^ ((lane & 1) * 8 + (lane >> 1 & 1) * 4 + (lane >> 2 & 1) * 2 + (lane >> 3 & 1));
}

/// A lane keeps the codes of 16 rows as a stream of bytes, `row_bytes` a row. The bytes of a row are cut into
/// parts of 4, then 2, then 1; a part's 16 slots follow each other in pairs (0, 8), (1, 9), .. (7, 15), since
/// tensor cores want rows r and r + 8 in one thread: one load brings a part of both. Position in the stream
/// of byte `byte` of slot `slot`.
[[nodiscard]] CODEGEMM_HOST_DEVICE constexpr int stream_offset(int row_bytes, int slot, int byte) {
  const int fours = row_bytes / 4 * 4;
  const int twos = row_bytes / 2 * 2;
  const int first = byte < fours ? byte / 4 * 4 : byte < twos ? fours : twos;
  const int width = byte < fours ? 4 : byte < twos ? 2 : 1;
  return kTileRows * first + ((slot & 7) * 2 + (slot >> 3)) * width + (byte - first);
}

/// A byte of a row of a lane.
struct StreamPlace {
  int slot = 0;  ///< of the row
  int byte = 0;  ///< of the row's `row_bytes`
};
/// The inverse of stream_offset().
[[nodiscard]] CODEGEMM_HOST_DEVICE constexpr StreamPlace stream_place(int row_bytes, int offset) {
  const int fours = row_bytes / 4 * 4;
  const int twos = row_bytes / 2 * 2;
  int first = offset / kTileRows;  // byte of a row that the part begins with
  const int width = first < fours ? 4 : first < twos ? 2 : 1;
  first = first < fours ? first / 4 * 4 : first < twos ? fours : twos;
  const int pair = (offset - kTileRows * first) / width;
  return {(pair & 1) * 8 + pair / 2, first + offset % width};
}

/// Position in a tile of byte `offset` of a lane's stream. 16 bytes of a lane lie together, and beside them
/// those of the next lane: the loads of a warp are whole lines.
[[nodiscard]] CODEGEMM_HOST_DEVICE constexpr int tile_offset(int lane, int offset) {
  return (offset / 16 * 32 + lane) * 16 + offset % 16;
}

/// Half of such a line is what 16 lanes have. In shared memory the halves are so far apart that the codes of
/// a lane's 16 rows are in different banks.
inline constexpr int kHalfLineStride = 16 * 16 + 16;

/// Where a tile holds the scale of a row for the lanes first .. first + 2^steps - 1, as number of an fp16 in
/// [32 lanes][16 >> steps]: with the lane that ends up with this row when the lanes of the group are summed.
/// steps <= 4.
[[nodiscard]] CODEGEMM_HOST_DEVICE constexpr int scale_offset(int steps, int first, int row) {
  const int reversed = (row >> 3 & 1) | (row >> 1 & 2) | (row << 1 & 4) | (row << 3 & 8);
  const int lane = first | (reversed & ((1 << steps) - 1));
  return lane * (kTileRows >> steps) + row_slot(lane, row);
}

}  // namespace codegemm::cuda
