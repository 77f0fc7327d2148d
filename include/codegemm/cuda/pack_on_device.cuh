// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/pack_on_device.cuh - canonical weights into the layout of the GPU kernels, made on the GPU:
// the host holds no second copy, and moves no code by itself.
// Layer: cuda (host, needs nvcc).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <codegemm/cuda/device_array.cuh>
#include <codegemm/cuda/kernels/pack.cuh>
#include <codegemm/cuda/launch.cuh>
#include <codegemm/cuda/packed_matrix.hpp>

namespace codegemm::cuda {

/// Packed weights on the device.
struct DevicePackedMatrix {
  DeviceArray<std::byte> bytes;  ///< the same as PackedMatrix::bytes()
  DevicePackedView view;         ///< of them
};

/// pack() on the current device, in the default stream; complete on return. Beside the result it needs the
/// device memory of the largest part's codes and scales for a while. Errors as pack(), and kCudaError.
[[nodiscard]] inline Result<DevicePackedMatrix> pack_on_device(std::span<const QuantizedMatrixView> parts,
                                                               PackOptions options = {}) {
  const auto plan = detail::plan_pack(parts, options);
  if (!plan.ok()) return plan.status();
  const PackedLayout& l = plan->layout;
  auto bytes = DeviceArray<std::byte>::zeros(l.bytes);
  if (!bytes.ok()) return bytes.status();
  DevicePackedMatrix out;
  out.bytes = std::move(bytes).value();
  out.view = {plan->format, plan->rows, plan->cols, l, out.bytes.data(), kPackedVersion, plan->unscale};
  if (l.bytes == 0) return out;

  const auto copy = [](void* to, const void* from, std::size_t size) {
    return size == 0 ? Status()
                     : cuda_status(cudaMemcpy(to, from, size, cudaMemcpyHostToDevice), "cudaMemcpy");
  };
  std::vector<std::byte> codebooks(parts.size() * plan->codebook_values() * sizeof(Half));
  detail::store_codebooks(*plan, parts, codebooks.data());
  if (Status s = copy(out.bytes.data() + l.codebooks_at, codebooks.data(), codebooks.size()); !s.ok())
    return s;

  std::size_t most_codes = 0;
  std::size_t most_scales = 0;
  const auto code_words = [&](const QuantizedMatrixView& w) {
    return static_cast<std::size_t>(canonical_sizes(w.format, w.rows, w.cols)->code_words);
  };
  for (const QuantizedMatrixView& w : parts) {
    most_codes = std::max(most_codes, code_words(w));
    most_scales = std::max(most_scales, plan->scales_of(w).size());
  }
  const auto codes = DeviceArray<std::uint32_t>::create(most_codes);
  if (!codes.ok()) return codes.status();
  const auto scales = DeviceArray<Half>::create(most_scales);
  if (!scales.ok()) return scales.status();
  for (std::size_t part = 0; part < parts.size(); ++part) {
    const QuantizedMatrixView& w = parts[part];
    const auto of_part = plan->scales_of(w);
    if (w.rows == 0) continue;
    // In one stream with the kernels that read what was there before.
    if (Status s = copy(codes->data(), w.codes, code_words(w) * sizeof(std::uint32_t)); !s.ok()) return s;
    if (Status s = copy(scales->data(), of_part.data(), of_part.size_bytes()); !s.ok()) return s;
    PackArgs args;
    args.codes = codes->data();
    args.scales = reinterpret_cast<const __half*>(scales->data());
    args.tiles = reinterpret_cast<unsigned char*>(out.bytes.data() + l.tiles_at) +
                 std::int64_t{l.first_tile[part]} * l.tile_bytes;
    args.row_scales = reinterpret_cast<__half*>(out.bytes.data() + l.row_scales_at) +
                      std::int64_t{l.first_tile[part]} * kTileRows;
    args.granule_bytes = l.row_tiles * l.tile_bytes;
    args.rows = w.rows;
    args.cols = w.cols;
    args.vectors = w.vectors();
    args.words = (w.vectors() + w.format.codes_per_word() - 1) / w.format.codes_per_word();
    args.granules = l.granules;
    args.tile_count = (w.rows + kTileRows - 1) / kTileRows;
    args.group = w.format.g < 0 ? std::max<std::int64_t>(w.cols, 1) : w.format.g;
    args.m = w.format.m;
    args.v = w.format.v;
    args.sets = l.sets;
    args.code_bytes = l.code_bytes;
    args.tile_bytes = l.tile_bytes;
    args.scale_steps = l.scale_steps;
    args.scale_factor = plan->scale_factor;
    LaunchShape shape;
    shape.grid = dim3(1024);
    shape.threads = kPackThreads;
    if (Status s = launch(pack_codes_kernel<0>, shape, args, nullptr); !s.ok()) return s;
    if (of_part.empty()) continue;
    if (Status s = launch(pack_scales_kernel<0>, shape, args, nullptr); !s.ok()) return s;
  }
  if (Status s = cuda_status(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize"); !s.ok()) return s;
  return out;
}

}  // namespace codegemm::cuda
