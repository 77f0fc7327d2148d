// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/kernels/code_moves.cuh - codes that change while a model is trained: where
// the weights would be if they were free, and the codes nearest to it.
// Layer: train/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/quantize/cuda/kernels/kmeans.cuh>
#include <prefillshare/train/cuda/kernels/composed.cuh>
#include <prefillshare/train/cuda/kernels/optimizer.cuh>

namespace prefillshare::cuda::detail {

// Of a layer of codes, in units of its unscaled vectors.
struct MoveTask {
  float* ahead = nullptr;   // [rows][cols]: how far the free weights are from the codes' ones
  float* first = nullptr;   // [rows][cols], mean gradients
  float* second = nullptr;  // [rows][cols], mean squares
  std::uint16_t* codes = nullptr;
  float size = 0.0F;  // root mean square of the unscaled vectors at the beginning
};

struct MoveArgs {
  const CodesTask* tasks = nullptr;
  const MoveTask* moves = nullptr;
  const std::int32_t* blocks = nullptr;  // [gridDim.x][2]: task, first row
  const StepState* state = nullptr;
  std::int32_t* counts = nullptr;  // [gridDim.x]: codes that changed
  float beta1 = 0.0F;
  float beta2 = 0.0F;
  float root = 0.0F;  // 1 / sqrt(1 - beta2^t)
  float rate = 0.0F;  // of the vectors' size, over 1 - beta1^t
};

// A step of Adam on the free weights; kComposeRows rows a block.
template <int>
__global__ void __launch_bounds__(kComposeThreads) move_ahead_kernel(const __grid_constant__ MoveArgs args) {
  wait_for_previous_kernel();
  allow_next_kernel();
  if (args.state->finite == 0) return;
  const CodesTask t = args.tasks[args.blocks[2 * blockIdx.x]];
  const MoveTask move = args.moves[args.blocks[2 * blockIdx.x]];
  const int first = args.blocks[2 * blockIdx.x + 1];
  const int count = min(kComposeRows, t.rows - first) * t.cols;
  const std::int64_t base = static_cast<std::int64_t>(first) * t.cols;
  const float rate = args.rate * move.size;
  for (int i = 2 * static_cast<int>(threadIdx.x); i < count; i += 2 * kComposeThreads) {
    const std::int64_t at = base + i;
    const float scale =
        t.scales[static_cast<std::int64_t>(first + i / t.cols) * t.groups + i % t.cols / t.group];
    const float2 g = load2(t.dw + at);
    float2 m = load2(move.first + at);
    float2 v = load2(move.second + at);
    float2 ahead = load2(move.ahead + at);
    const auto step = [&](float gradient, float& mean, float& square, float& value) {
      gradient *= scale;
      mean = mean * args.beta1 + gradient * (1.0F - args.beta1);
      square = square * args.beta2 + gradient * gradient * (1.0F - args.beta2);
      value -= mean * rate / (sqrtf(square) * args.root + 1e-20F);
    };
    step(g.x, m.x, v.x, ahead.x);
    step(g.y, m.y, v.y, ahead.y);
    store2(move.first + at, m);
    store2(move.second + at, v);
    store2(move.ahead + at, ahead);
  }
}

// Codes become those nearest to the free weights, where that is nearer than the old ones: each codebook's
// given the others', in turn. kComposeRows rows a block; layers of other vector lengths are left to other
// launches.
template <int kVecLen>
__global__ void __launch_bounds__(kComposeThreads) move_codes_kernel(const __grid_constant__ MoveArgs args) {
  static_assert(kComposeThreads == codegemm::cuda::detail::kNearestThreads);
  __shared__ __align__(16) float shared[codegemm::cuda::detail::kNearestShared<kVecLen>];
  wait_for_previous_kernel();
  allow_next_kernel();
  const CodesTask t = args.tasks[args.blocks[2 * blockIdx.x]];
  if (t.v != kVecLen) return;
  const MoveTask move = args.moves[args.blocks[2 * blockIdx.x]];
  const int first = args.blocks[2 * blockIdx.x + 1];
  const int vectors = t.cols / kVecLen;
  const int items = min(kComposeRows, t.rows - first) * vectors;
  const int rounds = t.m > 1 ? 2 : 1;
  int changed = 0;
  for (int base = 0; base < items; base += kComposeThreads) {
    const int item = base + static_cast<int>(threadIdx.x);
    const bool mine = item < items;
    const std::int64_t row = first + (mine ? item / vectors : 0);
    const int j = mine ? item % vectors : 0;
    float* const ahead = move.ahead + row * t.cols + j * kVecLen;
    std::uint16_t* const codes = move.codes + row * t.m * vectors + j;
    int now[4];  // as many codebooks as there may be
    float left[kVecLen];
    float before = 0.0F;
#pragma unroll
    for (int c = 0; c < 4; ++c) now[c] = mine && c < t.m ? codes[static_cast<std::int64_t>(c) * vectors] : 0;
#pragma unroll
    for (int d = 0; d < kVecLen; ++d) {
      left[d] = mine ? ahead[d] : 0.0F;
      before += left[d] * left[d];
    }
    for (int round = 0; round < rounds; ++round) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (c >= t.m) break;
        codegemm::cuda::detail::BookArgs book;
        book.values = t.books + static_cast<std::int64_t>(c) * t.centroids * kVecLen;
        book.centroids = t.centroids;
#pragma unroll
        for (int d = 0; d < kVecLen; ++d) left[d] += book.values[now[c] * kVecLen + d];
        now[c] = codegemm::cuda::detail::nearest_centroid<kVecLen>(book, left, shared);
#pragma unroll
        for (int d = 0; d < kVecLen; ++d) left[d] -= book.values[now[c] * kVecLen + d];
      }
    }
    float after = 0.0F;
#pragma unroll
    for (int d = 0; d < kVecLen; ++d) after += left[d] * left[d];
    if (!mine || !(after < before)) continue;  // no barrier comes behind this
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (c >= t.m) break;
      std::uint16_t& code = codes[static_cast<std::int64_t>(c) * vectors];
      changed += code == now[c] ? 0 : 1;
      code = static_cast<std::uint16_t>(now[c]);
    }
#pragma unroll
    for (int d = 0; d < kVecLen; ++d) ahead[d] = left[d];
  }
  changed = __reduce_add_sync(0xFFFFFFFFU, changed);
  if (threadIdx.x % 32 == 0 && changed > 0) atomicAdd(args.counts, changed);
}

}  // namespace prefillshare::cuda::detail
