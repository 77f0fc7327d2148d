// SPDX-License-Identifier: Apache-2.0
//
// tests/support/counted_new.hpp - operator new that counts its calls and refuses some. Replaces the program's
// own: at most one file of a program includes this.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>

namespace codegemm::test {

/// Calls of operator new, on every thread, since the last reset().
class NewCalls {
 public:
  static void reset() { refuse_between(kNever, kNever); }
  /// From now on the calls number first to last (from 1) are refused.
  static void refuse_between(std::int64_t first, std::int64_t last) {
    first_ = first;
    last_ = last;
    calls_ = 0;
  }
  [[nodiscard]] static std::int64_t count() { return calls_; }
  [[nodiscard]] static bool next() {
    if (paused_) return true;
    const std::int64_t number = ++calls_;
    return number < first_ || number > last_;
  }
  /// What a test allocates for itself neither counts nor is refused.
  struct Pause {
    Pause() { paused_ = true; }
    Pause(const Pause&) = delete;
    Pause& operator=(const Pause&) = delete;
    ~Pause() { paused_ = false; }
  };

  static constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

 private:
  static inline std::atomic<std::int64_t> calls_{0}, first_{kNever}, last_{kNever};
  static inline std::atomic<bool> paused_{false};
};

/// Null if the call is refused.
[[nodiscard]] inline void* counted_new(std::size_t size, std::size_t alignment) noexcept {
  if (!NewCalls::next()) return nullptr;
  const std::size_t rounded = (size + alignment - 1) / alignment * alignment;
  return rounded < size ? nullptr : std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded);
}
[[nodiscard]] inline void* counted_new_or_throw(std::size_t size, std::size_t alignment) {
  void* const memory = counted_new(size, alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace codegemm::test

// The array forms call these. Not inlined: g++ takes free() there for a mistake.
// NOLINTBEGIN(misc-definitions-in-headers): what replaces the program's own may not be inline
[[gnu::noinline]] void* operator new(std::size_t size) {
  return codegemm::test::counted_new_or_throw(size, __STDCPP_DEFAULT_NEW_ALIGNMENT__);
}
[[gnu::noinline]] void* operator new(std::size_t size, std::align_val_t alignment) {
  return codegemm::test::counted_new_or_throw(size, static_cast<std::size_t>(alignment));
}
[[gnu::noinline]] void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return codegemm::test::counted_new(size, __STDCPP_DEFAULT_NEW_ALIGNMENT__);
}
[[gnu::noinline]] void* operator new(std::size_t size, std::align_val_t alignment,
                                     const std::nothrow_t&) noexcept {
  return codegemm::test::counted_new(size, static_cast<std::size_t>(alignment));
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t, const std::nothrow_t&) noexcept {
  std::free(memory);
}
// NOLINTEND(misc-definitions-in-headers)
