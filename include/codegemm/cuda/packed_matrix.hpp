// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/packed_matrix.hpp - weights in the layout of the GPU kernels: made on the host, once.
// Layer: cuda (host only, no CUDA headers).
// See: examples/04_codegemm_gpu.cu
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
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
#include <codegemm/cuda/block/row_parts.hpp>
#include <codegemm/cuda/block/tile_layout.hpp>
#include <codegemm/format.hpp>
#include <codegemm/quantized_matrix.hpp>

namespace codegemm::cuda {

/// Goes up with every change of the layout below; a view of another version is refused.
inline constexpr int kPackedVersion = 3;

/// Where everything lies in the buffer of a packed matrix. Kernels of every regime read the same one.
///
/// A *granule* is what 32 lanes own along K: lane l has the `sets / m` vectors from l * sets / m on, and
/// their codes of all m codebooks are its columns p = 0 .. sets - 1 (vector l * sets / m + p / m, codebook p
/// % m). A *tile* is 16 rows of a granule: the lanes' codes (block/tile_layout.hpp; a code takes one byte, or
/// two where b > 8), then the scales [32 lanes][16 >> scale_steps] in fp16, since groups of 2^scale_steps
/// lanes share a scale. Tiles lie in the order [granule][row tile]. What is beyond N or K is 0.
///
/// Matrices merged along N are parts of one packed matrix: each starts with a row tile and has codebooks of
/// its own.
///
/// Codebooks and scales are multiplied by powers of two, so that the largest of each is about 2^6 and a
/// product of the two is a normal fp16 number; DevicePackedView::unscale undoes it.
struct PackedLayout {
  int sets = 0;                   ///< columns that a lane owns in a granule
  int code_bytes = 1;             ///< bytes of a code: 1, or 2 where b > 8
  int scale_steps = 0;            ///< 0..4, or 5: one scale a row, kept beside the tiles
  std::int64_t granules = 0;      ///< granules along K
  std::int64_t row_tiles = 0;     ///< row tiles of all parts
  int tile_bytes = 0;             ///< bytes of a tile
  int parts = 1;                  ///< matrices merged along N, 1 to kMaxParts
  PartTiles first_tile = {};      ///< of each part, then row_tiles
  std::size_t codebooks_at = 0;   ///< fp16 [parts][m][2^b][v]
  std::size_t row_scales_at = 0;  ///< fp16 [N], if scale_steps is 5
  std::size_t tiles_at = 0;       ///< the tiles
  std::size_t bytes = 0;          ///< of the whole

  /// Bytes of a row's codes in a lane.
  [[nodiscard]] constexpr int row_bytes() const noexcept { return sets * code_bytes; }
  /// Position in a tile of the scales.
  [[nodiscard]] constexpr int scales_at() const noexcept { return row_bytes() * 512; }

  /// All numbers are equal.
  friend constexpr bool operator==(const PackedLayout&, const PackedLayout&) = default;
};

/// What pack() may be told.
struct PackOptions {
  int sets = 0;  ///< columns that a lane owns in a granule: a multiple of m up to 4; 0: by format
};

/// The layout for matrices of part_rows[i] x K merged along N. Errors as canonical_sizes(); kUnsupported for
/// a side over 2^30, more than kMaxParts parts, or one before the last whose rows are not a multiple of 16.
[[nodiscard]] inline Result<PackedLayout> packed_layout(Format f, std::span<const std::int64_t> part_rows,
                                                        std::int64_t cols, PackOptions options = {}) {
  if (part_rows.empty() || part_rows.size() > static_cast<std::size_t>(kMaxParts)) {
    return error(StatusCode::kUnsupported, "cuda pack: ", part_rows.size(), " parts, but 1 to ", kMaxParts,
                 " can be merged");
  }
  std::int64_t rows = 0;
  for (std::size_t i = 0; i < part_rows.size(); ++i) {
    if (const auto sizes = canonical_sizes(f, part_rows[i], cols); !sizes.ok()) return sizes.status();
    if (i + 1 < part_rows.size() && part_rows[i] % kTileRows != 0) {
      return error(StatusCode::kUnsupported, "cuda pack: part ", i, " has ", part_rows[i],
                   " rows, but all parts before the last must have a multiple of ", kTileRows);
    }
    if (part_rows[i] > std::numeric_limits<std::int64_t>::max() - rows) rows = -1;
    if (rows >= 0) rows += part_rows[i];
  }
  if (rows < 0) return error(StatusCode::kUnsupported, "cuda pack: the parts have too many rows");
  // Kernels count rows, columns and tiles in 32 bits.
  constexpr std::int64_t kMaxSide = std::int64_t{1} << 30;
  if (rows > kMaxSide || cols > kMaxSide) {
    return error(StatusCode::kUnsupported, "cuda pack: shape ", rows, " x ", cols, " has a side over ",
                 kMaxSide);
  }
  const bool one_scale = f.scale_groups(cols) <= 1;
  PackedLayout out;
  out.code_bytes = f.stored_code_bits() / 8;
  const auto fits = [&](int sets) {  // one scale for all that a lane owns
    return sets % f.m == 0 && (one_scale || f.g % (sets / f.m * f.v) == 0);
  };
  // More columns a lane: fewer sums over lanes for a product. Four bytes a row is what a multiprocessor's
  // shared memory holds the Psumbooks of, and what one load of the tensor-core kernels brings; 16 weights are
  // what their threads hold activations for.
  const auto good = [&](int sets) { return fits(sets) && sets / f.m * f.v <= 16; };
  const int most = 4 / out.code_bytes;
  out.sets = good(most) ? most : good(2) ? 2 : f.m;
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
  const int granule_span = 32 * lane_span;
  // One of zeros where K is 0: kernels ask for the first before they know how many there are.
  out.granules = std::max<std::int64_t>((cols + granule_span - 1) / granule_span, 1);
  out.row_tiles = (rows + kTileRows - 1) / kTileRows;
  out.parts = static_cast<int>(part_rows.size());
  std::int64_t before = 0;
  for (std::size_t i = 0; i < out.first_tile.size(); ++i) {
    out.first_tile[i] = static_cast<std::int32_t>(i < part_rows.size() ? before / kTileRows : out.row_tiles);
    if (i < part_rows.size()) before += part_rows[i];
  }
  out.tile_bytes = out.scales_at() + (one_scale ? 0 : 1024 >> out.scale_steps);
  const auto aligned = [](std::size_t n) { return (n + 255) / 256 * 256; };
  out.row_scales_at =
      aligned(static_cast<std::size_t>(std::int64_t{out.parts} * f.m * f.centroids() * f.v) * sizeof(Half));
  out.tiles_at = aligned(out.row_scales_at + (one_scale ? static_cast<std::size_t>(rows) * sizeof(Half) : 0));
  out.bytes = out.tiles_at + static_cast<std::size_t>(out.granules * out.row_tiles * out.tile_bytes);
  return out;
}

/// The layout for one N x K matrix.
[[nodiscard]] inline Result<PackedLayout> packed_layout(Format f, std::int64_t rows, std::int64_t cols,
                                                        PackOptions options = {}) {
  return packed_layout(f, std::span<const std::int64_t>(&rows, 1), cols, options);
}

/// Packed weights in device memory, passed to calls by value. Owns nothing; `data` is 256-byte aligned.
struct DevicePackedView {
  Format format;                    ///< of the weights
  std::int64_t rows = 0;            ///< N
  std::int64_t cols = 0;            ///< K
  PackedLayout layout;              ///< where what lies in data
  const std::byte* data = nullptr;  ///< [layout.bytes], device memory
  int version = 0;                  ///< of the layout: PackedMatrix::kLayoutVersion
  /// A power of two: what products of the packed codebooks and scales are multiplied by.
  float unscale = 1.0F;
};
static_assert(std::is_trivially_copyable_v<DevicePackedView>, "DevicePackedView is passed by value");

/// Packed weights in host memory, to be copied as they are: bytes() into device memory of the caller's, whose
/// address then makes a view. May be freed after the copy.
class PackedMatrix {
 public:
  [[nodiscard]] Format format() const noexcept { return format_; }    ///< of the weights
  [[nodiscard]] std::int64_t rows() const noexcept { return rows_; }  ///< N, of all parts together
  [[nodiscard]] std::int64_t cols() const noexcept { return cols_; }  ///< K
  /// Where what lies in bytes().
  [[nodiscard]] const PackedLayout& layout() const noexcept { return layout_; }
  /// What is copied to the device.
  [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return buffer_.span(); }

  /// `device` holds a copy of bytes() and stays valid as long as the view is used.
  [[nodiscard]] DevicePackedView view(const void* device) const noexcept {
    return DevicePackedView{format_,        rows_,   cols_, layout_, static_cast<const std::byte*>(device),
                            kPackedVersion, unscale_};
  }

 private:
  friend Result<PackedMatrix> pack(std::span<const QuantizedMatrixView> parts, PackOptions options);
  PackedMatrix() = default;

  Format format_;
  std::int64_t rows_ = 0;
  std::int64_t cols_ = 0;
  PackedLayout layout_;
  float unscale_ = 1.0F;
  AlignedBuffer<std::byte> buffer_;
};

namespace detail {

// The largest finite |value| so far.
[[nodiscard]] inline float largest(std::span<const Half> values, float most) {
  for (const Half value : values) {
    const float size = std::fabs(value.to_float());
    if (std::isfinite(size)) most = std::max(most, size);
  }
  return most;
}

// The e for which largest * 2^e is in [2^5, 2^6); 0 where there is none.
[[nodiscard]] inline int exponent_to_fill(float largest) {
  return largest == 0.0F ? 0 : 5 - std::ilogb(largest);
}

inline void store_scaled(std::byte* to, Half value, float factor) {
  const Half scaled = Half::from_float(value.to_float() * factor);
  std::memcpy(to, &scaled, sizeof(Half));
}

// Columns of 16 bits: the canonical code, low byte first.
inline void store_codes(const QuantizedMatrixView& w, const PackedLayout& l, std::byte* tiles,
                        std::int64_t granule, int lane) {
  const int m = w.format.m;
  const std::int64_t first = (granule * 32 + lane) * (l.sets / m);
  for (int p = 0; p < l.sets; ++p) {
    const std::int64_t j = first + p / m;
    if (j >= w.vectors()) break;
    for (std::int64_t n = 0; n < w.rows; ++n) {
      std::byte* const tile = tiles + n / kTileRows * l.tile_bytes;
      const int slot = row_slot(lane, static_cast<int>(n % kTileRows));
      const std::uint32_t code = w.code(p % m, n, j);
      for (int i = 0; i < l.code_bytes; ++i) {
        const int at = tile_offset(lane, stream_offset(l.row_bytes(), slot, p * l.code_bytes + i));
        tile[at] = static_cast<std::byte>(code >> (8 * i));
      }
    }
  }
}

// Scales that lie in tiles.
inline void store_scales(const QuantizedMatrixView& w, const PackedLayout& l, std::byte* tiles,
                         std::int64_t granule, float factor) {
  const std::int64_t lane_span = std::int64_t{l.sets / w.format.m} * w.format.v;
  for (int lane = 0; lane < 32; lane += 1 << l.scale_steps) {
    const std::int64_t k = (granule * 32 + lane) * lane_span;
    if (k >= w.cols) break;
    const Half* const scales = w.scales + k / w.format.g * w.rows;
    for (std::int64_t n = 0; n < w.rows; ++n) {
      const std::int64_t at =
          n / kTileRows * l.tile_bytes + l.scales_at() +
          scale_offset(l.scale_steps, lane, static_cast<int>(n % kTileRows)) * std::int64_t{2};
      store_scaled(tiles + at, scales[n], factor);
    }
  }
}

}  // namespace detail

namespace detail {

// What is known of packed weights before any is moved.
struct PackPlan {
  Format format;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  PackedLayout layout;
  float codebook_factor = 1.0F;  // powers of two
  float scale_factor = 1.0F;
  float unscale = 1.0F;

  // Of one matrix.
  [[nodiscard]] std::size_t codebook_values() const {
    return static_cast<std::size_t>(format.m * format.centroids() * format.v);
  }
  [[nodiscard]] std::span<const Half> scales_of(const QuantizedMatrixView& w) const {
    return {w.scales, static_cast<std::size_t>(format.scale_groups(cols) * w.rows)};
  }
};

// The checks of pack().
[[nodiscard]] inline Result<PackPlan> plan_pack(std::span<const QuantizedMatrixView> parts,
                                                PackOptions options) {
  std::array<std::int64_t, kMaxParts> part_rows = {};
  for (std::size_t i = 0; i < parts.size() && i < part_rows.size(); ++i) {
    const QuantizedMatrixView& w = parts[i];
    if (Status status = validate(w); !status.ok()) return status;
    if (w.format != parts[0].format) {
      return error(StatusCode::kInvalidArgument, "cuda pack: part ", i, " is ", format_name(w.format),
                   ", part 0 is ", format_name(parts[0].format));
    }
    if (w.cols != parts[0].cols) {
      return error(StatusCode::kShapeMismatch, "cuda pack: part ", i, " has K = ", w.cols,
                   ", part 0 has K = ", parts[0].cols);
    }
    part_rows[i] = w.rows;
  }
  if (parts.empty() || parts.size() > part_rows.size()) {
    return error(StatusCode::kUnsupported, "cuda pack: ", parts.size(), " parts, but 1 to ", kMaxParts,
                 " can be merged");
  }
  PackPlan out;
  out.format = parts[0].format;
  out.cols = parts[0].cols;
  for (const QuantizedMatrixView& w : parts) out.rows += w.rows;
  const auto layout = packed_layout(out.format, {part_rows.data(), parts.size()}, out.cols, options);
  if (!layout.ok()) return layout.status();
  out.layout = *layout;
  float largest_centroid = 0.0F;
  float largest_scale = 0.0F;
  for (const QuantizedMatrixView& w : parts) {
    largest_centroid = largest({w.codebooks, out.codebook_values()}, largest_centroid);
    largest_scale = largest(out.scales_of(w), largest_scale);
  }
  const int codebook_exponent = exponent_to_fill(largest_centroid);
  const int scale_exponent = exponent_to_fill(largest_scale);
  out.codebook_factor = std::ldexp(1.0F, codebook_exponent);
  out.scale_factor = std::ldexp(1.0F, scale_exponent);
  out.unscale = std::ldexp(1.0F, -codebook_exponent - scale_exponent);
  return out;
}

// The codebooks of all parts to where packed weights have them.
inline void store_codebooks(const PackPlan& plan, std::span<const QuantizedMatrixView> parts, std::byte* to) {
  const std::size_t values = plan.codebook_values();
  for (std::size_t part = 0; part < parts.size(); ++part) {
    for (std::size_t i = 0; i < values; ++i) {
      store_scaled(to + (part * values + i) * sizeof(Half), parts[part].codebooks[i], plan.codebook_factor);
    }
  }
}

}  // namespace detail

/// Packs canonical matrices, merged along N in their order: Q, K and V, or gate and up. All have the same K
/// and format. Errors as packed_layout() and validate() of a view (every code is checked), kInvalidArgument
/// for different formats, kShapeMismatch for different K, and kOutOfMemory.
[[nodiscard]] inline Result<PackedMatrix> pack(std::span<const QuantizedMatrixView> parts,
                                               PackOptions options = {}) {
  const auto plan = detail::plan_pack(parts, options);
  if (!plan.ok()) return plan.status();
  PackedMatrix out;
  out.format_ = plan->format;
  out.rows_ = plan->rows;
  out.cols_ = plan->cols;
  out.layout_ = plan->layout;
  out.unscale_ = plan->unscale;
  const PackedLayout& l = out.layout_;
  if (!out.buffer_.reserve(l.bytes)) {
    return error(StatusCode::kOutOfMemory, "cuda pack: ", out.rows_, " x ", out.cols_, " as ",
                 format_name(out.format_), " needs ", l.bytes, " bytes");
  }
  std::byte* const base = out.buffer_.data();
  std::memset(base, 0, l.bytes);
  detail::store_codebooks(*plan, parts, base + l.codebooks_at);
  for (std::size_t part = 0; part < parts.size(); ++part) {
    const QuantizedMatrixView& w = parts[part];
    const std::int64_t first_tile = l.first_tile[part];
    for (std::int64_t granule = 0; granule < l.granules; ++granule) {
      std::byte* const tiles =
          base + l.tiles_at + (granule * l.row_tiles + first_tile) * std::int64_t{l.tile_bytes};
      for (int lane = 0; lane < 32; ++lane) detail::store_codes(w, l, tiles, granule, lane);
      if (l.scale_steps < 5) detail::store_scales(w, l, tiles, granule, plan->scale_factor);
    }
    if (l.scale_steps == 5) {
      const auto scales = plan->scales_of(w);
      std::byte* const to =
          base + l.row_scales_at + static_cast<std::size_t>(first_tile * kTileRows) * sizeof(Half);
      for (std::size_t n = 0; n < scales.size(); ++n)
        detail::store_scaled(to + n * sizeof(Half), scales[n], plan->scale_factor);
    }
  }
  return out;
}

/// Packs one canonical matrix.
[[nodiscard]] inline Result<PackedMatrix> pack(const QuantizedMatrixView& w, PackOptions options = {}) {
  return pack(std::span<const QuantizedMatrixView>(&w, 1), options);
}

}  // namespace codegemm::cuda
