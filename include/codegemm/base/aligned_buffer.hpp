// SPDX-License-Identifier: Apache-2.0
//
// codegemm/base/aligned_buffer.hpp - an owned array that starts on a cache line.
// Layer: base (host only).
#pragma once

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

/// `size()` elements, uninitialized after reserve(). Movable, not copyable. For packed weights, workspaces.
template <class T>
class AlignedBuffer {
  static_assert(std::is_trivially_copyable_v<T>, "codegemm: AlignedBuffer T must be trivially copyable");

 public:
  AlignedBuffer() = default;
  AlignedBuffer(AlignedBuffer&& other) noexcept
      : data_(std::move(other.data_)), size_(std::exchange(other.size_, 0)) {}
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
    void* const memory = ::operator new (size * sizeof(T), std::align_val_t{kBufferAlignment}, std::nothrow);
    if (memory == nullptr) return false;
    data_.reset(static_cast<T*>(memory));
    size_ = size;
    return true;
  }

  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  [[nodiscard]] T* data() noexcept { return data_.get(); }
  [[nodiscard]] const T* data() const noexcept { return data_.get(); }
  [[nodiscard]] std::span<T> span() noexcept { return {data_.get(), size_}; }
  [[nodiscard]] std::span<const T> span() const noexcept { return {data_.get(), size_}; }
  [[nodiscard]] T& operator[](std::size_t i) noexcept { return data_.get()[i]; }
  [[nodiscard]] const T& operator[](std::size_t i) const noexcept { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* memory) const noexcept {
      ::operator delete (memory, std::align_val_t{kBufferAlignment});
    }
  };
  std::unique_ptr<T, Free> data_;
  std::size_t size_ = 0;
};

}  // namespace codegemm
