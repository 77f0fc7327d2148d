// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/attention/gpu_angles.cuh - the angles by which a kernel turns K and Q, in its two forms.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <prefillshare/attention/append.cuh>

#include "gpu_pages.cuh"

namespace prefillshare::test {

enum class Angles { kTable, kFrequencies, kNone };

/// Cosines and sines of positions 0 .. positions - 1, and frequencies, on the device.
struct DeviceAngles {
  RopeLayout layout;
  std::int64_t positions;
  RopeTable table;  ///< the CPU's
  DeviceBuffer<float> cos, sin, frequencies;

  DeviceAngles(const RopeConfig& rope, std::int64_t count)
      : layout(rope.layout),
        positions(count),
        table(RopeTable::create(rope, count).value()),
        cos(all(table.cos(0), rope)),
        sin(all(table.sin(0), rope)),
        frequencies(frequencies_of(rope)) {}

  [[nodiscard]] cuda::DeviceRope rope(Angles angles) {
    if (angles == Angles::kTable) return {cos.data(), sin.data(), positions, nullptr, layout};
    if (angles == Angles::kFrequencies) return {nullptr, nullptr, 0, frequencies.data(), layout};
    return {};
  }

 private:
  [[nodiscard]] std::vector<float> all(const float* first, const RopeConfig& rope) const {
    return {first, first + static_cast<std::ptrdiff_t>(positions * (rope.head_dim / 2))};
  }
  [[nodiscard]] static std::vector<float> frequencies_of(const RopeConfig& rope) {
    std::vector<float> out;
    for (int i = 0; i < rope.head_dim / 2; ++i) out.push_back(rope_frequency(rope, i));
    return out;
  }
};

}  // namespace prefillshare::test
