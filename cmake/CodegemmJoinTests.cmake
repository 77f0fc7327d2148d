# SPDX-License-Identifier: Apache-2.0
#
# Several test files as one unit of compilation: what they share, which is most of a header-only library, is then
# compiled once for all of them.
include_guard(GLOBAL)

# codegemm_join_tests(OUTPUT FILE...): writes the unit. All files' includes come first; then each file, where the same
# includes have nothing left to add, with its names kept apart from the others': in a namespace of its own, or, where
# it opens a namespace "test" of a library, in one within that.
function(codegemm_join_tests output)
  set(includes "")
  set(bodies "")
  set(number 0)
  foreach(file IN LISTS ARGN)
    math(EXPR number "${number} + 1")
    get_filename_component(path "${file}" ABSOLUTE)
    get_filename_component(folder "${path}" DIRECTORY)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${path}")
    file(STRINGS "${path}" lines REGEX "^(#include|namespace [a-z]+::test )")
    set(named FALSE)
    foreach(line IN LISTS lines)
      if(line MATCHES "^namespace")
        set(named TRUE)
      else()
        string(REGEX REPLACE "^#include \"" "#include \"${folder}/" line "${line}")
        string(APPEND includes "${line}\n")
      endif()
    endforeach()
    if(named)
      string(APPEND bodies
"namespace codegemm::test::file${number} { using namespace codegemm::test; }
namespace prefillshare::test::file${number} { using namespace prefillshare::test; }
#define test test::file${number}
#include \"${path}\"
#undef test
")
    else()
      string(APPEND bodies "namespace file${number} {\n#include \"${path}\"\n}\n")
    endif()
  endforeach()
  file(CONFIGURE OUTPUT "${output}" @ONLY CONTENT
"// Made by cmake/CodegemmJoinTests.cmake.
${includes}
${bodies}")
endfunction()
