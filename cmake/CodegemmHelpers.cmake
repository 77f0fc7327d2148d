# SPDX-License-Identifier: Apache-2.0
#
# Functions for this project's own programs. Nothing here touches the library targets or a parent project.
include_guard(GLOBAL)

# codegemm_find_package(NAME [VERSION] DEBIAN package FOR what [CONFIG]): find_package, or stop with the name
# of the Debian package that brings it. A macro, since find_package sets variables for the caller.
macro(codegemm_find_package name)
  cmake_parse_arguments(_cgfp "CONFIG" "DEBIAN;FOR" "" ${ARGN})
  set(_cgfp_mode "")
  if(_cgfp_CONFIG)
    set(_cgfp_mode CONFIG)
  endif()
  find_package(${name} ${_cgfp_UNPARSED_ARGUMENTS} ${_cgfp_mode} QUIET)
  if(NOT ${name}_FOUND)
    list(JOIN _cgfp_UNPARSED_ARGUMENTS " " _cgfp_version)
    message(FATAL_ERROR
      "${_cgfp_FOR} needs ${name} ${_cgfp_version}, which was not found.\n"
      "On Debian or Ubuntu: apt-get install ${_cgfp_DEBIAN}\n"
      "Elsewhere: install it and point CMAKE_PREFIX_PATH at it.")
  endif()
endmacro()

# codegemm_own(target): the flags of everything this project builds for itself: warnings, the host's
# instruction set, sanitizers. ASSERTS adds the broken-invariant assertions to an optimized build.
function(codegemm_own target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "ASSERTS" "" "")
  set(cxx "$<COMPILE_LANGUAGE:CXX>")
  set(warnings -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    # False alarms: inside std::string at -O3 (GCC bug 105651), inside GCC's own AVX-512 headers (bug 105593).
    list(APPEND warnings -Wno-restrict -Wno-maybe-uninitialized -Wno-uninitialized)
  endif()
  if(CODEGEMM_WERROR)
    list(APPEND warnings -Werror)
  endif()
  target_compile_options(${target} PRIVATE "$<${cxx}:${warnings}>")
  if(CODEGEMM_NATIVE)
    target_compile_options(${target} PRIVATE "$<${cxx}:-march=native>")
  endif()
  if(CODEGEMM_SANITIZE)
    set(sanitize -fsanitize=${CODEGEMM_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
    target_compile_options(${target} PRIVATE "$<${cxx}:${sanitize}>")
    target_compile_definitions(${target} PRIVATE "$<${cxx}:_GLIBCXX_ASSERTIONS>")
    target_link_options(${target} PRIVATE -fsanitize=${CODEGEMM_SANITIZE})
    set(arg_ASSERTS TRUE)
  endif()
  if(arg_ASSERTS)
    target_compile_definitions(${target} PRIVATE CODEGEMM_ENABLE_ASSERTS)
  endif()
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>")
  set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF CUDA_EXTENSIONS OFF)
endfunction()

# codegemm_add_kernels(NAME LIBRARY DEFINITION FILES...): kernels of a library, compiled once for whatever this project
# builds for itself. The shared library takes them in, too, and shows none of them.
function(codegemm_add_kernels name library definition)
  add_library(${name} STATIC ${ARGN})
  target_link_libraries(${name} PUBLIC ${library})
  target_compile_definitions(${name} INTERFACE ${definition})
  set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden
                        CUDA_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
  if(CODEGEMM_BUILD_TESTS)
    codegemm_own(${name} ASSERTS)
  else()
    codegemm_own(${name})
  endif()
endfunction()

function(codegemm_add_cpu_kernels)
  if(NOT TARGET codegemm_cpu_kernels)
    codegemm_add_kernels(codegemm_cpu_kernels codegemm::codegemm CODEGEMM_PRECOMPILED
                         ${PROJECT_SOURCE_DIR}/cmake/cpu_kernels.cpp)
  endif()
endfunction()

# A file for each kind of kernel and format.
function(codegemm_add_cuda_kernels)
  if(NOT TARGET codegemm_cuda_kernels)
    file(GLOB files CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/cmake/cuda_kernels/*.cu)
    codegemm_add_kernels(codegemm_cuda_kernels codegemm::cuda CODEGEMM_PRECOMPILED_CUDA ${files})
  endif()
endfunction()

# Everything a test, example or benchmark may use. One interface target, so that globbed programs need no
# lists of their own.
function(codegemm_add_program_libraries)
  if(TARGET codegemm_programs)
    return()
  endif()
  codegemm_find_package(nlohmann_json 3.11 CONFIG DEBIAN nlohmann-json3-dev FOR "The tests and examples")
  codegemm_find_package(CLI11 2.1 CONFIG DEBIAN libcli11-dev FOR "The examples")
  find_path(CODEGEMM_PCRE2_INCLUDE pcre2.h)
  find_library(CODEGEMM_PCRE2_LIBRARY pcre2-8)
  mark_as_advanced(CODEGEMM_PCRE2_INCLUDE CODEGEMM_PCRE2_LIBRARY)
  if(NOT CODEGEMM_PCRE2_INCLUDE OR NOT CODEGEMM_PCRE2_LIBRARY)
    message(FATAL_ERROR "The examples need PCRE2 (8-bit), which was not found.\n"
                        "On Debian or Ubuntu: apt-get install libpcre2-dev")
  endif()
  codegemm_add_cpu_kernels()
  if(CODEGEMM_ENABLE_CUDA)
    codegemm_add_cuda_kernels()
  endif()
  add_library(codegemm_programs INTERFACE)
  target_include_directories(codegemm_programs INTERFACE ${PROJECT_SOURCE_DIR}/examples)
  target_include_directories(codegemm_programs SYSTEM INTERFACE ${CODEGEMM_PCRE2_INCLUDE})
  target_link_libraries(codegemm_programs INTERFACE
    codegemm_cpu_kernels prefillshare::prefillshare codegemm::io CLI11::CLI11 ${CODEGEMM_PCRE2_LIBRARY})
  if(TARGET prefillshare_mpi)
    # mpirun's arguments for a test of N processes: as root in a container, and on fewer cores than processes.
    set(CODEGEMM_MPIRUN ${MPIEXEC_EXECUTABLE} --allow-run-as-root --oversubscribe CACHE INTERNAL "")
  endif()
endfunction()

# ccache where there is one, unless the user chose a launcher. With -march=native the object depends on the
# processor, which ccache does not see in the command line: its feature list is hashed with the sources.
function(codegemm_use_ccache)
  if(DEFINED CMAKE_CXX_COMPILER_LAUNCHER)
    return()
  endif()
  find_program(CODEGEMM_CCACHE ccache)
  mark_as_advanced(CODEGEMM_CCACHE)
  if(NOT CODEGEMM_CCACHE)
    return()
  endif()
  set(launcher ${CODEGEMM_CCACHE})
  if(CODEGEMM_NATIVE AND EXISTS /proc/cpuinfo)
    file(STRINGS /proc/cpuinfo cpu REGEX "^(flags|Features|model name)" LIMIT_COUNT 2)
    file(WRITE ${PROJECT_BINARY_DIR}/processor.txt "${cpu}\n")
    set(launcher ${CMAKE_COMMAND} -E env "CCACHE_EXTRAFILES=${PROJECT_BINARY_DIR}/processor.txt" ${launcher})
  endif()
  foreach(language CXX CUDA)
    set(CMAKE_${language}_COMPILER_LAUNCHER "${launcher}" PARENT_SCOPE)
  endforeach()
endfunction()

# codegemm_program_name(out FILE): "a/b/thing_test.cpp" becomes "a_b_thing_test".
function(codegemm_program_name out file)
  string(REGEX REPLACE "\\.[a-z]+$" "" name "${file}")
  string(REPLACE "/" "_" name "${name}")
  set(${out} "${name}" PARENT_SCOPE)
endfunction()
