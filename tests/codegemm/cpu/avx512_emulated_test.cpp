// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cpu/avx512_emulated_test.cpp - the AVX-512 kernels on a processor without AVX-512: SIMDe
// (Debian package libsimde-dev) computes each intrinsic in AVX2. Skipped where it is not installed.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include <support/catch.hpp>

#if defined(__AVX2__) && defined(__F16C__) && !defined(__AVX512F__) && __has_include(<simde/x86/avx512.h>)
#define CODEGEMM_EMULATE_AVX512 1

#include <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

// What SIMDe 0.7.4 lacks.
namespace emulated {

template <class To, class From, class Fn>
To each(From from, Fn fn) {
  To to;
  for (std::size_t i = 0; i < sizeof(to) / sizeof(fn(from, i)); ++i) {
    const auto value = fn(from, i);
    __builtin_memcpy(reinterpret_cast<char*>(&to) + i * sizeof(value), &value, sizeof(value));
  }
  return to;
}

template <class T, class V>
T lane(const V& v, std::size_t i) {
  T value;
  __builtin_memcpy(&value, reinterpret_cast<const char*>(&v) + i * sizeof(T), sizeof(T));
  return value;
}

inline simde__m512i cvtps_epi32(simde__m512 v) {
  return each<simde__m512i>(v, [](const auto& f, std::size_t i) {
    return static_cast<std::int32_t>(std::nearbyint(lane<float>(f, i)));
  });
}
inline simde__m512 cvtepi32_ps(simde__m512i v) {
  return each<simde__m512>(
      v, [](const auto& f, std::size_t i) { return static_cast<float>(lane<std::int32_t>(f, i)); });
}
inline simde__m512i cvtepi16_epi32(__m256i v) {
  return each<simde__m512i>(
      v, [](const auto& f, std::size_t i) { return static_cast<std::int32_t>(lane<std::int16_t>(f, i)); });
}
inline simde__m512i cvtepu8_epi16(__m256i v) {
  return each<simde__m512i>(
      v, [](const auto& f, std::size_t i) { return static_cast<std::uint16_t>(lane<std::uint8_t>(f, i)); });
}
inline simde__m512 cvtph_ps(__m256i v) {
  return each<simde__m512>(v,
                           [](const auto& f, std::size_t i) { return _cvtsh_ss(lane<std::uint16_t>(f, i)); });
}

inline __m128i cvtepi16_epi8(__m256i v) {
  return each<__m128i>(v, [](const auto& f, std::size_t i) {
    return static_cast<std::uint8_t>(lane<std::uint16_t>(f, i) & 255U);
  });
}

inline simde__m512i madd_epi16(simde__m512i a, simde__m512i b) {
  return each<simde__m512i>(a, [&b](const auto& v, std::size_t i) {
    const auto product = [&](std::size_t j) {
      return static_cast<std::uint32_t>(lane<std::int16_t>(v, j) * lane<std::int16_t>(b, j));
    };
    return product(2 * i) + product(2 * i + 1);
  });
}

struct Quarter {
  float lanes[4];
};
template <class V>
V shuffle_quarters(V a, V b, int order) {
  return each<V>(a, [&b, order](const auto& v, std::size_t i) {
    const auto from = static_cast<std::size_t>(order >> (2 * i) & 3);
    return i < 2 ? lane<Quarter>(v, from) : lane<Quarter>(b, from);
  });
}

}  // namespace emulated

// NOLINTBEGIN(bugprone-reserved-identifier): they stand in for the compiler's own
#undef _mm512_madd_epi16  // SIMDe's has too many arguments
#define _mm512_madd_epi16(a, b) emulated::madd_epi16(a, b)
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4(a, b, order) emulated::shuffle_quarters(a, b, order)
#define _mm512_shuffle_i64x2(a, b, order) emulated::shuffle_quarters(a, b, order)
#define _mm512_cvtps_epi32(v) emulated::cvtps_epi32(v)
#define _mm512_cvtepi32_ps(v) emulated::cvtepi32_ps(v)
#define _mm512_cvtepi16_epi32(v) emulated::cvtepi16_epi32(v)
#define _mm512_cvtepu8_epi16(v) emulated::cvtepu8_epi16(v)
#define _mm256_cvtepi16_epi8(v) emulated::cvtepi16_epi8(v)
#define _mm512_cvtph_ps(v) emulated::cvtph_ps(v)
// NOLINTEND(bugprone-reserved-identifier)

#include <codegemm/cpu/few_tokens.hpp>
#include <codegemm/cpu/kernels.hpp>
#include <codegemm/cpu/plan.hpp>
#include <codegemm/pack.hpp>

#include <codegemm/cpu/permutes_check.hpp>
#include <codegemm/samples.hpp>
#include <support/random.hpp>

using namespace codegemm;

namespace {

// y[T][N] by the kernels of kIsa, whatever the processor has.
template <Isa kIsa, class Config>
std::vector<float> look_up(const QuantizedMatrix& w, const std::vector<float>& x, std::int64_t tokens) {
  const Result<PackedMatrix> packed = detail::pack_for(w.view(), kIsa);
  REQUIRE(packed.ok());
  SerialExecutor serial;
  const detail::PsumbookPlan plan = detail::make_psumbook_plan(packed->view(), tokens, true);
  AlignedBuffer<float> workspace;
  REQUIRE(workspace.reserve(static_cast<std::size_t>(plan.partial_floats() + plan.worker_floats())));
  for (float& value : workspace.span()) value = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> y(static_cast<std::size_t>(tokens * w.rows()), std::numeric_limits<float>::quiet_NaN());
  const detail::GemmArgs args{packed->view(), MatrixView<const float>(x.data(), tokens, w.cols()),
                              MatrixView<float>(y.data(), tokens, w.rows()), workspace.data()};
  detail::run_psumbook(detail::cpu_kernels<kIsa, Config>(), args, plan, serial);
  return y;
}

template <Isa kIsa, class Config>
void check(std::int64_t rows, std::int64_t vectors, int m, int g, std::int64_t tokens) {
  const std::uint64_t seed = test::seed_or(31);
  const Format f{Config::kVecLen, m, Config::kCodeBits, g};
  CAPTURE(seed, isa_name(kIsa), format_name(f), rows, vectors, tokens);
  test::Rng rng(seed);
  const QuantizedMatrix w = test::random_quantized(rng, f, rows, vectors * f.v);
  const std::vector<float> x = rng.normals(tokens * w.cols());
  test::Expected want = test::expect(w.view(), x, tokens);
  test::add_lookup_rounding(w.view(), x, tokens, want);
  const std::vector<float> y = look_up<kIsa, Config>(w, x, tokens);
  double off2 = 0.0;
  double size2 = 0.0;
  for (std::size_t i = 0; i < y.size(); ++i) {
    const double off = static_cast<double>(y[i]) - want.y[i];
    CAPTURE(i, y[i], want.y[i]);
    REQUIRE(std::fabs(off) <= want.bound[i]);
    off2 += off * off;
    size2 += want.y[i] * want.y[i];
  }
  if (rows >= 64) {
    CHECK(off2 <= 1e-6 * size2);
    CHECK(off2 > 1e-12 * size2);  // 16 bits it was
  }
}

}  // namespace

TEST_CASE("AVX-512 lookups agree with the reference, emulated", "[codegemm]") {
  for_each_config(CpuConfigs{}, [](auto config) {
    using Config = decltype(config);
    check<Isa::kAvx512Vbmi, Config>(65, 37, 1, -1, 1);
    check<Isa::kAvx512Vbmi, Config>(130, 96, 2, 8 * Config::kVecLen, 2);
    check<Isa::kAvx512, Config>(65, 37, 1, -1, 1);
    check<Isa::kAvx512, Config>(130, 96, 2, 8 * Config::kVecLen, 2);
  });
}

TEST_CASE("8-bit codes are looked up the same way with permutes of one register and of two, emulated",
          "[codegemm]") {
  test::check_permutes<detail::Permutes::kTwoRegisters>();
  test::check_permutes<detail::Permutes::kOneRegister>();
}

TEST_CASE("AVX-512 integer tiles give the bits of AVX2's, emulated", "[codegemm]") {
  const std::uint64_t seed = test::seed_or(32);
  CAPTURE(seed);
  test::Rng rng(seed);
  const auto draw = [&](std::int64_t most) {
    return static_cast<std::int32_t>(
        static_cast<std::int64_t>(rng.next() % static_cast<std::uint64_t>(2 * most + 1)) - most);
  };
  const auto pair = [&](std::int64_t most) {
    return static_cast<std::int32_t>((static_cast<std::uint32_t>(draw(most)) & 0xFFFFU) |
                                     static_cast<std::uint32_t>(draw(most)) << 16U);
  };
  for (const std::int64_t depth : {2, 32, 70, 512}) {
    for (const std::int64_t group : {-1, 32, 96, 128}) {
      CAPTURE(depth, group);
      constexpr std::int64_t kStride = 19;
      const auto units = static_cast<std::size_t>(depth / CpuTiles::kIntegerUnit + 1);
      std::vector<std::int32_t> x(static_cast<std::size_t>(depth / 2 * 6));
      AlignedBuffer<std::int32_t> w;
      REQUIRE(w.reserve(static_cast<std::size_t>(depth / 2 * 16)));
      for (std::int32_t& value : x) value = pair(2000);  // as large as the sums of a chunk may be
      for (std::int32_t& value : w.span()) value = pair(8191);
      const std::vector<float> x_steps = rng.normals(static_cast<std::int64_t>(units * 6));
      const std::vector<float> w_steps = rng.normals(static_cast<std::int64_t>(units * 16));
      for (const bool accumulate : {false, true}) {
        const std::vector<float> before = rng.normals(6 * kStride);
        const auto multiply = [&](auto kernel) {
          std::vector<float> c = before;
          kernel({x.data(), w.data(), x_steps.data(), w_steps.data(), 16, 512, depth, group, c.data(),
                  kStride, accumulate});
          return c;
        };
        const std::vector<float> want = multiply(&detail::multiply_pairs_avx2);
        REQUIRE(want != before);
        CHECK(multiply(&detail::multiply_pairs_avx512<&detail::sum_chunk_avx512>) == want);
        CHECK(multiply(&detail::multiply_pairs_avx512<&detail::sum_chunk_vnni>) == want);
      }
    }
  }
}

#elif defined(__AVX512F__)

TEST_CASE("AVX-512 lookups agree with the reference, emulated", "[codegemm]") {
  TEST_SKIP("this machine may have AVX-512: gemm_test runs the kernels themselves");
}

#else

TEST_CASE("AVX-512 lookups agree with the reference, emulated", "[codegemm]") {
  TEST_SKIP("needs a build for AVX2 and SIMDe (Debian package libsimde-dev)");
}

#endif
