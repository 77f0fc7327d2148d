// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/stage_ring_test.cpp - the parts of a slab find the stages that they come through.
#include <codegemm/cuda/block/stage_ring.hpp>

#include <support/catch.hpp>

namespace codegemm::test {
namespace {

// Beside a count of all parts.
template <int PerSlab, bool Fit>
void check_ring(int stages) {
  cuda::StageRing<PerSlab, Fit> ring;
  int part = 0;
  for (int slab = 0; slab < 30; ++slab) {
    for (int i = 0; i < PerSlab; ++i, ++part) {
      CAPTURE(PerSlab, Fit, stages, slab, i);
      CHECK(ring.stage(i, stages) == part % stages);
      CHECK(ring.phase(i, stages) == static_cast<unsigned>(part / stages % 2));
    }
    ring.next_slab(stages);
  }
}

TEST_CASE("cuda stage ring: every part of every slab") {
  for (const int stages : {4, 8}) {
    check_ring<1, true>(stages);
    check_ring<2, true>(stages);
    check_ring<4, true>(stages);
  }
  for (const int stages : {3, 4, 5, 7, 8}) {
    check_ring<1, false>(stages);
    check_ring<2, false>(stages);
    check_ring<4, false>(stages);
    check_ring<8, false>(stages);
  }
}

}  // namespace
}  // namespace codegemm::test
