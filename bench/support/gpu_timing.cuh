// SPDX-License-Identifier: Apache-2.0
//
// bench/support/gpu_timing.cuh - what the suites on a GPU share: device memory, times of captured graphs, and
// the bandwidth that the card reaches.
#pragma once

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include <codegemm/base/status.hpp>
#include <codegemm/cuda/device.cuh>

#include "machine.hpp"

namespace codegemm::bench {

inline void check(cudaError_t code, const char* what) {
  if (code != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(code));
}
inline void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}

template <class T>
struct Buffer {
  T* data = nullptr;
  explicit Buffer(std::size_t count) {
    check(cudaMalloc(&data, std::max<std::size_t>(count * sizeof(T), 256)), "cudaMalloc");
  }
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
    check(cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data); }
};

// `launches` launches as one graph: enqueue(i) puts launch i into the stream.
class Replay {
 public:
  template <class Enqueue>
  Replay(cudaStream_t stream, int launches, Enqueue&& enqueue) : stream_(stream), launches_(launches) {
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    for (int i = 0; i < launches; ++i) enqueue(i);
    check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    const cudaError_t made = cudaGraphInstantiate(&exec_, graph, 0);
    check(cudaGraphDestroy(graph), "cudaGraphDestroy");
    check(made, "cudaGraphInstantiate");
  }
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;
  ~Replay() { cudaGraphExecDestroy(exec_); }

  int launches() const { return launches_; }
  void enqueue() const { check(cudaGraphLaunch(exec_, stream_), "cudaGraphLaunch"); }
  void wait() const { check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

 private:
  cudaStream_t stream_;
  int launches_;
  cudaGraphExec_t exec_ = nullptr;
};

// Median time of one launch in microseconds, of `launches` in a graph.
template <class Enqueue>
double time_us(cudaStream_t stream, int launches, int replays, Enqueue&& enqueue) {
  const Replay graph(stream, launches, enqueue);
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start), "cudaEventCreate");
  check(cudaEventCreate(&stop), "cudaEventCreate");
  std::vector<double> times;
  for (int i = 0; i < replays + 3; ++i) {
    check(cudaEventRecord(start, stream), "cudaEventRecord");
    graph.enqueue();
    check(cudaEventRecord(stop, stream), "cudaEventRecord");
    check(cudaEventSynchronize(stop), "cudaEventSynchronize");
    float ms = 0.0F;
    check(cudaEventElapsedTime(&ms, start, stop), "cudaEventElapsedTime");
    if (i >= 3) times.push_back(static_cast<double>(ms) * 1e3 / launches);
  }
  check(cudaEventDestroy(start), "cudaEventDestroy");
  check(cudaEventDestroy(stop), "cudaEventDestroy");
  return median(times);
}

template <int>  // a template: one definition, however many files include this
__global__ void read_kernel(const uint4* data, std::size_t count, unsigned* sink) {
  unsigned sum = 0;
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * blockDim.x;
  std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * step < count; i += 4 * step) {
    const uint4 a = __ldcs(data + i), b = __ldcs(data + i + step), c = __ldcs(data + i + 2 * step),
                d = __ldcs(data + i + 3 * step);
    sum += a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
  }
  for (; i < count; i += step) sum += data[i].x;
  if (sum == 0x12345678U) *sink = sum;
}

// What the card copies and reads.
inline MemorySpeed measure_bandwidth(cudaStream_t stream, int multiprocessors) {
  constexpr std::size_t kBytes = std::size_t{4} << 30;
  Buffer<unsigned char> a(kBytes);
  Buffer<unsigned> sink(1);
  check(cudaMemset(a.data, 0x5A, kBytes), "cudaMemset");
  const double copy = time_us(stream, 1, 9, [&](int) {
    check(cudaMemcpyAsync(a.data + kBytes / 2, a.data, kBytes / 2, cudaMemcpyDeviceToDevice, stream),
          "cudaMemcpyAsync");
  });
  double read = 1e30;
  for (const int blocks : {2, 4, 8, 16}) {
    read = std::min(read, time_us(stream, 1, 9, [&](int) {
                      read_kernel<0><<<static_cast<unsigned>(multiprocessors * blocks), 512, 0, stream>>>(
                          reinterpret_cast<const uint4*>(a.data), kBytes / 16, sink.data);
                    }));
  }
  MemorySpeed out;
  out.copy_gb_per_s = static_cast<double>(kBytes) / copy * 1e-3;
  out.read_gb_per_s = static_cast<double>(kBytes) / read * 1e-3;
  return out;
}

// "NVIDIA H100 80GB HBM3, 132 multiprocessors, CUDA 13.0, driver for 13.0"
inline std::string describe_card(const cuda::Device& device) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  int driver = 0;
  int runtime = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  return concat(properties.name, ", ", device.multiprocessors, " multiprocessors, CUDA ", runtime / 1000, '.',
                runtime % 1000 / 10, ", driver for ", driver / 1000, '.', driver % 1000 / 10);
}

}  // namespace codegemm::bench
