// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/gemm_test.cpp - every configuration, shape, token count, instruction set and way against the
// reference; the same bits for any number of workers; the text of every refusal.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/gemm.hpp>
#include <codegemm/pack.hpp>

#include <codegemm/cpu/permutes_check.hpp>
#include <codegemm/samples.hpp>
#include <support/catch.hpp>
#include <support/random.hpp>

using namespace codegemm;
using codegemm::detail::Regime;
using codegemm::test::Expected;
using codegemm::test::Rng;

namespace {

constexpr std::byte kGuard{0xA5};
constexpr std::size_t kGuardBytes = 256;

// Runs one multiplication with poisoned outputs and guards; returns y[T][N].
std::vector<float> multiply(const PackedMatrix& w, const std::vector<float>& x, std::int64_t tokens,
                            Executor& executor, Isa isa, Regime regime) {
  const std::int64_t stride = w.rows() + 3;
  const float poison = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> y(static_cast<std::size_t>(tokens * stride + 1), poison);
  const auto floats = detail::exact_workspace_floats(w.view(), tokens, executor.workers(), isa, regime);
  const std::size_t bytes = static_cast<std::size_t>(floats) * sizeof(float);
  AlignedBuffer<std::byte> workspace;
  REQUIRE(workspace.reserve(bytes + kGuardBytes));
  std::memset(workspace.data(), 0xFF, bytes);  // NaN: nothing may be read before it is written
  std::memset(workspace.data() + bytes, static_cast<int>(kGuard), kGuardBytes);

  const Status status =
      detail::gemm_with(w, MatrixView<const float>(x.data(), tokens, w.cols()),
                        MatrixView<float>(y.data(), tokens, w.rows(), stride),
                        std::span<std::byte>(workspace.data(), bytes), executor, isa, regime);
  INFO(status.message());
  REQUIRE(status.ok());
  for (std::size_t i = 0; i < kGuardBytes; ++i) REQUIRE(workspace[bytes + i] == kGuard);
  std::vector<float> out;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t n = 0; n < stride; ++n) {
      const float value = y[static_cast<std::size_t>(t * stride + n)];
      if (n < w.rows()) {
        out.push_back(value);
      } else {
        REQUIRE(std::bit_cast<std::uint32_t>(value) == std::bit_cast<std::uint32_t>(poison));
      }
    }
  }
  REQUIRE(std::isnan(y.back()));
  return out;
}

// Fails on NaN, with the place, both values and the bound.
void check_close(const std::vector<float>& got, const Expected& want, std::int64_t rows, double share = 0.5) {
  REQUIRE(got.size() == want.y.size());
  std::size_t bad = 0;
  std::string first;
  double error2 = 0.0;
  double bound2 = 0.0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double error = std::fabs(static_cast<double>(got[i]) - want.y[i]);
    error2 += error * error;
    bound2 += want.bound[i] * want.bound[i];
    if (error <= want.bound[i]) continue;
    if (bad++ == 0) {
      first =
          concat("token ", static_cast<std::int64_t>(i) / rows, " row ", static_cast<std::int64_t>(i) % rows,
                 ": got ", got[i], ", want ", want.y[i], " within ", want.bound[i]);
    }
  }
  INFO(first << "; " << bad << " of " << got.size() << " are off");
  CHECK(bad == 0);
  // Rounding errors do not all point one way: together they stay far inside the bound of each.
  CHECK(std::sqrt(error2) <= share * std::sqrt(bound2));
}

std::vector<Isa> isas() {
  std::vector<Isa> out;
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vbmi, Isa::kNeon}) {
    if (isa_available(isa)) out.push_back(isa);
  }
  return out;
}

void sweep(Format f, std::int64_t rows, std::int64_t cols, const std::vector<std::int64_t>& token_counts,
           std::uint64_t written_seed) {
  constexpr std::int64_t kLookupTokens = 9;
  const std::uint64_t seed = test::seed_or(written_seed);
  Rng rng(seed);
  CAPTURE(seed, format_name(f), rows, cols);
  const QuantizedMatrix w = test::random_quantized(rng, f, rows, cols);
  SerialExecutor serial;
  const std::int64_t most = token_counts.back();
  std::vector<float> x = rng.normals(most * cols);
  x[0] = 100.0F;  // an outlier
  const Expected all = test::expect(w.view(), x, most);
  Expected rounded = all;
  test::add_lookup_rounding(w.view(), x, std::min(most, kLookupTokens), rounded);
  Expected integer = all;
  test::add_integer_rounding(w.view(), x, most, pack(w.view())->view().codebook_step, integer);
  for (const Isa isa : isas()) {
    const Result<PackedMatrix> packed = detail::pack_for(w.view(), isa);
    REQUIRE(packed.ok());
    for (const std::int64_t tokens : token_counts) {
      const std::vector<float> x_used(x.begin(), x.begin() + tokens * cols);
      for (const Regime regime : {Regime::kPsumbook, Regime::kDense, Regime::kLookup, Regime::kInteger}) {
        if (regime == Regime::kLookup && tokens > kLookupTokens) continue;
        Expected want = regime == Regime::kLookup ? rounded : regime == Regime::kInteger ? integer : all;
        want.y.resize(static_cast<std::size_t>(tokens * rows));
        want.bound.resize(static_cast<std::size_t>(tokens * rows));
        CAPTURE(tokens, isa_name(isa), static_cast<int>(regime));
        // One product may be nearly all of a short sum, and rounding it is off by 0.58 of the most it may be.
        const double share = regime == Regime::kInteger ? 0.7 : 0.5;
        check_close(multiply(*packed, x_used, tokens, serial, isa, regime), want, rows, share);
      }
    }
  }
}

const std::vector<std::int64_t> kTokens = {0, 1, 2, 3, 5, 8, 9, 17, 64};

}  // namespace

TEST_CASE("every configuration agrees with the reference at edge shapes and token counts", "[codegemm]") {
  std::uint64_t seed = 1;
  for_each_config(CpuConfigs{}, [&](auto config) {
    constexpr int kV = decltype(config)::kVecLen;
    constexpr int kB = decltype(config)::kCodeBits;
    for (int m = 1; m <= kMaxCodebooks; ++m) {
      // The scale group and the shape go round, so that every one meets every v and m.
      const int groups[] = {-1, kV, 3 * kV, 8 * kV, 32 * kV};
      const std::int64_t row_counts[] = {1, 7, 8, 9, 17, 37};
      const std::int64_t vector_counts[] = {1, 5, 16, 33, 67};
      ++seed;
      sweep(Format{kV, m, kB, groups[seed % 5]}, row_counts[seed % 6], kV * vector_counts[seed / 5 % 5],
            kTokens, seed);
    }
  });
}

TEST_CASE("every scale group and tail agrees with the reference", "[codegemm]") {
  for (const int g : {-1, 4, 12, 32, 64, 68, 128, 1024}) {
    for (const std::int64_t cols : {4, 60, 64, 68, 260, 516}) {
      sweep(Format{4, 1, 8, g}, 19, cols, {1, 3, 8, 14}, 77);
      sweep(Format{4, 3, 6, g}, 8, cols, {1, 4, 13}, 78);
    }
  }
}

TEST_CASE("more rows than share one Psumbook, and K split or not", "[codegemm]") {
  sweep(Format{4, 1, 8, 64}, CpuTiles::kRowChunk + 1, 72, {1, 9}, 5);
  sweep(Format{8, 2, 8, 128}, 2 * CpuTiles::kRowChunk + 15, 136, {1, 2}, 6);
  sweep(Format{4, 1, 4, -1}, 40, 2560, {1, 8, 130}, 7);
  // An odd number of splits, the last one in two parts, or rows in two chunks for one token.
  sweep(Format{4, 1, 8, -1}, 130, 276, {1, 3}, 8);
  // Two tiles of half of K, whose tables fit a first-level cache of 48 KiB.
  sweep(Format{8, 2, 8, 64}, 70, 576, {1, 3}, 10);
  sweep(Format{4, 1, 8, 64}, 576, 576, {1}, 12);
  sweep(Format{4, 2, 4, 64}, CpuTiles::kCutRows4 + 70, 276, {1, 2}, 9);
  sweep(Format{4, 1, 8, 64}, CpuTiles::kCutRows + 70, 276, {1, 2}, 11);
}

TEST_CASE("the result has the same bits for any number of workers", "[codegemm]") {
  const std::uint64_t seed = test::seed_or(9);
  CAPTURE(seed);
  Rng rng(seed);
  for (const Format f :
       {Format{4, 1, 8, 64}, Format{8, 2, 8, 128}, Format{4, 3, 5, -1}, Format{4, 2, 4, 128}}) {
    const std::int64_t rows = 531;
    const std::int64_t cols = 640;
    const QuantizedMatrix w = test::random_quantized(rng, f, rows, cols);
    for (const Isa isa : isas()) {
      const Result<PackedMatrix> packed = detail::pack_for(w.view(), isa);
      REQUIRE(packed.ok());
      for (const std::int64_t tokens : {1, 4, 21, 300}) {
        const std::vector<float> x = rng.normals(tokens * cols);
        for (const Regime regime : {Regime::kAutomatic, Regime::kPsumbook, Regime::kDense, Regime::kLookup,
                                    Regime::kInteger, Regime::kBytes}) {
          CAPTURE(format_name(f), tokens, isa_name(isa), static_cast<int>(regime));
          SerialExecutor serial;
          const std::vector<float> want = multiply(*packed, x, tokens, serial, isa, regime);
          for (const int workers : {1, 2, 3}) {
            ThreadPool pool(workers);
            const std::vector<float> got = multiply(*packed, x, tokens, pool, isa, regime);
            CHECK(std::memcmp(got.data(), want.data(), want.size() * sizeof(float)) == 0);
          }
        }
      }
    }
  }
}

TEST_CASE("the workspace that is asked for serves every smaller number of tokens", "[codegemm]") {
  Rng rng(3);
  for (const std::int64_t rows : {8, 576, 5000}) {
    for (const Format f : {Format{4, 1, 8, 64}, Format{4, 3, 8, 64}, Format{16, 4, 8, -1},
                           Format{2, 1, 4, 16}, Format{4, 2, 6, 64}}) {
      const QuantizedMatrix w = test::random_quantized(rng, f, rows, 64);
      // The plans are the same everywhere; only what they choose among differs.
      for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vbmi, Isa::kNeon}) {
        const Result<PackedMatrix> packed = detail::pack_for(w.view(), isa);
        REQUIRE(packed.ok());
        for (const std::int64_t most : {1, 7, 8, 20, 150, 700}) {
          const std::int64_t asked = detail::workspace_floats(packed->view(), most, 3, isa);
          for (std::int64_t tokens = 0; tokens <= most; ++tokens) {
            REQUIRE(detail::exact_workspace_floats(packed->view(), tokens, 3, isa, Regime::kAutomatic) <=
                    asked);
          }
        }
        CHECK(workspace_bytes(*packed, 20, 3) ==
              sizeof(float) *
                  static_cast<std::size_t>(detail::workspace_floats(packed->view(), 20, 3, detect_isa())));
      }
    }
  }
}

#if CODEGEMM_HAS_AMX

namespace {

void begin_nothing(std::int64_t) {}
void end_nothing() {}

// What AMX's tiles are to do, by the layout that ByteTileArgs describes.
void multiply_bytes_plainly(const detail::ByteTileArgs& a) {
  for (std::int64_t t = 0; t < a.tokens; ++t) {
    for (std::int64_t n = 0; n < a.rows; ++n) {
      float total = 0.0F;
      for (std::int64_t chunk = 0, k = 0; chunk < a.chunks; k = a.chunk_ends[chunk++]) {
        const std::int64_t end = a.chunk_ends[chunk];
        std::int64_t high = 0;
        std::int64_t mixed = 0;
        for (std::int64_t i = k; i < end; ++i) {
          const std::int8_t* const x = a.x + i / 64 * 2048 + t * 64 + i % 64;
          const std::int8_t* const w = a.w + n / 16 * a.panel_bytes + i / 4 * 128 + n % 16 * 4 + i % 4;
          high += x[0] * w[0];
          mixed += x[0] * w[64] + x[1024] * w[0];
        }
        const std::int64_t whole = (high << a.radix_bits) + mixed;
        if (whole != static_cast<std::int32_t>(whole)) FAIL("a chunk's sum does not fit into 32 bits");
        total += static_cast<float>(whole) * a.w_steps[k / 64 * 64 + n] * a.x_steps[k / 64 * 16 + t];
      }
      float& c = a.c[t * a.stride + n];
      c = a.accumulate ? c + total : total;
    }
  }
}

constexpr detail::ByteTileKernels kPlainTiles{&begin_nothing, &multiply_bytes_plainly, &end_nothing};

// gemm() in tiles of bytes that are multiplied plainly.
std::vector<float> multiply_as_bytes(const PackedMatrix& packed, const std::vector<float>& x,
                                     std::int64_t tokens, Executor& executor) {
  const PackedView& w = packed.view();
  const detail::SlabPlan plan = detail::make_byte_plan(w.rows, w.cols, tokens);
  AlignedBuffer<float> workspace;
  REQUIRE(workspace.reserve(static_cast<std::size_t>(plan.floats(executor.workers()))));
  for (float& value : workspace.span()) value = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> y(static_cast<std::size_t>(tokens * w.rows), std::numeric_limits<float>::quiet_NaN());
  const detail::GemmArgs args{w, MatrixView<const float>(x.data(), tokens, w.cols),
                              MatrixView<float>(y.data(), tokens, w.rows), workspace.data()};
  detail::CpuKernels kernels{};
  first_match(
      CpuConfigs{},
      [&](auto config) { return config.kVecLen == w.format.v && config.kCodeBits == w.format.b; },
      [&](auto config) { kernels = detail::cpu_kernels_of<decltype(config)>(Isa::kAvx512Vbmi); });
  detail::run_bytes(kernels, args, executor, kPlainTiles);
  return y;
}

}  // namespace

#endif

namespace {

// |y - reference| / |reference| of one token.
double relative_error(const QuantizedMatrix& w, const std::vector<float>& x, Isa isa, Regime regime) {
  const Result<PackedMatrix> packed = detail::pack_for(w.view(), isa);
  REQUIRE(packed.ok());
  SerialExecutor serial;
#if CODEGEMM_HAS_AMX
  const std::vector<float> y = regime == Regime::kBytes ? multiply_as_bytes(*packed, x, 1, serial)
                                                        : multiply(*packed, x, 1, serial, isa, regime);
#else
  const std::vector<float> y = multiply(*packed, x, 1, serial, isa, regime);
#endif
  const Expected want = test::expect(w.view(), x, 1);
  double off2 = 0.0;
  double size2 = 0.0;
  for (std::size_t i = 0; i < y.size(); ++i) {
    const double off = static_cast<double>(y[i]) - want.y[i];
    off2 += off * off;
    size2 += want.y[i] * want.y[i];
  }
  return std::sqrt(off2 / size2);
}

}  // namespace

TEST_CASE("16-bit tables and products are off by at most 1e-3, whatever the activations", "[codegemm]") {
  const std::uint64_t seed = test::seed_or(21);
  CAPTURE(seed);
  Rng rng(seed);
  const std::int64_t cols = 1024;
  for (const Format f :
       {Format{4, 1, 8, 128}, Format{8, 2, 8, 128}, Format{4, 2, 4, 128}, Format{2, 2, 4, -1},
        Format{2, 1, 6, 128}, Format{4, 2, 5, 32}, Format{4, 2, 7, 128}}) {
    const QuantizedMatrix w = test::random_quantized(rng, f, 300, cols);
    for (int kind = 0; kind < 7; ++kind) {
      std::vector<float> x = rng.normals(cols);
      if (kind == 1) x[500] = 1e4F;  // one outlier that is nearly all of y
      if (kind == 2) {
        for (float& value : x) value *= std::exp(3.0F * rng.normal());
      }
      if (kind == 3) {
        for (std::size_t k = 128; k < x.size(); ++k) x[k] = 0.0F;
      }
      if (kind == 4) {
        for (float& value : x) value *= 1e-18F;  // squares are subnormal
      }
      if (kind == 5) {
        for (float& value : x) value *= 1e-33F;
      }
      if (kind == 6) {
        for (float& value : x) value *= 4e36F;  // their sum is not finite
        x[3] = 0.0F;
      }
      for (const Isa isa : isas()) {
        CAPTURE(format_name(f), kind, isa_name(isa));
        const double error = relative_error(w, x, isa, Regime::kLookup);
        CHECK(error <= 1e-3);
        // 16 bits are used where they are good enough: fp32 would be a thousand times closer.
        if (kind == 0 && detail::lookup_cost(isa, f.b) > 0.0) CHECK(error > 1e-5);
        const double integer_error = relative_error(w, x, isa, Regime::kInteger);
        CHECK(integer_error <= 1e-3);
        if (kind == 0 && has_avx2(isa)) CHECK(integer_error > 1e-5);
      }
#if CODEGEMM_HAS_AMX
      if (!isa_available(Isa::kAvx512Vbmi) || (f.g > 0 && f.g % 64 != 0)) continue;
      const double bytes_error = relative_error(w, x, Isa::kAvx512Vbmi, Regime::kBytes);
      CAPTURE(format_name(f), kind);
      CHECK(bytes_error <= 1e-3);
      if (kind == 0) CHECK(bytes_error > 1e-5);
#endif
    }
    // What is not a number comes through.
    std::vector<float> x = rng.normals(cols);
    x[77] = std::numeric_limits<float>::infinity();
    for (const Isa isa : isas()) {
      const Result<PackedMatrix> packed = detail::pack_for(w.view(), isa);
      REQUIRE(packed.ok());
      SerialExecutor serial;
      for (const Regime regime : {Regime::kLookup, Regime::kInteger}) {
        const std::vector<float> y = multiply(*packed, x, 1, serial, isa, regime);
        CHECK(!std::isfinite(y[200]));
      }
    }
  }
}

TEST_CASE("the largest sum that tables of integers can have fits into 16 bits") {
  // All activations lie along the longest centroid, which is every code.
  for (const Format f :
       {Format{4, 1, 8, 64}, Format{8, 2, 8, 128}, Format{4, 3, 6, -1}, Format{2, 4, 5, 64},
        Format{4, 1, 7, 20}, Format{2, 2, 4, 16}, Format{2, 1, 4, -1}, Format{2, 3, 4, 20}}) {
    CAPTURE(format_name(f));
    Rng rng(test::seed_or(41));
    QuantizedMatrix w = test::random_quantized(rng, f, 70, 640);
    std::fill(w.codes().begin(), w.codes().end(), 0U);
    for (std::size_t i = 0; i < w.codebooks().size(); ++i) {
      const bool first = static_cast<std::int64_t>(i) % (f.centroids() * f.v) < f.v;
      w.codebooks()[i] = Half::from_float(first ? 0.9F : rng.uniform(-0.85F, 0.85F));
    }
    for (const float sign : {1.0F, -1.0F}) {
      const std::vector<float> x(640, sign);
      for (const Isa isa : isas()) {
        CAPTURE(isa_name(isa));
        const Result<PackedMatrix> packed = detail::pack_for(w.view(), isa);
        REQUIRE(packed.ok());
        CHECK((packed->view().codebooks_pairs != nullptr) == detail::makes_integer_tables(isa, f.b));
        CHECK(relative_error(w, x, isa, Regime::kLookup) <= 1e-3);
      }
    }
  }
}

TEST_CASE("a centroid that is far out is looked up in tables that are encoded from fp32") {
  Rng rng(test::seed_or(42));
  const Format f{4, 1, 8, 64};
  QuantizedMatrix w = test::random_quantized(rng, f, 300, 640);
  for (Half& value : w.codebooks()) value = Half::from_float(rng.uniform(-1.0F, 1.0F));
  const QuantizedMatrix without = w;
  w.codebooks()[5] = Half::from_float(60.0F);
  const std::vector<float> x = rng.normals(640);
  for (const Isa isa : isas()) {
    CAPTURE(isa_name(isa));
    CHECK((detail::pack_for(without.view(), isa)->view().codebooks_pairs != nullptr) ==
          detail::makes_integer_tables(isa, f.b));
    CHECK(detail::pack_for(w.view(), isa)->view().codebooks_pairs == nullptr);
    CHECK(relative_error(w, x, isa, Regime::kLookup) <= 1e-3);
  }
}

#if CODEGEMM_HAS_AVX512
TEST_CASE("8-bit codes are looked up the same way with permutes of one register and of two", "[codegemm]") {
  if (!isa_available(Isa::kAvx512Vbmi)) return;  // then avx512_emulated_test does it
  test::check_permutes<detail::Permutes::kTwoRegisters>();
  test::check_permutes<detail::Permutes::kOneRegister>();
}
#endif

#if CODEGEMM_HAS_AMX

namespace {

// |got - want| / |want|, all tokens together.
double relative_difference(const std::vector<float>& got, const std::vector<float>& want) {
  double off2 = 0.0;
  double size2 = 0.0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double off = static_cast<double>(got[i]) - static_cast<double>(want[i]);
    off2 += off * off;
    size2 += static_cast<double>(want[i]) * static_cast<double>(want[i]);
  }
  return std::sqrt(off2 / size2);
}

}  // namespace

TEST_CASE("weights are rebuilt as pairs of bytes by every vector length, code and number of codebooks",
          "[codegemm]") {
  if (!isa_available(Isa::kAvx512Vbmi)) return;
  const std::uint64_t seed = test::seed_or(52);
  CAPTURE(seed);
  Rng rng(seed);
  for (const int v : {2, 4, 8, 16}) {
    for (const int b : {4, 5, 6, 7, 8}) {
      for (const int m : {1, 2, 3, 5, 8}) {
        const Format f{v, m, b, -1};
        CAPTURE(format_name(f));
        const std::int64_t table = f.m * f.centroids() * f.v;
        std::vector<float> codebooks(static_cast<std::size_t>(table));
        for (float& value : codebooks) value = rng.uniform(-1.0F, 1.0F);
        const int bits = detail::byte_radix_bits(m);
        const float step =
            static_cast<float>(m) / static_cast<float>(detail::byte_weight_max(m) - m);  // all may be 1
        AlignedBuffer<std::int8_t> tables;
        REQUIRE(tables.reserve(static_cast<std::size_t>(detail::byte_codebook_bytes(f))));
        detail::fill_byte_codebooks(codebooks.data(), f, step, tables.data());
        const std::int64_t vectors = 64 / v + 2;  // more than are split at once, and no multiple of it
        const std::int64_t columns = vectors * v;
        std::vector<std::uint8_t> codes(static_cast<std::size_t>(vectors * m * detail::code_bytes(b)));
        for (std::uint8_t& byte : codes) byte = static_cast<std::uint8_t>(rng.below(b == 4 ? 256 : 1 << b));
        AlignedBuffer<std::int8_t> panels;
        const std::int64_t panel_bytes = columns * 32 + 64;
        REQUIRE(panels.reserve(static_cast<std::size_t>(4 * panel_bytes)));
        for (std::int8_t& byte : panels.span()) byte = 77;
        detail::RebuildArgs args{};
        args.codes = codes.data();
        args.vectors = vectors;
        args.codebook_count = m;
        args.centroids = f.centroids();
        args.codebooks = tables.data();
        args.out = panels.data();
        args.panel_bytes = panel_bytes;
        first_match(
            CpuConfigs{}, [&](auto config) { return config.kVecLen == v && config.kCodeBits == b; },
            [&](auto config) { detail::cpu_kernels_of<decltype(config)>(Isa::kAvx512Vbmi).rebuild(args); });
        std::int64_t bad = 0;
        for (std::int64_t row = 0; row < 64; ++row) {
          for (std::int64_t k = 0; k < columns; ++k) {
            std::int64_t want = 0;
            for (std::int64_t c = 0; c < m; ++c) {
              const std::int64_t entry = k / v * m + c;
              const std::uint8_t byte =
                  codes[static_cast<std::size_t>(b == 4 ? entry * 32 + row % 32 : entry * 64 + row)];
              const std::int64_t code = b != 4 ? byte : row < 32 ? byte & 15 : byte >> 4;
              want += std::lround(
                  codebooks[static_cast<std::size_t>((c * f.centroids() + code) * v + k % v)] / step);
            }
            const std::int8_t* const got =
                panels.data() + row / 16 * panel_bytes + k / 4 * 128 + row % 16 * 4 + k % 4;
            if ((std::int64_t{got[0]} << bits) + got[64] != want) ++bad;
          }
        }
        CHECK(bad == 0);
        for (std::int64_t panel = 0; panel < 4; ++panel) {
          CHECK(panels[static_cast<std::size_t>((panel + 1) * panel_bytes - 64)] == 77);
        }
      }
    }
  }
}

TEST_CASE("tiles of bytes are off by at most 1e-3 and AMX multiplies them as a plain loop", "[codegemm]") {
  if (!isa_available(Isa::kAvx512Vbmi)) return;
  const std::uint64_t seed = test::seed_or(51);
  CAPTURE(seed, detail::amx_available());
  Rng rng(seed);
  ThreadPool pool(2);
  int done = 0;
  for (const Format f : {Format{4, 1, 8, 64}, Format{8, 2, 8, 128}, Format{4, 2, 4, -1}, Format{4, 3, 4, 128},
                         Format{2, 2, 4, 64}, Format{2, 3, 6, 192}, Format{16, 1, 8, 64}}) {
    for (const std::int64_t rows : {16, 37, 113}) {
      for (const std::int64_t cols : {64, 576, 1216}) {
        const QuantizedMatrix w = test::random_quantized(rng, f, rows, cols);
        const Result<PackedMatrix> packed = detail::pack_for(w.view(), Isa::kAvx512Vbmi);
        REQUIRE(packed.ok());
        if (!detail::suits_bytes(packed->view(), Isa::kAvx512Vbmi)) continue;
        for (const std::int64_t tokens : {1, 9, 16, 35, 260}) {
          CAPTURE(format_name(f), rows, cols, tokens);
          std::vector<float> x = rng.normals(tokens * cols);
          x[3] = 1000.0F;
          const std::vector<float> exact =
              multiply(*packed, x, tokens, pool, Isa::kAvx512Vbmi, Regime::kDense);
          std::vector<float> plain;
          if (tokens <= 35) {  // multiplied plainly, wherever the test runs
            SerialExecutor serial;
            plain = multiply_as_bytes(*packed, x, tokens, serial);
            CHECK(relative_difference(plain, exact) <= 1e-3);
          }
          if (detail::amx_available()) {
            const std::vector<float> got =
                multiply(*packed, x, tokens, pool, Isa::kAvx512Vbmi, Regime::kBytes);
            CHECK(relative_difference(got, exact) <= 1e-3);
            // The compiler may join a product and a sum.
            if (tokens <= 35) CHECK(relative_difference(got, plain) <= 1e-6);
          }
          ++done;
        }
      }
    }
  }
  CHECK(done > 250);
}

#endif

namespace {

// One worker that begins with the last task.
class Backwards final : public Executor {
 public:
  [[nodiscard]] int workers() const noexcept override { return 1; }
  void run(std::int64_t count, Task task, void* context) override {
    while (count > 0) task(context, --count, 0);
  }
};

}  // namespace

TEST_CASE("two splits add their sums up, whoever comes first", "[codegemm]") {
  Rng rng(test::seed_or(43));
  SerialExecutor forwards;
  Backwards backwards;
  ThreadPool pool(2);
  for (const Isa isa : isas()) {
    for (const Format f : {Format{4, 1, 8, 64}, Format{8, 2, 8, 64}, Format{4, 2, 4, 64}}) {
      for (const std::int64_t rows : {1, 64, 65, 200, 576}) {
        CAPTURE(isa_name(isa), format_name(f), rows);
        const QuantizedMatrix w = test::random_quantized(rng, f, rows, 576);
        const PackedMatrix packed = detail::pack_for(w.view(), isa).value();
        const bool lookup = detail::can_look_up(packed.view(), isa);
        CHECK(detail::make_psumbook_plan(packed.view(), 1, lookup).meet == lookup);
        const std::vector<float> x = rng.normals(576);
        const std::vector<float> once = multiply(packed, x, 1, forwards, isa, Regime::kLookup);
        Expected want = test::expect(w.view(), x, 1);
        test::add_lookup_rounding(w.view(), x, 1, want);
        check_close(once, want, rows);
        CHECK(multiply(packed, x, 1, backwards, isa, Regime::kLookup) == once);
        for (int i = 0; i < 50; ++i) {
          REQUIRE(multiply(packed, x, 1, pool, isa, Regime::kLookup) == once);
        }
      }
    }
  }
}

TEST_CASE("codes are asked for ahead, on into the next tile's", "[codegemm]") {
  // 10 blocks, of which 3 are as many bytes as are asked for ahead; the next tile's lie behind a gap.
  std::vector<std::uint8_t> memory(1);
  const std::int64_t stride = detail::ceil_div(CpuTiles::kLookupAheadBytes, 3);
  detail::LookupArgs args{};
  args.codes = memory.data();
  args.stride = stride;
  args.end_block = 10;
  args.next = args.codes;  // nothing follows: back to the first ones
  CHECK(detail::bytes_ahead(args, 0, 1) == 3 * stride);
  CHECK(detail::bytes_ahead(args, 0, 2) == 4 * stride);  // whole pairs of blocks
  CHECK(detail::bytes_ahead(args, 6, 1) == 3 * stride);
  CHECK(detail::bytes_ahead(args, 7, 1) == -7 * stride);
  CHECK(detail::bytes_ahead(args, 9, 1) == -7 * stride);
}

TEST_CASE("gemm takes the automatic way, empty matrices and a caller's own list", "[codegemm]") {
  Rng rng(4);
  SerialExecutor serial;
  AlignedBuffer<std::byte> workspace;

  const Format f{4, 1, 8, 64};
  const QuantizedMatrix w = test::random_quantized(rng, f, 24, 128);
  const Result<PackedMatrix> packed = pack(w.view());
  REQUIRE(packed.ok());
  const std::vector<float> x = rng.normals(384);
  std::vector<float> y(72);
  REQUIRE(workspace.reserve(workspace_bytes(*packed, 3, 1)));
  REQUIRE(gemm(*packed, MatrixView<const float>(x.data(), 3, 128), MatrixView<float>(y.data(), 3, 24),
               workspace.span(), serial)
              .ok());
  Expected want = test::expect(w.view(), x, 3);
  test::add_lookup_rounding(w.view(), x, 3, want);
  check_close(y, want, 24);

  // [guide: cpu_list]
  using Short = config_list<CpuV8B8>;
  const Status refused = gemm<Short>(*packed, MatrixView<const float>(x.data(), 3, 128),
                                     MatrixView<float>(y.data(), 3, 24), workspace.span(), serial);
  CHECK(refused.code() == StatusCode::kUnsupported);
  CHECK(refused.message() == "gemm: no kernel for v = 4, b = 8 in the list of 1 configurations");
  // [guide: end]

  const Result<QuantizedMatrix> no_rows = QuantizedMatrix::create(f, 0, 128);
  const Result<PackedMatrix> packed_no_rows = pack(no_rows->view());
  REQUIRE(packed_no_rows.ok());
  CHECK(workspace_bytes(*packed_no_rows, 3, 1) == 0);
  CHECK(gemm(*packed_no_rows, MatrixView<const float>(x.data(), 3, 128), MatrixView<float>(nullptr, 3, 0), {},
             serial)
            .ok());
  const Result<QuantizedMatrix> no_cols = QuantizedMatrix::create(f, 24, 0);
  const Result<PackedMatrix> packed_no_cols = pack(no_cols->view());
  REQUIRE(packed_no_cols.ok());
  CHECK(gemm(*packed_no_cols, MatrixView<const float>(nullptr, 3, 0), MatrixView<float>(y.data(), 3, 24), {},
             serial)
            .ok());
  for (const float value : y) CHECK(value == 0.0F);
  CHECK(gemm(*packed, MatrixView<const float>(nullptr, 0, 128), MatrixView<float>(nullptr, 0, 24), {}, serial)
            .ok());
  const PackedMatrix empty;
  CHECK(
      gemm(empty, MatrixView<const float>(nullptr, 2, 0), MatrixView<float>(nullptr, 2, 0), {}, serial).ok());
}

TEST_CASE("gemm refuses wrong calls with the numbers and leaves y alone", "[codegemm]") {
  Rng rng(6);
  SerialExecutor serial;
  const QuantizedMatrix w = test::random_quantized(rng, Format{4, 1, 8, 64}, 24, 128);
  const Result<PackedMatrix> made = pack(w.view());
  REQUIRE(made.ok());
  const PackedMatrix& packed = *made;
  const std::vector<float> x = rng.normals(256);
  std::vector<float> y(48, 7.0F);
  AlignedBuffer<std::byte> workspace;
  // What two tokens need, which may be less than one does: workspace_bytes() serves both.
  const auto bytes = sizeof(float) * static_cast<std::size_t>(detail::exact_workspace_floats(
                                         packed.view(), 2, 1, detect_isa(), Regime::kAutomatic));
  REQUIRE(bytes > 0);
  REQUIRE(workspace_bytes(packed, 2, 1) >= bytes);
  REQUIRE(workspace.reserve(bytes + 64));
  const MatrixView<const float> x_ok(x.data(), 2, 128);
  const MatrixView<float> y_ok(y.data(), 2, 24);
  const auto refuse = [&](MatrixView<const float> xv, MatrixView<float> yv, std::span<std::byte> space,
                          StatusCode code, const std::string& text) {
    const Status status = gemm(packed, xv, yv, space, serial);
    CHECK(status.code() == code);
    CHECK(status.message() == text);
    for (const float value : y) CHECK(value == 7.0F);
  };
  const std::span<std::byte> space = workspace.span();
  refuse({nullptr, 2, 128}, y_ok, space, StatusCode::kNullPointer, "gemm: x is null");
  refuse(x_ok, {nullptr, 2, 24}, space, StatusCode::kNullPointer, "gemm: y is null");
  refuse({x.data(), 2, 124}, y_ok, space, StatusCode::kShapeMismatch,
         "gemm: x has 124 columns, the weights have K = 128");
  refuse(x_ok, {y.data(), 2, 23}, space, StatusCode::kShapeMismatch,
         "gemm: y has 23 columns, the weights have N = 24");
  refuse({x.data(), 1, 128}, y_ok, space, StatusCode::kShapeMismatch, "gemm: x has 1 rows (tokens), y has 2");
  refuse({x.data(), -1, 128}, {y.data(), -1, 24}, space, StatusCode::kInvalidArgument,
         "gemm: x has -1 rows, y has -1");
  refuse({x.data(), 2, 128, 127}, y_ok, space, StatusCode::kInvalidArgument,
         "gemm: x has stride 127, below its 128 columns");
  refuse(x_ok, {y.data(), 2, 24, 20}, space, StatusCode::kInvalidArgument,
         "gemm: y has stride 20, below its 24 columns");
  std::vector<float> both(2 * 152, 7.0F);
  CHECK(gemm(packed, MatrixView<const float>(both.data(), 2, 128, 152),
             MatrixView<float>(both.data() + 127, 2, 24, 152), space, serial)
            .message() == "gemm: y overlaps x");
  CHECK(both == std::vector<float>(2 * 152, 7.0F));
  CHECK(gemm(packed, MatrixView<const float>(both.data(), 2, 128, 152),
             MatrixView<float>(both.data() + 128, 2, 24, 152), space, serial)
            .ok());  // columns beside each other
  refuse(x_ok, y_ok, space.first(bytes - 1), StatusCode::kWorkspaceTooSmall,
         concat("gemm: workspace has ", bytes - 1, " bytes, 2 tokens on 1 workers need ", bytes));
  refuse(x_ok, y_ok, {}, StatusCode::kWorkspaceTooSmall,
         concat("gemm: workspace has 0 bytes, 2 tokens on 1 workers need ", bytes));
  refuse(x_ok, y_ok, space.subspan(4), StatusCode::kMisaligned,
         "gemm: workspace is 4 bytes beyond a multiple of 64");
}
