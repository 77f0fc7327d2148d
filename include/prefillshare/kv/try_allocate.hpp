// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/try_allocate.hpp - growing a container without letting std::bad_alloc out of the library.
// Layer: kv (host only).
#pragma once

#include <cstddef>
#include <exception>

namespace prefillshare::detail {

/// Runs `grow`, which only allocates; false if the memory cannot be had (or the size is absurd).
template <class Grow>
[[nodiscard]] bool try_allocate(Grow&& grow) {
  try {
    grow();
  } catch (const std::exception&) {  // bad_alloc or length_error: nothing else is thrown by a container
    return false;
  }
  return true;
}

template <class Vector>
[[nodiscard]] bool try_reserve(Vector& vector, std::size_t count) {
  return try_allocate([&] { vector.reserve(count); });
}

}  // namespace prefillshare::detail
