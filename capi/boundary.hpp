// SPDX-License-Identifier: Apache-2.0
//
// capi/boundary.hpp - what every function of the C API does at the border: errors out, exceptions caught.
// Layer: capi (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <new>
#include <string_view>
#include <system_error>

#include <codegemm_c.h>
#include <codegemm/base/status.hpp>

namespace codegemm::c_api {

/// What codegemm_c_last_error() tells a thread: an array, so that telling of a lack of memory takes none, and
/// a thread that ends has nothing to free.
struct LastError {
  char text[1024];
  int native;
};

[[nodiscard]] inline LastError& last_error() noexcept {
  static thread_local LastError error = {};
  return error;
}

/// Keeps a failure for codegemm_c_last_error(), cut where a UTF-8 character begins.
inline codegemm_c_status fail(codegemm_c_status code, std::string_view text, int native = 0) noexcept {
  LastError& error = last_error();
  std::size_t size = std::min(text.size(), sizeof(error.text) - 1);
  if (size < text.size()) {
    while (size > 0 && (static_cast<unsigned char>(text[size]) & 0xC0U) == 0x80U) --size;
  }
  std::memcpy(error.text, text.data(), size);
  error.text[size] = '\0';
  error.native = native;
  return code;
}

/// Runs one function of the API: body returns a Status, and whatever it throws becomes a code.
template <class Body>
[[nodiscard]] codegemm_c_status guarded(Body&& body) noexcept {
  try {
    const Status status = body();
    if (status.ok()) return CODEGEMM_C_OK;
    return fail(static_cast<codegemm_c_status>(status.code()), status.message(), status.native_code());
  } catch (const std::bad_alloc&) {
    return fail(CODEGEMM_C_OUT_OF_MEMORY, "out of memory");
  } catch (const std::system_error& e) {  // threads and locks
    return fail(CODEGEMM_C_IO_ERROR, e.what(), e.code().value());
  } catch (const std::exception& e) {
    return fail(CODEGEMM_C_INTERNAL_ERROR, e.what());
  } catch (...) {
    return fail(CODEGEMM_C_INTERNAL_ERROR, "an exception of an unknown type");
  }
}

/// kNullPointer, with the argument's name as the header spells it.
[[nodiscard]] inline Status check_pointer(const void* pointer, const char* name) {
  if (pointer != nullptr) return {};
  return error(StatusCode::kNullPointer, name, " is NULL");
}
[[nodiscard]] inline Status check_aligned(const void* pointer, std::size_t to, const char* name) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % to == 0) return {};
  return error(StatusCode::kMisaligned, name, " is not aligned to ", to, " bytes");
}

/// The caller's struct is there and of the one size that there is so far. When a struct grows, every size
/// that it has had is taken, and what an older caller does not have reads as zeros.
template <class Struct>
[[nodiscard]] Status check_struct(const Struct* from, const char* name) {
  if (Status status = check_pointer(from, name); !status.ok()) return status;
  if (Status status = check_aligned(from, alignof(Struct), name); !status.ok()) return status;
  if (from->struct_size == sizeof(Struct)) return {};
  return error(StatusCode::kInvalidArgument, name, ": struct_size is ", from->struct_size,
               ", this library (ABI version ", CODEGEMM_C_ABI_VERSION, ") knows ", sizeof(Struct));
}

/// The value of a function that returns a number of a handle: -1 for NULL.
template <class Handle, class Get>
[[nodiscard]] auto number_of(const Handle* handle, const char* name, Get&& get) noexcept -> decltype(get()) {
  if (handle != nullptr) return get();
  static_cast<void>(guarded([&] { return check_pointer(handle, name); }));
  return -1;
}

}  // namespace codegemm::c_api
