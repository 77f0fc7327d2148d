// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/validate_gpu_test.cu - every wrong call has its own answer, before anything is
// launched. Needs no GPU: what a device can do is a struct, and no call here may reach one.
#include <codegemm/gemm.cuh>

#include "gpu.cuh"

namespace codegemm::test {
namespace {

using Problem = cuda::GemmProblem<Half, float>;

constexpr cuda::Device kHopper{90, 132, 232448, {0, 132, 66, 40, 30, 22, 16, 16, 14}};
constexpr cuda::Device kAmpere{80, 108, 166912, {}};

// Never followed: every call below must stop at the checks.
template <class T>
T* address(std::uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

struct Fixture {
  cuda::PackedMatrix packed;
  Problem good;

  Fixture() : packed(make()) {
    good.weights = packed.view(address<void>(4096));
    good.x = MatrixView<const Half>(address<const Half>(8192), 2, 512);
    good.y = MatrixView<float>(address<float>(16384), 2, 48);
  }
  static cuda::PackedMatrix make() {
    Rng rng(1);
    auto packed = cuda::pack(random_matrix({4, 1, 8, 128}, 48, 512, rng).view());
    REQUIRE(packed.ok());
    return std::move(packed).value();
  }
};

template <class Configs = cuda::DefaultConfigs>
void expect(const Problem& p, StatusCode code, const char* text, const cuda::Device& device = kHopper) {
  const Status status = cuda::validate<Configs>(p, device);
  CAPTURE(status.message());
  CHECK(status.code() == code);
  CHECK(status.message().find(text) != std::string::npos);
  CHECK(cuda::run<Configs>(p, device, nullptr, 0, nullptr).code() == code);
}

TEST_CASE("cuda validate: a good problem, and one of no tokens") {
  Fixture f;
  CHECK(cuda::validate(f.good, kHopper).ok());
  CHECK(cuda::validate(f.good, kAmpere).ok());
  Problem p = f.good;
  p.x.rows = p.y.rows = 0;
  p.x.data = nullptr;
  p.y.data = nullptr;
  CHECK(cuda::run(p, kHopper, nullptr, 0, nullptr).ok());
}

TEST_CASE("cuda validate: every wrong operand has its own status") {
  Fixture f;
  Problem p = f.good;
  p.x.cols = 508;
  expect(p, StatusCode::kShapeMismatch, "K = 512");
  p = f.good;
  p.y.cols = 47;
  expect(p, StatusCode::kShapeMismatch, "N = 48");
  p = f.good;
  p.y.rows = 1;
  expect(p, StatusCode::kShapeMismatch, "2 rows (tokens)");
  p = f.good;
  p.x.rows = p.y.rows = -1;
  expect(p, StatusCode::kInvalidArgument, "-1 rows");
  p = f.good;
  p.x.stride = 511;
  expect(p, StatusCode::kInvalidArgument, "stride 511");
  p = f.good;
  p.y.stride = 1;
  expect(p, StatusCode::kInvalidArgument, "stride 1");
  p = f.good;
  p.x.rows = p.y.rows = (std::int64_t{1} << 24) + 1;
  expect(p, StatusCode::kUnsupported, "16777217 tokens");
  p = f.good;
  p.residual = MatrixView<const float>(address<const float>(16384), 2, 40);
  expect(p, StatusCode::kShapeMismatch, "residual is 2 x 40");
  p.residual = MatrixView<const float>(address<const float>(16384), 2, 48, 47);
  expect(p, StatusCode::kInvalidArgument, "residual has stride 47");
  p.residual = MatrixView<const float>(address<const float>(16386), 2, 48);
  expect(p, StatusCode::kMisaligned, "residual");
  p = f.good;
  p.x.data = nullptr;
  expect(p, StatusCode::kNullPointer, "x is null");
  p = f.good;
  p.y.data = nullptr;
  expect(p, StatusCode::kNullPointer, "y is null");
  p = f.good;
  p.weights.data = nullptr;
  expect(p, StatusCode::kNullPointer, "weights is null");
  p = f.good;
  p.weights.data = address<std::byte>(4096 + 128);
  expect(p, StatusCode::kMisaligned, "weights");
  p = f.good;
  p.x.data = address<const Half>(8193);
  expect(p, StatusCode::kMisaligned, "x is");
  p = f.good;
  p.y.data = address<float>(16386);
  expect(p, StatusCode::kMisaligned, "y is");
  p = f.good;
  p.bias = address<float>(16386);
  expect(p, StatusCode::kMisaligned, "bias");
  p = f.good;  // x ends at 8192 + 2 * 1024
  p.y.data = address<float>(8192 + 2 * 1024 - 4);
  expect(p, StatusCode::kInvalidArgument, "y overlaps x");
  p.y.data = address<float>(8192 + 2 * 1024);
  CHECK(cuda::validate(p, kHopper).ok());
  p.residual = p.y;
  CHECK(cuda::validate(p, kHopper).ok());
  p.residual.data += 48;  // y's second row
  expect(p, StatusCode::kInvalidArgument, "y overlaps residual");
  p = f.good;
  p.weights.version = cuda::kPackedVersion + 1;
  expect(p, StatusCode::kIncompatible, "version");
  p = f.good;
  p.weights.layout.sets = 2;
  expect(p, StatusCode::kInvalidArgument, "layout");
  p = f.good;
  p.tuning.cluster = 9;
  expect(p, StatusCode::kInvalidArgument, "clusters of 9");
  p = f.good;
  p.tuning.rounds_ahead = 17;
  expect(p, StatusCode::kInvalidArgument, "17 rounds");
  p = f.good;
  p.tuning.splits = 9;
  expect(p, StatusCode::kInvalidArgument, "9 splits");
}

template <class Config>
struct OneConfig {
  using Gather = config_list<Config>;
  using Fused = config_list<>;
};

TEST_CASE("cuda validate: devices and configurations") {
  Fixture f;
  expect(f.good, StatusCode::kUnsupported, "7.5", cuda::Device{75, 40, 65536, {}});
  expect(f.good, StatusCode::kUnsupported, "bytes of shared memory", cuda::Device{86, 82, 49152, {}});
  expect<OneConfig<cuda::GatherM2V8G128>>(f.good, StatusCode::kUnsupported, "no configuration for m1v4g128");
  CHECK(cuda::validate<OneConfig<cuda::GatherM1V4G128>>(f.good, kHopper).ok());
  Problem many = f.good;
  many.x.rows = many.y.rows = 2048;
  CHECK(cuda::regime_of(many, kHopper) == cuda::Regime::kFusedWgmma);
  cuda::Device plain = kHopper;
  plain.wgmma = false;  // a program built for sm_90
  CHECK(cuda::regime_of(many, plain) == cuda::Regime::kFusedMma);
}

// [guide: cuda_row]
// m1v8b6g64, which has no row of its own in the library's list.
struct GatherM1V8B6G64 {
  static constexpr int kVecLen = 8, kCodebooks = 1, kCodeBits = 6, kSets = 2, kScaleSteps = 2;
  static constexpr int kThreads = 512, kPassTokens = 1;
};
struct OwnConfigs {
  using Gather = config_list<GatherM1V8B6G64>;
  using Fused = config_list<>;
};
// [guide: end]

TEST_CASE("cuda validate: a configuration of one's own") {
  Rng rng(2);
  const auto packed = cuda::pack(random_matrix({8, 1, 6, 64}, 48, 512, rng).view());
  REQUIRE(packed.ok());
  Fixture f;
  Problem p = f.good;
  p.weights = packed->view(address<void>(4096));
  CHECK(cuda::validate<OwnConfigs>(p, kHopper).ok());
  CHECK(cuda::regime_of<OwnConfigs>(p, kHopper) == cuda::Regime::kGather);
  expect<OwnConfigs>(f.good, StatusCode::kUnsupported, "no configuration for m1v4g128");
}

TEST_CASE("cuda validate: the workspace") {
  Fixture f;
  CHECK(cuda::workspace_bytes(f.good, kHopper) == 0);
  // Large enough to be split along K.
  Rng rng(3);
  const auto packed = cuda::pack(random_matrix({4, 1, 8, 128}, 512, 4096, rng).view());
  REQUIRE(packed.ok());
  f.good.weights = packed->view(address<void>(4096));
  f.good.x = MatrixView<const Half>(address<const Half>(8192), 2, 4096);
  f.good.y = MatrixView<float>(address<float>(65536), 2, 512);
  f.good.tuning.regime = cuda::Regime::kGather;
  const std::size_t bytes = cuda::workspace_bytes(f.good, kAmpere);
  REQUIRE(bytes > 256);
  CHECK(cuda::run(f.good, kAmpere, address<void>(4096), bytes - 1, nullptr).code() ==
        StatusCode::kWorkspaceTooSmall);
  CHECK(cuda::run(f.good, kAmpere, nullptr, bytes, nullptr).code() == StatusCode::kNullPointer);
  CHECK(cuda::run(f.good, kAmpere, address<void>(4096 + 64), bytes, nullptr).code() ==
        StatusCode::kMisaligned);
}

TEST_CASE("cuda pack: what it refuses") {
  Rng rng(2);
  CHECK(cuda::pack(QuantizedMatrixView{{4, 1, 8, 128}, 4, 6, nullptr, nullptr, nullptr}).status().code() ==
        StatusCode::kInvalidArgument);
  CHECK(cuda::pack(QuantizedMatrixView{{4, 1, 8, 128}, 4, 8, nullptr, nullptr, nullptr}).status().code() ==
        StatusCode::kNullPointer);
  CHECK(cuda::packed_layout({8, 1, 16, 128}, (std::int64_t{1} << 30) + 1, 8).status().code() ==
        StatusCode::kUnsupported);
  auto broken = random_matrix({4, 1, 6, 128}, 5, 64, rng);
  broken.codes()[3] = 0x40;
  CHECK(cuda::pack(broken.view()).status().code() == StatusCode::kCorruptData);
}

}  // namespace
}  // namespace codegemm::test
