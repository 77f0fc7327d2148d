// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/gpu.cuh - device buffers with guards, streams, random quantized matrices, and the
// comparison.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <codegemm/base/numerics.hpp>
#include <codegemm/cuda/device.cuh>
#include <codegemm/cuda/packed_matrix.hpp>
#include <codegemm/quantized_matrix.hpp>
#include <codegemm/reference.hpp>
#include <support/catch.hpp>
#include <support/quantized.hpp>
#include <support/random.hpp>

namespace codegemm::test {

#define REQUIRE_CUDA(call) REQUIRE(cudaGetErrorName(call) == std::string("cudaSuccess"))

/// Fails with the status's text. Not in a template: with Catch2 3, nvcc's device compiler never ends on INFO
/// in one.
inline void require_ok(const Status& status) {
  INFO(status.message());
  REQUIRE(status.ok());
}

/// The first GPU, or the test is skipped in plain sight.
[[nodiscard]] inline cuda::Device gpu_or_skip() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) TEST_SKIP("no GPU");
  const auto device = cuda::query_device(0);
  REQUIRE(device.ok());
  if (device->arch < 80) TEST_SKIP("the GPU's compute capability is below 8.0");
  return *device;
}

/// What there must be, or the test fails with the status's text.
template <class U>
[[nodiscard]] U take(Result<U> made) {
  require_ok(made.status());
  return std::move(made).value();
}

/// One that does not wait for the default stream.
struct Stream {
  cudaStream_t get = nullptr;
  Stream() { REQUIRE_CUDA(cudaStreamCreateWithFlags(&get, cudaStreamNonBlocking)); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(get); }
};

[[nodiscard]] inline int gpu_count() {
  int count = 0;
  REQUIRE_CUDA(cudaGetDeviceCount(&count));
  return count;
}

/// Device memory with a guard on both sides that must stay as it is.
template <class T>
class DeviceBuffer {
 public:
  explicit DeviceBuffer(std::size_t size) : size_(size) {
    REQUIRE_CUDA(cudaMalloc(&base_, bytes() + 2 * kGuard));
    REQUIRE_CUDA(cudaMemset(base_, kPattern, bytes() + 2 * kGuard));
  }
  explicit DeviceBuffer(const std::vector<T>& values) : DeviceBuffer(values.size()) { upload(values); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() { cudaFree(base_); }

  [[nodiscard]] T* data() { return reinterpret_cast<T*>(base_ + kGuard); }
  [[nodiscard]] std::size_t size() const { return size_; }
  void upload(const std::vector<T>& values) {
    REQUIRE(values.size() == size_);
    REQUIRE_CUDA(cudaMemcpy(data(), values.data(), bytes(), cudaMemcpyHostToDevice));
  }
  /// Every byte becomes 0xFF: a NaN in every floating-point type.
  void poison() { fill(0xFF); }
  void clear() { fill(0); }
  [[nodiscard]] std::vector<T> download() {
    std::vector<T> out(size_);
    REQUIRE_CUDA(cudaMemcpy(out.data(), data(), bytes(), cudaMemcpyDeviceToHost));
    return out;
  }
  [[nodiscard]] bool guards_intact() {
    std::vector<unsigned char> guard(2 * kGuard);
    REQUIRE_CUDA(cudaMemcpy(guard.data(), base_, kGuard, cudaMemcpyDeviceToHost));
    REQUIRE_CUDA(cudaMemcpy(guard.data() + kGuard, base_ + kGuard + bytes(), kGuard, cudaMemcpyDeviceToHost));
    for (const unsigned char byte : guard) {
      if (byte != kPattern) return false;
    }
    return true;
  }

 private:
  static constexpr std::size_t kGuard = 1024;
  static constexpr unsigned char kPattern = 0xA5;
  [[nodiscard]] std::size_t bytes() const { return size_ * sizeof(T); }
  // Waits: cudaMemset returns before it is done, and a non-blocking stream does not wait for it.
  void fill(int byte) {
    REQUIRE_CUDA(cudaMemset(data(), byte, bytes()));
    REQUIRE_CUDA(cudaDeviceSynchronize());
  }
  std::size_t size_ = 0;
  std::byte* base_ = nullptr;
};

template <class T>
[[nodiscard]] std::vector<T> random_vector(std::size_t size, Rng& rng) {
  std::vector<T> out(size);
  for (T& value : out) {
    if constexpr (std::is_same_v<T, float>) {
      value = rng.normal();
    } else {
      value = T::from_float(rng.normal());
    }
  }
  return out;
}

[[nodiscard]] inline float as_float(float value) { return value; }
[[nodiscard]] inline float as_float(Half value) { return value.to_float(); }
[[nodiscard]] inline float as_float(BFloat16 value) { return value.to_float(); }

template <class T>
[[nodiscard]] constexpr double rounding_of() {
  return std::is_same_v<T, float> ? 0x1p-24 : std::is_same_v<T, Half> ? 0x1p-11 : 0x1p-8;
}

/// Packed weights on the device, one matrix or several merged, with the host's copies of the canonical ones.
struct DeviceWeights {
  std::vector<QuantizedMatrix> parts;
  cuda::PackedMatrix packed;
  DeviceBuffer<std::byte> buffer;

  explicit DeviceWeights(std::vector<QuantizedMatrix> matrices, cuda::PackOptions options = {})
      : parts(std::move(matrices)), packed(pack_or_fail(parts, options)), buffer(packed.bytes().size()) {
    REQUIRE_CUDA(
        cudaMemcpy(buffer.data(), packed.bytes().data(), packed.bytes().size(), cudaMemcpyHostToDevice));
  }
  explicit DeviceWeights(QuantizedMatrix m, cuda::PackOptions options = {})
      : DeviceWeights(one(std::move(m)), options) {}
  [[nodiscard]] cuda::DevicePackedView view() { return packed.view(buffer.data()); }

 private:
  [[nodiscard]] static std::vector<QuantizedMatrix> one(QuantizedMatrix m) {
    std::vector<QuantizedMatrix> out;
    out.push_back(std::move(m));
    return out;
  }
  [[nodiscard]] static cuda::PackedMatrix pack_or_fail(const std::vector<QuantizedMatrix>& parts,
                                                       cuda::PackOptions options) {
    std::vector<QuantizedMatrixView> views;
    for (const QuantizedMatrix& part : parts) views.push_back(part.view());
    auto packed = cuda::pack(std::span<const QuantizedMatrixView>(views), options);
    require_ok(packed.status());
    return std::move(packed).value();
  }
};

/// y = x W^T + bias in double, and the sum of the sizes of its terms, which bounds the error of an fp32 sum.
struct Reference {
  std::vector<double> y;     // [T][N]
  std::vector<double> size;  // [T][N]
};

template <class X>
[[nodiscard]] Reference reference_of(const QuantizedMatrix& w, const std::vector<X>& x, std::int64_t tokens,
                                     std::int64_t stride) {
  Reference out;
  out.y.assign(static_cast<std::size_t>(tokens * w.rows()), 0.0);
  out.size = out.y;
  const QuantizedMatrixView view = w.view();
  std::vector<double> values(static_cast<std::size_t>(tokens * w.cols()));
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t k = 0; k < w.cols(); ++k) {
      values[static_cast<std::size_t>(t * w.cols() + k)] =
          static_cast<double>(as_float(x[static_cast<std::size_t>(t * stride + k)]));
    }
  }
  std::vector<double> row(static_cast<std::size_t>(w.cols()));
  for (std::int64_t n = 0; n < w.rows(); ++n) {
    for (std::int64_t k = 0; k < w.cols(); ++k)
      row[static_cast<std::size_t>(k)] = reference_weight(view, n, k);
    for (std::int64_t t = 0; t < tokens; ++t) {
      double sum = 0.0;
      double size = 0.0;
      for (std::size_t k = 0; k < row.size(); ++k) {
        const double term = row[k] * values[static_cast<std::size_t>(t) * row.size() + k];
        sum += term;
        size += std::abs(term);
      }
      out.y[static_cast<std::size_t>(t * w.rows() + n)] = sum;
      out.size[static_cast<std::size_t>(t * w.rows() + n)] = size;
    }
  }
  return out;
}

/// The same for matrices merged along N.
template <class X>
[[nodiscard]] Reference reference_of(const std::vector<QuantizedMatrix>& parts, const std::vector<X>& x,
                                     std::int64_t tokens, std::int64_t stride) {
  std::int64_t rows = 0;
  for (const QuantizedMatrix& part : parts) rows += part.rows();
  Reference out;
  out.y.resize(static_cast<std::size_t>(tokens * rows));
  out.size = out.y;
  std::int64_t first = 0;
  for (const QuantizedMatrix& part : parts) {
    const Reference of_part = reference_of(part, x, tokens, stride);
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (std::int64_t n = 0; n < part.rows(); ++n) {
        const auto from = static_cast<std::size_t>(t * part.rows() + n);
        const auto to = static_cast<std::size_t>(t * rows + first + n);
        out.y[to] = of_part.y[from];
        out.size[to] = of_part.size[from];
      }
    }
    first += part.rows();
  }
  return out;
}

/// silu(first half of the rows) * second half; the sizes are those of the errors that come through.
[[nodiscard]] inline Reference swiglu_of(const Reference& both, std::int64_t tokens, std::int64_t rows) {
  Reference out;
  const std::int64_t half = rows / 2;
  out.y.resize(static_cast<std::size_t>(tokens * half));
  out.size = out.y;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t n = 0; n < half; ++n) {
      const auto g = static_cast<std::size_t>(t * rows + n);
      const auto u = static_cast<std::size_t>(t * rows + half + n);
      const double silu = both.y[g] / (1.0 + std::exp(-both.y[g]));
      const auto to = static_cast<std::size_t>(t * half + n);
      out.y[to] = silu * both.y[u];
      // silu is nowhere steeper than 1.1; its own exponential function rounds a few times.
      out.size[to] = 1.1 * std::abs(both.y[u]) * both.size[g] + std::abs(silu) * both.size[u] +
                     std::abs(both.y[u]) * std::abs(both.y[g]);
    }
  }
  return out;
}

/// The element that is furthest off, as a multiple of what it may be off: at most 1 passes. NaN counts as
/// infinite. Each weight may have been rounded by weight_rounding.
template <class Y>
[[nodiscard]] double worst(const Reference& want, const std::vector<Y>& got, std::int64_t tokens,
                           std::int64_t rows, std::int64_t stride, std::int64_t cols,
                           double weight_rounding = 0.0) {
  double out = 0.0;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t n = 0; n < rows; ++n) {
      const auto i = static_cast<std::size_t>(t * rows + n);
      const double y = static_cast<double>(as_float(got[static_cast<std::size_t>(t * stride + n)]));
      // The centroids' codebook sums, their sum over K in any order, one rounding of the output, and its
      // underflow.
      const double bound =
          1.01 * rounding_of<Y>() * std::abs(want.y[i]) + 1e-7 +
          ((16.0 + std::sqrt(static_cast<double>(cols))) * 0x1p-24 + weight_rounding) * want.size[i];
      const double off = std::abs(y - want.y[i]) / bound;
      out = off <= out ? out : (off > out ? off : HUGE_VAL);
    }
  }
  return out;
}

/// ||want||.
[[nodiscard]] inline double norm(const Reference& want) {
  double size = 0.0;
  for (const double y : want.y) size += y * y;
  return std::sqrt(size);
}

/// ||got - want|| / size, or / ||want||.
template <class Y>
[[nodiscard]] double relative_error(const Reference& want, const std::vector<Y>& got, std::int64_t tokens,
                                    std::int64_t rows, std::int64_t stride, double size = 0.0) {
  double off = 0.0;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t n = 0; n < rows; ++n) {
      const double y = want.y[static_cast<std::size_t>(t * rows + n)];
      const double d = static_cast<double>(as_float(got[static_cast<std::size_t>(t * stride + n)])) - y;
      off += d * d;
    }
  }
  return std::sqrt(off) / (size > 0.0 ? size : norm(want));
}

}  // namespace codegemm::test
