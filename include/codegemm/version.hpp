// SPDX-License-Identifier: Apache-2.0
//
// codegemm/version.hpp - the version of both libraries; CMake reads it from here.
// Layer: base (host + device, no CUDA headers).
#pragma once

#define CODEGEMM_VERSION_MAJOR 0
#define CODEGEMM_VERSION_MINOR 1
#define CODEGEMM_VERSION_PATCH 0

namespace codegemm {

/// MAJOR * 10000 + MINOR * 100 + PATCH, for "at least" comparisons.
inline constexpr int kVersion =
    CODEGEMM_VERSION_MAJOR * 10000 + CODEGEMM_VERSION_MINOR * 100 + CODEGEMM_VERSION_PATCH;

}  // namespace codegemm
