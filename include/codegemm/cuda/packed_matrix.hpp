// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/packed_matrix.hpp - weights in the layout of the GPU kernels: made on the host, once.
// Layer: cuda (host only, no CUDA headers).
// See: examples/04_codegemm_cuda.cu
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>

#include <codegemm/base/aligned_buffer.hpp>
#include <codegemm/base/numerics.hpp>
#include <codegemm/base/status.hpp>
#include <codegemm/cuda/block/row_slot.hpp>
#include <codegemm/format.hpp>
#include <codegemm/quantized_matrix.hpp>

namespace codegemm::cuda {

/// Goes up with every change of the layout below; a view of another version is refused.
inline constexpr int kPackedVersion = 1;
inline constexpr int kTileRows = 16;

/// Where everything lies in the buffer of a packed matrix.
///
/// A *granule* is what 32 lanes own along K: lane l has the `sets / m` vectors from l * sets / m on, and
/// their codes of all m codebooks are its columns p = 0 .. sets - 1 (vector l * sets / m + p / m, codebook p
/// % m). A *tile* is 16 rows of a granule: [sets][32 lanes][16 slots] codes of a byte each, slot
/// row_slot(lane, row), then the scales [32 lanes][16 >> scale_steps] in fp16, since groups of 2^scale_steps
/// lanes share a scale and are summed first. Tiles lie in the order [granule][row tile]. What is beyond N or
/// K is 0.
struct PackedLayout {
  int sets = 0;
  int scale_steps = 0;  // 0..4, or 5: one scale a row, kept beside the tiles
  std::int64_t granules = 0;
  std::int64_t row_tiles = 0;
  int tile_bytes = 0;
  std::size_t codebooks_at = 0;   // fp16 [m][2^b][v]
  std::size_t row_scales_at = 0;  // fp16 [N], if scale_steps is 5
  std::size_t tiles_at = 0;
  std::size_t bytes = 0;
};

/// What pack() may be told.
struct PackOptions {
  int sets = 0;  ///< columns that a lane owns in a granule: a multiple of m up to 4; 0: by format and size
};

/// The layout for an N x K matrix. kUnsupported: b over 8, which a Psumbook is not for.
[[nodiscard]] inline Result<PackedLayout> packed_layout(Format f, std::int64_t rows, std::int64_t cols,
                                                        PackOptions options = {}) {
  if (const auto sizes = canonical_sizes(f, rows, cols); !sizes.ok()) return sizes.status();
  if (f.b > kMaxPsumbookCodeBits) {
    return error(StatusCode::kUnsupported, "cuda pack: b = ", f.b,
                 ", but the kernels for few tokens need b <= ", kMaxPsumbookCodeBits);
  }
  // Kernels count rows, columns and tiles in 32 bits.
  constexpr std::int64_t kMaxSide = std::int64_t{1} << 30;
  if (rows > kMaxSide || cols > kMaxSide) {
    return error(StatusCode::kUnsupported, "cuda pack: shape ", rows, " x ", cols, " has a side over ",
                 kMaxSide);
  }
  const bool one_scale = f.scale_groups(cols) <= 1;
  PackedLayout out;
  const auto fits = [&](int sets) {  // one scale for all that a lane owns
    return sets % f.m == 0 && (one_scale || f.g % (sets / f.m * f.v) == 0);
  };
  // More columns a lane: fewer sums over lanes for a product. Four is what a multiprocessor's shared memory
  // holds.
  out.sets = fits(4) ? 4 : fits(2) ? 2 : f.m;
  if (options.sets != 0) {
    if (options.sets < 0 || options.sets > 4 || !fits(options.sets)) {
      return error(StatusCode::kInvalidArgument, "cuda pack: ", options.sets, " columns a lane do not fit ",
                   format_name(f));
    }
    out.sets = options.sets;
  }
  const int lane_span = out.sets / f.m * f.v;  // k that a lane owns
  out.scale_steps = 5;
  if (!one_scale) {
    out.scale_steps = 0;
    while (out.scale_steps < 4 && f.g % (lane_span << (out.scale_steps + 1)) == 0) ++out.scale_steps;
  }
  out.granules = (cols + 32 * lane_span - 1) / (32 * lane_span);
  out.row_tiles = (rows + kTileRows - 1) / kTileRows;
  out.tile_bytes = out.sets * 512 + (one_scale ? 0 : 1024 >> out.scale_steps);
  const auto aligned = [](std::size_t n) { return (n + 255) / 256 * 256; };
  out.row_scales_at = aligned(static_cast<std::size_t>(f.m * f.centroids() * f.v) * sizeof(Half));
  out.tiles_at = aligned(out.row_scales_at + (one_scale ? static_cast<std::size_t>(rows) * sizeof(Half) : 0));
  out.bytes = out.tiles_at + static_cast<std::size_t>(out.granules * out.row_tiles * out.tile_bytes);
  return out;
}

/// Packed weights in device memory, passed to calls by value. Owns nothing; `data` is 256-byte aligned.
struct DevicePackedView {
  Format format;
  std::int64_t rows = 0;  // N
  std::int64_t cols = 0;  // K
  PackedLayout layout;
  const std::byte* data = nullptr;  // [layout.bytes], device memory
  int version = 0;
};
static_assert(std::is_trivially_copyable_v<DevicePackedView>, "DevicePackedView is passed by value");

/// Packed weights in host memory, to be copied as they are: bytes() into device memory of the caller's, whose
/// address then makes a view. May be freed after the copy.
class PackedMatrix {
 public:
  [[nodiscard]] Format format() const noexcept { return format_; }
  [[nodiscard]] std::int64_t rows() const noexcept { return rows_; }
  [[nodiscard]] std::int64_t cols() const noexcept { return cols_; }
  [[nodiscard]] const PackedLayout& layout() const noexcept { return layout_; }
  [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return buffer_.span(); }

  /// `device` holds a copy of bytes() and stays valid as long as the view is used.
  [[nodiscard]] DevicePackedView view(const void* device) const noexcept {
    return DevicePackedView{format_,       rows_, cols_, layout_, static_cast<const std::byte*>(device),
                            kPackedVersion};
  }

 private:
  friend Result<PackedMatrix> pack(const QuantizedMatrixView& w, PackOptions options);
  PackedMatrix() = default;

  Format format_;
  std::int64_t rows_ = 0;
  std::int64_t cols_ = 0;
  PackedLayout layout_;
  AlignedBuffer<std::byte> buffer_;
};

/// Packs a canonical matrix. Errors as packed_layout() and validate() of the view (every code is checked),
/// and kOutOfMemory.
[[nodiscard]] inline Result<PackedMatrix> pack(const QuantizedMatrixView& w, PackOptions options = {}) {
  if (Status status = validate(w); !status.ok()) return status;
  const auto layout = packed_layout(w.format, w.rows, w.cols, options);
  if (!layout.ok()) return layout.status();
  PackedMatrix out;
  out.format_ = w.format;
  out.rows_ = w.rows;
  out.cols_ = w.cols;
  out.layout_ = *layout;
  const PackedLayout& l = out.layout_;
  if (!out.buffer_.reserve(l.bytes)) {
    return error(StatusCode::kOutOfMemory, "cuda pack: ", w.rows, " x ", w.cols, " as ",
                 format_name(w.format), " needs ", l.bytes, " bytes");
  }
  std::byte* const base = out.buffer_.data();
  std::memset(base, 0, l.bytes);
  std::memcpy(base + l.codebooks_at, w.codebooks,
              static_cast<std::size_t>(w.format.m * w.format.centroids() * w.format.v) * sizeof(Half));
  const int per_lane = l.sets / w.format.m;  // vectors
  const std::int64_t tile_bytes = l.tile_bytes;
  for (std::int64_t granule = 0; granule < l.granules; ++granule) {
    std::byte* const tiles = base + l.tiles_at + granule * l.row_tiles * tile_bytes;
    for (int lane = 0; lane < 32; ++lane) {
      const std::int64_t first = (granule * 32 + lane) * per_lane;
      for (int p = 0; p < l.sets; ++p) {
        const std::int64_t j = first + p / w.format.m;
        if (j >= w.vectors()) break;
        std::byte* const codes = tiles + (p * 32 + lane) * kTileRows;
        for (std::int64_t n = 0; n < w.rows; ++n) {
          const int slot = row_slot(lane, static_cast<int>(n % kTileRows));
          codes[n / kTileRows * tile_bytes + slot] = static_cast<std::byte>(w.code(p % w.format.m, n, j));
        }
      }
      if (l.scale_steps == 5) continue;
      const std::int64_t group_k =
          (granule * 32 + (lane >> l.scale_steps << l.scale_steps)) * per_lane * w.format.v;
      if (group_k >= w.cols) continue;
      const Half* const scales = w.scales + group_k / w.format.g * w.rows;
      const int count = kTileRows >> l.scale_steps;
      for (std::int64_t n = 0; n < w.rows; ++n) {
        const int slot = row_slot(lane, static_cast<int>(n % kTileRows));
        if (slot >= count) continue;
        std::memcpy(tiles + n / kTileRows * tile_bytes + l.sets * 512 + (lane * count + slot) * 2, scales + n,
                    sizeof(Half));
      }
    }
  }
  if (l.scale_steps == 5 && w.cols > 0) {
    std::memcpy(base + l.row_scales_at, w.scales, static_cast<std::size_t>(w.rows) * sizeof(Half));
  }
  return Result<PackedMatrix>(std::move(out));  // spelled out for nvcc, which would copy
}

}  // namespace codegemm::cuda
