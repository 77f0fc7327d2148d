// SPDX-License-Identifier: Apache-2.0
//
// capi/codegemm_c_no_cuda.cpp - the GPU calls of the C API in a build without CUDA: there, and say so.
// Layer: capi (host only).
#include <cstddef>
#include <cstdint>

#include <codegemm_c.h>
#include <capi/boundary.hpp>

namespace {

codegemm_c_status without_cuda(const char* function) noexcept {
  return codegemm::c_api::guarded([&] {
    return codegemm::error(codegemm::StatusCode::kUnsupported, function,
                           ": this library was built without CUDA (CODEGEMM_ENABLE_CUDA is OFF)");
  });
}

}  // namespace

int32_t codegemm_c_has_cuda(void) { return 0; }

codegemm_c_status codegemm_c_cuda_query_device(int32_t, codegemm_c_cuda_device** device) {
  if (device != nullptr) *device = nullptr;
  return without_cuda("codegemm_c_cuda_query_device");
}

void codegemm_c_cuda_device_destroy(codegemm_c_cuda_device*) {}

codegemm_c_status codegemm_c_cuda_validate(const codegemm_c_cuda_problem*, const codegemm_c_cuda_device*) {
  return without_cuda("codegemm_c_cuda_validate");
}

codegemm_c_status codegemm_c_cuda_workspace_bytes(const codegemm_c_cuda_problem*,
                                                  const codegemm_c_cuda_device*, size_t*) {
  return without_cuda("codegemm_c_cuda_workspace_bytes");
}

codegemm_c_status codegemm_c_cuda_run(const codegemm_c_cuda_problem*, const codegemm_c_cuda_device*, void*,
                                      size_t, void*) {
  return without_cuda("codegemm_c_cuda_run");
}
