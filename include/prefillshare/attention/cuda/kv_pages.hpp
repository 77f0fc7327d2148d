// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/kv_pages.hpp - K/V in pages of device memory, and the table that finds them.
// Layer: attention (host + device, no CUDA headers).
// See: https://docs.flashinfer.ai/tutorials/kv_layout.html
#pragma once

#include <cstdint>

namespace prefillshare::cuda {

/// The order of dimensions within the K or the V half of a page.
enum class KvLayout {
  kNhd,  ///< [page_size][kv_heads][head_dim], as HostKvStorage has it
  kHnd,  ///< [kv_heads][page_size][head_dim]
};

/// The K/V cache of one layer. Element d of token slot t and head h in page p is
/// k[p * page_stride + t * token_stride + h * head_stride + d]; v the same. k and v lie at multiples of 16
/// bytes, strides are multiples of 16 bytes. T is prefillshare::Fp8E4M3 (or __nv_fp8_e4m3) for a cache of
/// fp8, whose numbers are what they stand for divided by a scale, as in prefillshare::KvPages. Owns nothing.
template <class T>
struct KvPages {
  T* k = nullptr;                 ///< device memory
  T* v = nullptr;                 ///< device memory
  std::int64_t page_stride = 0;   ///< elements
  std::int64_t token_stride = 0;  ///< from a slot to the next
  std::int64_t head_stride = 0;   ///< from a head to the next
  std::int32_t pages = 0;         ///< in the pool
  int page_size = 0;              ///< tokens, 1 to kMaxPageSize
  int kv_heads = 0;               ///< heads of K and of V
  int head_dim = 0;               ///< elements of a head
  float k_scale = 1.0F;           ///< fp8 alone: a K is its stored number times this
  float v_scale = 1.0F;           ///< the same for V

  /// A view to read from, out of one to write to.
  operator KvPages<const T>() const {  // NOLINT(google-explicit-constructor): as T* becomes const T*
    return {k,         v,        page_stride, token_stride, head_stride, pages,
            page_size, kv_heads, head_dim,    k_scale,      v_scale};
  }
};

inline constexpr int kMaxPageSize = 64;  ///< tokens of a page at most

/// Pages that hold K and V one after the other: [pages][2][page_size][kv_heads][head_dim] (NHD), or
/// [pages][2][kv_heads][page_size][head_dim] (HND).
template <class T>
[[nodiscard]] constexpr KvPages<T> kv_pages(T* data, KvLayout layout, std::int32_t pages, int page_size,
                                            int kv_heads, int head_dim) {
  KvPages<T> out;
  const std::int64_t half = std::int64_t{page_size} * kv_heads * head_dim;
  out.k = data;
  out.v = data == nullptr ? nullptr : data + half;
  out.page_stride = 2 * half;
  out.token_stride = layout == KvLayout::kNhd ? std::int64_t{kv_heads} * head_dim : head_dim;
  out.head_stride = layout == KvLayout::kNhd ? head_dim : std::int64_t{page_size} * head_dim;
  out.pages = pages;
  out.page_size = page_size;
  out.kv_heads = kv_heads;
  out.head_dim = head_dim;
  return out;
}

/// PageTable (kv/page_table.hpp) on the device, read when a kernel runs: a captured graph may be replayed
/// after it has changed. Sequence i holds page_size * (pages - 1) + last_page_len[i] tokens, or none if it
/// has no pages. At most kMaxContext tokens a sequence; page numbers below KvPages::pages.
struct PageTableView {
  const std::int32_t* indptr = nullptr;         ///< [sequences + 1]
  const std::int32_t* indices = nullptr;        ///< [indptr[sequences]]
  const std::int32_t* last_page_len = nullptr;  ///< [sequences], 1 to page_size
  int sequences = 0;                            ///< sequences of the batch
};

inline constexpr std::int64_t kMaxContext = (std::int64_t{1} << 26) - 1;  ///< tokens of a sequence at most

}  // namespace prefillshare::cuda
