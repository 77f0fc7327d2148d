// SPDX-License-Identifier: Apache-2.0
//
// examples/common/unwrap.hpp - the examples turn a Status into an exception, caught once in main().
#pragma once

#include <stdexcept>
#include <utility>

#include <codegemm/base/status.hpp>

namespace prefillshare::examples {

/// What an example throws for a failure that its user can mend: main() prints it and exits with 2.
struct UserError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check(const codegemm::Status& status) {
  if (!status.ok()) throw UserError(status.message());
}

template <class T>
[[nodiscard]] T unwrap(codegemm::Result<T> result) {
  check(result.status());
  return std::move(result).value();
}

}  // namespace prefillshare::examples
