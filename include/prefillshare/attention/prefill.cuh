// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/prefill.cuh - causal attention of new tokens over their sequences' pages, on the
// GPU.
// Layer: attention (host, needs nvcc).
#pragma once

#include <algorithm>
#include <cstdint>

#include <cuda_runtime.h>

#include <prefillshare/attention/cuda/kernels/prefill.cuh>
#include <prefillshare/attention/cuda/kernels/prefill_wgmma.cuh>
#include <prefillshare/attention/cuda/problem.cuh>
#include <prefillshare/attention/cuda/tuning.hpp>

namespace prefillshare::cuda {

/// out[t][h] = softmax(scale * q[t][h] . K[0 .. p]) V[0 .. p], p being the position of token t. Sequence i's
/// tokens are rows query_indptr[i] .. query_indptr[i + 1] - 1; the last of them is at position length - 1, so
/// its K/V and those of all before it are in the pages. Scores and sums are fp32; the weights are rounded to
/// T. T: __half, __nv_bfloat16 (or codegemm::Half, BFloat16); Y: these or float; C, the cache's type: T, or
/// Fp8E4M3 with a scale for K and one for V, which mma.sync alone takes.
template <class T, class Y = T, class C = T>
struct PrefillProblem {
  static_assert(detail::kIsCacheType<T>,
                "prefillshare: PrefillProblem T must be __half, __nv_bfloat16, codegemm::Half or BFloat16");
  static_assert(
      detail::ScalarOf<Y>::kKnown,
      "prefillshare: PrefillProblem Y must be float, __half, __nv_bfloat16, codegemm::Half or BFloat16");
  static_assert(detail::kFits<C, T>, "prefillshare: PrefillProblem C must be T or Fp8E4M3");
  KvPages<const C> kv;                         ///< one layer's pages
  PageTableView table;                         ///< the sequences' pages
  const std::int32_t* query_indptr = nullptr;  ///< device, [sequences + 1]
  MatrixView<const T> q;                       ///< [T][heads * head_dim], after RoPE
  MatrixView<Y> out;                           ///< the same shape; must not overlap q or the pages
  int heads = 0;                               ///< a multiple of kv.kv_heads
  float scale = 0.0F;                          ///< of the scores; 0 means 1 / sqrt(head_dim)
  PrefillTuning tuning = {};                   ///< what is chosen by itself unless set here
};

namespace detail {

inline constexpr std::int64_t kPrefillRows = 128;  // that a block takes at a time

// Tiles of query rows at most: a sequence's last one may be partly filled.
template <class T, class Y, class C>
[[nodiscard]] std::int64_t row_tiles(const PrefillProblem<T, Y, C>& p) {
  return (p.q.rows * (p.heads / p.kv.kv_heads) + kPrefillRows - 1) / kPrefillRows +
         std::min<std::int64_t>(p.table.sequences, p.q.rows) - 1;
}

// A block an item or a multiprocessor, whichever are fewer: a block takes several items one after the other.
template <class T, int HeadDim>
[[nodiscard]] Status launch_prefill_wgmma(const PrefillArgs& args, std::int64_t tiles, const Device& device,
                                          cudaStream_t stream) {
  using Shape = PrefillWgmmaShape<ScalarOf<T>::kType, HeadDim>;
  const std::int64_t items = tiles * args.kv_heads;
  codegemm::cuda::LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(std::min<std::int64_t>(items, device.multiprocessors)));
  shape.threads = Shape::kThreads;
  shape.shared_bytes = Shape::kSharedBytes;
  shape.overlap = true;
  return codegemm::cuda::launch(prefill_wgmma_kernel<Shape>, shape, args, stream);
}

// A block an item.
template <class T, class C, int HeadDim>
[[nodiscard]] Status launch_prefill_mma(const PrefillArgs& args, std::int64_t tiles, const Device& device,
                                        cudaStream_t stream) {
  using Shape = AttendShape<ScalarOf<T>::kType, HeadDim, 4, 1, 2, 2, kIsFp8<C>>;
  constexpr std::int64_t kMaxGrid = 65535;
  if (tiles > kMaxGrid) {
    return error(StatusCode::kUnsupported, "cuda prefill: ", tiles, " tiles of ", Shape::kRows,
                 " query rows in one call, more than ", kMaxGrid);
  }
  codegemm::cuda::LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(args.kv_heads), static_cast<unsigned>(tiles));
  shape.threads = Shape::kThreads;
  shape.shared_bytes = Shape::kSharedBytes;
  shape.overlap = device.arch >= 90;
  return codegemm::cuda::launch(prefill_kernel<Shape>, shape, args, stream);
}

}  // namespace detail

/// Everything that run() refuses, with the numbers; looks at no device memory. No tokens is success.
template <class T, class Y, class C>
[[nodiscard]] Status validate(const PrefillProblem<T, Y, C>& p, const Device& device) {
  using detail::error;
  constexpr const char* kCall = "cuda prefill";
  if (Status s = detail::check_device(kCall, device); !s.ok()) return s;
  if (p.q.rows < 0 || p.q.rows > kMaxQueryTokens) {
    return error(StatusCode::kInvalidArgument, kCall, ": ", p.q.rows, " tokens, expected 0 to ",
                 kMaxQueryTokens);
  }
  const bool used = p.q.rows > 0;
  if (Status s = detail::check_head_dim(kCall, p.kv.head_dim); !s.ok()) return s;
  if (Status s = detail::check_pages(kCall, p.kv, used); !s.ok()) return s;
  if (Status s = detail::check_table(kCall, p.table, used); !s.ok()) return s;
  if (Status s = detail::check_heads(kCall, p.heads, p.kv.kv_heads); !s.ok()) return s;
  if (Status s = detail::check_scale(kCall, p.scale); !s.ok()) return s;
  if (p.tuning.kernel == PrefillKernel::kWgmma && device.arch != 90) {
    return error(StatusCode::kUnsupported, kCall, ": wgmma on compute capability ", device.arch / 10, ".",
                 device.arch % 10, ", expected 9.0");
  }
  if (p.tuning.kernel == PrefillKernel::kWgmma && detail::kIsFp8<C>) {
    return error(StatusCode::kUnsupported, kCall, ": wgmma over a cache of fp8, expected kAuto or kMma");
  }
  if (p.tuning.kernel == PrefillKernel::kWgmma && !device.wgmma) {
    return error(StatusCode::kUnsupported, kCall,
                 ": this program's code for sm_90 has no wgmma: build for sm_90a");
  }
  const std::int64_t width = std::int64_t{p.heads} * p.kv.head_dim;
  if (Status s = detail::check_rows(kCall, "q", p.q, p.q.rows, width, used); !s.ok()) return s;
  if (Status s = detail::check_rows(kCall, "out", p.out, p.q.rows, width, used); !s.ok()) return s;
  if (Status s = detail::check_apart(kCall, "q", p.q, p.out); !s.ok()) return s;
  if (!used) return {};
  if (p.table.sequences == 0) {
    return error(StatusCode::kShapeMismatch, kCall, ": ", p.q.rows, " tokens for no sequence");
  }
  if (p.query_indptr == nullptr) return error(StatusCode::kNullPointer, kCall, ": query_indptr is null");
  return {};
}

/// Puts the work into the stream; needs no workspace. May be captured: a replay reads table, query_indptr and
/// lengths anew, for up to as many tokens (q.rows) in all. Same bits on every run. Errors as validate(), and
/// kCudaError; then nothing was launched.
template <class T, class Y, class C>
[[nodiscard]] Status run(const PrefillProblem<T, Y, C>& p, const Device& device, cudaStream_t stream) {
  if (Status status = validate(p, device); !status.ok()) return status;
  if (p.q.rows == 0) return {};
  PrefillArgs args;
  args.kv = detail::source_of(p.kv);
  args.q = reinterpret_cast<const std::uint16_t*>(p.q.data);
  args.q_stride = p.q.stride;
  args.query_indptr = p.query_indptr;
  args.indptr = p.table.indptr;
  args.indices = p.table.indices;
  args.last_page_len = p.table.last_page_len;
  args.out = p.out.data;
  args.out_stride = p.out.stride;
  args.out_type = detail::ScalarOf<Y>::kType;
  args.sequences = p.table.sequences;
  args.kv_heads = p.kv.kv_heads;
  args.group = p.heads / p.kv.kv_heads;
  args.scale_log2 = detail::scale_log2_of(p.scale, p.kv);
  const std::int64_t tiles = detail::row_tiles(p);
  const bool wgmma = p.tuning.kernel == PrefillKernel::kWgmma ||
                     (p.tuning.kernel == PrefillKernel::kAuto && device.arch == 90 && device.wgmma);
  Status status;
  static_cast<void>(codegemm::first_match(
      HeadSizes{}, [&](auto c) { return c.kHeadDim == p.kv.head_dim; },
      [&](auto c) {
        if constexpr (!detail::kIsFp8<C>) {
          if (wgmma) {
            args.boxes = detail::describe_pages(p.kv, args.maps);
            static_cast<void>(status =
                                  detail::launch_prefill_wgmma<T, c.kHeadDim>(args, tiles, device, stream));
            return;
          }
        }
        status = detail::launch_prefill_mma<T, C, c.kHeadDim>(args, tiles, device, stream);
      }));
  return status;
}

}  // namespace prefillshare::cuda
