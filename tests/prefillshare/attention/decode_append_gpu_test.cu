// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/attention/decode_append_gpu_test.cu - the newest token in one kernel: the pages that
// appending leaves, bit for bit, and attention against sums in double.
#include <prefillshare/attention/decode_append.cuh>

#include "gpu_angles.cuh"

namespace prefillshare::test {
namespace {

using codegemm::test::gpu_or_skip;
using codegemm::test::random_vector;
using codegemm::test::seed_or;

template <class T, class Y>
void check(const BatchShape& shape, const std::vector<int>& lengths, Angles angles, RopeLayout layout,
           std::uint64_t seed) {
  const auto device = gpu_or_skip();
  CAPTURE(seed, shape.page_size, shape.kv_heads, shape.group, shape.head_dim, lengths);
  CAPTURE(static_cast<int>(shape.layout), static_cast<int>(angles), static_cast<int>(layout), sizeof(Y));
  Rng rng(seed);
  PagedBatch<T> batch(shape, lengths, {}, rng);
  const auto rows = static_cast<std::int64_t>(lengths.size());
  const std::int64_t cols = std::int64_t{shape.heads()} * shape.head_dim;
  const std::int64_t kv_cols = std::int64_t{shape.kv_heads} * shape.head_dim;
  const std::int64_t width = cols + 2 * kv_cols + 8;
  const auto qkv = random_vector<T>(static_cast<std::size_t>(rows * width), rng);
  RopeConfig rope;
  rope.head_dim = shape.head_dim;
  rope.layout = layout;
  const std::int64_t positions = *std::max_element(lengths.begin(), lengths.end());
  DeviceAngles turn(rope, positions);
  DeviceTable pages(batch);
  // What append alone leaves: in pages, and of Q.
  DeviceBuffer<T> appended(batch.values);
  DeviceBuffer<T> turned(qkv);
  DeviceBuffer<T> cache(batch.values);
  DeviceBuffer<T> qkv_device(qkv);
  DeviceBuffer<Y> out(static_cast<std::size_t>(rows * (cols + 8)));
  cuda::DecodeAppendProblem<T, Y> p;
  const auto rows_of = [&](DeviceBuffer<T>& from, DeviceBuffer<T>& to) {
    cuda::AppendProblem<T>& a = p.append;
    a.kv = batch.view(to.data());
    a.table = pages.view();
    a.q = MatrixView<T>(from.data(), rows, cols, width);
    a.k = MatrixView<const T>(from.data() + cols, rows, kv_cols, width);
    a.v = MatrixView<const T>(from.data() + cols + kv_cols, rows, kv_cols, width);
    a.heads = shape.heads();
    a.rope = turn.rope(angles);
  };
  p.out = MatrixView<Y>(out.data(), rows, cols, cols + 8);
  rows_of(turned, appended);
  REQUIRE(cuda::run(p.append, device, nullptr).ok());
  REQUIRE_CUDA(cudaDeviceSynchronize());

  rows_of(qkv_device, cache);
  REQUIRE(serves(p, device));
  std::vector<Y> first;
  for (const bool overlap : {false, true}) {
    CAPTURE(overlap);
    p.append.overlap = overlap;
    cache.upload(batch.values);
    out.poison();
    REQUIRE_CUDA(cudaDeviceSynchronize());
    const Status status = cuda::run(p, device, nullptr);
    codegemm::test::require_ok(status);
    REQUIRE_CUDA(cudaDeviceSynchronize());
    REQUIRE(cache.guards_intact());
    REQUIRE(out.guards_intact());
    REQUIRE(qkv_device.download() == qkv);
    REQUIRE(cache.download() == appended.download());
    const std::vector<Y> got = out.download();
    if (first.empty()) {
      PagedBatch<T> after = batch;
      after.values = appended.download();
      std::vector<QueryAt> queries;
      for (std::size_t i = 0; i < lengths.size(); ++i) queries.push_back({i, lengths[i]});
      CHECK(furthest(reference_attention(after, turned.download(), width, queries), got, cols, cols + 8,
                     kTolerance) <= 1.0);
      first = got;
    }
    CHECK(std::memcmp(got.data(), first.data(), got.size() * sizeof(Y)) == 0);
    // Columns behind the last head belong to somebody else.
    for (std::size_t i = 0; i < got.size(); ++i) {
      if (static_cast<std::int64_t>(i) % (cols + 8) < cols) continue;
      const auto* const bytes = reinterpret_cast<const unsigned char*>(&got[i]);
      REQUIRE(std::all_of(bytes, bytes + sizeof(Y), [](unsigned char b) { return b == 0xFF; }));
    }
  }
}

TEST_CASE("cuda decode with append: a small one of each kind") {
  const std::uint64_t seed = seed_or(1);
  check<Half, Half>({16, cuda::KvLayout::kNhd, 8, 4, 128}, {1025}, Angles::kFrequencies, RopeLayout::kHalf,
                    seed);
  check<BFloat16, float>({16, cuda::KvLayout::kHnd, 2, 3, 64}, {1, 70, 200}, Angles::kTable,
                         RopeLayout::kInterleaved, seed);
}

TEST_CASE("cuda decode with append: groups, page sizes, head sizes, lengths, layouts") {
  const std::uint64_t seed = seed_or(2);
  for (const int page_size : {1, 5, 16, 64}) {
    for (const int group : {1, 4, 7, 16}) {
      for (const int head_dim : {64, 96, 128}) {
        const auto layout = (page_size + group) % 2 == 0 ? cuda::KvLayout::kNhd : cuda::KvLayout::kHnd;
        const BatchShape shape{page_size, layout, 2, group, head_dim};
        const std::vector<int> lengths{1, page_size + 1, 63, 64, 65, 520, 2100};
        check<Half, float>(shape, lengths, Angles::kFrequencies, RopeLayout::kHalf, seed);
        check<BFloat16, BFloat16>(shape, lengths, Angles::kTable, RopeLayout::kInterleaved, seed);
      }
    }
  }
  check<Half, Half>({16, cuda::KvLayout::kNhd, 8, 8, 128}, {9001}, Angles::kNone, RopeLayout::kHalf, seed);
}

TEST_CASE("cuda decode with append: says what it has no kernel for") {
  const auto device = gpu_or_skip();
  cuda::DecodeAppendProblem<Half> p;
  std::vector<std::uint16_t> at(16);
  auto* const data = reinterpret_cast<Half*>(reinterpret_cast<std::uintptr_t>(at.data()) / 16 * 16);
  const auto* const ints = reinterpret_cast<const std::int32_t*>(data);
  const auto with = [&](int sequences, int heads, int kv_heads) {
    cuda::AppendProblem<Half>& a = p.append;
    a.kv = cuda::kv_pages(data, cuda::KvLayout::kNhd, 4, 16, kv_heads, 128);
    a.table = {ints, ints, ints, sequences};
    a.q = MatrixView<Half>(data, sequences, std::int64_t{heads} * 128);
    a.k = MatrixView<const Half>(data, sequences, std::int64_t{kv_heads} * 128);
    a.v = a.k;
    a.heads = heads;
    p.out = MatrixView<Half>(data, sequences, std::int64_t{heads} * 128);
    return serves(p, device);
  };
  CHECK(with(1, 32, 8));
  CHECK_FALSE(with(64, 32, 8));
  CHECK(run(p, device, nullptr).code() == StatusCode::kUnsupported);
  CHECK_FALSE(with(1, 34, 2));
  CHECK_FALSE(with(1, 9, 2));
  CHECK(with(1, 32, 2));
  p.out.cols = 8;
  CHECK(run(p, device, nullptr).code() == StatusCode::kShapeMismatch);
}

}  // namespace
}  // namespace prefillshare::test
