# SPDX-License-Identifier: Apache-2.0
#
# Turns on CUDA, or says plainly how to do without it.
include_guard(GLOBAL)
include(CheckLanguage)

# nvcc is often installed but not on the PATH.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(codegemm_nvcc nvcc HINTS ENV CUDA_PATH ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES bin
               NO_CACHE)
  if(codegemm_nvcc)
    set(CMAKE_CUDA_COMPILER "${codegemm_nvcc}")
  endif()
endif()

# A user's choice of architectures stays as it is: A100, and H100/H200 with their own instructions.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES "80;90a")
endif()

check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(FATAL_ERROR
    "CODEGEMM_ENABLE_CUDA is ON, but no CUDA compiler was found.\n"
    "Without one: cmake --preset cpu (everything but the GPU parts).\n"
    "With one: set CMAKE_CUDA_COMPILER or CUDACXX to the path of nvcc.")
endif()
enable_language(CUDA)
find_package(CUDAToolkit 12 REQUIRED)
