// SPDX-License-Identifier: Apache-2.0
//
// examples/01_codegemm_cpu.cpp - quantize a matrix to 2 bits a weight and multiply with it.

#include <cstddef>
#include <cstdio>

#include <Eigen/Dense>
#include <codegemm/gemm.hpp>
#include <codegemm/quantize/kmeans.hpp>

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

int main() {
  const Matrix w = Matrix::Random(1024, 512);  // 1024 outputs, 512 inputs
  const Matrix x = Matrix::Random(3, 512);     // 3 tokens
  Matrix y(3, 1024);

  // [guide: quantize]
  codegemm::SerialExecutor executor;
  const auto format = codegemm::parse_format("m1v4g128").value();
  const auto quantized = codegemm::quantize_kmeans({w.data(), 1024, 512}, format, {}, executor).value();
  const auto packed = codegemm::pack(quantized.view()).value();
  // [guide: end]

  // [guide: multiply]
  codegemm::AlignedBuffer<std::byte> workspace;
  if (!workspace.reserve(codegemm::workspace_bytes(packed, 3, executor.workers()))) return 1;

  const codegemm::Status status =
      codegemm::gemm(packed, {x.data(), 3, 512}, {y.data(), 3, 1024}, workspace.span(), executor);
  if (!status.ok()) return std::puts(status.message().c_str()), 1;
  // [guide: end]

  const Matrix dense = x * w.transpose();
  std::printf("%.3f bits a weight, relative error %.3f\n", codegemm::bits_per_weight(format, 1024, 512),
              static_cast<double>((y - dense).norm() / dense.norm()));
}
