// SPDX-License-Identifier: Apache-2.0
#include <codegemm/base/aligned_buffer.hpp>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>

#include <support/catch.hpp>

using codegemm::AlignedBuffer;

TEST_CASE("aligned buffer: starts on a cache line, at every size") {
  for (const std::size_t size : {1U, 3U, 63U, 64U, 65U, 4097U}) {
    CAPTURE(size);
    AlignedBuffer<float> buffer;
    REQUIRE(buffer.reserve(size));
    CHECK(buffer.size() == size);
    CHECK(buffer.span().size() == size);
    CHECK(reinterpret_cast<std::uintptr_t>(buffer.data()) % codegemm::kBufferAlignment == 0);
    buffer[size - 1] = 1.5F;
    CHECK(std::as_const(buffer).span().back() == 1.5F);
  }
}

TEST_CASE("aligned buffer: an absurd size is refused and leaves it empty") {
  AlignedBuffer<double> buffer;
  REQUIRE(buffer.reserve(8));
  CHECK_FALSE(buffer.reserve(std::numeric_limits<std::size_t>::max()));  // overflows in bytes
  CHECK(buffer.size() == 0);
  CHECK(buffer.data() == nullptr);
  CHECK(buffer.reserve(0));
  CHECK(buffer.size() == 0);
}

TEST_CASE("aligned buffer: moving takes the memory along") {
  AlignedBuffer<int> first;
  REQUIRE(first.reserve(4));
  first[2] = 7;
  const int* const memory = first.data();
  AlignedBuffer<int> second(std::move(first));
  CHECK(second.data() == memory);
  CHECK(second[2] == 7);
  // NOLINTBEGIN(bugprone-use-after-move,clang-analyzer-cplusplus.Move): what is left is empty
  CHECK(first.size() == 0);
  CHECK(first.data() == nullptr);
  // NOLINTEND(bugprone-use-after-move,clang-analyzer-cplusplus.Move)
  AlignedBuffer<int> third;
  REQUIRE(third.reserve(100));
  third = std::move(second);
  CHECK(third.size() == 4);
  CHECK(third.data() == memory);
}
