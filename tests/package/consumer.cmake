# SPDX-License-Identifier: Apache-2.0
#
# Builds and runs tests/package/CONSUMER as a stranger's project would. For find_package the copy is installed
# and then moved, so that a path into the source or build folder cannot go unnoticed.
# Wants: consumer source binary work generator compiler version
cmake_minimum_required(VERSION 3.25)

function(run)
  execute_process(COMMAND ${ARGV} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    list(JOIN ARGV " " command)
    message(FATAL_ERROR "${command}\nended with ${result}:\n${output}")
  endif()
  set(run_output "${output}" PARENT_SCOPE)
endfunction()

file(REMOVE_RECURSE ${work})
file(MAKE_DIRECTORY ${work})

set(arguments -G ${generator} -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_COMPILER=${compiler} -Dversion=${version})
if(consumer STREQUAL "find_package")
  run(${CMAKE_COMMAND} --install ${binary} --prefix ${work}/installed)
  file(RENAME ${work}/installed ${work}/moved)
  file(GLOB_RECURSE packages ${work}/moved/*.cmake)
  foreach(file IN LISTS packages)
    file(READ ${file} text)
    string(FIND "${text}" "${source}" position)
    if(NOT position EQUAL -1)
      message(FATAL_ERROR "${file} names the source folder ${source}")
    endif()
  endforeach()
  list(APPEND arguments -DCMAKE_PREFIX_PATH=${work}/moved)
else()
  list(APPEND arguments -Dlibrary_source=${source})
endif()

run(${CMAKE_COMMAND} -S ${source}/tests/package/${consumer} -B ${work}/build ${arguments})
run(${CMAKE_COMMAND} --build ${work}/build)
run(${work}/build/consumer)
if(NOT run_output MATCHES "codegemm ${version}")
  message(FATAL_ERROR "the consumer was to print 'codegemm ${version}', and printed:\n${run_output}")
endif()
message(STATUS "${run_output}")
