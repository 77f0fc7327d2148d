// SPDX-License-Identifier: Apache-2.0
//
// bench/support/cpu_peers.hpp - other people's products on the CPU: Eigen's, OpenBLAS's, ggml's, AQLM's. The
// libraries are loaded when the program runs, and left out where they are not installed.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <Eigen/Dense>

#include <codegemm/base/executor.hpp>
#include <codegemm/base/matrix_view.hpp>
#include <codegemm/base/numerics.hpp>
#include <codegemm/base/text.hpp>
#include <support/random.hpp>

#include "machine.hpp"
#include "peer_process.hpp"
#include "problems.hpp"

namespace codegemm::bench {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr double kColdBytes = 256.0 * 1024 * 1024;

[[nodiscard]] inline Matrix random_matrix(std::int64_t rows, std::int64_t cols, test::Rng& random) {
  Matrix out(rows, cols);
  for (std::int64_t i = 0; i < rows * cols; ++i) out.data()[i] = random.uniform(-1.0F, 1.0F);
  return out;
}

/// Copies of `bytes` bytes that no cache holds together.
[[nodiscard]] inline std::size_t cold_copies(double bytes) {
  return static_cast<std::size_t>(std::max(2.0, std::ceil(kColdBytes / bytes)));
}

/// One loaded library; null where it is not there.
class Library {
 public:
  Library() = default;
  explicit Library(const std::string& path) : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL)) {}
  [[nodiscard]] bool loaded() const { return handle_ != nullptr; }
  template <class Fn>
  [[nodiscard]] Fn* find(const char* name) const {
    return handle_ == nullptr ? nullptr : reinterpret_cast<Fn*>(dlsym(handle_, name));
  }

 private:
  void* handle_ = nullptr;  // stays until the program ends
};

/// fp32 weights, many times.
struct DenseWeights {
  std::vector<Matrix> copies;

  DenseWeights(Shape shape, test::Rng& random) {
    const std::size_t count = cold_copies(4.0 * static_cast<double>(shape.rows * shape.cols));
    for (std::size_t i = 0; i < count; ++i) copies.push_back(random_matrix(shape.rows, shape.cols, random));
  }
};

/// y = x W^T, cut by rows of W among the workers.
inline void multiply_eigen(const Matrix& w, const Matrix& x, Matrix& y, Executor& executor) {
  const std::int64_t parts = executor.workers();
  parallel_for(executor, parts, [&](std::int64_t part, int) {
    const std::int64_t first = w.rows() * part / parts;
    const std::int64_t count = w.rows() * (part + 1) / parts - first;
    if (x.rows() == 1) {
      y.row(0).segment(first, count).transpose().noalias() =
          w.middleRows(first, count) * x.row(0).transpose();
    } else {
      y.middleCols(first, count).noalias() = x * w.middleRows(first, count).transpose();
    }
  });
}

/// Debian's libopenblas0, with its own threads.
class OpenBlas {
 public:
  explicit OpenBlas(int threads) : library_("libopenblas.so.0") {
    if (auto* set = library_.find<void(int)>("openblas_set_num_threads")) set(threads);
    gemv_ = library_.find<Gemv>("cblas_sgemv");
    gemm_ = library_.find<Gemm>("cblas_sgemm");
  }
  [[nodiscard]] bool loaded() const { return gemv_ != nullptr && gemm_ != nullptr; }

  void multiply(const Matrix& w, const Matrix& x, Matrix& y) const {
    constexpr int kRowMajor = 101, kNoTrans = 111, kTrans = 112;
    const auto n = static_cast<int>(w.rows());
    const auto k = static_cast<int>(w.cols());
    const auto t = static_cast<int>(x.rows());
    if (t == 1) {
      gemv_(kRowMajor, kNoTrans, n, k, 1.0F, w.data(), k, x.data(), 1, 0.0F, y.data(), 1);
    } else {
      gemm_(kRowMajor, kNoTrans, kTrans, t, n, k, 1.0F, x.data(), k, w.data(), k, 0.0F, y.data(), n);
    }
  }

 private:
  using Gemv = void(int, int, int, int, float, const float*, int, const float*, int, float, float*, int);
  using Gemm = void(int, int, int, int, int, int, float, const float*, int, const float*, int, float, float*,
                    int);
  Library library_;
  Gemv* gemv_ = nullptr;
  Gemm* gemm_ = nullptr;
};

/// The block formats of llama.cpp, through the ggml libraries of PyPI's llama-cpp-python in folder
/// CODEGEMM_GGML.
class Ggml {
 public:
  struct Type {
    const char* name;
    int id;                       // enum ggml_type
    int block;                    // weights
    int bytes;                    // of a block
    std::vector<int> half_bytes;  // where its fp16 numbers are
  };
  [[nodiscard]] static const std::vector<Type>& types() {
    static const std::vector<Type> all = {{"llama.cpp-q2_k", 10, 256, 84, {80, 82}},
                                          {"llama.cpp-iq2_xs", 17, 256, 74, {0}},
                                          {"llama.cpp-q4_k", 12, 256, 144, {0, 2}},
                                          {"llama.cpp-q4_1", 3, 32, 20, {0, 2}}};
    return all;
  }
  /// Those that llama.cpp's files of 2 to 8 bits are made of.
  [[nodiscard]] static const std::vector<Type>& file_types() {
    static const std::vector<Type> all = {
        {"Q4_0", 2, 32, 18, {0}},      {"Q4_1", 3, 32, 20, {0, 2}},    {"Q5_0", 6, 32, 22, {0}},
        {"Q5_1", 7, 32, 24, {0, 2}},   {"Q8_0", 8, 32, 34, {0}},       {"Q2_K", 10, 256, 84, {80, 82}},
        {"Q3_K", 11, 256, 110, {108}}, {"Q4_K", 12, 256, 144, {0, 2}}, {"Q5_K", 13, 256, 176, {0, 2}},
        {"Q6_K", 14, 256, 210, {208}}, {"IQ2_XS", 17, 256, 74, {0}}};
    return all;
  }

  Ggml() {
    const char* const folder = std::getenv("CODEGEMM_GGML");
    if (folder == nullptr) return;
    base_ = Library(std::string(folder) + "/libggml-base.so");
    cpu_ = Library(std::string(folder) + "/libggml-cpu.so");
    traits_ = base_.find<const Traits*(int)>("ggml_get_type_traits");
    cpu_traits_ = cpu_.find<const CpuTraits*(int)>("ggml_get_type_traits_cpu");
    quantize_ = base_.find<Quantize>("ggml_quantize_chunk");
    if (auto* init = cpu_.find<void()>("ggml_cpu_init"); init != nullptr) init();
  }
  [[nodiscard]] bool loaded() const { return traits_ != nullptr && cpu_traits_ != nullptr; }
  /// Whether requantize() can work; it needs less.
  [[nodiscard]] bool quantizes() const { return traits_ != nullptr && quantize_ != nullptr; }

  /// Weights of one type: random blocks with sane scales, many times.
  struct Weights {
    Shape shape;
    std::int64_t row_bytes;
    std::vector<std::vector<std::uint8_t>> copies;
  };
  /// Nothing where K is not a multiple of the type's block, or the block's size is another than expected.
  [[nodiscard]] std::unique_ptr<Weights> weights(const Type& type, Shape shape, test::Rng& random) const {
    const Traits& traits = *traits_(type.id);
    if (shape.cols % type.block != 0 || traits.block != type.block ||
        traits.size != static_cast<std::size_t>(type.bytes)) {
      return nullptr;
    }
    auto out = std::make_unique<Weights>();
    out->shape = shape;
    out->row_bytes = shape.cols / type.block * type.bytes;
    const auto bytes = static_cast<std::size_t>(shape.rows * out->row_bytes);
    out->copies.resize(cold_copies(static_cast<double>(bytes)));
    for (auto& copy : out->copies) {
      copy.resize(bytes);
      for (std::size_t at = 0; at < bytes; at += sizeof(std::uint64_t)) {
        const std::uint64_t word = random.next();
        std::memcpy(copy.data() + at, &word, std::min(sizeof(word), bytes - at));
      }
      for (std::size_t block = 0; block < bytes; block += static_cast<std::size_t>(type.bytes)) {
        for (const int at : type.half_bytes) {
          const Half scale = Half::from_float(random.uniform(0.01F, 0.02F));
          std::memcpy(copy.data() + block + at, &scale, sizeof(scale));
        }
      }
    }
    return out;
  }

  /// One row of x with every row of W: what ggml's own product of a matrix and a vector does.
  void multiply(const Type& type, const Weights& w, std::size_t copy, const float* x, float* y,
                Executor& executor) const {
    const CpuTraits& traits = *cpu_traits_(type.id);
    const Traits& x_traits = *traits_(traits.vec_dot_type);
    quantized_.resize(static_cast<std::size_t>(w.shape.cols / x_traits.block) * x_traits.size);
    cpu_traits_(traits.vec_dot_type)->from_float(x, quantized_.data(), w.shape.cols);
    constexpr std::int64_t kRows = 64;
    parallel_for(executor, (w.shape.rows + kRows - 1) / kRows, [&](std::int64_t part, int) {
      const std::int64_t end = std::min(w.shape.rows, (part + 1) * kRows);
      for (std::int64_t n = part * kRows; n < end; ++n) {
        traits.vec_dot(static_cast<int>(w.shape.cols), y + n, 0, w.copies[copy].data() + n * w.row_bytes, 0,
                       quantized_.data(), 0, 1);
      }
    });
  }

  /// The relative error of y against ggml's own dequantized weights, in double.
  [[nodiscard]] double error(const Type& type, const Weights& w, const float* x, const float* y) const {
    std::vector<float> row(static_cast<std::size_t>(w.shape.cols));
    double off2 = 0.0;
    double size2 = 0.0;
    for (std::int64_t n = 0; n < w.shape.rows; n += std::max<std::int64_t>(1, w.shape.rows / 64)) {
      traits_(type.id)->to_float(w.copies[0].data() + n * w.row_bytes, row.data(), w.shape.cols);
      double want = 0.0;
      for (std::size_t k = 0; k < row.size(); ++k)
        want += static_cast<double>(row[k]) * static_cast<double>(x[k]);
      const double off = static_cast<double>(y[n]) - want;
      off2 += off * off;
      size2 += want * want;
    }
    return std::sqrt(off2 / size2);
  }

  /// The values of a type's blocks for `weights`, whose inputs matter as importance[cols] says. Blocks go on
  /// over the rows' ends, which no file can have: what the blocks are worth for rows of any length. Nothing
  /// where the weights are not whole blocks. Each block is quantized for itself, so workers share them.
  [[nodiscard]] std::vector<float> requantize(const Type& type, MatrixView<const float> weights,
                                              const std::vector<float>& importance,
                                              Executor& executor) const {
    const std::int64_t count = weights.rows * weights.cols;
    if (quantize_ == nullptr || count % type.block != 0 || weights.stride != weights.cols) return {};
    std::vector<float> tiled;
    for (std::int64_t n = 0; n < weights.rows; ++n)
      tiled.insert(tiled.end(), importance.begin(), importance.end());
    std::vector<std::uint8_t> blocks(static_cast<std::size_t>(count / type.block * type.bytes));
    quantize_(type.id, weights.data, blocks.data(), 0, 1, type.block,
              tiled.data());  // makes the type's tables
    constexpr std::int64_t kBlocks = 64;
    std::atomic<bool> failed = false;
    parallel_for(executor, (count / type.block + kBlocks - 1) / kBlocks, [&](std::int64_t part, int) {
      const std::int64_t first = part * kBlocks * type.block;
      const std::int64_t length = std::min(kBlocks * type.block, count - first);
      std::uint8_t* const to = blocks.data() + first / type.block * type.bytes;
      const auto bytes = static_cast<std::size_t>(length / type.block * type.bytes);
      if (quantize_(type.id, weights.data + first, to, 0, 1, length, tiled.data() + first) != bytes)
        failed = true;
    });
    if (failed) return {};
    std::vector<float> out(static_cast<std::size_t>(count));
    traits_(type.id)->to_float(blocks.data(), out.data(), count);
    return out;
  }

 private:
  using Quantize = std::size_t(int type, const float* from, void* to, std::int64_t start, std::int64_t rows,
                               std::int64_t row_length, const float* importance);
  struct Traits {
    const char* name;
    std::int64_t block;
    std::int64_t interleave;
    std::size_t size;
    bool is_quantized;
    void (*to_float)(const void*, float*, std::int64_t);
    void (*from_float)(const float*, void*, std::int64_t);
  };
  struct CpuTraits {
    void (*from_float)(const float*, void*, std::int64_t);
    void (*vec_dot)(int n, float* out, std::size_t, const void* w, std::size_t, const void* x, std::size_t,
                    int count);
    int vec_dot_type;
    std::int64_t rows;
  };
  Library base_, cpu_;
  const Traits* (*traits_)(int) = nullptr;
  const CpuTraits* (*cpu_traits_)(int) = nullptr;
  Quantize* quantize_ = nullptr;
  mutable std::vector<std::uint8_t> quantized_;
};

/// AQLM's numba kernel in a process of its own, by aqlm_peer.py. Its threads now and then sleep through a
/// tick of the scheduler, and add to the same sums without a lock.
class Aqlm {
 public:
  Aqlm(Shape shape, Format f, int threads)
      : server_(concat("NUMBA_NUM_THREADS=", threads), "aqlm_peer.py",
                concat(shape.rows, ' ', shape.cols, ' ', f.v, ' ', f.m)) {}
  /// Not where it is not installed or its result is wrong.
  [[nodiscard]] bool ready() { return server_.ready(); }
  /// The seconds of so many calls; throws if it has failed.
  [[nodiscard]] std::vector<double> time(std::int64_t calls) {
    std::vector<double> out = server_.ask(calls, static_cast<std::size_t>(calls));
    if (!server_.ready()) throw std::runtime_error("AQLM's process has ended");
    return out;
  }

 private:
  PeerServer server_;
};

}  // namespace codegemm::bench
