// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/precompiled.hpp - how a program of many files compiles the kernels of DefaultConfigs once.
// Layer: cuda (host).
//
// They take nvcc minutes, in each file that calls gemm.cuh's functions. A program may compile them once,
// side by side, as cmake/cuda_kernels/*.cu does: each file includes a header of codegemm/cuda/regimes and
// instantiates its kernels, by CODEGEMM_GATHER_KERNELS() and so on. Its other files define
// CODEGEMM_PRECOMPILED_CUDA and compile in seconds. Configurations that a program lists itself (configs.cuh)
// compile as ever: only what DefaultConfigs names is left to those files.
#pragma once
