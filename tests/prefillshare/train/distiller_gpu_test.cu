// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/train/distiller_gpu_test.cu - quantized models distilled on the GPU, with codes that
// move.

// What nvcc's front end remarks on in Eigen and in the CPU's kernels.
#pragma nv_diag_suppress 20012, 1675, 550

#include <prefillshare/train/cuda/distiller.cuh>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <support/catch.hpp>

#include "gpu_training.cuh"

namespace prefillshare::test {
namespace {

using cuda::Activations;
using cuda::DeviceDistiller;

// A dense model on the device, and texts on which models with codes learn what it says.
struct Distilling {
  using S = __nv_bfloat16;
  Device device = gpu_or_skip();
  Stream stream;
  std::shared_ptr<const LlamaModel<DenseLinear>> dense;
  std::shared_ptr<const DeviceFrozenWeights<S>> teacher;
  std::vector<std::vector<std::int32_t>> sequences;
  TrainOptions options;

  Distilling(std::uint64_t seed, std::int64_t steps, double rate)
      : dense(random_model(small_config(), seed)), teacher(on_device<S>(*dense, device, stream.get)) {
    Rng rng(seed + 1);
    for (int i = 0; i < 12; ++i) sequences.push_back(random_tokens(rng, 2 + rng.below(30), 60));
    options.steps = steps;
    options.batch = 6;
    options.pass_tokens = 64;
    options.rate = rate;
    options.adam.weight_decay = 0.0;
  }
  // The run that trains a student.
  [[nodiscard]] auto distill(TrainableModel<float>& student, const cuda::CodeMoveOptions& moves = {},
                             double label_share = 0.0) const {
    return DeviceDistiller<S>::create(student, teacher, sequences, options, device, stream.get,
                                      Activations::kKept, moves, label_share);
  }
};

}  // namespace

TEST_CASE("distillation on the GPU brings a quantized model nearer to the dense one", "[train][gpu]") {
  Distilling d(1021, 80, 0.02);

  auto same = trainable<float>(d.dense, Kind::kFull);
  auto idle = d.distill(same);
  require_ok(idle.status());
  CHECK(std::abs(idle->divergence(d.sequences).value()) <= 1e-6);

  // The same model read a block at a time: but for one layer without codes, weights are not there else.
  const auto hollow = without_weights(*d.dense, "model.layers.1.mlp.gate_proj");
  CHECK(DeviceFrozenWeights<Distilling::S>::create(*hollow, d.device, d.stream.get).status().code() ==
        StatusCode::kNullPointer);
  auto read =
      DeviceFrozenWeights<Distilling::S>::create(*hollow, d.device, d.stream.get, [&](std::int64_t i) {
        return Result<LlamaLayer<DenseLinear>>(d.dense->layers[static_cast<std::size_t>(i)]);
      });
  require_ok(read.status());
  const auto teacher_by_blocks = std::make_shared<const DeviceFrozenWeights<Distilling::S>>(*std::move(read));

  std::vector<float> first;
  for (int time = 0; time < 3; ++time) {
    auto student = trainable<float>(d.dense, Kind::kCodebooks);
    if (time == 2) student = TrainableModel<float>::codebooks(hollow, student.matrices()).value();
    if (time == 2) d.teacher = teacher_by_blocks;
    auto distiller = d.distill(student);
    require_ok(distiller.status());
    const double before = distiller->divergence(d.sequences).value();
    double last = 0.0;
    require_ok(distiller->run([&](const TrainProgress& now) { last = now.loss; }));
    const double after = distiller->divergence(d.sequences).value();
    std::printf("divergence %.4f, after %d steps %.4f, last step's %.4f\n", before,
                static_cast<int>(d.options.steps), after, last);
    CHECK(before > 0.0);
    CHECK(after < 0.6 * before);
    CHECK(std::abs(last - after) <= 0.5 * after);
    CHECK(distiller->step().status().code() == StatusCode::kInvalidArgument);
    if (time == 0) first = values_of(student);
    CHECK(same_bits(first, values_of(student)));
  }
  auto student = trainable<float>(d.dense, Kind::kCodebooks);
  CHECK(d.distill(student, {}, -0.1).status().code() == StatusCode::kInvalidArgument);
  d.sequences.push_back({1});
  const Status wrong = d.distill(student).status();
  CHECK(wrong.code() == StatusCode::kInvalidArgument);
  CHECK(wrong.message().find("sequence 12") != std::string::npos);
}

TEST_CASE("codes that moved in the last of a few steps are the student's", "[train][gpu]") {
  using S = __nv_bfloat16;
  const Device device = gpu_or_skip();
  const Stream stream;
  const auto dense = random_model(small_config(), 1051);
  const auto teacher = on_device<S>(*dense, device, stream.get);
  Rng rng(1052);
  const std::vector<std::vector<std::int32_t>> sequences = {random_tokens(rng, 20, 60),
                                                            random_tokens(rng, 12, 60)};
  TrainOptions options;
  options.steps = 3;
  options.batch = 2;
  options.rate = 0.01;
  options.schedule = RateSchedule::kConstant;
  options.adam.weight_decay = 0.0;
  cuda::CodeMoveOptions moves;
  moves.rate = 0.3;
  moves.every = 1;
  moves.until = 1.0;
  auto student = trainable<float>(dense, Kind::kCodebooks);
  auto distiller = DeviceDistiller<S>::create(student, teacher, sequences, options, device, stream.get,
                                              Activations::kKept, moves);
  require_ok(distiller.status());
  std::int64_t before = 0;
  while (!distiller->done()) {
    before = distiller->codes_moved();
    require_ok(distiller->step().status());
  }
  CHECK(distiller->codes_moved() > before);
  require_ok(distiller->download());
  auto again = DeviceDistiller<S>::create(student, teacher, sequences, options, device, stream.get);
  require_ok(again.status());
  CHECK(std::abs(again->divergence(sequences).value() - distiller->divergence(sequences).value()) <= 1e-7);
}

TEST_CASE("codes that follow the gradient bring a quantized model nearer than codebooks alone",
          "[train][gpu]") {
  Distilling d(1041, 100, 0.01);
  double still = 0.0;
  std::vector<float> first;
  for (const double rate : {0.0, 0.02, 0.02}) {
    CAPTURE(rate);
    auto student = trainable<float>(d.dense, Kind::kCodebooks);
    const auto before = student.matrices();
    cuda::CodeMoveOptions moves;
    moves.rate = rate;
    moves.every = 3;
    auto distiller = d.distill(student, moves);
    require_ok(distiller.status());
    require_ok(distiller->run());
    const double after = distiller->divergence(d.sequences).value();
    std::printf("codes' rate %g: divergence %.4f, %lld moved\n", rate, after,
                static_cast<long long>(distiller->codes_moved()));
    std::int64_t different = 0;
    for (const auto& [name, matrix] : student.matrices()) {
      const auto old = before.at(name).codes();
      for (std::size_t i = 0; i < old.size(); ++i) different += matrix.codes()[i] == old[i] ? 0 : 1;
    }
    CHECK((different > 0) == (rate > 0.0));
    CHECK(distiller->codes_moved() >= different);
    if (rate == 0.0) still = after;
    if (rate > 0.0) CHECK(after < 0.8 * still);
    // What the host was given is what the device has: codes, codebooks and the lists made of them.
    auto again = d.distill(student);
    require_ok(again.status());
    CHECK(std::abs(again->divergence(d.sequences).value() - after) <= 1e-7);
    if (rate > 0.0 && first.empty()) {
      first = values_of(student);
    } else if (rate > 0.0) {
      CHECK(same_bits(first, values_of(student)));
    }
  }
  auto student = trainable<float>(d.dense, Kind::kCodebooks);
  cuda::CodeMoveOptions wrong;
  wrong.every = 0;
  CHECK(d.distill(student, wrong).status().code() == StatusCode::kInvalidArgument);
  CHECK(student.set_codes("model.layers.0.mlp.up", {}).code() == StatusCode::kNotFound);
  CHECK(student.set_codes("model.layers.0.mlp.up_proj", {}).code() == StatusCode::kInvalidArgument);
}

}  // namespace prefillshare::test
