// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/pack_test.cpp - the canonical layout, its checks, and packing there and back.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <Eigen/Dense>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/base/weight_arena.hpp>
#include <codegemm/pack.hpp>
#include <codegemm/reference.hpp>

#include <codegemm/samples.hpp>
#include <support/catch.hpp>
#include <support/random.hpp>

using namespace codegemm;
using codegemm::test::Rng;

namespace {

template <class T>
bool same(std::span<const T> a, std::span<const T> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

}  // namespace

TEST_CASE("codes, codebooks and scales lie where the canonical layout says", "[codegemm]") {
  // v = 2, m = 2, K = 10: five vectors, in two words of four codes; N = 3.
  Result<QuantizedMatrix> made = QuantizedMatrix::create(Format{2, 2, 8, 4}, 3, 10);
  REQUIRE(made.ok());
  QuantizedMatrix& w = *made;
  REQUIRE(w.codes().size() == 12);
  REQUIRE(w.codebooks().size() == 1024);
  REQUIRE(w.scales().size() == 9);
  w.set_code(1, 2, 4, 0xAB);  // codebook 1, row 2, vector 4: word 1, lowest byte
  CHECK(w.codes()[(1 * 2 + 1) * 3 + 2] == 0xABU);
  w.set_code(0, 1, 2, 0xCD);  // third byte of word 0
  CHECK(w.codes()[1] == 0xCD0000U);
  w.set_code(0, 1, 2, 0x01);
  CHECK(w.codes()[1] == 0x010000U);
  CHECK(w.view().code(1, 2, 4) == 0xABU);

  w.codebooks()[(1 * 256 + 0xAB) * 2 + 1] = Half::from_float(0.5F);
  w.codebooks()[(0 * 256 + 0) * 2 + 1] = Half::from_float(0.25F);
  w.scales()[2 * 3 + 2] = Half::from_float(4.0F);  // k = 8, 9 are in group 2
  CHECK(reference_weight(w.view(), 2, 9) == 4.0 * (0.5 + 0.25));
  CHECK(reference_weight(w.view(), 2, 7) == 0.0);

  Result<QuantizedMatrix> wide = QuantizedMatrix::create(Format{4, 1, 12, -1}, 2, 12);
  REQUIRE(wide.ok());
  REQUIRE(wide->codes().size() == 4);  // three vectors, two codes a word
  wide->set_code(0, 1, 1, 0xFFF);
  CHECK(wide->codes()[1] == 0x0FFF0000U);
  CHECK(wide->scales().size() == 2);
}

TEST_CASE("the reference is the product with the dequantized matrix", "[codegemm]") {
  const std::uint64_t seed = test::seed_or(11);
  CAPTURE(seed);
  Rng rng(seed);
  using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  for (const Format f :
       {Format{4, 1, 8, 32}, Format{8, 3, 6, -1}, Format{2, 4, 12, 10}, Format{16, 2, 16, 48}}) {
    const QuantizedMatrix w = test::random_quantized(rng, f, 21, 80);
    Matrix dense(21, 80);
    reference_dequantize(w.view(), MatrixView<double>(dense.data(), 21, 80));
    Matrix x(5, 80);
    for (double& value : x.reshaped()) value = static_cast<double>(rng.normal());
    Matrix y = Matrix::Constant(5, 21, std::numeric_limits<double>::quiet_NaN());
    reference_gemm(w.view(), MatrixView<const double>(x.data(), 5, 80), MatrixView<double>(y.data(), 5, 21));
    const Matrix want = x * dense.transpose();
    CHECK((y - want).norm() <= 1e-13 * want.norm());
  }
}

namespace {

// Bytes of the codebooks that only some processors' kernels take: in bytes, and in pairs of 16-bit integers.
std::size_t more_codebooks(const QuantizedMatrix& w) {
  const PackedMatrix packed = pack(w.view()).value();
  std::size_t out = 0;
  if (packed.view().codebooks_bytes != nullptr) {  // in whole cache lines
    out += (static_cast<std::size_t>(detail::byte_codebook_bytes(w.format())) + 63) / 64 * 64;
  }
  if (packed.view().codebooks_pairs != nullptr) out += w.codebooks().size() * sizeof(std::int16_t);
  return out;
}

}  // namespace

TEST_CASE("packing there and back changes nothing", "[codegemm]") {
  const std::uint64_t seed = test::seed_or(12);
  CAPTURE(seed);
  Rng rng(seed);
  for (const int v : {2, 4, 8, 16}) {
    for (const int m : {1, 2, 3, 4}) {
      for (const int b : {4, 5, 6, 7, 8}) {
        for (const int g : {-1, v, 5 * v}) {
          const Format f{v, m, b, g};
          const std::int64_t rows = 1 + rng.below(140);
          const std::int64_t cols = v * (1 + rng.below(90));
          CAPTURE(format_name(f), rows, cols);
          const QuantizedMatrix w = test::random_quantized(rng, f, rows, cols);
          // The layouts of two instruction sets: rows in blocks of 64 for all formats, or only with 4 bits.
          for (const Isa isa : {Isa::kAvx512Vbmi, Isa::kPortable}) {
            Result<PackedMatrix> packed = detail::pack_for(w.view(), isa);
            REQUIRE(packed.ok());
            CHECK(packed->rows() == rows);
            CHECK(packed->cols() == cols);
            CHECK(packed->format() == f);
            CHECK(packed->view().block_rows == (isa == Isa::kAvx512Vbmi || b == 4 ? 64 : 8));
            const PackedMatrix moved = std::move(*packed);
            const Result<QuantizedMatrix> back = unpack(moved);
            REQUIRE(back.ok());
            REQUIRE(same<std::uint32_t>(back->codes(), w.codes()));
            REQUIRE(same<Half>(back->codebooks(), w.codebooks()));
            REQUIRE(same<Half>(back->scales(), w.scales()));
          }
        }
      }
    }
  }
  // 2 bits a weight, plus scales, plus codebooks: two in fp32 and one rounded.
  const QuantizedMatrix w = test::random_quantized(rng, Format{4, 1, 8, 64}, 64, 256);
  CHECK(pack(w.view())->bytes() == 4096U + 512U + 8192U + 2048U + more_codebooks(w));
  // 4-bit codes take 4 bits: 1 bit a weight, plus scales, plus codebooks: two in fp32 and one rounded.
  const QuantizedMatrix nibbles = test::random_quantized(rng, Format{4, 1, 4, 64}, 64, 256);
  CHECK(pack(nibbles.view())->bytes() == 2048U + 512U + 512U + 128U + more_codebooks(nibbles));
}

TEST_CASE("matrices of an arena lie side by side and outlive it", "[codegemm]") {
  Rng rng(test::seed_or(13));
  std::vector<QuantizedMatrix> matrices;
  for (int i = 0; i < 40; ++i) {
    matrices.push_back(test::random_quantized(rng, Format{4, 2, 8, 64}, 1 + rng.below(300), 640));
  }
  std::vector<PackedMatrix> packed(matrices.size());
  {
    WeightArena arena;
    for (std::size_t i = 0; i < matrices.size() / 2; ++i) packed[i] = pack(matrices[i].view(), arena).value();
    ThreadPool pool(3);
    parallel_for(pool, static_cast<std::int64_t>(matrices.size() / 2), [&](std::int64_t task, int) {
      const std::size_t i = matrices.size() / 2 + static_cast<std::size_t>(task);
      packed[i] = pack(matrices[i].view(), arena).value();
    });
  }
  for (std::size_t i = 0; i < packed.size(); ++i) {
    const PackedView& view = packed[i].view();
    CHECK(reinterpret_cast<std::uintptr_t>(view.codes) % 64 == 0);
    CHECK(reinterpret_cast<std::uintptr_t>(view.scales) % 64 == 0);
    if (i + 1 < packed.size() / 2) {  // packed one after another: each ends where the next begins
      const auto apart = reinterpret_cast<std::uintptr_t>(packed[i + 1].view().scales) -
                         reinterpret_cast<std::uintptr_t>(view.scales);
      CHECK(apart == packed[i].bytes());
    }
    packed[i] = PackedMatrix(std::move(packed[i]));
    const Result<QuantizedMatrix> back = unpack(packed[i]);
    REQUIRE(back.ok());
    REQUIRE(same<std::uint32_t>(back->codes(), matrices[i].codes()));
    REQUIRE(same<Half>(back->codebooks(), matrices[i].codebooks()));
    REQUIRE(same<Half>(back->scales(), matrices[i].scales()));
    packed[i] = PackedMatrix();  // the others' memory stays
  }
}

TEST_CASE("an arena takes chunks and leaves what is large alone", "[codegemm]") {
  WeightArena arena;
  const std::shared_ptr<std::byte> first = arena.allocate(1);
  const std::shared_ptr<std::byte> second = arena.allocate(65);
  const std::shared_ptr<std::byte> large = arena.allocate(detail::kHugeFrom);
  const std::shared_ptr<std::byte> third = arena.allocate(1);
  CHECK(second.get() - first.get() == 64);
  CHECK(third.get() - second.get() == 128);
  CHECK(reinterpret_cast<std::uintptr_t>(first.get()) % detail::kHugePage == 0);
  CHECK(reinterpret_cast<std::uintptr_t>(large.get()) % detail::kHugePage == 0);
  // 6 of nearly 3 MiB do not fit into the 16 MiB behind them; the next chunk begins on a huge page, too.
  std::vector<std::shared_ptr<std::byte>> more;
  for (int i = 0; i < 6; ++i) more.push_back(arena.allocate(3 << 20));
  CHECK(more[4].get() - more[0].get() == 4 * (3 << 20));
  CHECK(reinterpret_cast<std::uintptr_t>(more[5].get()) % detail::kHugePage == 0);
  *more[5] = std::byte{1};
  *first = std::byte{2};
}

TEST_CASE("empty matrices are packed and unpacked", "[codegemm]") {
  for (const auto& [rows, cols] : {std::pair<std::int64_t, std::int64_t>{0, 64}, {8, 0}, {0, 0}}) {
    const Result<QuantizedMatrix> w = QuantizedMatrix::create(Format{4, 2, 8, 32}, rows, cols);
    REQUIRE(w.ok());
    const Result<PackedMatrix> packed = pack(w->view());
    REQUIRE(packed.ok());
    const Result<QuantizedMatrix> back = unpack(*packed);
    REQUIRE(back.ok());
    CHECK(back->rows() == rows);
    CHECK(back->cols() == cols);
  }
}

TEST_CASE("shapes and formats that cannot be are refused before anything is allocated", "[codegemm]") {
  const Format f{4, 1, 8, 128};
  const auto text = [](const auto& result) { return result.status().message(); };
  CHECK(text(QuantizedMatrix::create(f, 8, 6)) == "quantized matrix: K = 6 is not a multiple of v = 4");
  CHECK(text(QuantizedMatrix::create(f, -1, 8)) == "quantized matrix: shape -1 x 8 is negative");
  CHECK(text(QuantizedMatrix::create(Format{5, 1, 8, 128}, 8, 8)) == "format: v = 5 is not 2, 4, 8 or 16");
  constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();
  for (const auto& [rows, cols] : {std::pair<std::int64_t, std::int64_t>{kHuge, kHuge - 3},
                                   {kHuge, 4},
                                   {std::int64_t{1} << 33, std::int64_t{1} << 33}}) {
    const auto huge = QuantizedMatrix::create(f, rows, cols);
    CHECK(huge.status().code() == StatusCode::kInvalidArgument);
    CHECK(text(huge) == concat("quantized matrix: shape ", rows, " x ", cols, " is too large"));
  }
}

TEST_CASE("pack refuses what no CPU kernel can serve and says where", "[codegemm]") {
  Rng rng(13);
  QuantizedMatrix w = test::random_quantized(rng, Format{4, 2, 6, 8}, 9, 24);
  QuantizedMatrixView view = w.view();
  CHECK(pack(view).ok());
  view.codes = nullptr;
  CHECK(pack(view).status().message() == "quantized matrix: codes is null");
  view = w.view();
  view.codebooks = nullptr;
  CHECK(pack(view).status().code() == StatusCode::kNullPointer);
  view = w.view();
  view.scales = nullptr;
  CHECK(pack(view).status().message() == "quantized matrix: scales is null");

  const QuantizedMatrix wide = test::random_quantized(rng, Format{4, 1, 12, -1}, 4, 16);
  CHECK(wide.validate().ok());
  CHECK(pack(wide.view()).status().code() == StatusCode::kUnsupported);
  CHECK(pack(wide.view()).status().message() ==
        "pack: format m1v4b12g-1 has b = 12 bits a code; the CPU kernels serve b = 4..8");

  // A code of 2^b or more, as a file might have it: codebook 1, row 3, vector 5.
  std::uint32_t& word = w.codes()[static_cast<std::size_t>((1 * 2 + 1) * 9 + 3)];
  const std::uint32_t kept = word;
  word = (word & ~0xFF00U) | (64U << 8);
  CHECK(w.validate().code() == StatusCode::kCorruptData);
  CHECK(w.validate().message() ==
        "quantized matrix: code 64 of codebook 1, row 3, vector 5 is not below 2^6");
  CHECK(pack(w.view()).status().code() == StatusCode::kCorruptData);
  word = kept;

  Half& value = w.codebooks()[(64 + 7) * 4 + 2];
  value = Half{0x7C00};  // infinity
  CHECK(pack(w.view()).status().message() == "pack: codebook 1, centroid 7, element 2 is not finite");
  value = Half{};
  w.scales()[2 * 9 + 5] = Half{0x7E00};  // NaN
  CHECK(pack(w.view()).status().message() == "pack: scale of row 5, group 2 is not finite");
}
