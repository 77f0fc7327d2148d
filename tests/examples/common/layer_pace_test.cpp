// SPDX-License-Identifier: Apache-2.0
//
// tests/examples/common/layer_pace_test.cpp - the time left of a run whose times are known.

#include <cstdint>

#include <common/layer_pace.hpp>
#include <support/catch.hpp>

using prefillshare::examples::LayerPace;

namespace {

// A block of SmolLM2's shape: each layer's cost, seconds of work, and seconds of calibration before it.
struct Layer {
  double cost, work, before;
};
constexpr Layer kBlock[] = {{0.85, 2.2, 3.0}, {0.28, 0.8, 0.0}, {0.28, 0.8, 0.0}, {0.85, 2.3, 2.0},
                            {2.28, 5.5, 2.5}, {2.28, 5.6, 0.0}, {3.13, 8.5, 2.5}};
constexpr int kBlocks = 30;

double seconds_of_block() {
  double out = 0.0;
  for (const Layer& layer : kBlock) out += layer.work + layer.before;
  return out;
}

LayerPace expected_run() {
  LayerPace pace;
  for (int i = 0; i < kBlocks; ++i) {
    for (const Layer& layer : kBlock) pace.expect(layer.cost);
  }
  return pace;
}

}  // namespace

TEST_CASE("the time left does not count the calibration for a layer's work", "[quantize]") {
  LayerPace pace = expected_run();
  CHECK(pace.seconds_left(0.0) < 0.0);
  const double whole = kBlocks * seconds_of_block();
  double now = 0.0;
  int done = 0;
  for (int i = 0; i < kBlocks; ++i) {
    for (const Layer& layer : kBlock) {
      now += layer.before;
      pace.begin(now, layer.cost);
      if (done == 0) CHECK(pace.seconds_left(now + 1.0) < 0.0);
      if (done > 0) {
        // Within a layer the time goes down as it passes, and not below what is left behind the layer.
        const double begun = pace.seconds_left(now);
        CHECK(pace.seconds_left(now + 0.1) < begun);
        CHECK(pace.seconds_left(now + 1e6) >= 0.0);
      }
      now += layer.work;
      pace.end(now);
      ++done;
      CAPTURE(done);
      const double left = pace.seconds_left(now);
      if (done < 7) {
        CHECK(left > 0.6 * (whole - now));
        CHECK(left < 1.6 * (whole - now));
      } else {
        CHECK(left > 0.9 * (whole - now) - 4.0);
        CHECK(left < 1.1 * (whole - now) + 4.0);
      }
    }
  }
  CHECK(pace.seconds_left(now) == Approx(0.0).margin(1e-9));
}

TEST_CASE("the time left of a run that goes on counts what it has to do alone", "[quantize]") {
  LayerPace pace = expected_run();
  constexpr int kFound = 18;  // blocks, which are run through without work
  double now = 0.0;
  for (int i = 0; i < kFound; ++i) {
    for (const Layer& layer : kBlock) pace.found(layer.cost);
    now += 3.0;
  }
  CHECK(pace.seconds_left(now) < 0.0);
  const double whole = now + (kBlocks - kFound) * seconds_of_block();
  for (const Layer& layer : kBlock) {
    now += layer.before;
    pace.begin(now, layer.cost);
    now += layer.work;
    pace.end(now);
    const double left = pace.seconds_left(now);
    CHECK(left > 0.6 * (whole - now));
    CHECK(left < 1.6 * (whole - now));
  }
}
