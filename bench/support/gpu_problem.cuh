// SPDX-License-Identifier: Apache-2.0
//
// bench/support/gpu_problem.cuh - a random quantized matrix on the GPU, often enough to be cold, and how far
// a product with it is off.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/cuda/packed_matrix.hpp>
#include <codegemm/reference.hpp>

#include "gpu_program.hpp"
#include "gpu_timing.cuh"

namespace codegemm::bench {

struct Random {  // splitmix64
  std::uint64_t state;
  std::uint64_t next() {
    std::uint64_t z = state += 0x9E3779B97F4A7C15ULL;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
  }
  float uniform() { return static_cast<float>(next() >> 40) * 0x1p-24F; }
  float normal() {
    float sum = -6.0F;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
};

struct Shape {
  std::int64_t rows;
  std::int64_t cols;

  std::string name() const { return std::to_string(rows) + "x" + std::to_string(cols); }
};

inline Shape parse_shape(const char* text) {
  long long n = 0, k = 0;
  if (std::sscanf(text, "%lldx%lld", &n, &k) != 2) throw std::runtime_error("--shape wants NxK");
  return {n, k};
}

// "--shape NxK" and "--format NAME" of a command line, each as often as wanted.
inline Option shape_option(std::vector<Shape>& to) {
  return Option::value([&to](const char* text) { to.push_back(parse_shape(text)); });
}
inline Option format_option(std::vector<Format>& to) {
  return Option::value([&to](const char* text) {
    const auto format = parse_format(text);
    check(format.status());
    to.push_back(*format);
  });
}

// How many copies of so many bytes no cache holds: 600 MB in all.
inline int cold_copies(std::size_t bytes) {
  return static_cast<int>(std::clamp<std::size_t>(600'000'000 / bytes + 1, 2, 64));
}

// Random codes, centroids and scales; packed, and on the device `copies` times.
class ColdMatrix {
 public:
  // copies 0: as many as make it cold.
  ColdMatrix(Shape shape, Format format, cuda::PackOptions options, int copies)
      : matrix_(draw(shape, format)),
        packed_(pack(matrix_, options)),
        pitch_((packed_.bytes().size() + 255) / 256 * 256),
        copies_(copies > 0 ? copies : cold_copies(packed_.bytes().size())),
        data_(pitch_ * static_cast<std::size_t>(copies_)) {
    const std::size_t bytes = packed_.bytes().size();
    check(cudaMemcpy(data_.data, packed_.bytes().data(), bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
    for (int i = 1; i < copies_; ++i) {
      check(cudaMemcpy(data_.data + pitch_ * static_cast<std::size_t>(i), data_.data, bytes,
                       cudaMemcpyDeviceToDevice),
            "cudaMemcpy");
    }
  }

  const QuantizedMatrix& matrix() const { return matrix_; }
  int copies() const { return copies_; }
  cuda::DevicePackedView view(int i) const {
    return packed_.view(data_.data + pitch_ * static_cast<std::size_t>(i % copies_));
  }

 private:
  static QuantizedMatrix draw(Shape shape, Format format) {
    Random random{static_cast<std::uint64_t>(shape.rows * 1000003 + shape.cols + format.v)};
    auto made = QuantizedMatrix::create(format, shape.rows, shape.cols);
    check(made.status());
    for (std::uint32_t& word : made->codes()) word = static_cast<std::uint32_t>(random.next());
    for (Half& value : made->codebooks()) value = Half::from_float(random.normal());
    for (Half& value : made->scales()) value = Half::from_float(0.01F + 0.02F * random.uniform());
    return std::move(made).value();
  }
  static cuda::PackedMatrix pack(const QuantizedMatrix& matrix, cuda::PackOptions options) {
    auto packed = cuda::pack(matrix.view(), options);
    check(packed.status());
    return std::move(packed).value();
  }

  QuantizedMatrix matrix_;
  cuda::PackedMatrix packed_;
  std::size_t pitch_;
  int copies_;
  Buffer<std::byte> data_;
};

// x, [tokens][cols]. Numbers are drawn once and repeated: a prime number of them, so that tokens differ.
inline std::vector<Half> draw_tokens(std::int64_t tokens, std::int64_t cols) {
  Random random{static_cast<std::uint64_t>(cols)};
  std::vector<Half> x(static_cast<std::size_t>(tokens * cols));
  std::vector<Half> drawn(std::min<std::size_t>(x.size(), 1'000'003));
  for (Half& value : drawn) value = Half::from_float(random.normal());
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = drawn[i % drawn.size()];
  return x;
}

// ||y - ref|| / ||ref|| over some of the rows and tokens, against sums in double over the same quantized
// weights.
inline double error_of(const QuantizedMatrix& w, const std::vector<Half>& x, const std::vector<Half>& y,
                       int tokens) {
  const std::int64_t step = std::max<std::int64_t>(1, w.rows() / 97);
  const int token_step = std::max(1, tokens / 16);
  double off = 0.0;
  double size = 0.0;
  const QuantizedMatrixView view = w.view();
  for (std::int64_t n = 0; n < w.rows(); n += step) {
    std::vector<double> sums(static_cast<std::size_t>(tokens), 0.0);
    for (std::int64_t k = 0; k < w.cols(); ++k) {
      const double weight = reference_weight(view, n, k);
      for (int t = 0; t < tokens; t += token_step) {
        sums[static_cast<std::size_t>(t)] +=
            weight * static_cast<double>(x[static_cast<std::size_t>(t * w.cols() + k)].to_float());
      }
    }
    for (int t = 0; t < tokens; t += token_step) {
      const double want = sums[static_cast<std::size_t>(t)];
      const double d = static_cast<double>(y[static_cast<std::size_t>(t * w.rows() + n)].to_float()) - want;
      off += d * d;
      size += want * want;
    }
  }
  return std::sqrt(off / size);
}

}  // namespace codegemm::bench
