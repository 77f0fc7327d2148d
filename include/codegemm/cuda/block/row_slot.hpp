// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/block/row_slot.hpp - in which of its 16 slots a lane keeps a row of a tile.
// Layer: cuda/block (host + device, no CUDA headers).
#pragma once

#include <codegemm/base/macros.hpp>

namespace codegemm::cuda {

/// The slot of row `row` (0..15) in lane `lane` (0..31), and, being an involution, the row of a slot. The
/// four low bits of the lane, reversed, flip the row: in each step of the transposing sum over lanes every
/// lane then keeps its lower slots and sends its upper ones, and no value has to be selected by lane.
[[nodiscard]] CODEGEMM_HOST_DEVICE constexpr int row_slot(int lane, int row) {
  return row ^ ((lane & 1) * 8 + (lane >> 1 & 1) * 4 + (lane >> 2 & 1) * 2 + (lane >> 3 & 1));
}

}  // namespace codegemm::cuda
