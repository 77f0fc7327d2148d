// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/attention/prefill_gpu_test.cu - causal attention of chunks over pages, against sums in
// double.
#include <optional>

#include <prefillshare/attention/prefill.cuh>
#include <prefillshare/attention/prefill_split.cuh>

#include <cstring>

#include "gpu_pages.cuh"

namespace prefillshare::test {
namespace {

using codegemm::test::gpu_or_skip;
using codegemm::test::random_vector;
using codegemm::test::seed_or;

enum class Keys { kWhole, kSplit };

// chunks[i]: new tokens of sequence i, the last of its lengths[i].
template <class T, class Y, class C = T, Keys kKeys = Keys::kWhole>
void check(const BatchShape& shape, const std::vector<int>& lengths, const std::vector<int>& chunks,
           std::uint64_t seed, float query_size = 1.0F, bool far = false) {
  const auto device = gpu_or_skip();
  CAPTURE(seed, shape.page_size, shape.kv_heads, shape.group, shape.head_dim, lengths, chunks, sizeof(Y));
  Rng rng(seed);
  PagedBatch<C> batch(shape, lengths, {}, rng);
  std::vector<std::int32_t> query_indptr{0};
  std::vector<QueryAt> rows;
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    for (int t = 0; t < chunks[i]; ++t) rows.push_back({i, lengths[i] - chunks[i] + t + 1});
    query_indptr.push_back(static_cast<std::int32_t>(rows.size()));
  }
  const std::int64_t cols = std::int64_t{shape.heads()} * shape.head_dim;
  const std::int64_t stride = cols + 16;
  std::vector<T> queries = random_vector<T>(rows.size() * static_cast<std::size_t>(stride), rng);
  for (T& value : queries) value = T::from_float(query_size * as_float(value));
  DeviceBuffer<C> cache(batch.values);
  DeviceTable table(batch);
  DeviceBuffer<std::int32_t> query_indptr_device(query_indptr);
  DeviceBuffer<T> q(queries);
  cuda::PrefillProblem<T, Y, C> p;
  p.kv = batch.view(cache.data());
  std::optional<FarPages<C>> far_pages;
  if (far) p.kv = far_pages.emplace(batch.view(cache.data())).view();
  p.table = table.view();
  p.query_indptr = query_indptr_device.data();
  p.q = MatrixView<const T>(q.data(), static_cast<std::int64_t>(rows.size()), cols, stride);
  p.heads = shape.heads();
  const AttentionReference want = reference_attention(batch, queries, stride, rows);
  const double tolerance = std::is_same_v<T, Half> ? kTolerance : kTolerancePrefillBFloat16;
  DeviceBuffer<std::byte> workspace(kKeys == Keys::kSplit ? cuda::split_workspace_bytes(p, device) : 0);
  workspace.poison();
  for (const auto kernel : {cuda::PrefillKernel::kMma, cuda::PrefillKernel::kWgmma}) {
    if (kernel == cuda::PrefillKernel::kWgmma &&
        (device.arch != 90 || sizeof(C) == 1 || kKeys == Keys::kSplit)) {
      continue;
    }
    CAPTURE(static_cast<int>(kernel));
    p.tuning.kernel = kernel;
    std::vector<Y> first;
    for (int time = 0; time < 2; ++time) {  // the same bits both times
      DeviceBuffer<Y> out(queries.size());
      out.poison();
      p.out = MatrixView<Y>(out.data(), static_cast<std::int64_t>(rows.size()), cols, stride);
      if constexpr (kKeys == Keys::kSplit) {
        const Status prepared = cuda::prepare_split(p, device, workspace.data(), workspace.size(), nullptr);
        codegemm::test::require_ok(prepared);
        const Status status = cuda::run_split(p, device, workspace.data(), workspace.size(), nullptr);
        codegemm::test::require_ok(status);
      } else {
        const Status status = cuda::run(p, device, nullptr);
        codegemm::test::require_ok(status);
      }
      REQUIRE_CUDA(cudaDeviceSynchronize());
      REQUIRE(out.guards_intact());
      REQUIRE(workspace.guards_intact());
      const std::vector<Y> got = out.download();
      if (time == 0) {
        CHECK(furthest(want, got, cols, stride, tolerance) <= 1.0);
        first = got;
      } else {
        CHECK(std::memcmp(first.data(), got.data(), got.size() * sizeof(Y)) == 0);
      }
    }
  }
}

TEST_CASE("cuda prefill: a small one of each kind") {
  check<Half, Half>({16, cuda::KvLayout::kNhd, 1, 4, 128}, {50, 70}, {50, 3}, seed_or(1));
  check<Half, float>({16, cuda::KvLayout::kNhd, 2, 4, 64}, {300}, {260}, seed_or(1));
  check<BFloat16, float>({5, cuda::KvLayout::kHnd, 2, 3, 64}, {70}, {70}, seed_or(1));
}

TEST_CASE("cuda prefill: groups, page sizes, head sizes, layouts") {
  for (const int page_size : {1, 16, 64, 11}) {
    for (const int group : {1, 3, 4, 8}) {
      for (const int head_dim : {64, 96, 128}) {
        const auto layout = (page_size + group) % 2 == 0 ? cuda::KvLayout::kNhd : cuda::KvLayout::kHnd;
        const BatchShape shape{page_size, layout, 2, group, head_dim};
        const std::vector<int> lengths{1, page_size, page_size + 1, 129, 0, 300, 65, 7};
        const std::vector<int> chunks{1, page_size, 2, 129, 0, 33, 0, 7};
        check<Half, float>(shape, lengths, chunks, seed_or(2));
        check<BFloat16, BFloat16>(shape, lengths, chunks, seed_or(2));
      }
    }
  }
}

TEST_CASE("cuda prefill: many sequences, and a long one") {
  std::vector<int> lengths;
  std::vector<int> chunks;
  Rng rng(seed_or(3));
  for (int i = 0; i < 70; ++i) {
    lengths.push_back(static_cast<int>(rng.below(60)));
    chunks.push_back(static_cast<int>(rng.below(lengths.back() + 1)));
  }
  check<Half, Half>({16, cuda::KvLayout::kNhd, 1, 4, 64}, lengths, chunks, seed_or(3));
  check<Half, Half>({16, cuda::KvLayout::kNhd, 1, 2, 128}, {1500}, {700}, seed_or(3));
}

TEST_CASE("cuda prefill: lengths and chunks about the edges of tiles") {
  // Tiles are 64 or 128 keys and 128 query rows, that is 128 / group tokens.
  const std::vector<int> lengths{127, 128, 129, 255, 256, 257, 384, 385, 640};
  const std::vector<int> chunks{127, 128, 1, 127, 33, 129, 32, 385, 64};
  check<BFloat16, BFloat16>({16, cuda::KvLayout::kNhd, 1, 1, 128}, lengths, chunks, seed_or(4));
  check<Half, float>({16, cuda::KvLayout::kNhd, 3, 4, 128}, lengths, chunks, seed_or(5));
  check<Half, Half>({64, cuda::KvLayout::kHnd, 2, 5, 96}, lengths, chunks, seed_or(6));
  check<BFloat16, float>({1, cuda::KvLayout::kNhd, 1, 8, 64}, lengths, chunks, seed_or(7));
}

TEST_CASE("cuda prefill: few tokens over long contexts, keys split over all multiprocessors") {
  const auto split = [](const BatchShape& shape, const std::vector<int>& lengths,
                        const std::vector<int>& chunks, std::uint64_t seed) {
    check<BFloat16, float, BFloat16, Keys::kSplit>(shape, lengths, chunks, seed);
  };
  // Of few, some and many query rows a sequence, one without any, one without keys before its own.
  split({16, cuda::KvLayout::kNhd, 8, 4, 128}, {4000, 900, 0, 333, 40}, {5, 16, 0, 80, 40}, seed_or(12));
  split({5, cuda::KvLayout::kHnd, 2, 3, 64}, {700, 65, 64, 1}, {1, 64, 2, 1}, seed_or(13));
  split({64, cuda::KvLayout::kNhd, 1, 8, 96}, {1300}, {33}, seed_or(14));
  split({1, cuda::KvLayout::kNhd, 2, 1, 128}, {513, 129}, {129, 129}, seed_or(15));
}

TEST_CASE("cuda prefill: pages that begin beyond 32 bits") {
  static_cast<void>(gpu_or_skip());
  if (!FarPages<Half>::fit()) return;
  const std::vector<int> lengths{700, 129, 300};
  const std::vector<int> chunks{260, 129, 3};
  for (const auto layout : {cuda::KvLayout::kNhd, cuda::KvLayout::kHnd}) {
    check<Half, float>({16, layout, 2, 4, 128}, lengths, chunks, seed_or(16), 1.0F, true);
    check<BFloat16, BFloat16>({11, layout, 1, 3, 64}, lengths, chunks, seed_or(17), 1.0F, true);
    check<Half, float, Fp8E4M3>({16, layout, 2, 4, 128}, lengths, chunks, seed_or(18), 1.0F, true);
    check<BFloat16, float, BFloat16, Keys::kSplit>({16, layout, 2, 4, 128}, lengths, {5, 16, 3}, seed_or(19),
                                                   1.0F, true);
  }
}

TEST_CASE("cuda prefill: a cache of fp8 with scales") {
  const std::vector<int> lengths{127, 129, 64, 257, 0, 640};
  const std::vector<int> chunks{127, 1, 63, 129, 0, 33};
  for (const int head_dim : {64, 96, 128}) {
    check<Half, float, Fp8E4M3>({16, cuda::KvLayout::kNhd, 2, 4, head_dim}, lengths, chunks, seed_or(10));
    check<Half, float, Fp8E4M3>({5, cuda::KvLayout::kHnd, 1, 3, head_dim}, lengths, chunks, seed_or(11));
  }
}

TEST_CASE("cuda prefill: more items than multiprocessors, large scores") {
  // Every block takes several items; scores of some 100 move the base of the exponents many times.
  std::vector<int> lengths;
  std::vector<int> chunks;
  for (int i = 0; i < 30; ++i) {
    lengths.push_back(90 + 7 * i);
    chunks.push_back(40 + 5 * i);
  }
  check<Half, float>({16, cuda::KvLayout::kNhd, 8, 1, 64}, lengths, chunks, seed_or(8), 8.0F);
  check<BFloat16, BFloat16>({32, cuda::KvLayout::kHnd, 4, 2, 128}, lengths, chunks, seed_or(9), 8.0F);
}

}  // namespace
}  // namespace prefillshare::test
