// SPDX-License-Identifier: Apache-2.0
//
// cmake/cpu_kernels.cpp - the CPU kernels of gemm(), compiled once for all tests, examples and benchmarks.
#include <codegemm/gemm.hpp>

template codegemm::Status codegemm::detail::gemm_with<codegemm::CpuConfigs>(
    const codegemm::PackedMatrix&, codegemm::MatrixView<const float>, codegemm::MatrixView<float>,
    std::span<std::byte>, codegemm::Executor&, codegemm::Isa, codegemm::detail::Regime);
