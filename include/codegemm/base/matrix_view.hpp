// SPDX-License-Identifier: Apache-2.0
//
// codegemm/base/matrix_view.hpp - a row-major matrix in somebody else's memory.
// Layer: base (host + device, no CUDA headers).
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <codegemm/base/macros.hpp>

namespace codegemm {

/// Element (r, c) is data[r * stride + c]. Owns nothing; may be empty. stride >= cols, in elements.
template <class T>
struct MatrixView {
  T* data = nullptr;        ///< [rows][stride], the first cols of each row are used
  std::int64_t rows = 0;    ///< rows
  std::int64_t cols = 0;    ///< columns
  std::int64_t stride = 0;  ///< elements from one row to the next

  constexpr MatrixView() = default;
  /// Rows that follow each other without a gap.
  CODEGEMM_HOST_DEVICE constexpr MatrixView(T* data_, std::int64_t rows_, std::int64_t cols_)
      : data(data_), rows(rows_), cols(cols_), stride(cols_) {}
  /// Rows that begin `stride_` elements after each other.
  CODEGEMM_HOST_DEVICE constexpr MatrixView(T* data_, std::int64_t rows_, std::int64_t cols_,
                                            std::int64_t stride_)
      : data(data_), rows(rows_), cols(cols_), stride(stride_) {}
  /// A view to read from, out of a view to write to.
  template <class U, class = std::enable_if_t<std::is_same_v<T, const U>>>
  // NOLINTNEXTLINE(google-explicit-constructor): implicit, as T* becomes const T*
  CODEGEMM_HOST_DEVICE constexpr MatrixView(const MatrixView<U>& other)
      : data(other.data), rows(other.rows), cols(other.cols), stride(other.stride) {}

  /// The first element of row r, unchecked.
  [[nodiscard]] CODEGEMM_HOST_DEVICE constexpr T* row(std::int64_t r) const { return data + r * stride; }

  /// Rows [first, first + count).
  [[nodiscard]] CODEGEMM_HOST_DEVICE constexpr MatrixView rows_from(std::int64_t first,
                                                                    std::int64_t count) const {
    return MatrixView(data + first * stride, count, cols, stride);
  }
};
static_assert(std::is_trivially_copyable_v<MatrixView<float>>, "MatrixView is passed to kernels by value");

/// Whether any byte is an element of both: for calls whose output must not lie where their input does.
/// Rows of one may lie between those of the other. Strides are at least the columns.
template <class A, class B>
[[nodiscard]] inline bool overlap(const MatrixView<A>& a, const MatrixView<B>& b) {
  struct Rows {
    std::uintptr_t first, count, bytes, step;
    [[nodiscard]] std::uintptr_t at(std::uintptr_t row) const { return first + row * step; }
    [[nodiscard]] std::uintptr_t end() const { return at(count - 1) + bytes; }
  };
  const auto rows_of = [](const auto& m) {
    return Rows{reinterpret_cast<std::uintptr_t>(m.data), static_cast<std::uintptr_t>(m.rows),
                static_cast<std::uintptr_t>(m.cols) * sizeof(*m.data),
                static_cast<std::uintptr_t>(m.stride) * sizeof(*m.data)};
  };
  if (a.data == nullptr || b.data == nullptr) return false;
  if (a.rows <= 0 || b.rows <= 0 || a.cols <= 0 || b.cols <= 0) return false;
  const Rows x = rows_of(a);
  const Rows y = rows_of(b);
  if (x.end() <= y.first || y.end() <= x.first) return false;
  const Rows& low = x.first <= y.first ? x : y;
  const Rows& high = x.first <= y.first ? y : x;
  if (x.step == y.step && x.step > 0) {  // columns beside each other
    const std::uintptr_t column = (high.first - low.first) % x.step;
    if (column >= low.bytes && column + high.bytes <= x.step) return false;
  }
  for (std::uintptr_t i = 0, j = 0; i < x.count && j < y.count;) {
    if (x.at(i) + x.bytes <= y.at(j)) {
      ++i;
    } else if (y.at(j) + y.bytes <= x.at(i)) {
      ++j;
    } else {
      return true;
    }
  }
  return false;
}

}  // namespace codegemm
