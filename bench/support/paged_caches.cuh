// SPDX-License-Identifier: Apache-2.0
//
// bench/support/paged_caches.cuh - caches in pages of random values for the attention of published models,
// and what attention over them has to give.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include <prefillshare/attention/decode.cuh>
#include <prefillshare/kv/element.hpp>

#include "gpu_timing.cuh"
#include "report.hpp"

namespace codegemm::bench {

using prefillshare::cuda::kv_pages;
using prefillshare::cuda::KvLayout;
using prefillshare::cuda::KvPages;
using prefillshare::cuda::PageTableView;

/// Element i of every random buffer: the host knows it without a copy. Uniform, variance 1.
__host__ __device__ inline float value_at(std::uint64_t i, std::uint64_t seed) {
  std::uint64_t z = (i + 1) * 0x9E3779B97F4A7C15ULL + seed * 0xD1B54A32D192ED03ULL;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return (static_cast<float>((z ^ (z >> 31)) >> 40) * 0x1p-24F - 0.5F) * 3.4641016F;
}
/// fp8 numbers are stored as so many times what they stand for.
inline constexpr float kFp8Factor = 64.0F;

template <class C>
__global__ void fill_values_kernel(C* data, std::uint64_t count, std::uint64_t seed) {
  const std::uint64_t step = static_cast<std::uint64_t>(gridDim.x) * blockDim.x;
  for (std::uint64_t i = static_cast<std::uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    data[i] = C(sizeof(C) == 1 ? kFp8Factor * value_at(i, seed) : value_at(i, seed));
  }
}
/// What is stored of it, for the reference.
template <class C>
double rounded(std::uint64_t i, std::uint64_t seed) {
  if constexpr (sizeof(C) == 1) {
    return static_cast<double>(prefillshare::Fp8E4M3::from_float(kFp8Factor * value_at(i, seed)).to_float() /
                               kFp8Factor);
  } else {
    return static_cast<double>(Half::from_float(value_at(i, seed)).to_float());
  }
}

/// Whether the pages of a sequence lie one after the other.
inline bool ordered_pages = false;

/// The heads of a model.
struct AttentionShape {
  const char* name;
  int heads;
  int kv_heads;
  int head_dim;
};
inline constexpr AttentionShape kModels[] = {{"8b", 32, 8, 128}, {"70b", 64, 8, 128}};
inline constexpr int kPageSize = 16;

/// A batch of sequences of one length, the first `shared` tokens of all in the same pages; `copies` caches.
template <class C = __half>
struct PagedCaches {
  AttentionShape model;
  int sequences;
  int tokens;
  int shared;
  int copies;
  std::int64_t pages;                 // of a cache
  double bytes;                       // K and V of a cache, each page once
  std::vector<std::int32_t> indices;  // [copies][sequences][pages of a sequence]
  Buffer<C> cache;
  Buffer<std::int32_t> indptr_device;
  Buffer<std::int32_t> indices_device;
  Buffer<std::int32_t> last_device;

  KvLayout layout;

  PagedCaches(AttentionShape model_, int sequences_, int tokens_, int shared_, double least_bytes,
              KvLayout layout_ = KvLayout::kNhd)
      : model(model_),
        sequences(sequences_),
        tokens(tokens_),
        shared(shared_),
        copies(1),
        pages(shared / kPageSize + std::int64_t{sequences} * (per_sequence() - shared / kPageSize)),
        bytes(static_cast<double>(pages) * static_cast<double>(page_elements()) * sizeof(C)),
        indices(scatter(least_bytes)),
        cache(static_cast<std::size_t>(copies * pages * page_elements())),
        indptr_device(indptr()),
        indices_device(indices),
        last_device(
            std::vector<std::int32_t>(static_cast<std::size_t>(sequences), (tokens - 1) % kPageSize + 1)),
        layout(layout_) {
    fill_values_kernel<<<1024, 256>>>(cache.data,
                                      static_cast<std::uint64_t>(copies * pages * page_elements()), 1);
    check(cudaDeviceSynchronize(), "fill");
  }
  [[nodiscard]] std::int64_t per_sequence() const { return (tokens + kPageSize - 1) / kPageSize; }
  [[nodiscard]] std::int64_t page_elements() const {
    return std::int64_t{2} * kPageSize * model.kv_heads * model.head_dim;
  }
  [[nodiscard]] std::vector<std::int32_t> indptr() const {
    std::vector<std::int32_t> out;
    for (int i = 0; i <= sequences; ++i) out.push_back(static_cast<std::int32_t>(i * per_sequence()));
    return out;
  }
  // Pages in random order, as an allocator's would be after a while.
  std::vector<std::int32_t> scatter(double least_bytes) {
    copies = static_cast<int>(std::clamp(least_bytes / bytes + 1.0, 1.0, 64.0));
    std::uint64_t state = 7;
    std::vector<std::int32_t> out;
    for (int c = 0; c < copies; ++c) {
      std::vector<std::int32_t> order(static_cast<std::size_t>(pages));
      std::iota(order.begin(), order.end(), static_cast<std::int32_t>(c * pages));
      for (std::size_t i = order.size() - 1; i > 0 && !ordered_pages; --i) {
        state = state * 6364136223846793005ULL + 1442695040888963407ULL;
        std::swap(order[i], order[(state >> 33) % (i + 1)]);
      }
      auto next = static_cast<std::size_t>(shared / kPageSize);
      for (int s = 0; s < sequences; ++s) {
        for (std::int64_t j = 0; j < per_sequence(); ++j) {
          out.push_back(j < shared / kPageSize ? order[static_cast<std::size_t>(j)] : order[next++]);
        }
      }
    }
    return out;
  }
  [[nodiscard]] KvPages<const C> pages_view() const {
    auto out = kv_pages<const C>(cache.data, layout, static_cast<std::int32_t>(copies * pages), kPageSize,
                                 model.kv_heads, model.head_dim);
    out.k_scale = out.v_scale = sizeof(C) == 1 ? 1.0F / kFp8Factor : 1.0F;
    return out;
  }
  [[nodiscard]] PageTableView table(int copy) const {
    return {indptr_device.data, indices_device.data + copy * sequences * per_sequence(), last_device.data,
            sequences};
  }
  // Relative error of some heads of some rows; row r is of sequence `sequence[r]` and sees keys[r] keys.
  [[nodiscard]] double error_of(const std::vector<Half>& out, const std::vector<int>& rows,
                                const std::vector<int>& sequence_of, const std::vector<int>& keys) const {
    const int dim = model.head_dim;
    double off = 0.0;
    double size = 0.0;
    for (std::size_t r = 0; r < rows.size(); ++r) {
      for (const int head : {0, model.heads / 2 + 1, model.heads - 1}) {
        const int kv_head = head / (model.heads / model.kv_heads);
        const std::int64_t q_at = (std::int64_t{rows[r]} * model.heads + head) * dim;
        const auto element = [&](int token, int d, bool v) {
          const std::int64_t page =
              indices[static_cast<std::size_t>(sequence_of[r] * per_sequence() + token / kPageSize)];
          const std::int64_t at =
              page * page_elements() + (v ? page_elements() / 2 : 0) +
              (layout == KvLayout::kNhd ? std::int64_t{token % kPageSize} * model.kv_heads + kv_head
                                        : std::int64_t{kv_head} * kPageSize + token % kPageSize) *
                  dim +
              d;
          return rounded<C>(static_cast<std::uint64_t>(at), 1);
        };
        std::vector<double> weight(static_cast<std::size_t>(keys[r]));
        double top = -HUGE_VAL;
        for (int t = 0; t < keys[r]; ++t) {
          double sum = 0.0;
          for (int d = 0; d < dim; ++d) {
            sum += rounded<__half>(static_cast<std::uint64_t>(q_at + d), 2) * element(t, d, false);
          }
          weight[static_cast<std::size_t>(t)] = sum / std::sqrt(static_cast<double>(dim));
          top = std::max(top, weight[static_cast<std::size_t>(t)]);
        }
        double all = 0.0;
        for (double& w : weight) all += w = std::exp(w - top);
        for (int d = 0; d < dim; ++d) {
          double want = 0.0;
          for (int t = 0; t < keys[r]; ++t) want += weight[static_cast<std::size_t>(t)] * element(t, d, true);
          want /= all;
          const double got = static_cast<double>(out[static_cast<std::size_t>(q_at + d)].to_float());
          off += (got - want) * (got - want);
          size += want * want;
        }
      }
    }
    const double error = std::sqrt(off / size);
    if (!(error < 5e-3)) throw std::runtime_error("wrong result: relative error " + std::to_string(error));
    return error;
  }
};

}  // namespace codegemm::bench
