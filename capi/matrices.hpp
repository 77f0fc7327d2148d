// SPDX-License-Identifier: Apache-2.0
//
// capi/matrices.hpp - the C structs of weights as the library's own, with everything in them checked.
// Layer: capi (host only).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include <codegemm_c.h>
#include <capi/boundary.hpp>
#include <codegemm/base/numerics.hpp>
#include <codegemm/base/status.hpp>
#include <codegemm/base/text.hpp>
#include <codegemm/cuda/packed_matrix.hpp>
#include <codegemm/format.hpp>
#include <codegemm/quantized_matrix.hpp>

namespace codegemm::c_api {

[[nodiscard]] inline Format format_of(const codegemm_c_format& format) noexcept {
  return Format{format.v, format.m, format.b, format.g};
}

/// As canonical_sizes(); kUnsupported for a side over 2^30, so that a matrix of few elements is also one of
/// little work.
[[nodiscard]] inline Result<CanonicalSizes> sizes_of(Format format, std::int64_t rows, std::int64_t cols) {
  constexpr std::int64_t kMaxSide = std::int64_t{1} << 30;
  auto sizes = canonical_sizes(format, rows, cols);
  if (sizes.ok() && (rows > kMaxSide || cols > kMaxSide)) {
    return error(StatusCode::kUnsupported, "shape ", rows, " x ", cols, " has a side over ", kMaxSide);
  }
  return sizes;
}

/// The arrays as a view, after a check of their sizes, pointers and alignment; codes are not looked at.
/// `name` is for messages.
[[nodiscard]] inline Result<QuantizedMatrixView> view_of(const codegemm_c_matrix& matrix,
                                                         const std::string& name) {
  const Format format = format_of(matrix.format);
  const auto sizes = sizes_of(format, matrix.rows, matrix.cols);
  if (!sizes.ok()) return sizes.status().with_prefix(name);
  const auto check_array = [&](const char* array, const void* data, std::size_t element,
                               const char* count_name, std::int64_t count, std::int64_t needed) -> Status {
    if (count != needed) {
      return error(StatusCode::kShapeMismatch, name, ": ", count_name, " is ", count, ", but ", matrix.rows,
                   " x ", matrix.cols, " as ", format_name(format), " has ", needed);
    }
    if (needed > 0 && data == nullptr) return error(StatusCode::kNullPointer, name, ": ", array, " is NULL");
    return check_aligned(data, element, array).with_prefix(name);
  };
  if (Status s = check_array("codes", matrix.codes, sizeof(std::uint32_t), "code_words", matrix.code_words,
                             sizes->code_words);
      !s.ok()) {
    return s;
  }
  if (Status s = check_array("codebooks", matrix.codebooks, sizeof(Half), "codebook_values",
                             matrix.codebook_values, sizes->codebook_values);
      !s.ok()) {
    return s;
  }
  if (Status s = check_array("scales", matrix.scales, sizeof(Half), "scale_values", matrix.scale_values,
                             sizes->scale_values);
      !s.ok()) {
    return s;
  }
  return QuantizedMatrixView{format,
                             matrix.rows,
                             matrix.cols,
                             matrix.codes,
                             reinterpret_cast<const Half*>(matrix.codebooks),
                             reinterpret_cast<const Half*>(matrix.scales)};
}

/// The view that the GPU kernels take, with the layout that the numbers stand for.
[[nodiscard]] inline Result<cuda::DevicePackedView> device_view_of(const codegemm_c_cuda_weights& weights) {
  if (weights.layout_version != cuda::kPackedVersion) {
    return error(StatusCode::kIncompatible, "weights: layout_version is ", weights.layout_version,
                 ", this library reads version ", cuda::kPackedVersion);
  }
  if (weights.parts < 1 || weights.parts > CODEGEMM_C_CUDA_MAX_PARTS) {
    return error(StatusCode::kInvalidArgument, "weights: parts is ", weights.parts, ", expected 1 to ",
                 CODEGEMM_C_CUDA_MAX_PARTS);
  }
  if (weights.sets < 1) {
    return error(StatusCode::kInvalidArgument, "weights: sets is ", weights.sets, ", expected 1 to 4");
  }
  const Format format = format_of(weights.format);
  const auto layout =
      cuda::packed_layout(format, {weights.part_rows, static_cast<std::size_t>(weights.parts)}, weights.cols,
                          cuda::PackOptions{weights.sets});
  if (!layout.ok()) return layout.status().with_prefix("weights");
  cuda::DevicePackedView view;
  view.format = format;
  for (std::int32_t i = 0; i < weights.parts; ++i) view.rows += weights.part_rows[i];
  view.cols = weights.cols;
  view.layout = *layout;
  view.data = static_cast<const std::byte*>(weights.data);
  view.version = weights.layout_version;
  view.unscale = weights.unscale;
  return view;
}

}  // namespace codegemm::c_api
