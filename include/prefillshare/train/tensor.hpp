// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/tensor.hpp - owned, aligned arrays of activations and parameters, and loops over them
// that give the same bits for any number of workers.
// Layer: train (host only).
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <new>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <Eigen/Core>

#include <codegemm/base/aligned_buffer.hpp>
#include <prefillshare/vocabulary.hpp>

namespace prefillshare {

/// What the training core computes in: float, or double to check gradients.
template <class T>
concept TrainScalar = std::same_as<T, float> || std::same_as<T, double>;

namespace detail {

/// Memory that begins on a cache line.
template <class T>
struct AlignedAllocator {
  using value_type = T;
  AlignedAllocator() = default;
  template <class U>
  explicit AlignedAllocator(const AlignedAllocator<U>& /*other*/) noexcept {}
  [[nodiscard]] T* allocate(std::size_t count) {
    return static_cast<T*>(::operator new (count * sizeof(T), std::align_val_t{codegemm::kBufferAlignment}));
  }
  void deallocate(T* memory, std::size_t /*count*/) noexcept {
    ::operator delete (memory, std::align_val_t{codegemm::kBufferAlignment});
  }
  friend bool operator==(const AlignedAllocator&, const AlignedAllocator&) noexcept { return true; }
};

}  // namespace detail

/// `size()` values, zero at first, on a cache line, so that vector code takes the same elements on every run.
/// Inside of the training core memory that is short is std::bad_alloc; its entry points make kOutOfMemory of
/// it.
template <TrainScalar T>
class Tensor {
 public:
  Tensor() = default;
  /// So many zeros.
  explicit Tensor(std::int64_t size) { resize(size); }

  /// Loses the old values.
  void resize(std::int64_t size) { values_ = Values(static_cast<std::size_t>(size), T{0}); }
  void zero() noexcept { std::fill(values_.begin(), values_.end(), T{0}); }  ///< sets all values to 0

  /// values.
  [[nodiscard]] std::int64_t size() const noexcept { return static_cast<std::int64_t>(values_.size()); }
  [[nodiscard]] bool empty() const noexcept { return values_.empty(); }  ///< no values
  /// The first value; the memory is the tensor's.
  [[nodiscard]] T* data() noexcept { return values_.data(); }
  [[nodiscard]] const T* data() const noexcept { return values_.data(); }     ///< the same, to read from
  [[nodiscard]] std::span<T> span() noexcept { return values_; }              ///< all values
  [[nodiscard]] std::span<const T> span() const noexcept { return values_; }  ///< all values, to read from
  /// Value i, unchecked.
  [[nodiscard]] T& operator[](std::int64_t i) noexcept { return values_[static_cast<std::size_t>(i)]; }
  /// Value i, unchecked.
  [[nodiscard]] const T& operator[](std::int64_t i) const noexcept {
    return values_[static_cast<std::size_t>(i)];
  }
  /// The first values as [count][width].
  [[nodiscard]] MatrixView<T> rows(std::int64_t count, std::int64_t width) noexcept {
    return MatrixView<T>(data(), count, width);
  }
  /// The first values as [count][width], to read from.
  [[nodiscard]] MatrixView<const T> rows(std::int64_t count, std::int64_t width) const noexcept {
    return MatrixView<const T>(data(), count, width);
  }

 private:
  using Values = std::vector<T, detail::AlignedAllocator<T>>;
  Values values_;
};

namespace detail {

template <class T>
using TrainMatrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class T>
using TrainMap = Eigen::Map<TrainMatrix<T>, 0, Eigen::OuterStride<>>;
template <class T>
using TrainConstMap = Eigen::Map<const TrainMatrix<T>, 0, Eigen::OuterStride<>>;
template <class T>
using TrainArray = Eigen::Map<Eigen::Array<T, Eigen::Dynamic, 1>>;
template <class T>
using TrainConstArray = Eigen::Map<const Eigen::Array<T, Eigen::Dynamic, 1>>;

template <class T>
[[nodiscard]] TrainMap<T> map_of(MatrixView<T> m) {
  return {m.data, m.rows, m.cols, Eigen::OuterStride<>(m.stride)};
}
template <class T>
[[nodiscard]] TrainConstMap<T> map_of(MatrixView<const T> m) {
  return {m.data, m.rows, m.cols, Eigen::OuterStride<>(m.stride)};
}

// Eigen's products behind three functions: each expression of its own would be compiled again.

/// c = a b^T on the calling thread.
template <class T>
void eigen_nt(MatrixView<const T> a, MatrixView<const T> b, MatrixView<T> c) {
  map_of<T>(c).noalias() = map_of<T>(a) * map_of<T>(b).transpose();
}
/// c = a b, or c += a b.
template <class T>
void eigen_nn(MatrixView<const T> a, MatrixView<const T> b, MatrixView<T> c, bool add) {
  if (!add) map_of<T>(c).setZero();
  map_of<T>(c).noalias() += map_of<T>(a) * map_of<T>(b);
}
/// c = a^T b, or c += a^T b.
template <class T>
void eigen_tn(MatrixView<const T> a, MatrixView<const T> b, MatrixView<T> c, bool add) {
  if (!add) map_of<T>(c).setZero();
  map_of<T>(c).noalias() += map_of<T>(a).transpose() * map_of<T>(b);
}

inline constexpr std::int64_t kTokensPerRange = 32;

[[nodiscard]] constexpr std::int64_t token_ranges(std::int64_t tokens) noexcept {
  return (tokens + kTokensPerRange - 1) / kTokensPerRange;
}

/// Runs body(range, first, count) over tokens in pieces that are worth a task and do not depend on the
/// workers.
template <class Body>
void for_ranges(std::int64_t tokens, Executor& executor, Body&& body) {
  codegemm::parallel_for(executor, token_ranges(tokens), [&](std::int64_t range, int) {
    const std::int64_t first = range * kTokensPerRange;
    body(range, first, std::min(kTokensPerRange, tokens - first));
  });
}

/// Runs body(first, count) over the elements of long arrays.
template <class Body>
void for_elements(std::int64_t size, Executor& executor, Body&& body) {
  constexpr std::int64_t kElements = std::int64_t{1} << 14;  // a multiple of every vector's length
  codegemm::parallel_for(executor, (size + kElements - 1) / kElements, [&](std::int64_t task, int) {
    const std::int64_t first = task * kElements;
    body(first, std::min(kElements, size - first));
  });
}

/// sums[width] += the rows of parts[count][width], in order.
template <class T>
void add_parts(const T* parts, std::int64_t count, std::int64_t width, T* sums) {
  for (std::int64_t part = 0; part < count; ++part)
    TrainArray<T>(sums, width) += TrainConstArray<T>(parts + part * width, width);
}

}  // namespace detail
}  // namespace prefillshare
