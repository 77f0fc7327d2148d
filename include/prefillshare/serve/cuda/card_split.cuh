// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/cuda/card_split.cuh - a card's multiprocessors in two parts, so that decode steps run
// beside a prefill.
// Layer: serve (host, needs nvcc).
// See: green contexts, CUDA driver API. A prefill is bound by arithmetic and a decode step by memory, which a
// few multiprocessors can keep busy; in two plain streams each kernel of a step would wait for blocks of the
// prefill's to end instead.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <utility>

#include <cuda.h>
#include <cuda_runtime.h>

#include <codegemm/cuda/device.cuh>
#include <prefillshare/vocabulary.hpp>

namespace prefillshare::cuda {

using codegemm::cuda::Device;

/// Some of a card's multiprocessors, and a stream whose work runs on them.
struct CardPart {
  Device device;                  ///< the card with as many multiprocessors as the part has
  cudaStream_t stream = nullptr;  ///< non-blocking; lives as long as its CardSplit
};

#if CUDA_VERSION >= 12050

namespace detail {

/// The driver's functions, asked for so that no program has to link the driver.
struct GreenContextApi {
  decltype(&cuDeviceGetDevResource) resource = nullptr;
  decltype(&cuDevSmResourceSplitByCount) split = nullptr;
  decltype(&cuDevResourceGenerateDesc) describe = nullptr;
  decltype(&cuGreenCtxCreate) create = nullptr;
  decltype(&cuGreenCtxDestroy) destroy = nullptr;
  decltype(&cuGreenCtxStreamCreate) create_stream = nullptr;
  bool found = false;

  GreenContextApi() {
    found = ask("cuDeviceGetDevResource", resource) && ask("cuDevSmResourceSplitByCount", split) &&
            ask("cuDevResourceGenerateDesc", describe) && ask("cuGreenCtxCreate", create) &&
            ask("cuGreenCtxDestroy", destroy) && ask("cuGreenCtxStreamCreate", create_stream);
  }

 private:
  template <class Function>
  [[nodiscard]] static bool ask(const char* name, Function& function) {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t code =
        cudaGetDriverEntryPointByVersion(name, &address, 12050, cudaEnableDefault, &result);
    if (code != cudaSuccess) static_cast<void>(cudaGetLastError());
    if (code != cudaSuccess || result != cudaDriverEntryPointSuccess) return false;
    function = reinterpret_cast<Function>(address);
    return function != nullptr;
  }
};

[[nodiscard]] inline const GreenContextApi& green_contexts() {
  static const GreenContextApi api;
  return api;
}

[[nodiscard]] inline Status driver_status(CUresult code, const char* what) {
  if (code == CUDA_SUCCESS) return {};
  if (code == CUDA_ERROR_NOT_SUPPORTED || code == CUDA_ERROR_INVALID_RESOURCE_TYPE) {
    return codegemm::error(StatusCode::kUnsupported, what, ": the driver has no such parts of a card");
  }
  return Status(StatusCode::kCudaError, codegemm::concat(what, ": driver error ", static_cast<int>(code)),
                static_cast<int>(code));
}

}  // namespace detail

/// Two disjoint parts of a card, each with a stream. Streams of the whole card run beside them as before, on
/// multiprocessors that are idle. Graphs that are captured in a part's stream run on that part. Movable; work
/// in its streams is over before it is destroyed.
class CardSplit {
 public:
  /// A part of at least `multiprocessors`, rounded up to what the card can set apart (eights with compute
  /// capability 9.0), and the rest. `number`: of the device, which is the current one. kInvalidArgument where
  /// either part would be empty; kUnsupported before CUDA 12.5; kCudaError.
  [[nodiscard]] static Result<CardSplit> create(const Device& device, int number, int multiprocessors) {
    const detail::GreenContextApi& api = detail::green_contexts();
    if (!api.found) {
      return codegemm::error(StatusCode::kUnsupported, "CardSplit: the driver has no green contexts");
    }
    if (multiprocessors < 1 || multiprocessors >= device.multiprocessors) {
      return codegemm::error(StatusCode::kInvalidArgument, "CardSplit: ", multiprocessors, " of ",
                             device.multiprocessors, " multiprocessors");
    }
    CUdevResource whole = {};
    if (Status s = detail::driver_status(api.resource(number, &whole, CU_DEV_RESOURCE_TYPE_SM),
                                         "cuDeviceGetDevResource");
        !s.ok()) {
      return s;
    }
    std::array<CUdevResource, 2> parts = {};  // what was asked for, the rest
    unsigned groups = 1;
    if (Status s = detail::driver_status(
            api.split(&parts[0], &groups, &whole, &parts[1], 0, static_cast<unsigned>(multiprocessors)),
            "cuDevSmResourceSplitByCount");
        !s.ok()) {
      return s;
    }
    if (groups != 1 || parts[0].sm.smCount == 0 || parts[1].sm.smCount == 0) {
      return codegemm::error(StatusCode::kInvalidArgument, "CardSplit: ", multiprocessors, " of ",
                             device.multiprocessors, " multiprocessors leave nothing");
    }
    CardSplit out;
    int least = 0;
    int greatest = 0;
    if (Status s = codegemm::cuda::cuda_status(cudaDeviceGetStreamPriorityRange(&least, &greatest),
                                               "cudaDeviceGetStreamPriorityRange");
        !s.ok()) {
      return s;
    }
    for (std::size_t i = 0; i < 2; ++i) {
      // Where something of the whole card runs on the small part, what waits for that part goes first.
      if (Status s = out.make(i, device, number, parts[i], i == 0 ? greatest : least); !s.ok()) return s;
    }
    return out;
  }
  /// `other` is empty then.
  CardSplit(CardSplit&& other) noexcept { swap(other); }
  /// `other` gets what was here.
  CardSplit& operator=(CardSplit&& other) noexcept {
    swap(other);
    return *this;
  }
  CardSplit(const CardSplit&) = delete;
  CardSplit& operator=(const CardSplit&) = delete;
  ~CardSplit() {
    for (std::size_t i = 0; i < 2; ++i) {
      if (parts_[i].stream != nullptr) cudaStreamDestroy(parts_[i].stream);
      if (contexts_[i] != nullptr) static_cast<void>(detail::green_contexts().destroy(contexts_[i]));
    }
  }

  [[nodiscard]] const CardPart& part() const noexcept { return parts_[0]; }  ///< as large as asked for
  [[nodiscard]] const CardPart& rest() const noexcept { return parts_[1]; }  ///< all others

 private:
  CardSplit() = default;

  void swap(CardSplit& other) noexcept {
    std::swap(contexts_, other.contexts_);
    std::swap(parts_, other.parts_);
  }
  [[nodiscard]] Status make(std::size_t i, const Device& device, int number, CUdevResource& resource,
                            int priority) {
    const detail::GreenContextApi& api = detail::green_contexts();
    CUdevResourceDesc description = nullptr;
    if (Status s =
            detail::driver_status(api.describe(&description, &resource, 1), "cuDevResourceGenerateDesc");
        !s.ok()) {
      return s;
    }
    if (Status s = detail::driver_status(
            api.create(&contexts_[i], description, number, CU_GREEN_CTX_DEFAULT_STREAM), "cuGreenCtxCreate");
        !s.ok()) {
      return s;
    }
    CUstream stream = nullptr;
    if (Status s =
            detail::driver_status(api.create_stream(&stream, contexts_[i], CU_STREAM_NON_BLOCKING, priority),
                                  "cuGreenCtxStreamCreate");
        !s.ok()) {
      return s;
    }
    parts_[i].stream = stream;
    parts_[i].device = device;
    parts_[i].device.multiprocessors = static_cast<int>(resource.sm.smCount);
    for (int& clusters : parts_[i].device.clusters) {
      clusters = clusters * parts_[i].device.multiprocessors / device.multiprocessors;
    }
    return {};
  }

  std::array<CUgreenCtx, 2> contexts_ = {};
  std::array<CardPart, 2> parts_;
};

#else

/// Needs CUDA 12.5.
class CardSplit {
 public:
  /// kUnsupported.
  [[nodiscard]] static Result<CardSplit> create(const Device&, int, int) {
    return codegemm::error(StatusCode::kUnsupported,
                           "CardSplit: this program was built without green contexts");
  }
  [[nodiscard]] const CardPart& part() const noexcept { return part_; }  ///< none
  [[nodiscard]] const CardPart& rest() const noexcept { return part_; }  ///< none

 private:
  CardPart part_;
};

#endif

}  // namespace prefillshare::cuda
