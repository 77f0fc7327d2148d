# SPDX-License-Identifier: Apache-2.0
#
# Install rules. Two packages: codegemm (components io, cuda, c) and prefillshare (components mpi, cuda, nccl). A component
# has an export file of its own, read only when it is asked for: a user of the CPU parts alone needs neither
# nlohmann-json nor CUDA.
include_guard(GLOBAL)
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
        FILES_MATCHING PATTERN "*.hpp" PATTERN "*.cuh" PATTERN "*.inl")
install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})

function(codegemm_install_package package)
  set(folder ${CMAKE_INSTALL_LIBDIR}/cmake/${package})
  configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/${package}Config.cmake.in
    ${PROJECT_BINARY_DIR}/${package}Config.cmake INSTALL_DESTINATION ${folder})
  # Before 1.0 a minor version may break; headers run on any architecture.
  write_basic_package_version_file(${PROJECT_BINARY_DIR}/${package}ConfigVersion.cmake
    COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
  install(FILES ${PROJECT_BINARY_DIR}/${package}Config.cmake ${PROJECT_BINARY_DIR}/${package}ConfigVersion.cmake
          DESTINATION ${folder})
  foreach(target IN LISTS ARGN)
    string(REPLACE "_" "-" export ${target})
    install(TARGETS ${target} EXPORT ${export})
    install(EXPORT ${export} FILE ${export}-targets.cmake NAMESPACE ${package}:: DESTINATION ${folder})
  endforeach()
endfunction()

set(codegemm_targets codegemm)
set(prefillshare_targets prefillshare)
if(TARGET codegemm_io)
  list(APPEND codegemm_targets codegemm_io)
endif()
if(TARGET codegemm_c)
  list(APPEND codegemm_targets codegemm_c)
  install(FILES ${PROJECT_SOURCE_DIR}/capi/codegemm_c.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
endif()
if(TARGET prefillshare_mpi)
  list(APPEND prefillshare_targets prefillshare_mpi)
endif()
if(CODEGEMM_ENABLE_CUDA)
  list(APPEND codegemm_targets codegemm_cuda)
  list(APPEND prefillshare_targets prefillshare_cuda)
endif()
if(TARGET prefillshare_nccl)
  list(APPEND prefillshare_targets prefillshare_nccl)
  install(FILES ${PROJECT_SOURCE_DIR}/cmake/FindNCCL.cmake
          DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/prefillshare)
endif()
codegemm_install_package(codegemm ${codegemm_targets})
codegemm_install_package(prefillshare ${prefillshare_targets})
