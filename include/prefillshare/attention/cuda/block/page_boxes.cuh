// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/block/page_boxes.cuh - the parts of pages that Hopper's copy engine brings.
// Layer: attention/cuda/block (device).
// See: PTX ISA, "Tensors", for boxes and their swizzle.
#pragma once

#include <cuda.h>

namespace prefillshare::cuda {

/// Keys that a box has, of one page; and its columns, of one head: numbers of 16 bits, or pairs of fp8.
inline constexpr int kBoxKeys = 16;
/// The same.
inline constexpr int kBoxColumns = 64;

/// K and V as tensors [pages][slots][heads][columns] in such boxes, in the 128-byte swizzle.
struct PageMaps {
  CUtensorMap k = {};  ///< of K
  CUtensorMap v = {};  ///< of V
};

}  // namespace prefillshare::cuda
