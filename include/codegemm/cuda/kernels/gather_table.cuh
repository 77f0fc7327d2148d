// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/gather_table.cuh - the two kinds of Psumbook that the gather kernel builds, behind one
// face.
// Layer: cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/fixed_psumbook.cuh>
#include <codegemm/cuda/block/psumbook.cuh>

namespace codegemm::cuda::detail {

// A configuration's optional members, see configs.cuh.
template <class Config>
[[nodiscard]] constexpr bool fixed_point() {
  if constexpr (requires { Config::kFixedPoint; })
    return Config::kFixedPoint;
  else
    return false;
}
template <class Config>
[[nodiscard]] constexpr int gather_blocks() {
  if constexpr (requires { Config::kBlocks; })
    return Config::kBlocks;
  else
    return 1;
}

// Psumbooks of fp32 words, of any format, built straight from memory.
template <class Config, int Tokens, bool Fixed = fixed_point<Config>()>
struct GatherTable {
  using Book = Psumbook<Config::kVecLen, Config::kCodebooks, Config::kSets, Tokens>;
  static constexpr bool kStaged = false;  // nothing is staged that the block has to meet behind

  [[nodiscard]] static __host__ __device__ constexpr int bytes(int code_bits) {
    return Book::bytes(code_bits);
  }

  char* table;
  const std::uint16_t* codebooks;
  int v, code_bits;
  Activations x[Tokens];

  // What does not depend on the kernel before.
  __device__ __forceinline__ GatherTable(char* shared, const std::uint16_t* books, int vec_len, int bits)
      : table(shared), codebooks(books), v(vec_len), code_bits(bits) {}
  __device__ __forceinline__ void set_input(const std::uint16_t* from, std::int64_t stride, int cols,
                                            bool bf16) {
#pragma unroll
    for (int t = 0; t < Tokens; ++t) x[t] = Activations{from + t * stride, cols, bf16};
  }
  // Asks for the activations of a granule.
  __device__ __forceinline__ void load(int) {}
  __device__ __forceinline__ void stage(bool) {}
  __device__ __forceinline__ void build(int granule) {
    Book::build(table, codebooks, x, granule * Book::kSegments * v, v, code_bits);
  }
  __device__ __forceinline__ void gather(const uint4 (&codes)[Config::kSets], int lane,
                                         float (&sums)[Tokens][16]) const {
    Book::gather(table, codes, lane, sums);
  }
};

// Integers of 16 bits, of one token.
template <class Config>
struct GatherTable<Config, 1, true> {
  using Book = FixedPsumbook<Config::kVecLen, Config::kCodebooks>;
  static_assert(Config::kThreads == Book::kThreads && Config::kCodeBits == 8 && Config::kSets == 4,
                "codegemm: a Config with kFixedPoint has 512 threads, 8-bit codes and four sets");
  static constexpr bool kStaged = true;

  [[nodiscard]] static __host__ __device__ constexpr int bytes(int) { return Book::kBytes; }

  char* table;
  const std::uint16_t* codebooks;
  typename Book::Centroids centroids;
  unsigned address;  // where the lane's look-ups begin
  Activations x;
  std::uint16_t next = 0;  // as bits: nothing waits for it before it is used
  float factor = 0.0F;

  __device__ __forceinline__ GatherTable(char* shared, const std::uint16_t* books, int, int)
      : table(shared),
        codebooks(books),
        centroids(Book::load_centroids(books)),
        address(Book::lane_address(shared)) {}
  __device__ __forceinline__ void set_input(const std::uint16_t* from, std::int64_t, int cols, bool bf16) {
    x = Activations{from, cols, bf16};
  }
  __device__ __forceinline__ void load(int granule) {
    next = x.bits(granule * Book::kSpan + static_cast<int>(threadIdx.x));
  }
  __device__ __forceinline__ void stage(bool first) {
    if (!first) centroids = Book::load_centroids(codebooks);  // not held while the warp gathers
    Book::stage(table, x.value(next));
  }
  __device__ __forceinline__ void build(int) {
    factor = Book::factor(table);
    Book::build(table, centroids);
  }
  __device__ __forceinline__ void gather(const uint4 (&codes)[4], int, float (&sums)[1][16]) const {
    Book::gather(address, codes, factor, sums[0]);
  }
};

}  // namespace codegemm::cuda::detail
