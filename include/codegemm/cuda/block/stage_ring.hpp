// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/block/stage_ring.hpp - which of a ring's stages the parts of a slab come through.
// Layer: cuda/block (host + device, no CUDA headers).
#pragma once

#include <codegemm/base/macros.hpp>

namespace codegemm::cuda {

/// A reader's place in a ring of `stages` stages, PerSlab of which a slab takes one after the other. Fit: the
/// number of stages is a multiple of PerSlab, so that no slab goes over the ring's end and a stage's number
/// in the slab, known when compiling, is added to one number. Without it there are at least three stages.
template <int PerSlab, bool Fit>
struct StageRing {
  int first = 0;             ///< stage of the slab's first part
  unsigned first_phase = 0;  ///< parity of the phase that it is full in

  /// Of part `i` of the slab, 0 .. PerSlab - 1.
  [[nodiscard]] CODEGEMM_HOST_DEVICE constexpr int stage(int i, int stages) const {
    return first + i - wraps(i, stages) * stages;
  }
  /// The same for the parity.
  [[nodiscard]] CODEGEMM_HOST_DEVICE constexpr unsigned phase(int i, int stages) const {
    return first_phase ^ static_cast<unsigned>(wraps(i, stages) & 1);
  }
  /// Goes on to the next slab.
  CODEGEMM_HOST_DEVICE constexpr void next_slab(int stages) {
    if constexpr (Fit) {
      first += PerSlab;
      const bool ends = first == stages;
      first = ends ? 0 : first;
      first_phase ^= ends ? 1U : 0U;
    } else {
      const int by = wraps(PerSlab, stages);
      first += PerSlab - by * stages;
      first_phase ^= static_cast<unsigned>(by & 1);
    }
  }

 private:
  // How often the ring ends before part `i`, which may be PerSlab.
  [[nodiscard]] CODEGEMM_HOST_DEVICE constexpr int wraps(int i, int stages) const {
    if (Fit) return 0;
    int out = 0;
    for (int most = 0; most < (PerSlab + 2) / 3; ++most) out += first + i >= (most + 1) * stages ? 1 : 0;
    return out;
  }
};

}  // namespace codegemm::cuda
