# SPDX-License-Identifier: Apache-2.0
#
# Makes one CTest test of each Catch2 test case, for Catch2 2 and 3 alike. CTest runs this when it starts, so
# that the build needs no program to run, and lists a program again only when it has been built anew.
include_guard(GLOBAL)

function(codegemm_set_test name labels timeout environment)
  set_tests_properties("${name}" PROPERTIES LABELS "${labels}" TIMEOUT "${timeout}" SKIP_RETURN_CODE 4
    # A test case that checks nothing fails, and so does one that Catch2 does not find by its name.
    FAIL_REGULAR_EXPRESSION "1 passed[\r\n]+assertions: - none -;No test cases matched;No tests ran")
  if(NOT environment STREQUAL "")
    set_tests_properties("${name}" PROPERTIES ENVIRONMENT "${environment}")
  endif()
endfunction()

# codegemm_list(OUT PROGRAM TAG): the names of the program's test cases, one a line; empty if it cannot tell. TAG: only
# those of the source file of that name, if not empty.
function(codegemm_list out program tag)
  set(only "")
  if(NOT tag STREQUAL "")
    set(only --filenames-as-tags "[#${tag}]")
  endif()
  execute_process(COMMAND "${program}" --list-test-names-only ${only} OUTPUT_VARIABLE names ERROR_VARIABLE errors)
  if(names STREQUAL "" OR NOT errors STREQUAL "")  # Catch2 3 has no such option
    execute_process(COMMAND "${program}" --list-tests --verbosity quiet ${only}
                    OUTPUT_VARIABLE names ERROR_VARIABLE errors RESULT_VARIABLE result)
    if(NOT result EQUAL 0)
      set(names "")
    endif()
  endif()
  set(${out} "${names}" PARENT_SCOPE)
endfunction()

# codegemm_discover(PROGRAM PREFIX CACHE_FILE LABELS TIMEOUT ENVIRONMENT TAG)
function(codegemm_discover program prefix cache labels timeout environment tag)
  if(NOT EXISTS "${program}")
    # A program that is not there must not look like one without tests.
    add_test("${prefix}: not built" "${program}")
    codegemm_set_test("${prefix}: not built" "${labels}" "${timeout}" "${environment}")
    return()
  endif()
  if(NOT EXISTS "${cache}" OR "${program}" IS_NEWER_THAN "${cache}")
    codegemm_list(rest "${program}" "${tag}")
    string(REGEX REPLACE "^[ \n]+" "" rest "${rest}")
    if(rest STREQUAL "")
      add_test("${prefix}: lists no test" "${program}" --no-such-option)
      codegemm_set_test("${prefix}: lists no test" "${labels}" "${timeout}" "${environment}")
      return()
    endif()

    set(script "")
    while(NOT rest STREQUAL "")  # not a CMake list: a name may hold ; or [
      string(FIND "${rest}" "\n" end)
      if(end EQUAL -1)
        string(LENGTH "${rest}" end)
      endif()
      string(SUBSTRING "${rest}" 0 ${end} name)
      string(SUBSTRING "${rest}" ${end} -1 rest)
      string(REGEX REPLACE "^[ \n]+" "" rest "${rest}")
      string(REGEX REPLACE "([],[\\])" "\\\\\\1" spec "${name}")
      string(APPEND script
        "add_test([==[${prefix}: ${name}]==] [==[${program}]==] [==[${spec}]==])\n"
        "codegemm_set_test([==[${prefix}: ${name}]==] \"\${labels}\" \"\${timeout}\" \"\${environment}\")\n")
    endwhile()
    file(WRITE "${cache}" "${script}")
  endif()
  include("${cache}")
endfunction()
