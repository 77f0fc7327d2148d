// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/cuda/kernels/search.cuh - new codes for all rows by beam search, a block a row:
// TileSearch and VectorBeam of the host, a stretch of columns a launch.
// Layer: quantize/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <codegemm/quantize/cuda/kernels/search_layout.cuh>

namespace codegemm::cuda::detail {

template <int kVecLen>
class RowSearch {
 public:
  __device__ RowSearch(const SearchArgs& args, float* shared)
      : a_(args), at_(kVecLen, args.layer.m, args.beam), shared_(shared) {}

  __device__ void run() {
    row_ = blockIdx.x;
    vectors_ = a_.layer.cols / kVecLen;
    enter();
    const int count = a_.width / kVecLen;
    for (int j = 0; j < count; ++j) {
      const int local = (a_.rebuild ? count - 1 - j : j) * kVecLen;
      fetch(local);
      const float scale =
          a_.layer.scales[(a_.first_row + row_) * a_.layer.groups + (a_.first + local) / a_.layer.group];
      begin_vector(local);
      // A group of zeros has the scale 0: every code is as good, and the old one stays.
      for (int round = 0; scale != 0.0F && round < a_.rounds; ++round) {
        for (int c = 0; c < a_.layer.m; ++c) step(local, scale, c);
      }
      advance(local);
    }
    leave();
  }

 private:
  // Two sets each, of the row's paths and of the vector's.
  __device__ double& loss(int set, int p) const { return doubles()[at_.loss + set * a_.beam + p]; }
  __device__ double& vector_loss(int set, int p) const {
    return doubles()[at_.vector_loss + set * a_.beam + p];
  }
  __device__ float* path_error(int set, int p) const {
    return shared_ + at_.path_error + (set * a_.beam + p) * kSearchColumns;
  }
  __device__ float* path_cross(int set, int p) const {
    return shared_ + at_.path_cross + (set * a_.beam + p) * kSearchColumns;
  }
  __device__ int* path_codes(int set, int p) const {
    return ints() + at_.path_codes + (set * a_.beam + p) * a_.layer.m * (kSearchColumns / kVecLen);
  }
  __device__ float* error(int set, int p) const {
    return shared_ + at_.error + (set * a_.beam + p) * kVecLen;
  }
  __device__ float* gradient(int set, int p) const {
    return shared_ + at_.gradient + (set * a_.beam + p) * kVecLen;
  }
  __device__ int* codes(int set, int p) const {
    return ints() + at_.codes + (set * a_.beam + p) * a_.layer.m;
  }
  __device__ int& root(int set, int p) const { return ints()[at_.root + set * a_.beam + p]; }
  __device__ int& parent(int set, int p) const { return ints()[at_.parent + set * a_.beam + p]; }
  __device__ double* doubles() const { return reinterpret_cast<double*>(shared_); }
  __device__ int* ints() const { return reinterpret_cast<int*>(shared_); }
  __device__ static int thread() { return static_cast<int>(threadIdx.x); }
  __device__ static int threads() { return static_cast<int>(blockDim.x); }

  /// The stretch's part of every path.
  __device__ void enter() {
    paths_ = a_.counts[row_];
    for (int i = thread(); i < paths_ * a_.width; i += threads()) {
      const int p = i / a_.width;
      const int t = i - p * a_.width;
      path_error(0, p)[t] = a_.errors_in[(row_ * a_.beam + p) * a_.layer.cols + a_.first + t];
      path_cross(0, p)[t] = a_.cross[(row_ * a_.beam + p) * a_.width + t];
    }
    const int of_stretch = a_.width / kVecLen;
    const int of_path = a_.layer.m * of_stretch;
    for (int i = thread(); i < paths_ * of_path; i += threads()) {
      const int p = i / of_path;
      const int c = (i - p * of_path) / of_stretch;
      const int j = i - p * of_path - c * of_stretch;
      path_codes(0, p)[c * (kSearchColumns / kVecLen) + j] =
          a_.codes_in[((row_ * a_.beam + p) * a_.layer.m + c) * vectors_ + a_.first / kVecLen + j];
    }
    for (int p = thread(); p < paths_; p += threads()) {
      root(0, p) = p;
      loss(0, p) = a_.losses[row_ * a_.beam + p];
    }
    set_ = 0;
    __syncthreads();
  }

  /// What the vector needs of the matrices.
  __device__ void fetch(int local) {
    const std::int64_t k = a_.first + local;
    for (int i = thread(); i < kVecLen * a_.width; i += threads()) {
      const int d = i / a_.width;
      const int t = i - d * a_.width;
      shared_[at_.slab + d * kSearchColumns + t] = a_.matrix[(k + d) * a_.layer.cols + a_.first + t];
    }
    const std::int64_t own = static_cast<std::int64_t>(local / kVecLen) * kVecLen * kVecLen;
    for (int i = thread(); i < kVecLen * kVecLen; i += threads()) {
      shared_[at_.q + i] = a_.q[own + i];
      shared_[at_.factor + i] = a_.factor[own + i];
    }
    __syncthreads();
  }

  __device__ void begin_vector(int local) {
    candidates_ = paths_;
    vector_set_ = 0;
    for (int p = thread(); p < paths_; p += threads()) {
      float* const e = error(0, p);
      float* const g = gradient(0, p);
      const float* const rest = path_cross(set_, p) + local;
      const float* const factor = shared_ + at_.factor;
      double sum = loss(set_, p);
#pragma unroll
      for (int d = 0; d < kVecLen; ++d) {
        e[d] = path_error(set_, p)[local + d];
        g[d] = a_.rebuild ? 0.0F : rest[d];
      }
      if (a_.rebuild) {
        // The term |e_j L_jj + rest|^2, new for this path.
        for (int i = 0; i < kVecLen; ++i) {
          float term = rest[i];
          for (int d = i; d < kVecLen; ++d) term += e[d] * factor[d * kVecLen + i];
          sum += static_cast<double>(term) * static_cast<double>(term);
          for (int d = i; d < kVecLen; ++d) g[d] += factor[d * kVecLen + i] * term;
        }
      }
      parent(0, p) = p;
      vector_loss(0, p) = sum;
      for (int c = 0; c < a_.layer.m; ++c)
        codes(0, p)[c] = path_codes(set_, p)[c * (kSearchColumns / kVecLen) + local / kVecLen];
    }
    __syncthreads();
  }

  /// The best continuations of all paths by codebook c.
  __device__ void step(int local, float scale, int c) {
    const int centroids = a_.layer.centroids;
    const float* const book = a_.books + static_cast<std::int64_t>(c) * centroids * kVecLen;
    const float* const norms =
        a_.norms + (static_cast<std::int64_t>(local / kVecLen) * a_.layer.m + c) * centroids;
    const float* const q = shared_ + at_.q;
    const int old_set = vector_set_;
    const float square = scale * scale;
    // Without the old centroid a = scale c_old the error is e + a: the gradient there is the target's.
    for (int i = thread(); i < candidates_ * kVecLen; i += threads()) {
      const int p = i / kVecLen;
      const int d = i - p * kVecLen;
      const float* const old = book + static_cast<std::int64_t>(codes(old_set, p)[c]) * kVecLen;
      float sum = gradient(old_set, p)[d];
#pragma unroll
      for (int k = 0; k < kVecLen; ++k) sum += scale * old[k] * q[k * kVecLen + d];
      shared_[at_.u + i] = -2.0F * scale * sum;
    }
    for (int p = thread(); p < candidates_; p += threads()) {
      const int code = codes(old_set, p)[c];
      const float* const old = book + static_cast<std::int64_t>(code) * kVecLen;
      double without = vector_loss(old_set, p);
#pragma unroll
      for (int d = 0; d < kVecLen; ++d)
        without += 2.0 * static_cast<double>(scale * old[d]) * static_cast<double>(gradient(old_set, p)[d]);
      doubles()[at_.base + p] = without + static_cast<double>(square * norms[code]);
    }
    __syncthreads();

    int kept = 0;
    for (; kept < a_.beam; ++kept) {
      double best = INFINITY;
      int index = -1;
      for (int p = 0; p < candidates_; ++p) {
        const double base = doubles()[at_.base + p];
        float u[kVecLen];
#pragma unroll
        for (int d = 0; d < kVecLen; ++d) u[d] = shared_[at_.u + p * kVecLen + d];
        for (int i = thread(); i < centroids; i += threads()) {
          if (taken(p, c, i, kept, old_set)) continue;
          float score = square * norms[i];
#pragma unroll
          for (int d = 0; d < kVecLen; ++d) score += u[d] * book[static_cast<std::int64_t>(i) * kVecLen + d];
          const double total = base + static_cast<double>(score);
          if (total < best) {
            best = total;
            index = p * centroids + i;
          }
        }
      }
      least_of_block(best, index);
      if (index < 0) break;  // no more of them
      if (thread() == 0) {
        ints()[at_.best_path + kept] = index / centroids;
        ints()[at_.best_code + kept] = index % centroids;
        vector_loss(1 - old_set, kept) = best;
      }
      __syncthreads();
    }
    if (kept == 0) return;  // NaN everywhere: as it was
    follow(scale, c, book, kept);
  }

  /// Whether a candidate is among those kept, or comes together with one: the same row path and codes.
  __device__ bool taken(int p, int c, int code, int kept, int set) const {
    for (int k = 0; k < kept; ++k) {
      if (ints()[at_.best_code + k] != code) continue;
      const int other = ints()[at_.best_path + k];
      if (other == p) return true;
      bool same = parent(set, other) == parent(set, p);
      for (int x = 0; x < a_.layer.m; ++x)
        same = same && (x == c || codes(set, other)[x] == codes(set, p)[x]);
      if (same) return true;
    }
    return false;
  }

  /// The least of all threads' candidates, the lowest index of equals, in every thread.
  __device__ void least_of_block(double& best, int& index) {
    const auto merge = [&](double loss, int other) {
      if (other >= 0 && (index < 0 || loss < best || (loss == best && other < index))) {
        best = loss;
        index = other;
      }
    };
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
      const double loss = __shfl_xor_sync(0xFFFFFFFFU, best, lane);
      merge(loss, __shfl_xor_sync(0xFFFFFFFFU, index, lane));
    }
    if (threads() == 32) return;
    if (thread() % 32 == 0) {
      doubles()[at_.partial_loss + thread() / 32] = best;
      ints()[at_.partial_index + thread() / 32] = index;
    }
    __syncthreads();
    for (int w = 0; w < threads() / 32; ++w)
      merge(doubles()[at_.partial_loss + w], ints()[at_.partial_index + w]);
    // The caller's barrier comes before the next write.
  }

  __device__ void follow(float scale, int c, const float* book, int kept) {
    const int from_set = vector_set_;
    const int to_set = 1 - from_set;
    const float* const q = shared_ + at_.q;
    for (int i = thread(); i < kept * kVecLen; i += threads()) {
      const int k = i / kVecLen;
      const int own = i - k * kVecLen;
      const int p = ints()[at_.best_path + k];
      const float* const from = book + static_cast<std::int64_t>(codes(from_set, p)[c]) * kVecLen;
      const float* const to = book + static_cast<std::int64_t>(ints()[at_.best_code + k]) * kVecLen;
      float g = gradient(from_set, p)[own];
#pragma unroll
      for (int d = 0; d < kVecLen; ++d) g -= scale * (to[d] - from[d]) * q[d * kVecLen + own];
      gradient(to_set, k)[own] = g;
      error(to_set, k)[own] = error(from_set, p)[own] - scale * (to[own] - from[own]);
    }
    for (int k = thread(); k < kept; k += threads()) {
      const int p = ints()[at_.best_path + k];
      parent(to_set, k) = parent(from_set, p);
      for (int x = 0; x < a_.layer.m; ++x)
        codes(to_set, k)[x] = x == c ? ints()[at_.best_code + k] : codes(from_set, p)[x];
    }
    candidates_ = kept;
    vector_set_ = to_set;
    __syncthreads();
  }

  /// The row's paths become those that the vector's search kept.
  __device__ void advance(int local) {
    const int from_set = set_;
    const int to_set = 1 - from_set;
    const float* const slab = shared_ + at_.slab;
    for (int i = thread(); i < candidates_ * a_.width; i += threads()) {
      const int k = i / a_.width;
      const int t = i - k * a_.width;
      const int p = parent(vector_set_, k);
      const float* const now = error(vector_set_, k);
      const float* const before = path_error(from_set, p) + local;
      const bool own = t >= local && t < local + kVecLen;
      float cross = path_cross(from_set, p)[t];
      if (!own && (t < local) == a_.rebuild) {
#pragma unroll
        for (int d = 0; d < kVecLen; ++d) {
          const float change = a_.rebuild ? now[d] : now[d] - before[d];
          cross += change * slab[d * kSearchColumns + t];
        }
      }
      path_cross(to_set, k)[t] = cross;
      path_error(to_set, k)[t] = own ? now[t - local] : path_error(from_set, p)[t];
    }
    constexpr int kOfStretch = kSearchColumns / kVecLen;
    const int of_path = a_.layer.m * kOfStretch;
    for (int i = thread(); i < candidates_ * of_path; i += threads()) {
      const int k = i / of_path;
      const int at = i - k * of_path;
      const int p = parent(vector_set_, k);
      path_codes(to_set, k)[at] = at % kOfStretch == local / kVecLen ? codes(vector_set_, k)[at / kOfStretch]
                                                                     : path_codes(from_set, p)[at];
    }
    for (int k = thread(); k < candidates_; k += threads()) {
      root(to_set, k) = root(from_set, parent(vector_set_, k));
      loss(to_set, k) = vector_loss(vector_set_, k);
    }
    paths_ = candidates_;
    set_ = to_set;
    __syncthreads();
  }

  /// Writes every path behind the one that it continues.
  __device__ void leave() {
    const bool in_place = a_.errors_in == a_.errors_out;
    const std::int64_t cols = a_.layer.cols;
    for (int p = 0; p < paths_; ++p) {
      const std::int64_t from = row_ * a_.beam + root(set_, p);
      const std::int64_t to = row_ * a_.beam + p;
      for (int k = thread(); k < cols; k += threads()) {
        const int t = k - a_.first;
        const bool own = t >= 0 && t < a_.width;
        if (in_place && !own) continue;
        a_.errors_out[to * cols + k] = own ? path_error(set_, p)[t] : a_.errors_in[from * cols + k];
      }
      const int all = a_.layer.m * vectors_;
      for (int i = thread(); i < all; i += threads()) {
        const int c = i / vectors_;
        const int j = i - c * vectors_ - a_.first / kVecLen;
        const bool own = j >= 0 && j < a_.width / kVecLen;
        if (in_place && !own) continue;
        a_.codes_out[to * all + i] =
            own ? static_cast<std::uint16_t>(path_codes(set_, p)[c * (kSearchColumns / kVecLen) + j])
                : a_.codes_in[from * all + i];
      }
    }
    // Paths that are not there stay zero, as products read them.
    for (std::int64_t i = paths_ * cols + thread(); i < a_.beam * cols; i += threads())
      a_.errors_out[row_ * a_.beam * cols + i] = 0.0F;
    for (int p = thread(); p < paths_; p += threads()) a_.losses[row_ * a_.beam + p] = loss(set_, p);
    if (thread() == 0) a_.counts[row_] = paths_;
  }

  const SearchArgs& a_;
  SearchLayout at_;
  float* shared_;
  std::int64_t row_ = 0;
  int vectors_ = 0;
  int paths_ = 0;       // of the row
  int set_ = 0;         // which of the two they are in
  int candidates_ = 0;  // of the vector
  int vector_set_ = 0;
};

// A block takes a row; a multiple of 32 threads.
template <int kVecLen>
__global__ void __launch_bounds__(kSearchThreads) search_kernel(const __grid_constant__ SearchArgs a) {
  extern __shared__ __align__(16) float search_shared[];
  RowSearch<kVecLen>(a, search_shared).run();
}

}  // namespace codegemm::cuda::detail
