// SPDX-License-Identifier: Apache-2.0
#include <codegemm/base/matrix_view.hpp>

#include <type_traits>
#include <vector>

#include <support/catch.hpp>

using codegemm::MatrixView;

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
