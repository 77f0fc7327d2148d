// SPDX-License-Identifier: Apache-2.0
//
// codegemm/base/aligned_buffer.hpp - an owned array that starts on a cache line.
// Layer: base (host only).
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <type_traits>
#include <utility>

namespace codegemm {

/// The alignment that kernels ask of a workspace, in bytes.
inline constexpr std::size_t kBufferAlignment = 64;

namespace detail {

/// From here on a buffer begins on a huge page and asks the system for such pages: weights are read once each
/// time, and with pages of 4 KiB the translation of their addresses is a quarter of that.
inline constexpr std::size_t kHugePage = std::size_t{2} << 20;
inline constexpr std::size_t kHugeFrom = 2 * kHugePage;

}  // namespace detail

/// `size()` elements, uninitialized after reserve(). Movable, not copyable. For packed weights, workspaces.
template <class T>
class AlignedBuffer {
  static_assert(std::is_trivially_copyable_v<T>, "codegemm: AlignedBuffer T must be trivially copyable");

 public:
  AlignedBuffer() = default;
  /// The other becomes empty.
  AlignedBuffer(AlignedBuffer&& other) noexcept
      : data_(std::move(other.data_)), size_(std::exchange(other.size_, 0)) {}
  /// What this one held is freed; the other becomes empty.
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    data_ = std::move(other.data_);
    size_ = std::exchange(other.size_, 0);
    return *this;
  }

  /// Makes room for `size` elements and loses the old ones. False, and empty, where memory is short.
  [[nodiscard]] bool reserve(std::size_t size) noexcept {
    data_.reset();
    size_ = 0;
    if (size > std::numeric_limits<std::size_t>::max() / sizeof(T)) return false;
    if (size == 0) return true;
    const std::size_t bytes = size * sizeof(T);
    const std::size_t alignment = bytes >= detail::kHugeFrom ? detail::kHugePage : kBufferAlignment;
    void* const memory = ::operator new (bytes, std::align_val_t{alignment}, std::nothrow);
    if (memory == nullptr) return false;
#if defined(__linux__)
    // Whole pages only: what follows belongs to others. If the system has none to give, nothing is lost.
    if (alignment == detail::kHugePage) madvise(memory, bytes / 4096 * 4096, MADV_HUGEPAGE);
#endif
    data_ = std::unique_ptr<T, Free>(static_cast<T*>(memory), Free{alignment});
    size_ = size;
    return true;
  }

  [[nodiscard]] std::size_t size() const noexcept { return size_; }  ///< elements
  /// The first element, aligned; null if size() is 0. The memory is the buffer's.
  [[nodiscard]] T* data() noexcept { return data_.get(); }
  /// The same, to read from.
  [[nodiscard]] const T* data() const noexcept { return data_.get(); }
  /// All elements.
  [[nodiscard]] std::span<T> span() noexcept { return {data_.get(), size_}; }
  /// The same, to read from.
  [[nodiscard]] std::span<const T> span() const noexcept { return {data_.get(), size_}; }
  /// Element i, unchecked.
  [[nodiscard]] T& operator[](std::size_t i) noexcept { return data_.get()[i]; }
  /// The same, to read from.
  [[nodiscard]] const T& operator[](std::size_t i) const noexcept { return data_.get()[i]; }

 private:
  struct Free {
    std::size_t alignment = kBufferAlignment;
    void operator()(T* memory) const noexcept { ::operator delete (memory, std::align_val_t{alignment}); }
  };
  std::unique_ptr<T, Free> data_;
  std::size_t size_ = 0;
};

}  // namespace codegemm
