// SPDX-License-Identifier: Apache-2.0
//
// codegemm/base/status.hpp - how every call of the two libraries reports failure.
// Layer: base (host only).
#pragma once

#include <concepts>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/text.hpp>

namespace codegemm {

/// One enumerator per kind of cause. The numbers are stable: they cross the C boundary.
enum class StatusCode : int {
  kOk = 0,
  kInvalidArgument = 1,    ///< a number or combination that no call of this function accepts
  kShapeMismatch = 2,      ///< operands that are each valid but do not fit one another
  kNullPointer = 3,        ///< a pointer that must not be null is
  kMisaligned = 4,         ///< a pointer or stride without the alignment that the kernel needs
  kWorkspaceTooSmall = 5,  ///< fewer bytes than workspace_bytes() asked for
  kUnsupported = 6,        ///< valid, but no kernel, format or architecture here serves it
  kNotFound = 7,           ///< a file, tensor or key that is not there
  kIoError = 8,            ///< the operating system refused; native_code() is errno
  kCorruptData = 9,        ///< a file whose bytes contradict its format
  kExhausted = 10,         ///< back-pressure: no block, slot or quota left now; try again later
  kIncompatible = 11,      ///< modules or caches that may not be used together
  kCancelled = 12,         ///< stopped on request
  kCudaError = 13,         ///< native_code() is the cudaError_t
  kOutOfMemory = 14,       ///< an allocation that the caller asked for failed
};

/// The enumerator's name in words, for messages: "invalid argument".
[[nodiscard]] constexpr std::string_view to_string(StatusCode code) noexcept {
  switch (code) {
    case StatusCode::kOk: return "ok";
    case StatusCode::kInvalidArgument: return "invalid argument";
    case StatusCode::kShapeMismatch: return "shape mismatch";
    case StatusCode::kNullPointer: return "null pointer";
    case StatusCode::kMisaligned: return "misaligned";
    case StatusCode::kWorkspaceTooSmall: return "workspace too small";
    case StatusCode::kUnsupported: return "unsupported";
    case StatusCode::kNotFound: return "not found";
    case StatusCode::kIoError: return "input/output error";
    case StatusCode::kCorruptData: return "corrupt data";
    case StatusCode::kExhausted: return "exhausted";
    case StatusCode::kIncompatible: return "incompatible";
    case StatusCode::kCancelled: return "cancelled";
    case StatusCode::kCudaError: return "CUDA error";
    case StatusCode::kOutOfMemory: return "out of memory";
  }
  return "unknown status";
}

namespace detail {

/// What `make` returns, or no text where there is no memory for one: to say so must not need some.
template <class Make>
[[nodiscard]] std::string text_if_memory(Make&& make) noexcept {
  try {
    return make();
  } catch (const std::exception&) {  // bad_alloc or length_error
    return {};
  }
}

}  // namespace detail

/// Success, or a cause with the text that names the thing and the numbers. Success holds no text, so
/// returning it allocates nothing; the text is made only on failure, and left out where memory is short.
class CODEGEMM_NODISCARD_CLASS Status {
 public:
  Status() = default;
  /// The text is left out where there is no memory for another.
  Status(const Status& other) noexcept
      : code_(other.code_),
        native_(other.native_),
        message_(detail::text_if_memory([&] { return other.message_; })) {}
  /// The text goes along.
  Status(Status&&) noexcept = default;
  /// As the copy.
  Status& operator=(const Status& other) noexcept {
    if (this != &other) *this = Status(other);
    return *this;
  }
  /// The text goes along.
  Status& operator=(Status&&) noexcept = default;
  ~Status() = default;

  /// `message` names the thing and the numbers; `native` keeps errno or cudaError_t where there is one.
  Status(StatusCode code, std::string message, int native = 0)
      : code_(code), native_(native), message_(std::move(message)) {}

  [[nodiscard]] bool ok() const noexcept { return code_ == StatusCode::kOk; }  ///< success
  [[nodiscard]] StatusCode code() const noexcept { return code_; }  ///< the kind of the failure, or kOk
  /// errno for kIoError, cudaError_t for kCudaError, else 0.
  [[nodiscard]] int native_code() const noexcept { return native_; }
  /// What failed, with names and numbers; empty on success.
  [[nodiscard]] const std::string& message() const noexcept { return message_; }

  /// The same failure seen from further out: "PREFIX: message".
  [[nodiscard]] Status with_prefix(std::string_view prefix) const {
    if (ok()) return {};
    return Status(code_, detail::text_if_memory([&] { return concat(prefix, ": ", message_); }), native_);
  }

 private:
  StatusCode code_ = StatusCode::kOk;
  int native_ = 0;
  std::string message_;
};

/// A failure whose text is made from words and numbers. Throws nothing.
template <class... Parts>
[[nodiscard]] Status error(StatusCode code, const Parts&... parts) noexcept {
  return Status(code, detail::text_if_memory([&] { return concat(parts...); }));
}

namespace detail {

/// Says what failed and where its value was taken all the same, and ends the program.
[[noreturn]] inline void value_of_failure(const Status& status, const char* file, int line) noexcept {
  const std::string_view code = to_string(status.code());
  const bool said = !status.message().empty();
  std::fprintf(stderr, "%s:%d: value() of a failure: %.*s%s%s\n", file, line, static_cast<int>(code.size()),
               code.data(), said ? ": " : "", status.message().c_str());
  std::abort();
}

}  // namespace detail

/// A value or the Status that says why there is none. Holding neither is impossible: building one from
/// an ok Status is a broken invariant.
template <class T>
class CODEGEMM_NODISCARD_CLASS Result {
 public:
  /// A value. By reference, so that `return local;` moves with nvcc too, which would copy for a parameter by
  /// value.
  Result(T&& value) : value_(std::move(value)) {}  // NOLINT(google-explicit-constructor): return value;
  /// The same, copied.
  Result(const T& value)  // NOLINT(google-explicit-constructor): return value;
      requires std::copy_constructible<T> : value_(value) {}
  /// A failure; `status` must not be a success.
  // NOLINTNEXTLINE(google-explicit-constructor): return error(...);
  Result(Status status) : status_(std::move(status)) { CODEGEMM_ASSERT(!status_.ok()); }

  [[nodiscard]] bool ok() const noexcept { return value_.has_value(); }    ///< there is a value
  [[nodiscard]] const Status& status() const noexcept { return status_; }  ///< the failure, or a success

  /// The value. For what cannot fail: of a failure it prints the status, with the caller's file and line, and
  /// ends the program, in every build.
  [[nodiscard]] T& value(const char* file = __builtin_FILE(), int line = __builtin_LINE()) & {
    if (!ok()) detail::value_of_failure(status_, file, line);
    return *value_;
  }
  /// The same, to read from.
  [[nodiscard]] const T& value(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const& {
    if (!ok()) detail::value_of_failure(status_, file, line);
    return *value_;
  }
  /// The same, moved out.
  [[nodiscard]] T&& value(const char* file = __builtin_FILE(), int line = __builtin_LINE()) && {
    if (!ok()) detail::value_of_failure(status_, file, line);
    return *std::move(value_);
  }
  /// The value where ok() was asked before: asserted only.
  [[nodiscard]] T& operator*() & {
    CODEGEMM_ASSERT(ok());
    return *value_;
  }
  /// The same, to read from.
  [[nodiscard]] const T& operator*() const& {
    CODEGEMM_ASSERT(ok());
    return *value_;
  }
  /// The same, moved out.
  [[nodiscard]] T&& operator*() && {
    CODEGEMM_ASSERT(ok());
    return *std::move(value_);
  }
  /// As operator*.
  [[nodiscard]] T* operator->() { return &**this; }
  /// As operator*.
  [[nodiscard]] const T* operator->() const { return &**this; }

 private:
  Status status_;
  std::optional<T> value_;
};

}  // namespace codegemm
