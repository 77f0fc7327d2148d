// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/vocabulary.hpp - the words of codegemm/base that prefillshare speaks with.
// Layer: base (host only).
#pragma once

#include <codegemm/base/executor.hpp>
#include <codegemm/base/matrix_view.hpp>
#include <codegemm/base/status.hpp>

namespace prefillshare {

// NOLINTBEGIN(misc-unused-using-decls): they are for who includes this.
using codegemm::error;
using codegemm::Executor;
using codegemm::MatrixView;
using codegemm::Result;
using codegemm::Status;
using codegemm::StatusCode;
// NOLINTEND(misc-unused-using-decls)

}  // namespace prefillshare
