// SPDX-License-Identifier: Apache-2.0
#include <codegemm/base/matrix_view.hpp>

#include <type_traits>
#include <vector>

#include <support/catch.hpp>
#include <support/random.hpp>

using codegemm::MatrixView;
using codegemm::overlap;

TEST_CASE("matrix view: the default is empty") {
  const MatrixView<float> view;
  CHECK(view.data == nullptr);
  CHECK(view.rows == 0);
  CHECK(view.cols == 0);
  CHECK(view.stride == 0);
}

TEST_CASE("matrix view: rows are a stride apart") {
  std::vector<int> numbers(20);
  for (int i = 0; i < 20; ++i) numbers[static_cast<std::size_t>(i)] = i;

  const MatrixView<int> dense(numbers.data(), 4, 5);
  CHECK(dense.stride == 5);
  CHECK(dense.row(3)[4] == 19);

  const MatrixView<int> strided(numbers.data(), 3, 4, 6);
  CHECK(strided.row(2)[3] == 15);
  strided.row(1)[0] = -1;
  CHECK(numbers[6] == -1);
}

TEST_CASE("matrix view: a block of rows keeps columns and stride") {
  std::vector<int> numbers(30);
  const MatrixView<int> view(numbers.data(), 5, 4, 6);
  const MatrixView<int> block = view.rows_from(2, 3);
  CHECK(block.data == numbers.data() + 12);
  CHECK(block.rows == 3);
  CHECK(block.cols == 4);
  CHECK(block.stride == 6);
  CHECK(block.row(2) == view.row(4));
  CHECK(view.rows_from(5, 0).rows == 0);
}

TEST_CASE("matrix view: to read from converts one way only") {
  static_assert(std::is_convertible_v<MatrixView<float>, MatrixView<const float>>);
  static_assert(!std::is_convertible_v<MatrixView<const float>, MatrixView<float>>);
  static_assert(!std::is_convertible_v<MatrixView<float>, MatrixView<const double>>);
  float number = 3.0F;
  const MatrixView<const float> readable = MatrixView<float>(&number, 1, 1, 8);
  CHECK(readable.data == &number);
  CHECK(readable.stride == 8);
}

TEST_CASE("matrix view: whether two overlap is what a set of their bytes says") {
  codegemm::test::Rng rng(codegemm::test::seed_or(1));
  alignas(8) std::vector<float> memory(64);
  int meet = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    const auto view = [&](auto* first, std::int64_t most) {
      const std::int64_t rows = rng.below(4);
      const std::int64_t cols = rng.below(6);
      // Often the same stride, as columns of one matrix have.
      const std::int64_t stride = rng.below(2) == 0 ? 8 : cols + rng.below(8);
      return MatrixView(first + rng.below(most - 3 * 13), rows, cols, stride);
    };
    const auto a = view(memory.data(), 64);
    const auto b = view(reinterpret_cast<const std::uint16_t*>(memory.data()), 128);
    std::vector<int> owners(memory.size() * sizeof(float), 0);
    const auto mark = [&](const auto& m, int owner) {
      for (std::int64_t r = 0; r < m.rows; ++r) {
        const auto at =
            reinterpret_cast<const char*>(m.row(r)) - reinterpret_cast<const char*>(memory.data());
        for (std::size_t i = 0; i < static_cast<std::size_t>(m.cols) * sizeof(*m.data); ++i)
          owners[static_cast<std::size_t>(at) + i] |= owner;
      }
    };
    mark(a, 1);
    mark(b, 2);
    bool both = false;
    for (const int owner : owners) both = both || owner == 3;
    CAPTURE(trial, a.rows, a.cols, a.stride, b.rows, b.cols, b.stride);
    REQUIRE(overlap(a, b) == both);
    REQUIRE(overlap(b, a) == both);
    meet += both ? 1 : 0;
  }
  CHECK(meet > 2000);
  CHECK(meet < 18000);
  CHECK_FALSE(overlap(MatrixView<float>(nullptr, 3, 3), MatrixView<float>(nullptr, 3, 3)));
}
