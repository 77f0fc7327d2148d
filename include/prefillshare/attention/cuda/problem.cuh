// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/problem.cuh - the checks that the calls on pages have in common. None looks at
// device memory.
// Layer: attention (host, needs nvcc).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numbers>
#include <type_traits>
#include <utility>

#include <cuda_fp8.h>

#include <codegemm/base/config_list.hpp>
#include <codegemm/base/matrix_view.hpp>
#include <codegemm/base/status.hpp>
#include <codegemm/cuda/device.cuh>
#include <codegemm/cuda/launch.cuh>
#include <codegemm/cuda/problem.cuh>
#include <codegemm/cuda/tensor_map.cuh>
#include <prefillshare/attention/cuda/block/page_boxes.cuh>
#include <prefillshare/attention/cuda/block/page_loader.cuh>
#include <prefillshare/attention/cuda/kv_pages.hpp>
#include <prefillshare/kv/element.hpp>

namespace prefillshare::cuda {

using codegemm::MatrixView;
using codegemm::Status;
using codegemm::StatusCode;
using codegemm::cuda::Device;

inline constexpr std::size_t kWorkspaceAlignment = 256;                 ///< bytes, of the workspace's address
inline constexpr int kMaxSequences = 1 << 16;                           ///< of a call
inline constexpr int kMaxHeads = 1024;                                  ///< of Q
inline constexpr std::int64_t kMaxQueryTokens = std::int64_t{1} << 20;  ///< of a call

/// A head size that the attention kernels are made for.
template <int HeadDim>
struct HeadSize {
  static constexpr int kHeadDim = HeadDim;  ///< elements of a head
};
/// The sizes of a head that have kernels of their own.
using HeadSizes = codegemm::config_list<HeadSize<128>, HeadSize<64>, HeadSize<96>>;

namespace detail {

using codegemm::error;
using codegemm::cuda::detail::aligned;
using codegemm::cuda::detail::ScalarOf;

template <class T>
inline constexpr bool kIsCacheType =
    ScalarOf<std::remove_const_t<T>>::kKnown && !std::is_same_v<std::remove_const_t<T>, float>;

// A cache of e4m3 with scales.
template <class C>
inline constexpr bool kIsFp8 =
    std::is_same_v<std::remove_const_t<C>, Fp8E4M3> || std::is_same_v<std::remove_const_t<C>, __nv_fp8_e4m3>;
// A cache that queries of type T may be multiplied with.
template <class C, class T>
inline constexpr bool kFits = kIsFp8<C> || std::is_same_v<std::remove_const_t<C>, std::remove_const_t<T>>;

[[nodiscard]] inline Status check_device(const char* call, const Device& device) {
  if (device.arch >= 80) return {};
  return error(StatusCode::kUnsupported, call, ": compute capability ", device.arch / 10, ".",
               device.arch % 10, ", but the kernels need 8.0");
}

// Shape, strides and pointers of a cache; `used`: something will be read or written.
template <class T>
[[nodiscard]] Status check_pages(const char* call, const KvPages<T>& kv, bool used) {
  if (kv.page_size < 1 || kv.page_size > kMaxPageSize) {
    return error(StatusCode::kUnsupported, call, ": pages of ", kv.page_size, " tokens, expected 1 to ",
                 kMaxPageSize);
  }
  if (kv.kv_heads < 1 || kv.kv_heads > kMaxHeads || kv.pages < 0) {
    return error(StatusCode::kInvalidArgument, call, ": ", kv.pages, " pages of ", kv.kv_heads, " K/V heads");
  }
  const auto check_stride = [&](const char* name, std::int64_t stride) -> Status {
    constexpr auto kStep = static_cast<std::int64_t>(16 / sizeof(T));
    if (stride > 0 && stride % kStep == 0) return {};
    return error(StatusCode::kMisaligned, call, ": ", name, " = ", stride,
                 ", expected a positive multiple of ", kStep, " elements");
  };
  if (Status s = check_stride("page_stride", kv.page_stride); !s.ok()) return s;
  if (Status s = check_stride("token_stride", kv.token_stride); !s.ok()) return s;
  if (Status s = check_stride("head_stride", kv.head_stride); !s.ok()) return s;
  if (kv.token_stride < kv.head_dim || kv.head_stride < kv.head_dim) {
    return error(StatusCode::kInvalidArgument, call, ": token_stride ", kv.token_stride, " or head_stride ",
                 kv.head_stride, " is less than head_dim ", kv.head_dim);
  }
  // From the innermost out, each of heads, slots and pages begins behind all of the one before.
  std::array<std::pair<std::int64_t, std::int64_t>, 3> nested{
      {{kv.page_stride, kv.pages}, {kv.token_stride, kv.page_size}, {kv.head_stride, kv.kv_heads}}};
  std::sort(nested.begin(), nested.end());
  std::int64_t extent = kv.head_dim;
  for (const auto& [stride, count] : nested) {
    if (count < 2) continue;
    if (stride < extent) {
      return error(StatusCode::kInvalidArgument, call, ": page_stride ", kv.page_stride, ", token_stride ",
                   kv.token_stride, " and head_stride ", kv.head_stride, " make ", kv.pages, " pages of ",
                   kv.page_size, " tokens of ", kv.kv_heads, " heads of ", kv.head_dim, " overlap");
    }
    if (stride > (std::numeric_limits<std::int64_t>::max() - extent) / (count - 1)) {
      return error(StatusCode::kUnsupported, call, ": a stride of ", stride, " over ", count);
    }
    extent += stride * (count - 1);
  }
  const auto is_scale = [](float scale) { return std::isfinite(scale) && scale > 0.0F; };
  if (kIsFp8<T> && (!is_scale(kv.k_scale) || !is_scale(kv.v_scale))) {
    return error(StatusCode::kInvalidArgument, call, ": scales ", kv.k_scale, " of K and ", kv.v_scale,
                 " of V, expected positive numbers");
  }
  if (!used) return {};
  if (kv.k == nullptr || kv.v == nullptr) {
    return error(StatusCode::kNullPointer, call, ": ", kv.k == nullptr ? "k" : "v", " is null");
  }
  if (!aligned(kv.k, 16) || !aligned(kv.v, 16)) {
    return error(StatusCode::kMisaligned, call, ": ", aligned(kv.k, 16) ? "v" : "k",
                 " is not aligned to 16 bytes");
  }
  return {};
}

[[nodiscard]] inline Status check_table(const char* call, const PageTableView& table, bool used) {
  if (table.sequences < 0 || table.sequences > kMaxSequences) {
    return error(StatusCode::kInvalidArgument, call, ": ", table.sequences, " sequences, expected 0 to ",
                 kMaxSequences);
  }
  if (!used) return {};
  const char* const null = table.indptr == nullptr          ? "indptr"
                           : table.indices == nullptr       ? "indices"
                           : table.last_page_len == nullptr ? "last_page_len"
                                                            : nullptr;
  if (null != nullptr) return error(StatusCode::kNullPointer, call, ": ", null, " is null");
  return {};
}

// Rows of heads that are read or written as 16 bytes.
template <class T>
[[nodiscard]] Status check_rows(const char* call, const char* name, const MatrixView<T>& x, std::int64_t rows,
                                std::int64_t cols, bool used) {
  if (x.rows != rows || x.cols != cols) {
    return error(StatusCode::kShapeMismatch, call, ": ", name, " is ", x.rows, " x ", x.cols, ", expected ",
                 rows, " x ", cols);
  }
  if (x.stride < x.cols || x.stride % 8 != 0) {
    return error(x.stride < x.cols ? StatusCode::kInvalidArgument : StatusCode::kMisaligned, call, ": ", name,
                 " has ", x.cols, " columns and stride ", x.stride, ", expected a multiple of 8 elements");
  }
  if (!used) return {};
  if (x.data == nullptr) return error(StatusCode::kNullPointer, call, ": ", name, " is null");
  if (!aligned(x.data, 16)) {
    return error(StatusCode::kMisaligned, call, ": ", name, " is not aligned to 16 bytes");
  }
  return {};
}

// An output may lie between the rows of an input, but not where it is.
template <class T, class Y>
[[nodiscard]] Status check_apart(const char* call, const char* name, const MatrixView<T>& x,
                                 const MatrixView<Y>& out) {
  if (!codegemm::overlap(x, out)) return {};
  return error(StatusCode::kInvalidArgument, call, ": out overlaps ", name);
}

[[nodiscard]] inline Status check_heads(const char* call, int heads, int kv_heads) {
  if (heads >= 1 && heads <= kMaxHeads && heads % kv_heads == 0) return {};
  return error(StatusCode::kInvalidArgument, call, ": ", heads, " heads over ", kv_heads,
               " K/V heads, expected a multiple of them, at most ", kMaxHeads);
}

[[nodiscard]] inline Status check_head_dim(const char* call, int head_dim) {
  const bool known = codegemm::first_match(
      HeadSizes{}, [&](auto c) { return c.kHeadDim == head_dim; }, [](auto) {});
  if (known) return {};
  return error(StatusCode::kUnsupported, call, ": head_dim = ", head_dim, ", expected 64, 96 or 128");
}

[[nodiscard]] inline Status check_scale(const char* call, float scale) {
  if (std::isfinite(scale) && scale >= 0.0F) return {};
  return error(StatusCode::kInvalidArgument, call, ": scale = ", scale,
               ", expected a positive number, or 0 for 1 / sqrt(head_dim)");
}

// What exponents of base 2, of queries times stored keys, are multiplied by.
template <class C>
[[nodiscard]] float scale_log2_of(float scale, const KvPages<C>& kv) {
  const double plain = scale != 0.0F ? static_cast<double>(scale) : 1.0 / std::sqrt(kv.head_dim);
  return static_cast<float>(plain * std::numbers::log2e *
                            (kIsFp8<C> ? static_cast<double>(kv.k_scale) : 1.0));
}

[[nodiscard]] inline Status check_workspace(const char* call, const void* workspace, std::size_t size,
                                            std::size_t needed) {
  if (size < needed) {
    return error(StatusCode::kWorkspaceTooSmall, call, ": workspace of ", size, " bytes, needs ", needed);
  }
  if (needed == 0) return {};
  if (workspace == nullptr) return error(StatusCode::kNullPointer, call, ": workspace is null");
  if (!aligned(workspace, kWorkspaceAlignment)) {
    return error(StatusCode::kMisaligned, call, ": workspace is not aligned to ", kWorkspaceAlignment,
                 " bytes");
  }
  return {};
}

template <class T>
[[nodiscard]] KvSource source_of(const KvPages<T>& kv) {
  KvSource out;
  out.k = reinterpret_cast<const std::uint16_t*>(kv.k);
  out.v = reinterpret_cast<const std::uint16_t*>(kv.v);
  constexpr int kOfUnit = 2 / static_cast<int>(sizeof(T));  // elements of two bytes
  out.page_stride = kv.page_stride / kOfUnit;
  out.token_stride = kv.token_stride / kOfUnit;
  out.head_stride = kv.head_stride / kOfUnit;
  if constexpr (kIsFp8<T>) out.v_scale = kv.v_scale;
  out.page_magic = magic_of(kv.page_size);
  out.page_size = kv.page_size;
  out.pages = kv.pages;
  return out;
}

// Whether pages of these sizes have whole boxes.
template <class C>
[[nodiscard]] bool has_boxes(const KvPages<const C>& kv) {
  return kv.page_size % kBoxKeys == 0 && kv.head_dim * sizeof(C) % (kBoxColumns * 2U) == 0 &&
         codegemm::cuda::detail::tensor_map_encoder() != nullptr;
}

// Whether the pages have boxes: whole ones, and strides that the copy engine takes.
template <class C>
[[nodiscard]] bool describe_pages(const KvPages<const C>& kv, PageMaps& maps) {
  const auto encode = codegemm::cuda::detail::tensor_map_encoder();
  if (!has_boxes(kv)) return false;
  const auto bytes = [](std::int64_t elements) { return static_cast<cuuint64_t>(elements) * sizeof(C); };
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(kv.head_dim) * sizeof(C) / 2,
                               static_cast<cuuint64_t>(kv.kv_heads), static_cast<cuuint64_t>(kv.page_size),
                               static_cast<cuuint64_t>(kv.pages)};
  const cuuint64_t strides[3] = {bytes(kv.head_stride), bytes(kv.token_stride), bytes(kv.page_stride)};
  const cuuint32_t box[4] = {kBoxColumns, 1, kBoxKeys, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const auto describe = [&](const C* data, CUtensorMap& map) {
    return encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<std::remove_const_t<C>*>(data), sizes,
                  strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  };
  return describe(kv.k, maps.k) && describe(kv.v, maps.v);
}

}  // namespace detail
}  // namespace prefillshare::cuda
