// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/dequantize.cuh - the weights themselves, for what is not a product with them.
// Layer: cuda (host, needs nvcc).
#pragma once

#include <codegemm/cuda/kernels/dequantize.cuh>
#include <codegemm/cuda/launch.cuh>
#include <codegemm/cuda/problem.cuh>

namespace codegemm::cuda {

/// Puts W[N][K] (fp16, bf16 or fp32, any stride) into the stream: every weight summed in fp32 and rounded
/// once. w is device memory of the caller's. kNullPointer, kMisaligned, kShapeMismatch, kInvalidArgument,
/// kIncompatible, kUnsupported or kCudaError.
template <class T>
[[nodiscard]] Status dequantize(const DevicePackedView& packed, MatrixView<T> w, const Device& device,
                                cudaStream_t stream) {
  static_assert(
      detail::ScalarOf<T>::kKnown,
      "codegemm: dequantize T must be float, __half, __nv_bfloat16, codegemm::Half or codegemm::BFloat16");
  if (w.rows != packed.rows || w.cols != packed.cols) {
    return error(StatusCode::kShapeMismatch, "cuda dequantize: w is ", w.rows, " x ", w.cols,
                 ", the packed weights are ", packed.rows, " x ", packed.cols);
  }
  if (w.stride < w.cols) {
    return error(StatusCode::kInvalidArgument, "cuda dequantize: w has stride ", w.stride, ", below its ",
                 w.cols, " columns");
  }
  if (Status status = detail::validate_weights(packed, device); !status.ok()) return status;
  if (w.rows == 0 || w.cols == 0) return {};
  if (w.data == nullptr) return error(StatusCode::kNullPointer, "cuda dequantize: w is null");
  if (!detail::aligned(w.data, sizeof(T))) {
    return error(StatusCode::kMisaligned, "cuda dequantize: w is not aligned to ", sizeof(T), " bytes");
  }
  if (packed.layout.granules > 65535) {
    return error(StatusCode::kUnsupported, "cuda dequantize: K = ", packed.cols, " is beyond a grid");
  }
  DequantizeArgs args;
  const auto* const base = reinterpret_cast<const unsigned char*>(packed.data);
  args.tiles = base + packed.layout.tiles_at;
  args.codebooks = reinterpret_cast<const std::uint16_t*>(base + packed.layout.codebooks_at);
  args.row_scales = reinterpret_cast<const std::uint16_t*>(base + packed.layout.row_scales_at);
  args.w = w.data;
  args.w_stride = w.stride;
  args.rows = static_cast<int>(packed.rows);
  args.cols = static_cast<int>(packed.cols);
  args.row_tiles = static_cast<int>(packed.layout.row_tiles);
  args.part_rows = cut_rows(packed.layout.first_tile, packed.layout.parts, 1, false);
  args.tile_bytes = packed.layout.tile_bytes;
  args.codebook_count = packed.format.m;
  args.sets = packed.layout.sets;
  args.code_bytes = packed.layout.code_bytes;
  args.code_bits = packed.format.b;
  args.scale_steps = packed.layout.scale_steps;
  args.unscale = packed.unscale;
  args.type = detail::ScalarOf<T>::kType;
  LaunchShape shape;
  shape.grid =
      dim3(static_cast<unsigned>(packed.layout.row_tiles), static_cast<unsigned>(packed.layout.granules));
  shape.threads = 256;
  return codegemm::detail::with_vec_len(
      packed.format.v, [&](auto v) { return launch(dequantize_kernel<v>, shape, args, stream); });
}

}  // namespace codegemm::cuda
