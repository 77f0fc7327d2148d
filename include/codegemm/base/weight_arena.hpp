// SPDX-License-Identifier: Apache-2.0
//
// codegemm/base/weight_arena.hpp - memory for weights that are many and small, side by side on large pages.
// Layer: base (host only).
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>

#include <codegemm/base/aligned_buffer.hpp>

namespace codegemm {

/// `size` bytes aligned to kBufferAlignment, which live as long as a copy of the pointer does; null where
/// memory is short.
[[nodiscard]] inline std::shared_ptr<std::byte> shared_bytes(std::size_t size) {
  const auto buffer = std::make_shared<AlignedBuffer<std::byte>>();
  if (!buffer->reserve(size)) return nullptr;
  return {buffer, buffer->data()};
}

/// Memory for the matrices of a model, which its layers read one after another. A matrix of less than some
/// MiB alone lies in pages of 4 KiB, each of which the processor has to find again whenever the model comes
/// around; many of them together fill pages of 2 MiB, of which a model has few. May be used from several
/// threads at once, and need not outlive what is in it.
class WeightArena {
 public:
  /// The chunks that are asked of the system; each is given back when nothing in it is alive.
  static constexpr std::size_t kChunkBytes = 8 * detail::kHugePage;

  /// The same as shared_bytes(). What is large has no use for neighbours and gets memory of its own.
  [[nodiscard]] std::shared_ptr<std::byte> allocate(std::size_t size) {
    if (size >= detail::kHugeFrom) return shared_bytes(size);
    const std::size_t taken = (size + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment;
    const std::lock_guard lock(mutex_);
    if (chunk_ == nullptr || kChunkBytes - used_ < taken) {
      chunk_ = shared_bytes(kChunkBytes);
      if (chunk_ == nullptr) return nullptr;
      used_ = 0;
    }
    return {chunk_, chunk_.get() + std::exchange(used_, used_ + taken)};
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<std::byte> chunk_;
  std::size_t used_ = 0;  // bytes of the chunk
};

}  // namespace codegemm
