// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/cublas_products.cuh - products of few tokens by cuBLAS, each by the algorithm that was
// fastest when all that cuBLAS proposes were tried.
// Layer: cuda (host, needs nvcc and cuBLAS).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <codegemm/cuda/cublas.cuh>
#include <codegemm/cuda/device_array.cuh>

namespace codegemm::cuda {

/// y = x W^T, or y += x W^T; sums are fp32. W is [rows][cols], x [tokens][cols], y [tokens][rows], all with
/// rows that lie together.
struct CublasProduct {
  std::int64_t rows = 0;               ///< of W
  std::int64_t cols = 0;               ///< of W
  std::int64_t tokens = 0;             ///< rows of x and y
  cudaDataType_t type = CUDA_R_16F;    ///< of W and x
  cudaDataType_t y_type = CUDA_R_16F;  ///< of y
  bool adds = false;                   ///< y += instead of y =

  /// The same product.
  friend bool operator==(const CublasProduct&, const CublasProduct&) = default;
};

/// Products whose algorithm was chosen by trying. One thread at a time; in one stream at a time, since they
/// share a workspace.
class CublasProducts {
 public:
  /// kCudaError, kOutOfMemory.
  [[nodiscard]] static Result<std::unique_ptr<CublasProducts>> create() {
    std::unique_ptr<CublasProducts> out(new CublasProducts());
    auto memory = DeviceArray<std::byte>::create(kWorkspace);
    if (!memory.ok()) return memory.status();
    out->memory_ = std::move(memory).value();
    cublasLtHandle_t handle = nullptr;
    if (Status s = Cublas::status_of(cublasLtCreate(&handle), "cublasLtCreate"); !s.ok()) return s;
    out->handle_.reset(handle);
    return out;
  }

  /// Whether run() has an algorithm for such a product.
  [[nodiscard]] bool has(const CublasProduct& p) const { return find(p) != nullptr; }

  /// Tries every algorithm that cuBLAS proposes for `p` on `weights` in turn (matrices of p.rows * p.cols
  /// elements each; more of them than the second-level cache holds, as a model's layers are) and keeps the
  /// fastest. Waits for the stream, which is neither captured nor the default one. What is at y is lost.
  /// kUnsupported where cuBLAS has none; kCudaError.
  [[nodiscard]] Status search(const CublasProduct& p, std::span<const void* const> weights, const void* x,
                              void* y, cudaStream_t stream) {
    if (has(p) || weights.empty()) return {};
    auto made = Call::create(p);
    if (!made.ok()) return made.status();
    Call call = std::move(made).value();
    Handle<cublasLtMatmulPreference_t> preference;
    cublasLtMatmulPreference_t raw = nullptr;
    if (Status s = Cublas::status_of(cublasLtMatmulPreferenceCreate(&raw), "cublasLtMatmulPreferenceCreate");
        !s.ok())
      return s;
    preference.reset(raw);
    double best = 0.0;
    // Without a workspace there are others, too.
    for (const std::size_t workspace : {kWorkspace, std::size_t{0}}) {
      if (Status s = Cublas::status_of(
              cublasLtMatmulPreferenceSetAttribute(raw, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                                   sizeof(workspace)),
              "cublasLtMatmulPreferenceSetAttribute");
          !s.ok())
        return s;
      cublasLtMatmulHeuristicResult_t proposed[kProposals];
      int count = 0;
      if (cublasLtMatmulAlgoGetHeuristic(handle_.get(), call.product.get(), call.w.get(), call.x.get(),
                                         call.y.get(), call.y.get(), raw, kProposals, proposed,
                                         &count) != CUBLAS_STATUS_SUCCESS)
        continue;
      for (int i = 0; i < count; ++i) {
        if (proposed[i].state != CUBLAS_STATUS_SUCCESS) continue;
        call.algorithm = proposed[i].algo;
        const Result<double> time = time_of(call, weights, x, y, stream);
        if (!time.ok()) return time.status();
        if (*time <= 0.0 || (best > 0.0 && *time >= best)) continue;
        best = *time;
        call.best = call.algorithm;
      }
    }
    if (best == 0.0) {
      return error(StatusCode::kUnsupported, "cuBLAS has no algorithm for ", p.tokens, " rows times ", p.rows,
                   " x ", p.cols);
    }
    call.algorithm = call.best;
    calls_.push_back(std::move(call));
    return {};
  }

  /// Puts the product into the stream. kUnsupported where has() says no; kCudaError.
  [[nodiscard]] Status run(const CublasProduct& p, const void* w, const void* x, void* y,
                           cudaStream_t stream) const {
    const Call* const call = find(p);
    if (call == nullptr) {
      return error(StatusCode::kUnsupported, "no algorithm was searched for ", p.tokens, " rows times ",
                   p.rows, " x ", p.cols);
    }
    return Cublas::status_of(start(*call, w, x, y, stream), "cublasLtMatmul");
  }

 private:
  static constexpr std::size_t kWorkspace = std::size_t{32} << 20;  // what cuBLAS advises for Hopper
  static constexpr int kProposals = 64;

  struct Destroy {
    void operator()(cublasLtHandle_t handle) const { cublasLtDestroy(handle); }
    void operator()(cublasLtMatmulDesc_t product) const { cublasLtMatmulDescDestroy(product); }
    void operator()(cublasLtMatrixLayout_t layout) const { cublasLtMatrixLayoutDestroy(layout); }
    void operator()(cublasLtMatmulPreference_t preference) const {
      cublasLtMatmulPreferenceDestroy(preference);
    }
    void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
    void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
    void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
  };
  template <class Pointer>
  using Handle = std::unique_ptr<std::remove_pointer_t<Pointer>, Destroy>;
  using Layout = Handle<cublasLtMatrixLayout_t>;

  // cuBLAS counts columns first: y^T = W x^T, each row-major matrix being a column-major transpose.
  struct Call {
    CublasProduct of;
    Handle<cublasLtMatmulDesc_t> product;
    Layout w, x, y;
    cublasLtMatmulAlgo_t algorithm = {};
    cublasLtMatmulAlgo_t best = {};

    [[nodiscard]] static Result<Call> create(const CublasProduct& p) {
      Call out;
      out.of = p;
      cublasLtMatmulDesc_t product = nullptr;
      Status status = Cublas::status_of(cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                                        "cublasLtMatmulDescCreate");
      if (!status.ok()) return status;
      out.product.reset(product);
      const cublasOperation_t transposed = CUBLAS_OP_T;
      static_cast<void>(
          status = Cublas::status_of(cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSA,
                                                                    &transposed, sizeof(transposed)),
                                     "cublasLtMatmulDescSetAttribute"));
      if (!status.ok()) return status;
      const auto layout = [&](Layout& to, cudaDataType_t type, std::int64_t rows, std::int64_t cols) {
        if (!status.ok()) return;
        cublasLtMatrixLayout_t made = nullptr;
        status = Cublas::status_of(cublasLtMatrixLayoutCreate(&made, type, static_cast<std::uint64_t>(rows),
                                                              static_cast<std::uint64_t>(cols), rows),
                                   "cublasLtMatrixLayoutCreate");
        to.reset(made);
      };
      layout(out.w, p.type, p.cols, p.rows);
      layout(out.x, p.type, p.cols, p.tokens);
      layout(out.y, p.y_type, p.rows, p.tokens);
      if (!status.ok()) return status;
      return out;
    }
  };

  CublasProducts() = default;

  [[nodiscard]] const Call* find(const CublasProduct& p) const {
    const auto at = std::find_if(calls_.begin(), calls_.end(), [&](const Call& c) { return c.of == p; });
    return at == calls_.end() ? nullptr : &*at;
  }
  [[nodiscard]] cublasStatus_t start(const Call& c, const void* w, const void* x, void* y,
                                     cudaStream_t stream) const {
    const float alpha = 1.0F;
    const float beta = c.of.adds ? 1.0F : 0.0F;
    return cublasLtMatmul(handle_.get(), c.product.get(), &alpha, w, c.w.get(), x, c.x.get(), &beta, y,
                          c.y.get(), y, c.y.get(), &c.algorithm, memory_.data(), memory_.bytes(), stream);
  }
  // Seconds of all weights in turn, the best of three; 0: it does not run. As a graph: the host takes as long
  // to start a small product as the card to make it.
  [[nodiscard]] Result<double> time_of(const Call& c, std::span<const void* const> weights, const void* x,
                                       void* y, cudaStream_t stream) const {
    if (Status s = cuda_status(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
                               "cudaStreamBeginCapture");
        !s.ok())
      return s;
    bool runs = true;
    for (const void* const w : weights) runs = runs && start(c, w, x, y, stream) == CUBLAS_STATUS_SUCCESS;
    cudaGraph_t captured = nullptr;
    runs = cudaStreamEndCapture(stream, &captured) == cudaSuccess && runs;
    const Handle<cudaGraph_t> graph(captured);
    cudaGraphExec_t made = nullptr;
    runs = runs && cudaGraphInstantiate(&made, captured, 0) == cudaSuccess;
    const Handle<cudaGraphExec_t> steps(made);
    if (!runs) {
      static_cast<void>(cudaGetLastError());
      return 0.0;
    }
    Handle<cudaEvent_t> from, to;
    for (auto* event : {&from, &to}) {
      cudaEvent_t one = nullptr;
      if (Status s = cuda_status(cudaEventCreate(&one), "cudaEventCreate"); !s.ok()) return s;
      event->reset(one);
    }
    double best = 0.0;
    for (int turn = 0; turn < 4; ++turn) {
      float milliseconds = 0.0F;
      Status status = cuda_status(cudaEventRecord(from.get(), stream), "cudaEventRecord");
      const auto then = [&](cudaError_t code, const char* what) {
        if (status.ok()) status = cuda_status(code, what);
      };
      then(cudaGraphLaunch(steps.get(), stream), "cudaGraphLaunch");
      then(cudaEventRecord(to.get(), stream), "cudaEventRecord");
      then(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
      then(cudaEventElapsedTime(&milliseconds, from.get(), to.get()), "cudaEventElapsedTime");
      if (!status.ok()) return status;
      const double seconds = static_cast<double>(milliseconds) * 1e-3;
      if (turn > 0 && (best == 0.0 || seconds < best)) best = seconds;
    }
    return best;
  }

  Handle<cublasLtHandle_t> handle_;
  mutable DeviceArray<std::byte> memory_;
  std::vector<Call> calls_;
};

}  // namespace codegemm::cuda
