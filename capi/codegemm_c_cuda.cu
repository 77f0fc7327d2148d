// SPDX-License-Identifier: Apache-2.0
//
// capi/codegemm_c_cuda.cu - the C API of the product on the GPU.
// Layer: capi (host, needs nvcc).
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include <cuda_runtime.h>

#include <codegemm_c.h>
#include <capi/boundary.hpp>
#include <capi/matrices.hpp>
#include <codegemm/base/numerics.hpp>
#include <codegemm/base/status.hpp>
#include <codegemm/cuda/problem.cuh>
#include <codegemm/gemm.cuh>

static_assert(CODEGEMM_C_CUDA_ALIGNMENT == codegemm::cuda::kWorkspaceAlignment);

struct codegemm_c_cuda_device {
  codegemm::cuda::Device device;
};

namespace {

namespace cuda = codegemm::cuda;

using codegemm::Status;
using codegemm::StatusCode;
using codegemm::c_api::check_pointer;
using codegemm::c_api::check_struct;
using codegemm::c_api::guarded;

// Stand for pointers that are not known yet: aligned, never read through, and so far from each other and from
// all memory that no output is taken to lie over an input.
void* unknown_pointer(std::uintptr_t number) {
  return reinterpret_cast<void*>((number << 60) + CODEGEMM_C_CUDA_ALIGNMENT);
}

template <class X, class Y>
[[nodiscard]] cuda::GemmProblem<X, Y> problem_of(const codegemm_c_cuda_problem& p,
                                                 const cuda::DevicePackedView& w) {
  cuda::GemmProblem<X, Y> out;
  std::int64_t columns = w.rows;
  if (p.activation == CODEGEMM_C_SWIGLU) {
    columns = w.rows / 2;
    out.activation = cuda::Activation::kSwiGlu;
  }
  out.weights = w;
  out.x = codegemm::MatrixView<const X>(static_cast<const X*>(p.x), p.tokens, w.cols, p.x_stride);
  out.y = codegemm::MatrixView<Y>(static_cast<Y*>(p.y), p.tokens, columns, p.y_stride);
  out.bias = static_cast<const Y*>(p.bias);
  if (p.residual != nullptr) {
    out.residual = codegemm::MatrixView<const Y>(static_cast<const Y*>(p.residual), p.tokens, columns,
                                                 p.residual_stride);
  }
  out.overlap = (p.flags & CODEGEMM_C_CUDA_NO_OVERLAP) == 0;
  return out;
}

template <class X, class Body>
[[nodiscard]] Status with_x(const codegemm_c_cuda_problem& p, const cuda::DevicePackedView& w, Body& body) {
  switch (p.y_type) {
    case CODEGEMM_C_FP16: return body(problem_of<X, codegemm::Half>(p, w));
    case CODEGEMM_C_BF16: return body(problem_of<X, codegemm::BFloat16>(p, w));
    case CODEGEMM_C_FP32: return body(problem_of<X, float>(p, w));
    default: return codegemm::error(StatusCode::kInvalidArgument, "problem: y_type is ", p.y_type);
  }
}

// body(GemmProblem) -> Status, for the types that the problem names. `planned`: pointers may be unknown yet.
template <class Body>
[[nodiscard]] Status with_problem(const codegemm_c_cuda_problem* problem,
                                  const codegemm_c_cuda_device* device, bool planned, Body&& body) {
  if (Status s = check_struct(problem, "problem"); !s.ok()) return s;
  if (Status s = check_pointer(device, "device"); !s.ok()) return s;
  codegemm_c_cuda_problem p = *problem;
  if (Status s = check_struct(p.weights, "problem: weights"); !s.ok()) return s;
  if (p.activation != CODEGEMM_C_NO_ACTIVATION && p.activation != CODEGEMM_C_SWIGLU) {
    return codegemm::error(StatusCode::kInvalidArgument, "problem: activation is ", p.activation);
  }
  constexpr std::uint32_t kFlags = CODEGEMM_C_CUDA_NO_OVERLAP;
  if ((p.flags & ~kFlags) != 0) {
    return codegemm::error(StatusCode::kInvalidArgument, "problem: flags is ", p.flags,
                           ", of which this library knows ", kFlags);
  }
  auto view = codegemm::c_api::device_view_of(*p.weights);
  if (!view.ok()) return view.status();
  cuda::DevicePackedView& w = *view;
  if (planned) {
    if (w.data == nullptr) w.data = static_cast<const std::byte*>(unknown_pointer(1));
    if (p.x == nullptr) p.x = unknown_pointer(2);
    if (p.y == nullptr) p.y = unknown_pointer(4);
  }
  switch (p.x_type) {
    case CODEGEMM_C_FP16: return with_x<codegemm::Half>(p, w, body);
    case CODEGEMM_C_BF16: return with_x<codegemm::BFloat16>(p, w, body);
    default:
      return codegemm::error(StatusCode::kInvalidArgument, "problem: x_type is ", p.x_type,
                             ", expected CODEGEMM_C_FP16 or CODEGEMM_C_BF16");
  }
}

}  // namespace

int32_t codegemm_c_has_cuda(void) { return 1; }

codegemm_c_status codegemm_c_cuda_query_device(int32_t number, codegemm_c_cuda_device** device) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(device, "device"); !s.ok()) return s;
    *device = nullptr;
    const auto asked = cuda::query_device(number);
    if (!asked.ok()) return asked.status();
    *device = std::make_unique<codegemm_c_cuda_device>(codegemm_c_cuda_device{*asked}).release();
    return {};
  });
}

void codegemm_c_cuda_device_destroy(codegemm_c_cuda_device* device) { delete device; }

codegemm_c_status codegemm_c_cuda_validate(const codegemm_c_cuda_problem* problem,
                                           const codegemm_c_cuda_device* device) {
  return guarded([&] {
    return with_problem(problem, device, false,
                        [&](const auto& p) { return cuda::validate(p, device->device); });
  });
}

codegemm_c_status codegemm_c_cuda_workspace_bytes(const codegemm_c_cuda_problem* problem,
                                                  const codegemm_c_cuda_device* device, size_t* bytes) {
  return guarded([&]() -> Status {
    if (Status s = check_pointer(bytes, "bytes"); !s.ok()) return s;
    return with_problem(problem, device, true, [&](const auto& p) -> Status {
      if (Status s = cuda::validate(p, device->device); !s.ok()) return s;
      *bytes = cuda::workspace_bytes(p, device->device);
      return {};
    });
  });
}

codegemm_c_status codegemm_c_cuda_run(const codegemm_c_cuda_problem* problem,
                                      const codegemm_c_cuda_device* device, void* workspace,
                                      size_t workspace_bytes, void* stream) {
  return guarded([&] {
    return with_problem(problem, device, false, [&](const auto& p) {
      return cuda::run(p, device->device, workspace, workspace_bytes, static_cast<cudaStream_t>(stream));
    });
  });
}
