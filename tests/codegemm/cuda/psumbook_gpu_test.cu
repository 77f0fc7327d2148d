// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/psumbook_gpu_test.cu - the block collectives alone: every word of a Psumbook, two
// tokens at once, and the sum over lanes.
#include <codegemm/cuda/block/half_psumbook.cuh>
#include <codegemm/cuda/block/psumbook.cuh>

#include "gpu.cuh"

namespace codegemm::test {
namespace {

template <class Book>
__global__ void build_kernel(const std::uint16_t* codebooks, cuda::Activations x0, cuda::Activations x1,
                             int k0, int v, int bits, float* out) {
  extern __shared__ __align__(128) char table[];
  const cuda::Activations x[2] = {x0, x1};
  Book::build(table, codebooks, x, k0, v, bits);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < 2 * Book::kColumns << bits;
       i += static_cast<int>(blockDim.x)) {
    const int lane = i % 32;
    const int p = i / 32 % (Book::kColumns / 32);
    const int code = i / Book::kColumns % (1 << bits);
    const int token = i / (Book::kColumns << bits);
    out[i] = *reinterpret_cast<const float*>(table + Book::plane(token, p) + code * 256 + lane * 4);
  }
}

// What a table of words [token][code][position][lane] was built from.
struct Table {
  int v, codebooks, sets, bits;
  int k0;    // its first activation
  int cols;  // activations of a token
};

// The largest of off(word, inner product, sum of the products' sizes) over a table.
template <class X, class Off>
double furthest_word(const Table& t, const std::vector<float>& words, const std::vector<Half>& codebooks,
                     const X* x, Off&& off) {
  double furthest = 0.0;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const int lane = static_cast<int>(i) % 32;
    const int p = static_cast<int>(i) / 32 % t.sets;
    const int code = static_cast<int>(i) / (32 * t.sets) % (1 << t.bits);
    const int token = static_cast<int>(i) / (32 * t.sets << t.bits);
    double want = 0.0;
    double size = 1e-30;
    for (int k = 0; k < t.v; ++k) {
      const int at = t.k0 + (lane * (t.sets / t.codebooks) + p / t.codebooks) * t.v + k;
      const double a = at < t.cols ? static_cast<double>(as_float(x[token * t.cols + at])) : 0.0;
      const int centroid = (p % t.codebooks << t.bits) + code;
      const double c =
          static_cast<double>(codebooks[static_cast<std::size_t>(centroid * t.v + k)].to_float());
      want += a * c;
      size += std::abs(a * c);
    }
    const double one = off(static_cast<double>(words[i]), want, size);
    furthest = one <= furthest ? furthest : (one > furthest ? one : HUGE_VAL);
  }
  return furthest;
}

template <class X, int V, int Codebooks, int Sets>
void check_build(int v, int bits, int threads) {
  using Book = cuda::Psumbook<V, Codebooks, Sets, 2>;
  CAPTURE(V, v, Codebooks, Sets, bits, threads);
  Rng rng(seed_or(1));
  const int cols = Book::kSegments * v * 2 - v;  // the second granule lacks its last segment
  const int k0 = Book::kSegments * v;
  const auto codebooks = random_vector<Half>(static_cast<std::size_t>(Codebooks * v) << bits, rng);
  const auto x = random_vector<X>(static_cast<std::size_t>(2 * cols), rng);
  DeviceBuffer<Half> codebooks_device(codebooks);
  DeviceBuffer<X> x_device(x);
  DeviceBuffer<float> out(static_cast<std::size_t>(2 * Book::kColumns) << bits);
  out.poison();
  const auto* const bits_of_x = reinterpret_cast<const std::uint16_t*>(x_device.data());
  const bool bf16 = std::is_same_v<X, BFloat16>;
  REQUIRE_CUDA(cudaFuncSetAttribute(build_kernel<Book>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    Book::bytes(bits)));
  build_kernel<Book><<<1, static_cast<unsigned>(threads), static_cast<std::size_t>(Book::bytes(bits))>>>(
      reinterpret_cast<const std::uint16_t*>(codebooks_device.data()), {bits_of_x, cols, bf16},
      {bits_of_x + cols, cols, bf16}, k0, v, bits, out.data());
  REQUIRE_CUDA(cudaGetLastError());
  REQUIRE_CUDA(cudaDeviceSynchronize());
  REQUIRE(out.guards_intact());
  const auto off = [](double got, double want, double size) { return std::abs(got - want) / size; };
  CHECK(furthest_word({v, Codebooks, Sets, bits, k0, cols}, out.download(), codebooks, x.data(), off) <=
        0x1p-21);
}

TEST_CASE("cuda psumbook: every word is the inner product of its centroid and segment", "[gpu]") {
  static_cast<void>(gpu_or_skip());
  check_build<Half, 4, 1, 2>(4, 8, 512);
  check_build<BFloat16, 4, 1, 2>(4, 8, 96);
  check_build<Half, 8, 2, 2>(8, 8, 256);
  check_build<BFloat16, 2, 1, 1>(2, 5, 64);
  check_build<Half, 16, 1, 1>(16, 4, 32);
  check_build<Half, 0, 3, 3>(2, 6, 160);
  check_build<BFloat16, 0, 1, 2>(16, 7, 1024);
}

__global__ void sum_kernel(const float* in, const __half* scales, float* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const auto fill = [&](float(&sums)[16]) {
    for (int i = 0; i < 16; ++i) sums[i] = in[lane * 16 + cuda::row_slot(lane, i)];
  };
  float sums[16];
  fill(sums);
  out[lane] = cuda::reduce_rows<5>(sums, nullptr);
  fill(sums);
  __half four[4];
  for (int i = 0; i < 4; ++i) four[i] = scales[lane / 4 * 16 + cuda::row_slot(lane, i)];
  out[32 + lane] = cuda::reduce_rows<2>(sums, four);
}

TEST_CASE("cuda psumbook: the sum over lanes, with and without scales", "[gpu]") {
  static_cast<void>(gpu_or_skip());
  Rng rng(seed_or(2));
  const auto in = random_vector<float>(32 * 16, rng);    // [lane][row]
  const auto scales = random_vector<Half>(8 * 16, rng);  // [group of 4 lanes][row]
  DeviceBuffer<float> in_device(in);
  DeviceBuffer<Half> scales_device(scales);
  DeviceBuffer<float> out(64);
  out.poison();
  sum_kernel<<<1, 32>>>(in_device.data(), reinterpret_cast<const __half*>(scales_device.data()), out.data());
  REQUIRE_CUDA(cudaDeviceSynchronize());
  const auto got = out.download();
  for (int lane = 0; lane < 32; ++lane) {
    const int row = cuda::row_slot(lane, 0);
    double plain = 0.0;
    double scaled = 0.0;
    for (int other = 0; other < 32; ++other) {
      const double value = static_cast<double>(in[static_cast<std::size_t>(other * 16 + row)]);
      plain += value;
      scaled +=
          value * static_cast<double>(scales[static_cast<std::size_t>(other / 4 * 16 + row)].to_float());
    }
    CHECK(std::abs(static_cast<double>(got[static_cast<std::size_t>(lane)]) - plain) <= 1e-5);
    CHECK(std::abs(static_cast<double>(got[static_cast<std::size_t>(32 + lane)]) - scaled) <= 1e-5);
  }
}

// The table, times what undoes the activations' power of two: out[token][code][column][lane].
template <class Book, int Tokens>
__global__ void half_kernel(const std::uint16_t* codebooks, cuda::Activations x0, cuda::Activations x1,
                            int k0, float* out) {
  extern __shared__ __align__(1024) char shared[];
  char* const table = shared + Book::kStagedBytes;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  if (warp < Tokens) Book::stage(shared, Book::load(warp == 0 ? x0 : x1, k0), x0.bf16, warp);
  __syncthreads();
  for (int i = warp; i < Book::kCodeBlocks; i += warps)
    Book::build(table, shared, Book::load_centroids(codebooks, i), i);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < Tokens * 256 * 4 * 32; i += static_cast<int>(blockDim.x)) {
    const int lane = i % 32;
    const int p = i / 32 % 4;
    const int code = i / 128 % 256;
    const int token = i / (256 * 128);
    const std::size_t second = Tokens == 2 && p >= 2 ? cuda::kHalfTableBytes : 0;
    const __half2 pair = *reinterpret_cast<const __half2*>(table + second + code * 256 + p % 2 * 128 +
                                                           (lane ^ p % 2 * 16) * 4);
    const bool low = Tokens == 2 ? token == 0 : p < 2;
    out[i] = __half2float(low ? __low2half(pair) : __high2half(pair)) * Book::unscale(shared, token);
  }
}

template <class X, int V, int Codebooks, int Tokens = 1>
void check_half(double size_of_x, bool aligned) {
  using Book = cuda::HalfPsumbook<V, Codebooks, Tokens>;
  CAPTURE(V, Codebooks, Tokens, size_of_x, aligned);
  Rng rng(seed_or(3));
  const int cols = 2 * Book::kActivations - V;  // the second granule lacks its last segment
  const auto codebooks = random_vector<Half>(static_cast<std::size_t>(Codebooks * V) << 8, rng);
  std::vector<X> x(static_cast<std::size_t>(Tokens * cols) + 1);
  for (X& value : x) value = X::from_float(static_cast<float>(static_cast<double>(rng.normal()) * size_of_x));
  DeviceBuffer<Half> codebooks_device(codebooks);
  DeviceBuffer<X> x_device(x);
  DeviceBuffer<float> out(Tokens * 256 * 4 * 32);
  const std::size_t first = aligned ? 0 : 1;
  const auto* const bits = reinterpret_cast<const std::uint16_t*>(x_device.data()) + first;
  constexpr int kShared = Book::kBytes + Book::kStagedBytes;
  REQUIRE_CUDA(
      cudaFuncSetAttribute(half_kernel<Book, Tokens>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  for (const int k0 : {0, Book::kActivations}) {
    out.poison();
    const bool bf16 = std::is_same_v<X, BFloat16>;
    half_kernel<Book, Tokens>
        <<<1, 512, kShared>>>(reinterpret_cast<const std::uint16_t*>(codebooks_device.data()),
                              {bits, cols, bf16}, {bits + (Tokens - 1) * cols, cols, bf16}, k0, out.data());
    REQUIRE_CUDA(cudaGetLastError());
    REQUIRE_CUDA(cudaDeviceSynchronize());
    REQUIRE(out.guards_intact());
    // One rounding to fp16, the sum, and what is lost below 2^-30 of the largest activation (some 5).
    const auto off = [&](double got, double want, double size) {
      return std::abs(got - want) / (0x1p-11 * std::abs(want) + 0x1p-21 * size + 0x1p-25 * size_of_x);
    };
    const Table table{V, Codebooks, Book::kSets, 8, k0, cols};
    CHECK(furthest_word(table, out.download(), codebooks, x.data() + first, off) <= 1.0);
  }
}

TEST_CASE("cuda psumbook: fp16 words, whatever the size of the activations", "[gpu]") {
  static_cast<void>(gpu_or_skip());
  for (const bool aligned : {true, false}) {
    check_half<Half, 4, 1>(1.0, aligned);
    check_half<Half, 8, 2>(1.0, aligned);
    check_half<Half, 4, 1>(1e4, aligned);
    check_half<BFloat16, 8, 2>(1.0, aligned);
  }
  check_half<Half, 8, 2>(1e-3, true);
  check_half<BFloat16, 4, 1>(1e30, true);
  check_half<BFloat16, 8, 2>(1e-30, true);
  check_half<Half, 4, 1, 2>(1.0, true);
  check_half<BFloat16, 8, 2, 2>(1e3, false);
}

}  // namespace
}  // namespace codegemm::test
